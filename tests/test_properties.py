"""On random trees, with random terms, the container equals a naive recursion over the same trees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Pair, paths, trees
from torch import Tensor, nn

from torch_pathloss import ConstructionError, PathLossModule, Term, _paths

# The reference: paths are lists of plain entries, "*" and "**" stand for others, and every function is a recursion.


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


def absolute(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().sum() + output.sum()


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, dict):
        return list(tree.items())
    if isinstance(tree, Pair):
        return [("left", tree.left), ("right", tree.right)]
    if isinstance(tree, (list, tuple)):
        return list(enumerate(tree))
    return []


def is_leaf(tree: Any) -> bool:
    return isinstance(tree, Tensor)


def matches(tree: Any, path: list[Any], at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the exact paths of the nodes that a pattern matches."""
    if not path:
        return [at]
    if tree is None:
        return []
    entry, rest = path[0], path[1:]
    if entry == "*":
        return [found for key, child in nodes(tree) for found in matches(child, rest, (*at, key))]
    if entry == "**":
        here = matches(tree, rest, at) if rest else ([at] if is_leaf(tree) else [])
        below = [f for key, child in nodes(tree) if child is not None for f in matches(child, path, (*at, key))]
        return here + below
    # a namedtuple's child is reached by its field or its index
    reached = [
        (key, child)
        for index, (key, child) in enumerate(nodes(tree))
        if key == entry or (isinstance(tree, Pair) and index == entry)
    ]
    return [found for key, child in reached for found in matches(child, rest, (*at, key))]


def reach(tree: Any, path: tuple[Any, ...]) -> Any:
    for entry in path:
        if tree is None:
            return None
        tree = dict(nodes(tree))[entry]
    return tree


def subtree_sum(function: Any, output: Any, target: Any) -> Any:
    """Adds a function up over the leaves that neither tree leaves out."""
    if output is None or target is None:
        return 0.0
    if is_leaf(output):
        return function(output, target)
    return sum((subtree_sum(function, child, dict(nodes(target))[key]) for key, child in nodes(output)), 0.0)


def over_subtree(function: Any) -> Any:
    """A criterion on any node, for the container."""

    def criterion(output: Any, target: Any) -> Tensor:
        return torch.zeros((), dtype=torch.float64) + subtree_sum(function, output, target)

    return criterion


def reference(output: Any, target: Any, terms: list[Any]) -> Any:
    total: Any = 0.0
    for path, function, weight, mean in terms:
        values = []
        for found in matches(output, path):
            o, t = reach(output, found), reach(target, found)
            if o is not None and t is not None:
                values.append(subtree_sum(function, o, t))
        if values:
            total = total + weight * (sum(values) / len(values) if mean else sum(values))
    return total


# Random cases


@st.composite
def cases(draw: Any) -> Any:
    """Returns an output of numbers, a target of the same shape with holes, and terms whose paths exist."""
    shape = draw(trees(st.sampled_from([1, 2, 3, None])))
    positions: list[tuple[Any, ...]] = []

    def collect(tree: Any, at: tuple[Any, ...]) -> None:
        positions.append(at)
        for key, child in nodes(tree):
            collect(child, (*at, key))

    collect(shape, ())
    terms: dict[Any, Any] = {}
    for number in range(draw(st.integers(1, 5))):
        path = list(draw(st.sampled_from(positions)))
        for index in range(len(path)):
            if draw(st.integers(0, 3)) == 0:
                path[index] = "*"
        if draw(st.integers(0, 4)) == 0:
            path.append("**")
        elif path and draw(st.integers(0, 4)) == 0:
            path[: draw(st.integers(1, len(path)))] = ["**"]
        label = draw(st.sampled_from([None, f"l{number}"]))
        function = draw(st.sampled_from([squared, absolute]))
        weight = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.5]))
        terms.setdefault((tuple(path), label), (path, function, weight, draw(st.booleans())))
    holes = draw(st.sets(st.sampled_from(positions), max_size=2)) - {()}
    reverse = draw(st.booleans())
    return shape, holes, reverse, terms


def filled(shape: Any, generator: torch.Generator, requires_grad: bool) -> Any:
    if isinstance(shape, int):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)
    if isinstance(shape, dict):
        return {key: filled(child, generator, requires_grad) for key, child in shape.items()}
    if isinstance(shape, Pair):
        return Pair(*(filled(child, generator, requires_grad) for child in shape))
    if isinstance(shape, (list, tuple)):
        return type(shape)(filled(child, generator, requires_grad) for child in shape)
    return None


def with_holes(tree: Any, holes: set[Any], reverse: bool, at: tuple[Any, ...] = ()) -> Any:
    """Returns a target with some nodes `None`, another order of keys and keys that no output has."""
    if at in holes:
        return None
    if isinstance(tree, dict):
        items = [(key, with_holes(child, holes, reverse, (*at, key))) for key, child in tree.items()]
        return {"extra": "?", **dict(reversed(items) if reverse else items)}
    if isinstance(tree, Pair):
        return Pair(*(with_holes(child, holes, reverse, (*at, key)) for key, child in nodes(tree)))
    if isinstance(tree, (list, tuple)):
        return type(tree)(with_holes(child, holes, reverse, (*at, key)) for key, child in enumerate(tree))
    return tree


def text(path: list[Any], label: str | None) -> str:
    """Writes a path out, quoting every key."""
    written = ""
    for entry in path:
        if entry in ("*", "**"):
            written += ("." if written else "") + entry
        else:
            written += f'["{entry}"]' if isinstance(entry, str) else f"[{entry}]"
    return written if label is None else f"{written}:{label}"


def leaves(tree: Any) -> list[Tensor]:
    return [tree] if is_leaf(tree) else [leaf for _, child in nodes(tree) for leaf in leaves(child)]


@given(cases(), st.integers(0, 2**31))
def test_the_container_equals_a_naive_recursion(case, seed):
    shape, holes, reverse, terms = case
    generator = torch.Generator().manual_seed(seed)
    output = filled(shape, generator, requires_grad=True)
    target = with_holes(filled(shape, generator, requires_grad=False), holes, reverse)
    if output is None or target is None:
        return
    criterion = PathLossModule(
        {
            text(path, label): Term(over_subtree(function), match="mean" if mean else "sum")
            for (_, label), (path, function, _, mean) in terms.items()
        },
        weights={text(path, label): weight for (_, label), (path, _, weight, _) in terms.items()},
    ).double()
    expected = reference(output, target, list(terms.values()))
    loss = criterion(output, target)
    torch.testing.assert_close(loss, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    inputs = leaves(output)
    wanted = [torch.zeros_like(leaf) for leaf in inputs]
    if isinstance(expected, Tensor) and expected.requires_grad:
        found = torch.autograd.grad(expected, inputs, allow_unused=True)
        wanted = [zero if gradient is None else gradient for zero, gradient in zip(wanted, found, strict=True)]
    for way in ("call", "backward"):
        for leaf in inputs:
            leaf.grad = None
        if way == "call" and loss.requires_grad:
            loss.backward()
        elif way == "backward":
            torch.testing.assert_close(criterion.backward(output, target), loss.detach(), rtol=1e-12, atol=1e-12)
        for leaf, gradient in zip(inputs, wanted, strict=True):
            ours = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(ours, gradient, rtol=1e-12, atol=1e-12)


def spellings(path: tuple[Any, ...]) -> list[Any]:
    """Returns ways to give one path: canonical text, quoted text, tuple, and nested from any entry on."""
    texts = [_paths.format((entry,)) for entry in path]
    quoted = "".join(
        f"[{text!r}]" if isinstance(entry, str) and text == entry else text if text[0] == "[" or not i else f".{text}"
        for i, (entry, text) in enumerate(zip(path, texts, strict=True))
    )
    cuts = [(path[:cut], path[cut:]) for cut in range(1, len(path))]
    return [
        {_paths.format(path): nn.L1Loss()},
        {quoted: nn.L1Loss()},
        {path: nn.L1Loss()},
        *({_paths.format(outer): {_paths.format(inner): nn.L1Loss()}} for outer, inner in cuts),
        *({outer: {inner: nn.L1Loss()}} for outer, inner in cuts),
    ]


@given(paths.filter(bool), st.data())
def test_a_path_given_twice_by_any_spelling_raises(path, data):
    ways = spellings(path)
    first, second = (data.draw(st.sampled_from(ways)) for _ in range(2))
    # The outer "x" keeps both, though a dict holds a key once.
    assert len(PathLossModule({"x": first}).weights) == 1
    with pytest.raises(ConstructionError, match=r" is given twice"):
        PathLossModule({"x": first, '["x"]': second})
