"""Writes `soft_adapt.json`: what softadaptx 0.0.1 gives, a NumPy port of the SoftAdapt authors' package.

Run in a throwaway environment, since the package pins others:

    python -m venv /tmp/soft_adapt
    /tmp/soft_adapt/bin/pip install numpy scipy sympy
    /tmp/soft_adapt/bin/pip install --no-deps softadaptx==0.0.1 findiff==0.10.2
    /tmp/soft_adapt/bin/python tests/weighting/vectors/make_soft_adapt.py
"""

import json
from pathlib import Path

import numpy as np
from softadaptx import LossWeightedSoftAdapt, NormalizedSoftAdapt, SoftAdapt

VARIANTS = {"original": SoftAdapt, "normalized": NormalizedSoftAdapt, "loss_weighted": LossWeightedSoftAdapt}


def main() -> None:
    generator = np.random.default_rng(0)
    cases = []
    for window, order in [(2, 1), (3, 2), (4, 3), (5, 4), (5, None), (6, 5), (7, 6), (8, 2), (9, 8)]:
        values = np.round(generator.uniform(0.5, 2.0, (window, 4)) * np.array([1.0, 3.0, 0.2, 10.0]), 4)
        for variant, make in VARIANTS.items():
            weights = make(beta=0.3, accuracy_order=order).get_component_weights(*values.T, verbose=False)
            cases.append(
                {
                    "variant": variant,
                    "beta": 0.3,
                    "window": window,
                    "accuracy_order": order,
                    "values": values.tolist(),
                    "weights": weights.tolist(),
                }
            )
    lines = ",\n".join(map(json.dumps, cases))
    Path(__file__).with_name("soft_adapt.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
