"""The static weights: one float32 buffer, written in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from torch_pathloss._errors import ArgumentError
from torch_pathloss._names import Names, names_from_tensor, names_to_tensor
from torch_pathloss._paths import Path
from torch_pathloss._term import not_a_weight


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

    Writing is in place, so that a compiled criterion takes the new weight without compiling again.

    Examples:
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.L1Loss()}, weights={"b": 5.0})
        >>> criterion.weights["a"] = 0.5
        >>> dict(criterion.weights.items())
        {'a': tensor(0.5000), 'b': tensor(5.)}
    """

    value: Tensor

    def __init__(self, names: Names, weights: Sequence[float | Tensor]) -> None:
        super().__init__()
        self._names = names
        self.register_buffer("value", torch.tensor([float(weight) for weight in weights], dtype=torch.float32))
        self.register_load_state_dict_pre_hook(_match_names)  # type: ignore[no-untyped-call]

    def __getitem__(self, name: str | Path) -> Tensor:
        """Returns the weight of a term as a 0-dim tensor that shares memory with the buffer."""
        return self.value[self._names.index(name)]

    def __setitem__(self, name: str | Path, weight: float | Tensor) -> None:
        """Sets the weight of a term in place.

        Raises:
            UnknownTermError: if there is no such term.
            ArgumentError: if the weight is not a finite number or a 0-dim tensor.
        """
        if problem := not_a_weight(weight):
            raise ArgumentError(f"The weight of {name!r} cannot be set: {problem}")
        with torch.no_grad():
            self.value[self._names.index(name)] = weight

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

    def update(self, weights: Mapping[str | Path, float | Tensor]) -> None:
        """Sets several weights in place: all of them, or none if one name or weight is wrong."""
        for name, weight in weights.items():
            self._names.index(name)
            if problem := not_a_weight(weight):
                raise ArgumentError(f"The weight of {name!r} cannot be set: {problem}")
        for name, weight in weights.items():
            self[name] = weight

    def get_extra_state(self) -> Tensor:
        """Returns the names as a tensor of bytes, so that a checkpoint gives each weight to its term."""
        return names_to_tensor(self._names)

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: the names were compared before anything was loaded."""

    def __repr__(self) -> str:
        shown = ", ".join(f"{name!r}: {weight:g}" for name, weight in zip(self, self.value.tolist(), strict=True))
        return f"Weights({{{shown}}})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Weights:
        keep_float32(self, fn, super()._apply)
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
    state[f"{prefix}value"] = module.value  # so that nothing is changed
    missing, further = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    errors.append(
        f"The weights were saved for other terms: the checkpoint lacks {missing} and has {further} besides. "
        f"Build the criterion with the terms {theirs}, or load without the keys that start with {prefix!r}."
    )


def weighted_sum(values: list[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum of weight times value, and the values as one detached tensor ``[K]``, or 0-dim for one.

    One product in eager mode. Compiled, the sum is a chain that fuses with the criteria; a stack in its way would not.
    """
    if len(values) == 1:
        return values[0] * weights.squeeze(), values[0].detach()
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
    return total, stacked.detach()
