"""One criterion for a model with a nested output: a mapping from paths to criteria.

Examples:
    >>> import torch
    >>> from torch import nn
    >>> from torch_pathloss import PathLossModule
    >>> criterion = PathLossModule({"mask": nn.BCEWithLogitsLoss(), "box": nn.L1Loss()}, weights={"box": 2.0})
    >>> output = {"mask": torch.zeros(3), "box": torch.zeros(4)}
    >>> target = {"mask": torch.ones(3), "box": torch.ones(4)}
    >>> round(criterion(output, target).item(), 4)  # ln 2 + 2
    2.6931
"""

from torch_pathloss._conditions import filled, known
from torch_pathloss._conflicts import Conflicts
from torch_pathloss._errors import (
    ArgumentError,
    CheckError,
    CompileError,
    ConstructionError,
    CriterionReturnError,
    MissingPackageError,
    PathLossError,
    PathNotFoundError,
    PathSyntaxError,
    UncoveredError,
    UncoveredWarning,
    UnknownTermError,
)
from torch_pathloss._inspect import Explanation
from torch_pathloss._last import Last
from torch_pathloss._module import PathLossModule
from torch_pathloss._plots import plot_schedules
from torch_pathloss._term import Input, Output, Shared, Target, Term
from torch_pathloss._weights import Weights

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CheckError",
    "CompileError",
    "Conflicts",
    "ConstructionError",
    "CriterionReturnError",
    "Explanation",
    "Input",
    "Last",
    "MissingPackageError",
    "Output",
    "PathLossError",
    "PathLossModule",
    "PathNotFoundError",
    "PathSyntaxError",
    "Shared",
    "Target",
    "Term",
    "UncoveredError",
    "UncoveredWarning",
    "UnknownTermError",
    "Weights",
    "filled",
    "known",
    "plot_schedules",
]
