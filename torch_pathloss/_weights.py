"""The weights: one float32 buffer, written in place by hand or by schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from torch_pathloss._errors import ArgumentError
from torch_pathloss._names import Names, names_from_tensor, names_to_tensor
from torch_pathloss._paths import Path
from torch_pathloss._term import is_schedule, not_a_weight
from torch_pathloss.schedules import Function, Schedule, as_schedule, value_at


def keep_float32(module: nn.Module, fn: Callable[[Tensor], Tensor], apply: Callable[[Any], Any]) -> None:
    """Applies `fn` to the buffers of a module, but leaves none below float32.

    ``criterion.to(torch.bfloat16)`` would round a weight of 0.3 to 0.30078125, and with it what is logged.
    Nothing in torch excludes a buffer from a cast; torchmetrics overrides ``_apply`` for the same reason.
    """
    before = dict(module._buffers)
    apply(fn)
    for name, buffer in module._buffers.items():
        old = before[name]
        if buffer is not None and old is not None and buffer.is_floating_point() and buffer.dtype.itemsize < 4:
            module._buffers[name] = old.to(buffer.device)


@final
class Weights(nn.Module):
    """The weights of the terms, by name: one float32 buffer ``[K]`` of the `state_dict`, saved with its names.

    Writing is in place, so that a compiled criterion takes the new weight without compiling again. Beside it lies the
    step at which schedules are read.

    Examples:
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.L1Loss()}, weights={"b": 5.0})
        >>> criterion.weights["a"] = 0.5
        >>> dict(criterion.weights.items())
        {'a': tensor(0.5000), 'b': tensor(5.)}
    """

    value: Tensor
    step: Tensor

    inactive: dict[str, bool] | None = None
    """The terms whose schedule is in an inactive phase, and whether their outputs get no gradient instead of zero."""

    def __init__(self, names: Names, weights: Sequence[float | Tensor | Function]) -> None:
        super().__init__()
        self._names = names
        self._schedules = {k: as_schedule(weight) for k, weight in enumerate(weights) if is_schedule(weight)}
        self._step = 0  # what the buffer holds, so that a step reads nothing from the device
        self._initial = [0.0 if k in self._schedules else float(weight) for k, weight in enumerate(weights)]  # type: ignore[arg-type]
        self.register_buffer("value", torch.tensor(self._initial, dtype=torch.float32))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_match_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_read_step)  # type: ignore[no-untyped-call]
        self._follow()

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules by name of the term."""
        names = list(self._names)
        return {names[position]: schedule for position, schedule in self._schedules.items()}

    def reset_parameters(self) -> None:
        """Sets weights and step to what they were at construction.

        Done of itself when the module leaves the meta device, on which `torch.device("meta")` builds it.
        """
        self._step = 0
        with torch.no_grad():
            self.step.zero_()
            self.value.copy_(torch.tensor(self._initial))
        self._follow()

    def advance(self) -> None:
        """Advances the step by one, and sets the scheduled weights. `PathLossModule.step` calls it.

        Raises:
            ArgumentError: if a schedule gives no finite number. Then nothing is changed.
        """
        self._step += 1
        try:
            self._follow()
        except ArgumentError:
            self._step -= 1
            raise
        self.step.add_(1)

    def _follow(self) -> None:
        """Sets every scheduled weight to its value at the step, and notes which terms are inactive."""
        names = list(self._names)
        values = {}
        for position, schedule in self._schedules.items():
            try:
                values[position] = value_at(schedule, self._step)
            except ArgumentError as error:
                raise ArgumentError(f"The weight of {names[position]!r}: {error}") from None
        inactive = {
            names[position]: schedule.set_to_none
            for position, schedule in self._schedules.items()
            if not schedule.is_active(self._step)
        }
        self.inactive = inactive or None
        with torch.no_grad():
            for position, value in values.items():
                self.value[position].fill_(value)  # a scalar argument of a kernel, not a copy to the device

    def __getitem__(self, name: str | Path) -> Tensor:
        """Returns the weight of a term as a 0-dim tensor that shares memory with the buffer."""
        return self.value[self._names.index(name)]

    def __setitem__(self, name: str | Path, weight: float | Tensor | Function) -> None:
        """Sets the weight of a term in place, or has it follow a schedule from now on.

        Raises:
            UnknownTermError: if there is no such term.
            ArgumentError: if the weight is not a finite number, a 0-dim tensor or a schedule, or a number is given for
                a weight that follows a schedule.
        """
        position = self._names.index(name)
        self._refuse(name, position, weight)
        if is_schedule(weight):
            self._schedules[position] = as_schedule(weight)
            self._follow()
            return
        with torch.no_grad():
            self.value[position] = weight  # type: ignore[assignment]

    def _refuse(self, name: str | Path, position: int, weight: Any) -> None:
        if problem := not_a_weight(weight):
            raise ArgumentError(f"The weight of {name!r} cannot be set: {problem}")
        if is_schedule(weight):
            value_at(weight, self._step)
        elif position in self._schedules:
            raise ArgumentError(
                f"The weight of {name!r} cannot be set to {float(weight)!r}: it follows the schedule "
                f"{self._schedules[position]!r}, which would overwrite it at the next step. "
                f"Set another schedule, such as schedules.constant({float(weight)!r})."
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def keys(self) -> Names:
        """Returns the names of the terms, in declared order."""
        return self._names

    def items(self) -> list[tuple[str, Tensor]]:
        """Returns names and weights, in declared order."""
        return list(zip(self._names, self.value.unbind(), strict=True))

    def values(self) -> list[Tensor]:
        """Returns the weights as 0-dim tensors that share memory with the buffer, in declared order."""
        return list(self.value.unbind())

    def update(self, weights: Mapping[str | Path, float | Tensor | Function]) -> None:
        """Sets several weights in place: all of them, or none if one name or weight is wrong."""
        for name, weight in weights.items():
            self._refuse(name, self._names.index(name), weight)
        for name, weight in weights.items():
            self[name] = weight

    def get_extra_state(self) -> Tensor:
        """Returns the names as a tensor of bytes, so that a checkpoint gives each weight to its term."""
        return names_to_tensor(self._names)

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: the names were compared before anything was loaded."""

    def __repr__(self) -> str:
        return f"Weights({{{', '.join(f'{name!r}: {text}' for name, text in zip(self, self.texts(), strict=True))}}})"

    def texts(self) -> list[str]:
        """Returns each weight as text, with its schedule. Reads from the device."""
        return [
            f"{weight:g}{f' by {self._schedules[position]!r}' if position in self._schedules else ''}"
            for position, weight in enumerate(self.value.tolist())
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Weights:
        was_meta = self.value.is_meta
        keep_float32(self, fn, super()._apply)
        if was_meta and not self.value.is_meta:
            self.reset_parameters()
        return self


def _match_names(
    module: Weights, state: dict[str, Any], prefix: str, _: Any, __: bool, ___: Any, ____: Any, errors: list[str]
) -> None:
    """Gives each weight of a checkpoint to the term of its name, whatever the order; refuses other names."""
    saved, value = state.get(f"{prefix}_extra_state"), state.get(f"{prefix}value")
    if saved is None or value is None:
        return  # torch tells what is missing
    theirs, ours = names_from_tensor(saved), list(module._names)
    if sorted(theirs) == sorted(ours):
        state[f"{prefix}value"] = value[[theirs.index(name) for name in ours]]
        return
    state[f"{prefix}value"], state[f"{prefix}step"] = module.value, module.step  # so that nothing is changed
    missing, further = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    errors.append(
        f"The weights were saved for other terms: the checkpoint lacks {missing} and has {further} besides. "
        f"Build the criterion with the terms {theirs}, or load without the keys that start with {prefix!r}."
    )


def _read_step(module: Weights, _: Any) -> None:
    if not module.step.is_meta:
        module._step = int(module.step)
        module._follow()


Combined: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""The total to differentiate, the values as one detached tensor ``[K]`` (0-dim for one), and the weight with which each
entered the total, ``[K]``, detached."""


def weighted_sum(values: list[Tensor], weights: Tensor) -> Combined:
    """Returns the sum of weight times value.

    One product in eager mode. Compiled, the sum is a chain that fuses with the criteria; a stack in its way would not.
    """
    if len(values) == 1:
        return values[0] * weights.squeeze(), values[0].detach(), weights
    stacked = torch.stack(values)
    if torch.compiler.is_compiling():
        total = values[0] * weights[0]
        for position, value in enumerate(values[1:], 1):
            total = total + value * weights[position]
    elif stacked.dtype == weights.dtype:
        total = torch.dot(stacked, weights)
    else:
        dtype = torch.promote_types(stacked.dtype, weights.dtype)
        total = torch.dot(stacked.to(dtype), weights.to(dtype))
    return total, stacked.detach(), weights
