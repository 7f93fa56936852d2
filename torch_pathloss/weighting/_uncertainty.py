"""Homoscedastic uncertainty as a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_pathloss._errors import ConstructionError, listed
from torch_pathloss._paths import Path
from torch_pathloss.weighting._learned import Learned

Form = Literal["regression", "classification"]
Regularizer = Literal["log", "log1p"]


@final
class Uncertainty(Learned):
    r"""A learned variance :math:`\sigma_k^2` for each term: what is noisy counts less.

    .. math::
        L = \sum_{k \in S} w_k \left( c_k e^{-s_k} v_k + r(s_k) \right), \qquad
        r(s) = \tfrac{1}{2} s \quad\text{or, with log1p,}\quad r(s) = \log(1 + e^s)

    where

    - :math:`s_k = \log \sigma_k^2` is learned,
    - :math:`c_k` is 1/2 in the regression form (a Gaussian likelihood, for a squared error) and 1 in the classification
      form (a softmax scaled by :math:`1 / \sigma_k^2`, for cross-entropy),
    - :math:`v_k` is the value of term :math:`k`,
    - :math:`w_k` is the weight that the user set; it multiplies a term's whole contribution, and so the speed at which
      :math:`s_k` is learned, but not where it goes,
    - :math:`S` is the set of the terms that are seen. Both halves of a term that is not seen are left out.

    With ``"log"``, :math:`e^{-s_k} c_k v_k = 1/2` at the optimum, so that a value near 0 gets a weight without bound,
    and the total may be negative. With ``"log1p"`` the total of positive values is positive.

    The parameter ``log_variance`` goes to the optimizer, without weight decay, which would pull the variances to 1:
    `PathLossModule.check_optimizer` says if it is not there.

    Args:
        form: the form for all terms, or a mapping by name; terms that it does not name are of the regression form.
            Default: ``"regression"``, which TorchJD and LibMTL use for all terms.
        regularizer: ``"log"`` is :math:`\log \sigma` of Kendall et al.; ``"log1p"`` is :math:`\log(1 + \sigma^2)` of
            Liebel and Körner. Default: ``"log"``.
        log_variance: :math:`s_k` at the start, for all terms or by name, 0 for those that are not named. Default: 0,
            as TorchJD; LibMTL starts from -0.5. Kendall et al. find training robust to it.

    Shape:
        ``[K]`` values; a 0-dim total.

    Raises:
        ConstructionError: for a form or regulariser that does not exist, or a start that is not finite; when the
            container is built, for a name that no term has.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.weighting import Uncertainty
        >>> losses = {"label": nn.CrossEntropyLoss(), "box": nn.MSELoss()}
        >>> criterion = PathLossModule(losses, weighting=Uncertainty({"label": "classification"}))
        >>> optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
        >>> output = {"label": torch.zeros(1, 4), "box": torch.full((2,), 3.0)}
        >>> target = {"label": torch.tensor([0]), "box": torch.zeros(2)}
        >>> criterion(output, target).backward()
        >>> criterion.last.weights
        {'label': tensor(1.), 'box': tensor(0.5000)}
        >>> criterion.weighting.log_variance.grad  # 1/2 - ln 4 and (1 - 9) / 2
        tensor([-0.8863, -4.0000])

    References:
        Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
        Semantics, CVPR 2018, equations 7 and 10.
        Liebel and Körner, Auxiliary Tasks in Multi-task Learning, arXiv:1805.06334, 2018.
    """

    log_variance: nn.Parameter
    coefficients: Tensor

    def __init__(
        self,
        form: Form | Mapping[str | Path, Form] = "regression",
        *,
        regularizer: Regularizer = "log",
        log_variance: float | Mapping[str | Path, float] = 0.0,
    ) -> None:
        super().__init__()
        forms = form.values() if isinstance(form, Mapping) else [form]
        starts = log_variance.values() if isinstance(log_variance, Mapping) else [log_variance]
        problems = [f"form must be one of {_listed(Form)}, not {f!r}." for f in forms if f not in get_args(Form)]
        if regularizer not in get_args(Regularizer):
            problems.append(f"regularizer must be one of {_listed(Regularizer)}, not {regularizer!r}.")
        problems += [f"log_variance must be finite, not {s!r}." for s in starts if not math.isfinite(s)]
        if problems:
            raise ConstructionError(f"Uncertainty cannot be built:{listed(problems)}")
        self.form = form if isinstance(form, str) else dict(form)
        self.kind_of_regularizer: Regularizer = regularizer
        self.start = dict(log_variance) if isinstance(log_variance, Mapping) else log_variance

    def setup(self, names: tuple[str, ...]) -> None:
        forms: list[Form] = self.by_name("form", self.form, names, "regression")
        coefficients = torch.tensor([0.5 if form == "regression" else 1.0 for form in forms])
        self.register_buffer("coefficients", coefficients, persistent=False)
        self.log_variance = nn.Parameter(torch.tensor(self.by_name("log_variance", self.start, names, 0.0)))

    def scale(self) -> Tensor:
        return self.coefficients * torch.exp(-self.log_variance)

    def regularizer(self) -> Tensor:
        return 0.5 * self.log_variance if self.kind_of_regularizer == "log" else F.softplus(self.log_variance)

    def extra_repr(self) -> str:
        return f"form={self.form!r}, regularizer={self.kind_of_regularizer!r}"


def _listed(literal: object) -> str:
    return ", ".join(map(repr, get_args(literal)))
