"""The names of the terms, found by any spelling."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, final

import torch
from torch import Tensor

from torch_pathloss import _paths
from torch_pathloss._errors import PathSyntaxError, UnknownTermError, did_you_mean, nearest
from torch_pathloss._paths import Name, Path


@final
class Names:
    """The names of the terms in declared order, unique by any spelling."""

    def __init__(self, names: Iterable[Name] = ()) -> None:
        self._names: list[Name] = []
        self._positions: dict[str, int] = {}
        self._alike: dict[Name, list[int]] = {}
        for name in names:
            self.add(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: Name) -> None:
        self._positions[_paths.format(*name)] = len(self._names)
        self._alike.setdefault(_loosened(name), []).append(len(self._names))
        self._names.append(name)

    def find(self, name: Name) -> int | None:
        """Returns the position of the term with this name in any spelling, or `None`."""
        return next(iter(self._all(name)), None)

    def _all(self, name: Name) -> list[int]:
        """Returns more than one position only where a bare number may be the string or the integer."""
        alike = self._alike.get(_loosened(name), ())
        return [position for position in alike if _paths.same_node(self._names[position].path, name.path)]

    def index(self, name: str | Path) -> int:
        """Returns the position of a term.

        Raises:
            UnknownTermError: if there is no such term.
        """
        position = self._positions.get(name) if isinstance(name, str) else None
        if position is not None:
            return position
        try:
            parsed = _paths.parse_name(name)
        except PathSyntaxError as error:
            raise UnknownTermError(str(error)) from None
        return self.index_of(parsed)

    def index_of(self, name: Name) -> int:
        """Returns the position of a term by its parsed name. Raises as `index`."""
        positions = self._all(name)
        if not positions:
            raise UnknownTermError(f"There is {self.unknown(name)}")
        if len(positions) > 1:
            meant = " or ".join(repr(_paths.format(*self._names[position])) for position in positions)
            raise UnknownTermError(f"The name {_paths.format(*name)!r} may mean {meant}. Write one of them.")
        return positions[0]

    def unknown(self, name: Name) -> str:
        """Returns the end of the sentence about a name that no term has."""
        text = _paths.format(*name)
        return f"no term {text!r}. The terms are {', '.join(map(repr, self))}.{did_you_mean(nearest(text, self))}"


def _loosened(name: Name) -> Name:
    """Makes names equal that may be spellings of one: 0, "0" and the bare number 0 are alike here."""
    entries = (entry.value if isinstance(entry, _paths.Number) else entry for entry in name.path)
    return Name(tuple(str(entry) if isinstance(entry, int) else entry for entry in entries), name.label)


def names_to_tensor(names: Iterable[str]) -> Tensor:
    """Returns names as a tensor of bytes, which a `state_dict` can hold under ``weights_only=True``."""
    return torch.tensor(list(json.dumps(list(names)).encode()), dtype=torch.uint8)


def names_from_tensor(state: Tensor) -> list[Any]:
    """Returns what `names_to_tensor` was given."""
    names: list[Any] = json.loads(bytes(state.tolist()).decode())
    return names
