"""Trees: one walk for every container, and the leaves for whatever looks at a whole tree.

The only importer of optree. The walk serves the hot path, because it traces under Dynamo and costs less than
flattening; flattening serves coverage, inspection and messages.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import numbers
from collections import OrderedDict, UserString, defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from torch_pathloss import _paths
from torch_pathloss._errors import PathNotFoundError, did_you_mean, nearest
from torch_pathloss._paths import Entry, Number, Path, Wildcard

_NAMESPACE = "torch_pathloss"
_SHOWN = 12  # entries of a node that a message lists
_TEXT = (str, bytes, bytearray, memoryview, UserString)  # sequences whose elements are no nodes
_NO_STATE = ("__dict__", "__weakref__")  # slots that hold no attribute of their own
_DEPTH = 8  # of plain objects within one another that are searched for tensors


class _Found(NamedTuple):
    """A child, and the exact entry under which it stands."""

    entry: Any
    child: Any


def walk(tree: Any, path: Path, name: str) -> Any:
    """Returns the node at a path without wildcards; `None` where the node or one on the way to it is `None`.

    `name` is what messages call the tree.

    Raises:
        PathNotFoundError: if the path does not exist, or an entry reaches two nodes.
    """
    node = tree
    for entry in path:
        if type(node) is dict and type(entry) is str and entry in node:  # the usual case, without a call
            node = node[entry]
        elif node is None:
            return None
        else:
            found = _step(node, entry)
            if found is None:
                locate(tree, path, name)  # raises, and says where
            node = found.child  # type: ignore[union-attr]
    return node


def locate(tree: Any, path: Path, name: str) -> Path:
    """Returns the path with every entry as it stands in the tree: numbers as what they reach, indices counted from 0.

    Stops early at `None`.
    """
    node = tree
    located: list[Any] = []
    for depth, entry in enumerate(path):
        if node is None:
            break
        found = _step(node, entry)
        if found is None:
            raise PathNotFoundError(_not_found(tree, path, depth, node, name))
        located.append(_listed_entry(node, found))
        node = found.child
    return tuple(located)


def _listed_entry(node: Any, found: _Found) -> Any:
    """Returns the entry under which `leaves` lists a child: optree's, where the class is registered with it."""
    if isinstance(node, (Mapping, Sequence)) or isinstance(found.entry, int):
        return found.entry
    same = (entry for entry, child in _registered(node) or () if child is found.child)
    return next(same, found.entry)


def _step(node: Any, entry: Entry) -> _Found | None:
    if isinstance(node, Mapping):
        return _step_mapping(node, entry)
    if isinstance(node, tuple) and (fields := _fields(node)):
        if isinstance(entry, str):
            return _Found(entry, node[fields.index(entry)]) if entry in fields else None
        index = _index(entry, len(node))
        return None if index is None else _Found(fields[index], node[index])
    if isinstance(node, Sequence) and not isinstance(node, _TEXT):
        index = _index(entry, len(node))
        return None if index is None else _Found(index, node[index])
    if _is_closed(node):
        return None
    if isinstance(entry, str) and not entry.startswith("__"):
        attribute = getattr(node, entry, _Found)  # _Found stands for "nothing": it is nobody's attribute
        if attribute is not _Found and not inspect.isroutine(attribute):
            return _Found(entry, attribute)
    return _step_registered(node, entry)


def _step_mapping(node: Mapping[Any, Any], entry: Entry) -> _Found | None:
    keys = node.keys()  # a TensorDict answers `in` for its keys only
    if isinstance(entry, Number):
        text = str(entry.value)
        if text in keys and _is_key(entry.value, node):
            raise PathNotFoundError(
                f"the entry {text} is ambiguous: the mapping has both the key {text!r} and the key {entry.value}. "
                f'Write ["{text}"] for the string or [{text}] for the integer.'
            )
        entry = text if text in keys else entry.value
    if _is_key(entry, node) if isinstance(entry, int) else entry in keys:
        return _Found(entry, node[entry])
    # A Hugging Face ModelOutput leaves the fields that are None out of its keys.
    if isinstance(entry, str) and dataclasses.is_dataclass(node) and getattr(node, entry, _Found) is None:
        return _Found(entry, None)
    return None


def _is_key(number: Any, node: Mapping[Any, Any]) -> bool:
    """Whether a mapping has an integer key. The keys of a TensorDict raise when they are asked for one."""
    if isinstance(node, dict):
        return number in node
    return any(isinstance(key, int) and key == number for key in node.keys())  # noqa: SIM118


def _step_registered(node: Any, entry: Entry) -> _Found | None:
    text = str(entry.value) if isinstance(entry, Number) else None
    opened = _registered(node) or ()
    matches = [f for f in opened if (f.entry in (entry.value, text) if isinstance(entry, Number) else f.entry == entry)]
    if not matches and isinstance(entry, (int, Number)):
        index = _index(entry, len(opened))
        if index is not None and all(isinstance(f.entry, int) for f in opened):
            return opened[index]
    return matches[0] if len(matches) == 1 else None


def _index(entry: Entry, length: int) -> int | None:
    if isinstance(entry, Number):
        entry = entry.value
    if not isinstance(entry, int) or not -length <= entry < length:
        return None
    return entry + length if entry < 0 else entry


def _fields(node: tuple[Any, ...]) -> tuple[str, ...]:
    """Field names of a namedtuple or of a struct sequence such as `torch.return_types.max`; else nothing."""
    named = getattr(node, "_fields", None)
    if isinstance(named, tuple):
        return named
    if type(node) is not tuple and optree.is_structseq(node):
        return optree.structseq_fields(node)
    return ()


def _is_closed(node: Any) -> bool:
    """Whether a node is a value that paths do not go into."""
    return node is None or isinstance(
        node, (Tensor, torch.nn.Module, str, bytes, numbers.Number, type, torch.dtype, torch.device)
    )


def _registered(node: Any) -> tuple[_Found, ...] | None:
    """Children of a node whose class the user registered with optree."""
    if type(node).__module__ == "builtins":
        return None
    if optree.tree_is_leaf(node, none_is_leaf=True):
        return None
    children, _, entries, _ = optree.tree_flatten_one_level(node)
    return tuple(_Found(e, c) for e, c in zip(entries, children, strict=True))


def children(node: Any) -> tuple[_Found, ...] | None:
    """Returns the children of a node in its own order, or `None` for a leaf.

    Opened are mappings, sequences, dataclasses, optree-registered nodes, and plain objects with public attributes
    that hold a tensor or a container.
    """
    if isinstance(node, Mapping):
        return tuple(_Found(key, node[key]) for key in node.keys())  # noqa: SIM118  (a TensorDict iterates over rows)
    if isinstance(node, tuple) and (fields := _fields(node)):
        return tuple(_Found(field, child) for field, child in zip(fields, node, strict=False))
    if isinstance(node, Sequence) and not isinstance(node, _TEXT):
        return tuple(_Found(index, child) for index, child in enumerate(node))
    if _is_closed(node):
        return None
    if (registered := _registered(node)) is not None:
        return registered
    if dataclasses.is_dataclass(node):
        return tuple(_Found(field.name, getattr(node, field.name)) for field in dataclasses.fields(node))
    if not _holds_tensors(node):
        return None
    public = tuple(found for found in _attributes(node) if not found.entry.startswith("_"))
    return public or None


def _parts(node: Any) -> tuple[_Found, ...] | None:
    """Returns the children of a node and, of an object, the private attributes that its methods may read.

    A gradient goes through `MultivariateNormal._unbroadcasted_scale_tril` as it does through its ``loc``.
    """
    opened = children(node)
    if isinstance(node, (Mapping, Sequence)) or _is_closed(node) or _registered(node) is not None:
        return opened
    if opened is None and not _holds_tensors(node):
        return None
    named = {found.entry for found in opened or ()}
    return (*(opened or ()), *(found for found in _attributes(node) if found.entry not in named))


def _attributes(node: Any) -> tuple[_Found, ...]:
    """Returns what an object stores under its own names."""
    slots = [slot for kind in type(node).__mro__ for slot in _as_tuple(kind.__dict__.get("__slots__", ()))]
    stored = {slot: getattr(node, slot) for slot in slots if slot not in _NO_STATE and hasattr(node, slot)}
    stored.update(getattr(node, "__dict__", {}))
    return tuple(_Found(name, value) for name, value in stored.items())


def _as_tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _holds_tensors(node: Any) -> bool:
    """Whether a tensor stands in a plain object, at most `_DEPTH` objects and containers deep.

    Level by level, and every object once: objects that know one another would be searched again and again.
    """
    level, seen = [node], {id(node): node}  # kept, so that nothing new gets the same id
    for _ in range(_DEPTH):
        below: list[Any] = []
        for parent in level:
            for child in _held(parent):
                if isinstance(child, Tensor):
                    return True
                if not _is_closed(child) and id(child) not in seen:
                    seen[id(child)] = child
                    below.append(child)
        level = below
    return False


def _held(node: Any) -> list[Any]:
    """Returns what a plain object or container holds."""
    if inspect.isroutine(node) or isinstance(node, _TEXT):
        return []
    if isinstance(node, Mapping):
        return [node[key] for key in node.keys()]  # noqa: SIM118
    if isinstance(node, Sequence):
        return list(node)
    return [child for _, child in _attributes(node)]


def expand(tree: Any, path: Path, name: str) -> list[tuple[Path, ...]]:
    """Returns, for each match of a pattern in order, what its wildcards stand for.

    ``*`` stands for one entry of a container. ``**`` stands for any number of entries; where it ends the path, the
    match is a leaf. Nodes that are `None` match nothing below them.

    Raises:
        PathNotFoundError: if the entries before the first wildcard do not exist, if ``*`` stands at a leaf, or if
            what follows a wildcard stands at none of the entries that it stands for.
    """
    first = next(i for i, entry in enumerate(path) if isinstance(entry, Wildcard))
    node = walk(tree, path[:first], name)
    found = list(_expand(node, path[first:]))
    if path.count(Wildcard.MANY) > 1:  # two of them can share out one way down in several ways
        once: dict[Path, tuple[Path, ...]] = {}
        for captures in found:
            once.setdefault(locate(tree, _paths.fill(path, captures), name), captures)
        found = list(once.values())
    if not found and Wildcard.MANY not in path:
        _explain_no_match(tree, path, name)
    elif not found and path[first] is Wildcard.MANY:
        _explain_no_deep_match(node, path, first, name)
    return found


def _expand(node: Any, path: Path) -> Iterator[tuple[Path, ...]]:
    if not path:
        yield ()
        return
    if node is None:
        return
    entry, rest = path[0], path[1:]
    if entry is Wildcard.ONE:
        for child_entry, child in _wildcard_children(node):
            for captures in _expand(child, rest):
                yield ((child_entry,), *captures)
    elif entry is Wildcard.MANY:
        yield from _expand_many(node, rest, ())
    else:
        found = _step(node, entry)
        if found is not None:
            yield from _expand(found.child, rest)


def _expand_many(node: Any, rest: Path, passed: Path) -> Iterator[tuple[Path, ...]]:
    opened = children(node)
    if rest or opened is None:
        for captures in _expand(node, rest):
            yield (passed, *captures)
    for child_entry, child in _wildcard_children(node):
        if child is not None:
            yield from _expand_many(child, rest, (*passed, child_entry))


def _wildcard_children(node: Any) -> Iterator[tuple[Entry, Any]]:
    # An index is captured as a bare number, so that it reaches the key "0" of a target that is a mapping,
    # as the same index written out in a path would.
    for entry, child in children(node) or ():
        yield (Number(entry) if isinstance(node, Sequence) and isinstance(entry, int) else entry), child


def _explain_no_match(tree: Any, path: Path, name: str) -> None:
    """Raises unless a pattern matches nothing because a container on its way is empty or `None`."""
    reached: list[tuple[Path, Any]] = [((), tree)]
    for depth, entry in enumerate(path):
        if isinstance(entry, Wildcard):
            for at, node in reached:
                if node is not None and children(node) is None:
                    raise PathNotFoundError(_not_found(tree, (*at, *path[depth:]), len(at), node, name))
            reached = [((*at, e), c) for at, node in reached for e, c in _wildcard_children(node) if node is not None]
        else:
            stepped = [(at, node, _step(node, entry)) for at, node in reached if node is not None]
            if stepped and all(found is None for _, _, found in stepped):
                at, node, _ = stepped[0]
                raise PathNotFoundError(_not_found(tree, (*at, *path[depth:]), len(at), node, name))
            reached = [((*at, found.entry), found.child) for at, _, found in stepped if found is not None]


def _explain_no_deep_match(node: Any, path: Path, many: int, name: str) -> None:
    """Raises if what follows ``**`` stands nowhere below a node that holds something."""
    end = next((i for i in range(many + 1, len(path)) if isinstance(path[i], Wildcard)), len(path))
    if end == many + 1 or not values(node) or any(True for _ in _expand(node, path[many:end])):
        return
    where = repr(_paths.format(path[:many])) if many else "the root"
    entries = dict.fromkeys(_paths.format((entry,)) for leaf_path, _ in leaves(node) for entry in leaf_path)
    near = nearest(_paths.format(path[many + 1 : many + 2]), entries)
    raise PathNotFoundError(
        f"the {name} has no {_paths.format(path)!r}. Nothing below {where}, {describe(node)}, is called "
        f"{_paths.format(path[many + 1 : end])!r}.{did_you_mean(near)}"
    )


def leaves(tree: Any) -> list[tuple[Path, Any]]:
    """Returns every leaf with its path, in the tree's own order. `None` is a leaf here; an empty container is not."""
    found: list[tuple[Path, Any]] = []
    for path, node in _flatten(tree):
        # What optree keeps whole: a UserDict, a plain dataclass, a Hugging Face ModelOutput, a TensorDict.
        opened = children(node)
        if opened is None:
            found.append((path, node))
        for entry, child in opened or ():
            found.extend(((*path, entry, *rest), leaf) for rest, leaf in leaves(child))
    return found


def _flatten(tree: Any) -> list[tuple[Path, Any]]:
    if torch.compiler.is_compiling():  # optree's accessors and insertion order do not trace
        return [((), tree)]
    with optree.dict_insertion_ordered(True, namespace=_NAMESPACE):
        accessors, nodes, _ = optree.tree_flatten_with_accessor(tree, none_is_leaf=True, namespace=_NAMESPACE)
    return [(tuple(_accessor_entry(entry) for entry in a), node) for a, node in zip(accessors, nodes, strict=True)]


def _accessor_entry(entry: optree.PyTreeEntry) -> Any:
    if isinstance(entry, (optree.NamedTupleEntry, optree.StructSequenceEntry)):
        return entry.field
    return entry.entry


def visit_leaves(function: Callable[[Path, Any], None], tree: Any, path: Path = ()) -> None:
    """Calls a function with the path of every leaf and the leaf, which may be `None`. Traces under Dynamo."""
    opened = None if isinstance(tree, Tensor) else _parts(tree)
    if opened is None:
        function(path, tree)
        return
    for entry, child in opened:
        visit_leaves(function, child, (*path, entry))


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Returns a tree of the same kind with every leaf replaced; a leaf may be `None`. Traces under Dynamo."""
    opened = None if isinstance(tree, Tensor) else _parts(tree)
    if opened is None:
        return function(tree)
    return _rebuild(tree, [(entry, map_leaves(function, child)) for entry, child in opened])


def _rebuild(node: Any, opened: list[tuple[Any, Any]]) -> Any:
    """Returns a node of the same kind with other children."""
    if type(node) in (dict, OrderedDict):
        return type(node)(opened)
    if type(node) is defaultdict:  # Dynamo does not trace its copy
        return defaultdict(node.default_factory, opened)
    if type(node) in (list, tuple):
        return type(node)(child for _, child in opened)
    values = [child for _, child in opened]
    if isinstance(node, torch.Size):
        return tuple(values)  # it holds integers only
    if isinstance(node, tuple):
        return node._make(values) if hasattr(node, "_make") else type(node)(values)
    if isinstance(node, (Mapping, Sequence)):
        return _rebuild_container(node, opened)
    if _registered(node) is not None:
        flattened = optree.tree_flatten_one_level(node)
        return flattened[-1](flattened[1], values)
    twin = copy.copy(node)
    for entry, child in opened:
        put(twin, entry, child)
    return twin


def _rebuild_container(node: Any, opened: list[tuple[Any, Any]]) -> Any:
    """Returns a mapping or sequence of the same kind, or a dict or list where that kind cannot be written.

    A read-only one would keep its old children, a wrapper whose copy shares its storage would change the original,
    and a TensorDict holds no `None`.
    """
    if isinstance(node, (MutableMapping, MutableSequence)):
        twin = copy.copy(node)
        if not _shares_storage(node, twin) and all(put(twin, entry, child) for entry, child in opened):
            return twin
    return dict(opened) if isinstance(node, Mapping) else [child for _, child in opened]


def _shares_storage(node: Any, twin: Any) -> bool:
    if isinstance(node, (dict, list)):
        return False
    mine, other = getattr(node, "__dict__", {}), getattr(twin, "__dict__", {})
    return any(
        value is other.get(name) and isinstance(value, (MutableMapping, MutableSequence))
        for name, value in mine.items()
    )


def put_at(tree: Any, path: Path, child: Any) -> bool:
    """Sets the node at a located path in place. Returns whether its parent could be written."""
    return bool(path) and put(find(tree, path[:-1]), path[-1], child)


def put(node: Any, entry: Any, child: Any) -> bool:
    """Sets a child in place. Returns whether the node could be written."""
    if isinstance(node, (MutableMapping, MutableSequence)):
        try:
            node[entry] = child
        except Exception:  # a TensorDict refuses None, and others may refuse in their own way
            return False
    elif isinstance(node, (Mapping, Sequence)) or not isinstance(entry, str):
        return False
    else:
        try:
            object.__setattr__(node, entry, child)  # a frozen dataclass too
        except AttributeError:  # the entry of a registered node need not be an attribute
            return False
    return True


def find(tree: Any, path: Path) -> Any:
    """Returns the node at a path, or `None` where there is none."""
    return find_at(tree, path)[1]


def find_at(tree: Any, path: Path) -> tuple[Path, Any]:
    """Returns the path to a node as `locate` does, and the node, or `None` where there is none."""
    node = tree
    located: Path = ()
    for entry in path:
        found = _step(node, entry)
        if found is None:
            return located, None
        node = found.child
        located = (*located, found.entry)
    return located, node


def values(tree: Any) -> list[Any]:
    """Returns every leaf that is not `None`. Traces under Dynamo."""
    opened = None if isinstance(tree, Tensor) else _parts(tree)
    if opened is None:
        return [] if tree is None else [tree]
    return [value for _, child in opened for value in values(child)]


def tensors(tree: Any) -> list[Tensor]:
    """Returns the tensors of a tree. Traces under Dynamo."""
    return [value for value in values(tree) if isinstance(value, Tensor)]


def describe(node: Any) -> str:
    """Returns a node in words for a message.

    Examples:
        >>> describe({"a": 1, "b": 2})
        "a dict with the keys 'a', 'b'"
    """
    if isinstance(node, Tensor):
        return f"a {type(node).__name__} of shape {tuple(node.shape)}"
    if node is None:
        return "None"
    article = "an" if type(node).__name__[0].lower() in "aeio" else "a"
    kind = f"{article} {type(node).__name__}"
    if isinstance(node, Mapping):
        keys = list(node.keys())  # the length of a TensorDict is its batch size
        return f"{kind} with the keys {_some(keys)}" if keys else f"{kind} without keys"
    if isinstance(node, tuple) and (fields := _fields(node)):
        return f"{kind} with the fields {_some(fields)}"
    if isinstance(node, Sequence) and not isinstance(node, _TEXT):
        return f"{kind} of length {len(node)}"
    opened = children(node)
    return kind if opened is None else f"{kind} with the attributes {_some(entry for entry, _ in opened)}"


def _some(entries: Any) -> str:
    shown = [repr(entry) for entry in entries]
    more = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _not_found(tree: Any, path: Path, depth: int, node: Any, name: str) -> str:
    reached = _paths.format(path[:depth])
    where = f"stopped at {reached!r}" if reached else "stopped at the root"
    text = f"the {name} has no {_paths.format(path)!r}. The walk {where}, {describe(node)}."
    if isinstance(node, Tensor):
        return text + " A path never goes into a tensor."
    siblings = {_paths.format((entry,)): entry for entry, _ in children(node) or ()}
    whole = _paths.format(path[depth:])  # a key with dots that was not quoted
    if whole in siblings.values():
        return text + did_you_mean(_paths.format((*path[:depth], whole)))
    near = nearest(_paths.format((path[depth],)), siblings)
    if near is not None:
        return text + did_you_mean(_paths.format((*path[:depth], siblings[near], *path[depth + 1 :])))
    everywhere = [_paths.format(leaf_path) for leaf_path, _ in leaves(tree)]
    last = _paths.format(path[-1:])
    moved = next((p for p in everywhere if p == last or p.endswith(f".{last}")), None)
    return text + did_you_mean(moved)
