"""What the latest forward computed, for logging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from torch_pathloss._names import Names
from torch_pathloss._term import Present
from torch_pathloss._weights import keep_float32


@final
class Last(nn.Module):
    """Values, weights and total of the latest ``forward``, detached, in float32.

    They lie in one buffer that ``forward`` writes in place, so that they are right after a CUDA graph is replayed and
    cost no host synchronisation. It is not part of the `state_dict`. Reading gives copies that later steps do not
    change. Before the first ``forward`` everything is NaN and no term is present. Under `torch.func.vmap` nothing is
    written.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weights={"b": 5.0})
        >>> zeros, ones = torch.zeros(2), torch.ones(2)
        >>> loss = criterion({"a": ones, "b": ones}, {"a": zeros, "b": None})
        >>> criterion.last.log("train/")
        {'train/total': 1.0, 'train/terms/a': 1.0, 'train/terms/b': nan, 'train/weights/a': 1.0, 'train/weights/b': 5.0}
        >>> criterion.last.present
        {'a': tensor(True), 'b': tensor(False)}
    """

    record: Tensor
    ones: Tensor

    def __init__(self, names: Names) -> None:
        super().__init__()
        self._names = names
        count = len(names)
        record = torch.empty(3 * count + 1, dtype=torch.float32)  # values [K], weights [K], presence [K], total
        self.register_buffer("record", record, persistent=False)
        self._rows: tuple[Tensor, ...] = self._split(record)  # views for eager writes, renewed when the buffer moves
        self.register_buffer("ones", torch.empty(count, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forgets the latest ``forward``. Done of itself when the module leaves the meta device."""
        self.ones.fill_(1.0)
        self.record.fill_(torch.nan)
        self.record[2 * len(self._names) : -1] = 0.0

    @property
    def total(self) -> Tensor:
        """The total, 0-dim."""
        return self.record[-1].clone()

    @property
    def values(self) -> dict[str, Tensor]:
        """The unweighted value of each term; 0 for an absent one."""
        return self._row(0)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weight with which each term entered the total."""
        return self._row(1)

    @property
    def present(self) -> dict[str, Tensor]:
        """Whether each term was present, as 0-dim boolean tensors."""
        return {name: seen != 0 for name, seen in self._row(2).items()}

    def log(self, prefix: str = "") -> dict[str, float]:
        """Returns everything as floats, with one copy from the device to the host.

        The keys are ``{prefix}total``, ``{prefix}terms/{name}`` (unweighted) and ``{prefix}weights/{name}``, the same
        at every step. The value of an absent term is NaN: skip it in a mean.
        """
        record = self.record.tolist()
        count = len(self._names)
        shown = {f"{prefix}total": record[-1]}
        for name, value, seen in zip(self._names, record, record[2 * count :], strict=False):
            shown[f"{prefix}terms/{name}"] = value if seen else float("nan")
        for name, weight in zip(self._names, record[count:], strict=False):
            shown[f"{prefix}weights/{name}"] = weight
        return shown

    def write(
        self, values: Sequence[Tensor], stacked: Tensor, present: Sequence[Present], weights: Tensor, total: Tensor
    ) -> None:
        """Overwrites the record.

        Args:
            values: the value of each term.
            stacked: the same as one detached tensor: ``[K]``, 0-dim for one term.
            present: whether each term is present; 0-dim bool tensors where that depends on data.
            weights: ``[K]``, detached.
            total: 0-dim.
        """
        record = self._buffers["record"]
        assert record is not None
        if torch.compiler.is_compiling():
            _write_traced(record, values, present, weights, total)
            return
        if torch._C._are_functorch_transforms_active() and _is_batched(total):
            return  # one record cannot hold the values of a whole vmap
        rows = self._rows
        if rows[0]._base is not record:
            rows = self._rows = self._split(record)
        seen: Tensor = self._buffers["ones"]  # type: ignore[assignment]
        if not all(is_present is True for is_present in present):
            seen = seen_of(present, seen)
        # One kernel; torch.cat costs twice as much.
        torch._foreach_copy_(rows, (stacked, weights, seen, total.detach()))

    def _split(self, record: Tensor) -> tuple[Tensor, ...]:
        count = len(self._names)
        values, weights, seen = record[:-1].view(3, count).unbind()
        return (values.squeeze() if count == 1 else values, weights, seen, record[-1])

    def _row(self, row: int) -> dict[str, Tensor]:
        count = len(self._names)
        return dict(zip(self._names, self.record[row * count : (row + 1) * count].clone().unbind(), strict=True))

    def __repr__(self) -> str:
        return f"Last({self.log()})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Last:
        was_meta = self.record.is_meta
        keep_float32(self, fn, super()._apply)
        if was_meta and not self.record.is_meta:
            self.reset_parameters()
        return self


def seen_of(present: Sequence[Present], ones: Tensor) -> Tensor:
    """Returns presence as a tensor ``[K]`` of the type and device of ``ones``, without a copy from the host."""
    seen = ones.clone()
    for position, is_present in enumerate(present):
        if isinstance(is_present, Tensor):
            seen[position] = is_present
        elif not is_present:
            seen[position].fill_(0)  # a tensor made of the list would be copied to the device, and wait for it
    return seen


def _write_traced(
    record: Tensor, values: Sequence[Tensor], present: Sequence[Present], weights: Tensor, total: Tensor
) -> None:
    """Writes element by element, which Inductor fuses into one kernel. A concatenation would be three or four.

    A stack of the values is one as well up to 20 terms, but one for each term above.
    """
    count = len(values)
    with torch.no_grad():  # instead of a detach() each, which takes a tenth of the time to trace
        record[count : 2 * count] = weights
        record[2 * count : 3 * count].fill_(1.0)
        for position, (value, is_present) in enumerate(zip(values, present, strict=True)):
            record[position] = value
            if is_present is not True:
                record[2 * count + position] = is_present
        record[3 * count] = total


def _is_batched(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
