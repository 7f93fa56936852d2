"""The static weights: one float32 buffer, written in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from torch_pathloss._errors import ArgumentError
from torch_pathloss._names import Names
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
    """The weights of the terms, by name. Part of the `state_dict`, as one float32 buffer of shape ``[K]``.

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

    def __repr__(self) -> str:
        shown = ", ".join(f"{name!r}: {weight:g}" for name, weight in zip(self, self.value.tolist(), strict=True))
        return f"Weights({{{shown}}})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Weights:
        keep_float32(self, fn, super()._apply)
        return self


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
