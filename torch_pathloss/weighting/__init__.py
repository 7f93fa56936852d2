"""Weightings: rules from the values of the terms to a total.

Examples:
    >>> import torch
    >>> from torch import nn
    >>> from torch_pathloss import PathLossModule
    >>> from torch_pathloss.weighting import WeightedSum
    >>> criterion = PathLossModule(
    ...     {"a": nn.L1Loss(), "b": nn.L1Loss()}, weighting=WeightedSum(weighted_mean=True)
    ... )
    >>> output, target = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.zeros(2)}
    >>> criterion(output, target)
    tensor(1.)
"""

from torch_pathloss.weighting._base import Factors, Weighted, Weighting, pinned
from torch_pathloss.weighting._coefficient_of_variation import CoefficientOfVariation
from torch_pathloss.weighting._dynamic_weight_average import DynamicWeightAverage
from torch_pathloss.weighting._ema_normalized import EMANormalized
from torch_pathloss.weighting._famo import FAMO
from torch_pathloss.weighting._geometric_mean import GeometricMean
from torch_pathloss.weighting._grad_norm import GradNorm
from torch_pathloss.weighting._imtl_l import IMTLL
from torch_pathloss.weighting._output_balancer import OutputBalancer
from torch_pathloss.weighting._random_weighting import RandomWeighting
from torch_pathloss.weighting._relobralo import ReLoBRaLo
from torch_pathloss.weighting._scalarizer import Scalarizer
from torch_pathloss.weighting._smooth_tchebycheff import SmoothTchebycheff
from torch_pathloss.weighting._soft_adapt import SoftAdapt
from torch_pathloss.weighting._uncertainty import Uncertainty
from torch_pathloss.weighting._weighted_sum import WeightedSum

__all__ = [
    "FAMO",
    "IMTLL",
    "CoefficientOfVariation",
    "DynamicWeightAverage",
    "EMANormalized",
    "Factors",
    "GeometricMean",
    "GradNorm",
    "OutputBalancer",
    "RandomWeighting",
    "ReLoBRaLo",
    "Scalarizer",
    "SmoothTchebycheff",
    "SoftAdapt",
    "Uncertainty",
    "Weighted",
    "WeightedSum",
    "Weighting",
    "pinned",
]
