"""How many kernels a GPU would launch, counted from the code that Inductor generates without one.

python -m bench.launches
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from bench._timing import save, table

CASES = pathlib.Path(__file__).parents[1] / "tests" / "cuda_codegen" / "cases.py"


def main() -> None:
    run = subprocess.run([sys.executable, str(CASES)], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    rows = [
        [name, " + ".join(map(str, counted["launches"])), "yes" if all(counted["one CUDA graph"]) else "NO"]
        for name, counted in found.items()
    ]
    print(table(["launches of forward + backward", "launches", "one CUDA graph each"], rows))
    print(f"written to {save('launches', found)}")


if __name__ == "__main__":
    main()
