r"""Schedules: weights that are functions of the step.

A schedule stands where a weight stands, in ``weights=``, in a `Term` or in ``criterion.weights[...]``.
:meth:`PathLossModule.step` advances the step, as the ``step`` of a learning-rate scheduler does. Any function
``step -> float`` is a schedule too; those of this module can be multiplied and added, with each other, with numbers and
with functions, and they print as they were written.

Examples:
    >>> import torch
    >>> from torch import nn
    >>> from torch_pathloss import PathLossModule
    >>> from torch_pathloss.schedules import linear
    >>> criterion = PathLossModule({"x": nn.MSELoss(), "kl": nn.L1Loss()}, weights={"kl": linear(0.0, 1.0, steps=10)})
    >>> for _ in range(5):
    ...     criterion.step()
    >>> criterion.weights["kl"]
    tensor(0.5000)
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

from torch_pathloss._errors import ArgumentError, ConstructionError

Function: TypeAlias = Callable[[int], float]
"""Any function from the step to a weight."""
Shape: TypeAlias = Literal["linear", "cosine"]

__all__ = [
    "Schedule",
    "alternate",
    "by_epoch",
    "constant",
    "cosine",
    "cyclical",
    "exponential",
    "linear",
    "one_cycle",
    "piecewise",
    "value_at",
]


class Schedule(ABC):
    """A function from the step, which starts at 0, to a weight, and to whether the term is computed at all.

    ``a * b`` is inactive where one of both is, ``a + b`` where both are.
    """

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Returns the weight at a step; 0 where the term is inactive."""

    def is_active(self, step: int) -> bool:
        """Whether the term is computed at a step. An inactive term is absent from the call."""
        return True

    @property
    def set_to_none(self) -> bool:
        """Whether outputs that only an inactive term reads get no gradient at all, instead of zero."""
        return False

    def __mul__(self, other: Any) -> Schedule:
        return _Product(self, as_schedule(other, "multiplied by"))

    def __rmul__(self, other: Any) -> Schedule:
        return _Product(as_schedule(other, "multiplied by"), self)

    def __add__(self, other: Any) -> Schedule:
        return _Sum(self, as_schedule(other, "added to"))

    def __radd__(self, other: Any) -> Schedule:
        return _Sum(as_schedule(other, "added to"), self)


def value_at(schedule: Function, step: int) -> float:
    """Returns the weight that a schedule or a function gives at a step.

    Raises:
        ArgumentError: if that is no finite number.
    """
    value = schedule(step)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ArgumentError(
            f"the schedule {as_schedule(schedule)!r} gave {value!r} of type {type(value).__name__} at step {step}. "
            "It must give a finite number."
        )
    return float(value)


def constant(value: float) -> Schedule:
    """The same weight at every step.

    Args:
        value: the weight.

    Examples:
        >>> from torch_pathloss.schedules import constant
        >>> constant(0.5)(1000)
        0.5
    """
    return _Constant(_number("value", value))


def linear(start: float, end: float, steps: int, *, begin: int = 0) -> Schedule:
    r"""A straight line, as `torch.optim.lr_scheduler.LinearLR`.

    With :math:`t` the step and :math:`\tau = \min(1, \max(0, t - \text{begin}) / \text{steps})`,

    .. math::
        w(t) = \text{start} + (\text{end} - \text{start}) \, \tau

    Args:
        start: the weight until the step ``begin``.
        end: the weight from the step ``begin + steps`` on.
        steps: the number of steps between, at least 1.
        begin: the step at which the weight begins to move. Default: 0.

    Raises:
        ConstructionError: if a number is not finite or ``steps`` is less than 1.

    Examples:
        >>> from torch_pathloss.schedules import linear
        >>> warm_up = linear(0.0, 2.0, steps=4)
        >>> [warm_up(step) for step in range(6)]
        [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    """
    return _Linear(_number("start", start), _number("end", end), _count("steps", steps), _count("begin", begin, 0))


def cosine(start: float, end: float, steps: int, *, begin: int = 0) -> Schedule:
    r"""Half a cosine wave, as `torch.optim.lr_scheduler.CosineAnnealingLR` until its end, and constant then.

    With :math:`\tau` as in `linear`,

    .. math::
        w(t) = \text{end} + \frac{\text{start} - \text{end}}{2} \, (1 + \cos \pi \tau)

    The arguments and errors are those of `linear`.

    References:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017, equation 5.

    Examples:
        >>> from torch_pathloss.schedules import cosine
        >>> [round(cosine(1.0, 0.0, steps=4)(step), 3) for step in range(6)]
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    return _Cosine(_number("start", start), _number("end", end), _count("steps", steps), _count("begin", begin, 0))


def exponential(start: float, end: float, steps: int, *, begin: int = 0) -> Schedule:
    r"""A constant ratio from step to step, as `torch.optim.lr_scheduler.ExponentialLR` until its end.

    With :math:`\tau` as in `linear`, :math:`w(t) = \text{start} \, (\text{end} / \text{start})^\tau`.
    The arguments are those of `linear`.

    Raises:
        ConstructionError: as `linear`, and if ``start`` or ``end`` is 0 or their signs differ.

    Examples:
        >>> from torch_pathloss.schedules import exponential
        >>> [round(exponential(1.0, 0.01, steps=2)(step), 6) for step in range(4)]
        [1.0, 0.1, 0.01, 0.01]
    """
    if _number("start", start) * _number("end", end) <= 0:
        raise ConstructionError(f"exponential cannot reach {end!r} from {start!r}: both must be positive, or negative.")
    return _Exponential(float(start), float(end), _count("steps", steps), _count("begin", begin, 0))


def piecewise(pieces: Mapping[int, float | Function]) -> Schedule:
    """One weight or schedule after the other.

    Args:
        pieces: by the step at which it begins, a weight, or a schedule whose steps are counted from there. The first
            begins at 0.

    Raises:
        ConstructionError: if no piece begins at 0, or one begins at no whole number, or is neither number nor function.

    Examples:
        >>> from torch_pathloss.schedules import linear, piecewise
        >>> schedule = piecewise({0: 1.0, 2: linear(0.0, 1.0, steps=2), 6: 5.0})
        >>> [schedule(step) for step in range(8)]
        [1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 5.0, 5.0]
    """
    begins = sorted(_count("the step of a piece", begin, 0) for begin in pieces)
    if not begins or begins[0] != 0:
        raise ConstructionError(f"piecewise needs a piece that begins at step 0; there are pieces at {begins}.")
    return _Piecewise(tuple((begin, as_schedule(pieces[begin], "a piece of a schedule")) for begin in begins))


def cyclical(
    steps: int,
    *,
    cycles: int = 4,
    ratio: float = 0.5,
    start: float = 0.0,
    end: float = 1.0,
    shape: Shape = "linear",
) -> Schedule:
    r"""Cycles that rise and then stay, made for the KL term of a VAE.

    With :math:`T` the steps, :math:`M` the cycles, :math:`R` the ratio and :math:`t` the step from 0,

    .. math::
        w(t) = \text{start} + (\text{end} - \text{start}) f(\min(1, \tau / R)), \qquad
        \tau = \frac{t \bmod \lceil T / M \rceil}{T / M}

    where :math:`f` is the identity, or :math:`(1 - \cos \pi x) / 2` with ``shape="cosine"``. From step :math:`T` on the
    weight is ``end``. The step of the paper counts from 1.

    Args:
        steps: the number of steps of all cycles together, :math:`T`.
        cycles: the number of cycles, :math:`M`. Default: 4 (the paper, section 4.1).
        ratio: the part of a cycle in which the weight rises, :math:`R`. Default: 0.5 (the paper, section 4.1).
        start: the weight at the begin of each cycle. Default: 0.0.
        end: the weight at the end of each cycle. Default: 1.0.
        shape: how it rises: ``"linear"`` or ``"cosine"``. Default: ``"linear"``.

    Raises:
        ConstructionError: if a number is out of its range.

    References:
        Fu et al., Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing, NAACL 2019, equations 6
        and 7.

    Examples:
        >>> from torch_pathloss.schedules import cyclical
        >>> [cyclical(8, cycles=2)(step) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """
    if not 0 < _number("ratio", ratio) <= 1:
        raise ConstructionError(f"ratio must be above 0 and at most 1, not {ratio!r}.")
    if shape not in ("linear", "cosine"):
        raise ConstructionError(f"shape must be 'linear' or 'cosine', not {shape!r}.")
    if _count("cycles", cycles) > _count("steps", steps):
        raise ConstructionError(f"{cycles} cycles do not fit into {steps} steps.")
    return _Cyclical(steps, cycles, float(ratio), _number("start", start), _number("end", end), shape)


def one_cycle(
    peak: float, steps: int, *, ratio: float = 0.3, start: float | None = None, end: float | None = None
) -> Schedule:
    r"""Up and down once along cosines, as `torch.optim.lr_scheduler.OneCycleLR`.

    Args:
        peak: the highest weight, reached at step ``ratio * steps - 1``.
        steps: the number of steps, at least 2; from step ``steps - 1`` on the weight is ``end``.
        ratio: the part of the steps in which the weight rises. Default: 0.3 (as `OneCycleLR`).
        start: the weight at step 0. Default: ``peak / 25`` (as `OneCycleLR`).
        end: the weight at the end. Default: ``start / 10000`` (as `OneCycleLR`).

    Raises:
        ConstructionError: if a number is out of its range.

    References:
        Smith and Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2018.

    Examples:
        >>> from torch_pathloss.schedules import one_cycle
        >>> [round(one_cycle(1.0, 5, ratio=0.6, start=0.0, end=0.0)(step), 3) for step in range(6)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    steps, ratio = _count("steps", steps, 2), _number("ratio", ratio)
    if not 1 < ratio * steps < steps:
        raise ConstructionError(
            f"ratio times steps must be above 1 and below steps, but {ratio!r} times {steps} is {ratio * steps:g}."
        )
    start = _number("peak", peak) / 25 if start is None else _number("start", start)
    return _OneCycle(float(peak), steps, ratio, start, start / 10000 if end is None else _number("end", end))


def alternate(*steps: int, phase: int = 0, set_to_none: bool = False) -> Schedule:
    """A weight of 1 in one phase of a cycle; in the other phases the term is not computed.

    Terms that alternate have the same ``steps`` and different phases. An inactive term is absent from the call: it adds
    0, and the outputs that it would have read get zero gradient. Multiply it by a number or another schedule for
    another weight. A compiled criterion compiles at most once for each phase; for more than eight phases raise
    ``torch._dynamo.config.recompile_limit``.

    Args:
        *steps: how many steps each phase of the cycle lasts, for two phases or more.
        phase: in which of them the term is active, counted from 0. Default: 0.
        set_to_none: whether outputs that no active term reads get no gradient at all, which leaves the ``.grad`` of
            their heads as it is, `None` after ``zero_grad``, so that an optimizer skips them instead of moving them by
            momentum or weight decay. DistributedDataParallel then needs ``find_unused_parameters=True``.
            Default: ``False``.

    Raises:
        ConstructionError: if there are fewer than two phases, one is shorter than a step, or there is no such phase.

    Examples:
        >>> from torch_pathloss.schedules import alternate
        >>> a, b = alternate(2, 1), 5.0 * alternate(2, 1, phase=1)
        >>> [(a(step), b(step)) for step in range(4)]
        [(1.0, 0.0), (1.0, 0.0), (0.0, 5.0), (1.0, 0.0)]
    """
    if len(steps) < 2:
        raise ConstructionError(
            f"alternate needs the steps of two phases or more, as in alternate(100, 50), but was given {steps!r}."
        )
    for count in steps:
        _count("the steps of a phase", count)
    if isinstance(phase, bool) or not isinstance(phase, int) or not 0 <= phase < len(steps):
        raise ConstructionError(f"phase must be one of {', '.join(map(str, range(len(steps))))}, not {phase!r}.")
    return _Alternate(steps, phase, bool(set_to_none))


def by_epoch(schedule: Function, steps_per_epoch: int) -> Schedule:
    """A schedule whose steps are epochs: its weight changes once an epoch, while the criterion steps once a batch.

    Args:
        schedule: a schedule or function of the epoch, which starts at 0.
        steps_per_epoch: the number of calls of `PathLossModule.step` in an epoch. A criterion that steps once an epoch
            does not need this.

    Examples:
        >>> from torch_pathloss.schedules import by_epoch, linear
        >>> schedule = by_epoch(linear(0.0, 1.0, steps=2), steps_per_epoch=3)
        >>> [schedule(step) for step in range(8)]
        [0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0]
    """
    return _ByEpoch(as_schedule(schedule, "given by epochs"), _count("steps_per_epoch", steps_per_epoch))


@final
@dataclass(frozen=True, repr=False)
class _Constant(Schedule):
    value: float

    def __call__(self, step: int) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"{self.value!r}"


@final
@dataclass(frozen=True, repr=False)
class _Function(Schedule):
    """A plain function, so that it can be multiplied and added."""

    function: Function

    def __call__(self, step: int) -> float:
        return value_at(self.function, step)

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", None) or repr(self.function)


@dataclass(frozen=True, repr=False)
class _Ramp(Schedule):
    start: float
    end: float
    steps: int
    begin: int

    def progress(self, step: int) -> float:
        return min(1.0, max(0, step - self.begin) / self.steps)

    def __repr__(self) -> str:
        begin = f", begin={self.begin}" if self.begin else ""
        return f"{type(self).__name__[1:].lower()}({self.start!r}, {self.end!r}, steps={self.steps}{begin})"


@final
class _Linear(_Ramp):
    def __call__(self, step: int) -> float:
        return _between(self.start, self.end, self.progress(step))


@final
class _Cosine(_Ramp):
    def __call__(self, step: int) -> float:
        return _between(self.start, self.end, _half_wave(self.progress(step)))


@final
class _Exponential(_Ramp):
    def __call__(self, step: int) -> float:
        return float(self.start * (self.end / self.start) ** self.progress(step))


@final
@dataclass(frozen=True, repr=False)
class _Piecewise(Schedule):
    pieces: tuple[tuple[int, Schedule], ...]

    def at(self, step: int) -> tuple[Schedule, int]:
        begin, schedule = next(piece for piece in reversed(self.pieces) if piece[0] <= step)
        return schedule, step - begin

    def __call__(self, step: int) -> float:
        schedule, local = self.at(step)
        return schedule(local)

    def is_active(self, step: int) -> bool:
        schedule, local = self.at(step)
        return schedule.is_active(local)

    @property
    def set_to_none(self) -> bool:
        return any(schedule.set_to_none for _, schedule in self.pieces)

    def __repr__(self) -> str:
        return f"piecewise({{{', '.join(f'{begin}: {schedule!r}' for begin, schedule in self.pieces)}}})"


@final
@dataclass(frozen=True, repr=False)
class _Cyclical(Schedule):
    steps: int
    cycles: int
    ratio: float
    start: float
    end: float
    shape: Shape

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        position = (step % math.ceil(self.steps / self.cycles)) / (self.steps / self.cycles)
        part = min(1.0, position / self.ratio)
        return _between(self.start, self.end, part if self.shape == "linear" else _half_wave(part))

    def __repr__(self) -> str:
        options = f"cycles={self.cycles}, ratio={self.ratio!r}, start={self.start!r}, end={self.end!r}"
        return f"cyclical({self.steps}, {options}, shape={self.shape!r})"


@final
@dataclass(frozen=True, repr=False)
class _OneCycle(Schedule):
    peak: float
    steps: int
    ratio: float
    start: float
    end: float

    def __call__(self, step: int) -> float:
        top, last = self.ratio * self.steps - 1, self.steps - 1
        if step <= top:
            return _between(self.start, self.peak, _half_wave(step / top))
        return _between(self.peak, self.end, _half_wave(min(1.0, (step - top) / (last - top))))

    def __repr__(self) -> str:
        options = f"ratio={self.ratio!r}, start={self.start!r}, end={self.end!r}"
        return f"one_cycle({self.peak!r}, steps={self.steps}, {options})"


@final
@dataclass(frozen=True, repr=False)
class _Alternate(Schedule):
    steps: tuple[int, ...]
    phase: int
    to_none: bool

    def __call__(self, step: int) -> float:
        return float(self.is_active(step))

    def is_active(self, step: int) -> bool:
        begin = sum(self.steps[: self.phase])
        return begin <= step % sum(self.steps) < begin + self.steps[self.phase]

    @property
    def set_to_none(self) -> bool:
        return self.to_none

    def __repr__(self) -> str:
        options = (f", phase={self.phase}" if self.phase else "") + (", set_to_none=True" if self.to_none else "")
        return f"alternate({', '.join(map(str, self.steps))}{options})"


@final
@dataclass(frozen=True, repr=False)
class _ByEpoch(Schedule):
    schedule: Schedule
    steps_per_epoch: int

    def __call__(self, step: int) -> float:
        return self.schedule(step // self.steps_per_epoch)

    def is_active(self, step: int) -> bool:
        return self.schedule.is_active(step // self.steps_per_epoch)

    @property
    def set_to_none(self) -> bool:
        return self.schedule.set_to_none

    def __repr__(self) -> str:
        return f"by_epoch({self.schedule!r}, steps_per_epoch={self.steps_per_epoch})"


@dataclass(frozen=True, repr=False)
class _Pair(Schedule):
    left: Schedule
    right: Schedule

    @property
    def set_to_none(self) -> bool:
        return self.left.set_to_none or self.right.set_to_none


@final
class _Product(_Pair):
    def __call__(self, step: int) -> float:
        return self.left(step) * self.right(step)

    def is_active(self, step: int) -> bool:
        return self.left.is_active(step) and self.right.is_active(step)

    def __repr__(self) -> str:
        return " * ".join(f"({side!r})" if isinstance(side, _Sum) else repr(side) for side in (self.left, self.right))


@final
class _Sum(_Pair):
    def __call__(self, step: int) -> float:
        return self.left(step) + self.right(step)

    def is_active(self, step: int) -> bool:
        return self.left.is_active(step) or self.right.is_active(step)

    def __repr__(self) -> str:
        return f"{self.left!r} + {self.right!r}"


def as_schedule(value: Any, role: str = "a weight") -> Schedule:
    """Returns a number, function or schedule as a schedule.

    Raises:
        ConstructionError: if it is none of them.
    """
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value):
        return _Constant(float(value))
    if callable(value) and not isinstance(value, type):
        return _Function(value)
    raise ConstructionError(
        f"{value!r} of type {type(value).__name__} cannot be {role}: it is neither a finite number nor a function "
        "step -> float."
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ConstructionError(f"{name} must be a finite number, not {value!r} of type {type(value).__name__}.")
    return float(value)


def _count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConstructionError(
            f"{name} must be a whole number of at least {least}, not {value!r} of type {type(value).__name__}."
        )
    return value


def _between(start: float, end: float, part: float) -> float:
    return start + (end - start) * part


def _half_wave(part: float) -> float:
    return (1 - math.cos(math.pi * part)) / 2
