"""Looking at a criterion: what its terms reach in an output, and what would fail."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from torch_pathloss import _paths, _tree
from torch_pathloss._errors import ArgumentError, CheckError, PathLossError, UncoveredError, UncoveredWarning, listed
from torch_pathloss._evaluate import Evaluation
from torch_pathloss._paths import Path
from torch_pathloss._plan import INPUT, OUTPUT, TREES, Computed, Condition, TermPlan
from torch_pathloss._term import Present, callable_name
from torch_pathloss.weighting import Weighting

if TYPE_CHECKING:
    from rich.table import Table

Uncovered: TypeAlias = Literal["ignore", "warn", "error"]
UNCOVERED = ("ignore", "warn", "error")


def _reached(evaluation: Evaluation) -> dict[Path, list[str]]:
    """Returns the names of the terms by the output paths that they read. Leaves out what does not exist."""
    output = evaluation.trees[OUTPUT]
    found: dict[Path, list[str]] = {}
    for term in evaluation.plan.terms:
        for read in term.reads:
            if read.tree != OUTPUT:
                continue
            try:
                for captures in evaluation.captures(term):
                    path = _tree.locate(output, _paths.fill(read.path, captures), TREES[OUTPUT])
                    names = found.setdefault(path, [])
                    if term.name not in names:
                        names.append(term.name)
            except PathLossError:
                continue
    return found


def _covered(evaluation: Evaluation) -> list[tuple[Path, Any, list[str]]]:
    """Returns every leaf of the output with the names of the terms that reach it or a node above it."""
    reached = _reached(evaluation)
    return [
        (path, leaf, [name for depth in range(len(path) + 1) for name in reached.get(path[:depth], ())])
        for path, leaf in _tree.leaves(evaluation.trees[OUTPUT])
    ]


def report_uncovered(evaluation: Evaluation, uncovered: Uncovered, warned: set[tuple[str, ...]]) -> None:
    """Warns of output tensors that no term reaches, once for each set of them and not in compiled code, or raises.

    Raises:
        UncoveredError: with ``uncovered="error"``.
    """
    if uncovered == "warn" and torch.compiler.is_compiling():
        return
    covered = _covered(evaluation)
    missed = tuple(_paths.format(path) for path, leaf, names in covered if isinstance(leaf, Tensor) and not names)
    if not missed or missed in warned:
        return
    text = (
        f"No term reaches the output {'leaf' if len(missed) == 1 else 'leaves'} {', '.join(map(repr, missed))}. "
        'Add a term, or build the module with uncovered="ignore".'
    )
    if uncovered == "error":
        raise UncoveredError(text)
    warned.add(missed)
    warnings.warn(text, UncoveredWarning, stacklevel=5)  # the caller of the module: past forward and two of torch's


@dataclass(frozen=True)
class _Row:
    """One line of an explanation."""

    tree: str
    shape: str = ""
    dtype: str = ""
    terms: str = ""
    mark: str = ""


@final
class Explanation(str):
    """What `PathLossModule.explain` returns: a plain text that rich, where it is installed, prints in colours."""

    __slots__ = ("_rows", "_tail")
    _rows: tuple[_Row, ...]
    _tail: tuple[str, ...]

    def __new__(cls, rows: Sequence[_Row], tail: Sequence[str]) -> Explanation:
        cells = [[row.tree, row.shape, row.dtype, row.terms, row.mark] for row in (_HEADER, *rows)]
        explanation = super().__new__(cls, "\n".join([*columns(cells), *tail]))
        explanation._rows = tuple(rows)
        explanation._tail = tuple(tail)
        return explanation

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, caption=Text("\n".join(self._tail)), caption_justify="left")
        for heading in (_HEADER.tree, _HEADER.shape, _HEADER.dtype, _HEADER.terms, ""):
            table.add_column(heading)
        for row in self._rows:
            mark = "red" if row.mark == _NO_TERM else "yellow"
            cells = ((row.tree, ""), (row.shape, "cyan"), (row.dtype, "dim"), (row.terms, "green"), (row.mark, mark))
            table.add_row(*(Text(text, style=style) for text, style in cells))
        return table


_HEADER = _Row("output", "shape", "dtype", "terms")
_NO_TERM = "no term"


def explain(evaluation: Evaluation, weights: Sequence[str]) -> Explanation:
    """Returns the output's tree, line by line, and below it the terms with what they read."""
    covered = _covered(evaluation)
    rows: list[_Row] = []
    _tree_rows([(path, leaf, names) for path, leaf, names in covered], 0, "", rows)
    tail = ["", "terms", *columns([["  " + shown_name(term.name), *_term_cells(evaluation, term, weight)]
            for term, weight in zip(evaluation.plan.terms, weights, strict=True)])]  # fmt: skip
    return Explanation(rows, tail)


def _tree_rows(leaves: list[tuple[Path, Any, list[str]]], depth: int, indent: str, rows: list[_Row]) -> None:
    groups: dict[Any, list[tuple[Path, Any, list[str]]]] = {}
    for leaf in leaves:
        if len(leaf[0]) == depth:  # the output is one leaf
            rows.append(_leaf_row("(root)", leaf))
            return
        groups.setdefault(leaf[0][depth], []).append(leaf)
    for number, (entry, group) in enumerate(groups.items(), 1):
        last = number == len(groups)
        text = f"{indent}{'└── ' if last else '├── '}{_entry_text(entry)}"
        if len(group[0][0]) == depth + 1:
            rows.append(_leaf_row(text, group[0]))
        else:
            rows.append(_Row(text))
            _tree_rows(group, depth + 1, indent + ("    " if last else "│   "), rows)


def _entry_text(entry: Any) -> str:
    return str(entry) if isinstance(entry, int) else _paths.format((entry,))


def _leaf_row(text: str, leaf: tuple[Path, Any, list[str]]) -> _Row:
    _, node, names = leaf
    if not isinstance(node, Tensor):
        return _Row(text, "None" if node is None else type(node).__name__, "", ", ".join(map(shown_name, names)))
    mark = _NO_TERM if not names else f"{len(names)} terms" if len(names) > 1 else ""
    return _Row(text, _shape(node), _dtype(node), ", ".join(map(shown_name, names)), mark)


def shown_name(name: str) -> str:
    """Returns a name that is visible: the root's is empty."""
    return name or '""'


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _term_cells(evaluation: Evaluation, term: TermPlan, weight: str) -> list[str]:
    module = evaluation.container.get_submodule(term.call.child)
    cells = [callable_name(module), f"weight {weight}", term.sources]
    if evaluation.inactive is not None and term.name in evaluation.inactive:
        return [*cells, "absent: its schedule is in an inactive phase"]
    try:
        matches = evaluation.captures(term)
        if not matches:
            return [*cells, "absent: its pattern matches nothing"]
        read = [_read(evaluation, term, captures) for captures in matches]
    except PathLossError as error:
        return [*cells, f"fails: {error}"]
    return [*cells, read[0] if len(read) == 1 else f"{len(read)} matches, the first: {read[0]}"]


def _read(evaluation: Evaluation, term: TermPlan, captures: tuple[Path, ...]) -> str:
    shown = []
    masking = () if isinstance(term.where, Condition) else term.masking
    for read in dict.fromkeys((*term.reads, *masking)):
        path = _paths.fill(read.path, captures)
        node = _tree.walk(evaluation.tree(read), path, TREES[read.tree])
        if node is None and read.tree != INPUT:
            return f"absent: the {TREES[read.tree]} has None at {_paths.format(path)!r}"
        shown.append(_shape(node) if isinstance(node, Tensor) else type(node).__name__)
    return " and ".join(shown)


def columns(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def check(evaluation: Evaluation, uncovered: Uncovered, weighting: Weighting | None) -> None:
    """Runs every term by itself, in this process alone, and leaves buffers and random numbers as they were.

    Raises:
        CheckError: listing what failed.
    """
    problems: list[str] = []
    present: list[Present] = []
    with unchanged(evaluation.container):
        for term in evaluation.plan.terms:
            try:
                value = evaluation.value(term)
                if value is None:
                    evaluation.zero(term)
                present.append(value is not None and evaluation.selected.get(term.name, True))
                if value is not None and term.where is not None:
                    _check_gradient(evaluation, term, value)
            except PathLossError as error:
                problems.append(f"Term {term.name!r}: {error}")
            except Exception as error:
                problems.append(f"Term {term.name!r}: its criterion raised {type(error).__name__}: {error}")
    if weighting is not None and not problems:
        try:
            weighting.check_present(present)
        except PathLossError as error:
            problems.append(str(error))
    if uncovered == "error":
        try:
            report_uncovered(evaluation, uncovered, set())
        except UncoveredError as error:
            problems.append(str(error))
    if problems:
        raise CheckError(f"This output and target do not fit the criterion:{listed(problems)}")


def _check_gradient(evaluation: Evaluation, term: TermPlan, value: Tensor) -> None:
    """Raises if a shared computation makes the gradient of a conditional term NaN, of which a call would say nothing.

    Raises:
        ArgumentError: naming a source.
    """
    shared = [argument for argument in term.call.arguments if isinstance(argument, Computed)]
    leaves = [
        leaf
        for captures in evaluation.captures(term)
        for leaf in evaluation.output_leaves(term.reads, captures)
        if leaf.requires_grad
    ]
    if not shared or not leaves or not value.requires_grad or not value.isfinite():
        return
    gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    if not all(gradient is None or gradient.isfinite().all() for gradient in gradients):
        raise ArgumentError(
            "its value is finite, but its gradient at the output is not. What is Shared is computed from all samples, "
            "also those that where leaves out, and its derivative has to be finite there. "
            "Do that computation in the criterion, which sees other values in their place."
        )


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Leaves the buffers of a module and the random numbers as they are.

    Written back without a new version, for a graph that saved a buffer could not run backward any more. Whether one
    was written to is not known: batch norm does not count its writes as versions either (torch 2.13).
    """
    before = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_inference()]
    devices = {buffer.device for buffer, _ in before if buffer.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.data.copy_(value)


def check_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises if a parameter of the module that requires grad is in no group of the optimizer.

    Raises:
        CheckError: naming the parameters.
    """
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in optimized]
    if missing:
        raise CheckError(
            f"The criterion has parameters that {type(optimizer).__name__} does not train: "
            f"{', '.join(map(repr, missing))}. Pass [*model.parameters(), *criterion.parameters()] to the optimizer."
        )
