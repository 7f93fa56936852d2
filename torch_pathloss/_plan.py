"""Plans: from the constructor's arguments to plain data that says what each call does."""

from __future__ import annotations

import numbers
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from torch_pathloss import _paths
from torch_pathloss._errors import (
    ArgumentError,
    ConstructionError,
    PathLossError,
    PathSyntaxError,
    UnknownTermError,
    listed,
)
from torch_pathloss._names import Names
from torch_pathloss._paths import Name, Path
from torch_pathloss._term import (
    FunctionCriterion,
    Input,
    Match,
    Output,
    Reduction,
    Shared,
    Source,
    Target,
    Term,
    arguments_text,
    callable_name,
    is_classwise,
    is_elementwise,
    is_schedule,
    not_a_call,
    not_a_criterion,
    not_a_weight,
    options_text,
    with_defaults,
)
from torch_pathloss.schedules import value_at

OUTPUT, TARGET, INPUT = range(3)
TREES = ("output", "target", "input")


@dataclass(frozen=True)
class Read:
    """An argument that is the node of a tree."""

    tree: int
    path: Path
    is_pattern: bool


@dataclass(frozen=True)
class Computed:
    """An argument that is a shared computation, by its position in the plan."""

    index: int
    is_pattern: bool


@dataclass(frozen=True)
class Stored:
    """A constant tensor, by the name under which it is registered."""

    name: str


@dataclass(frozen=True)
class Constant:
    """Any other constant."""

    value: Any


@dataclass(frozen=True)
class Condition:
    """A child module that makes the mask of a term from the whole output and target."""

    child: str


Argument: TypeAlias = Read | Computed | Stored | Constant

_WHOLE = (Read(OUTPUT, (), False), Read(TARGET, (), False))
"""What a condition reads."""


@dataclass(frozen=True)
class Call:
    """A child module and what it is called with."""

    child: str
    positional: tuple[Argument, ...]
    keywords: tuple[tuple[str, Argument], ...] = ()
    is_elementwise: bool = False
    is_classwise: bool = False

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return (*self.positional, *(argument for _, argument in self.keywords))


@dataclass(frozen=True)
class TermPlan:
    """One term: its name, its call, and how the result becomes a value."""

    name: str
    path: Path
    path_text: str
    call: Call
    sources: str
    reduction: Reduction | None
    match: Match
    reads: tuple[Read, ...]
    """Every node that the term reads, through shared computations too."""
    driver: Read | None
    """The read whose matches the term is summed over, if it is a pattern."""
    where: Argument | Condition | None = None
    masking: tuple[Read, ...] = ()
    """Every node that the mask is made of."""
    normalizer: Argument | None = None
    arguments: tuple[Read, ...] = ()
    """Those of the reads that are not of the output."""
    counted: tuple[Read, ...] = ()
    """Every node that the normalizer reads."""


@dataclass(frozen=True)
class Plan:
    """What each call does: terms in declared order, and the shared computations that they name."""

    terms: tuple[TermPlan, ...]
    shared: tuple[Call, ...]
    boundaries: tuple[bool, ...]
    """After each term, whether no shared computation is used on both sides."""
    identity: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False, repr=False)
    """Stands for all the rest where compiled code asks whether it was compiled for this plan. See `_compile`."""


@dataclass(frozen=True)
class Bound:
    """A plan, the initial weights, and what the container has to register for it."""

    plan: Plan
    names: Names
    weights: tuple[Any, ...]
    """Floats, 0-dim tensors and schedules."""
    modules: dict[str, nn.Module]
    tensors: dict[str, Tensor]


def bind(losses: Any, weights: Any) -> Bound:
    """Makes the plan.

    Raises:
        ConstructionError: listing every problem of the arguments.
    """
    return _Binder().bind(losses, weights)


def flatten(structure: Any, problems: list[str]) -> Iterator[tuple[Name, Any]]:
    """Yields the leaves of a nested structure of criteria, weights or schedules with their names, in order."""
    yield from _flatten(structure, (), problems)


def _flatten(structure: Any, prefix: Path, problems: list[str]) -> Iterator[tuple[Name, Any]]:
    for name, value in _items(structure, prefix, problems):
        if value is None:
            continue
        if not _is_nested(value):
            yield name, value
        elif name.label is None:
            yield from _flatten(value, name.path, problems)
        else:
            problems.append(f"The label of {_paths.format(*name)!r} needs one criterion, not a nested {_kind(value)}.")


def _items(structure: Any, prefix: Path, problems: list[str]) -> Iterator[tuple[Name, Any]]:
    if not _is_nested(structure):
        yield Name(prefix), structure
    elif isinstance(structure, (Mapping, nn.ModuleDict)):
        for key, value in structure.items():
            try:
                # An int in a mapping is a key like any other: it matches exactly.
                path, label = _paths.parse_name((key,) if type(key) is int else key)
            except PathSyntaxError as error:
                problems.append(str(error))
            else:
                yield Name((*prefix, *path), label), value
    else:
        fields = getattr(structure, "_fields", None)
        for index, value in enumerate(structure):
            yield Name((*prefix, fields[index] if fields else _paths.Number(index))), value


def _is_nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple, nn.ModuleDict, nn.ModuleList))


def _kind(value: Any) -> str:
    return type(value).__name__


class _Binder:
    """Collects problems while it makes a plan, so that all of them can be told at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.shared: list[Call] = []
        self.shared_reads: list[tuple[Read, ...]] = []
        self.shared_positions: dict[Any, int] = {}

    def bind(self, losses: Any, weights: Any) -> Bound:
        names, terms = self.terms(losses)
        if not terms and not self.problems:
            self.problems.append("There are no terms: every criterion is None or the mapping is empty.")
        plans = [self.term(name, term) for name, term in terms if term is not None]
        plan = self.plan(tuple(p for p in plans if p is not None))
        values = self.weights(weights, names, [1.0 if term is None else term.weight for _, term in terms])
        if self.problems:
            raise ConstructionError(f"PathLossModule cannot be built:{listed(self.problems)}")
        return Bound(plan, names, values, self.modules, self.tensors)

    def plan(self, terms: tuple[TermPlan, ...]) -> Plan:
        users: dict[int, list[int]] = {}
        for position, term in enumerate(terms):
            for index in _computed_by(term, self.shared):
                users.setdefault(index, []).append(position)
        boundaries = tuple(
            not any(min(positions) <= position < max(positions) for positions in users.values())
            for position in range(len(terms))
        )
        return Plan(terms, tuple(self.shared), boundaries)

    def terms(self, losses: Any) -> tuple[Names, list[tuple[Name, Term | None]]]:
        names = Names()
        terms: list[tuple[Name, Term | None]] = []
        for name, value in flatten(losses, self.problems):
            text = _paths.format(*name)
            if (twin := names.find(name)) is not None:
                other = _paths.format(*terms[twin][0])
                self.problems.append(
                    f"Term {text!r} is given twice{'' if other == text else f', also as {other!r}'}. "
                    "Give several criteria on one node labels, as in 'mask:dice' and 'mask:bce'."
                )
                continue
            names.add(name)  # a term that fails still has a name, so that its weight is no second problem
            if isinstance(value, Term):
                terms.append((name, value))
            elif problem := not_a_criterion(value):
                self.problems.append(f"Term {text!r}: {problem}")
                terms.append((name, None))
            else:
                terms.append((name, Term(value)))
        return names, terms

    def weights(self, weights: Any, names: Names, values: list[Any]) -> tuple[Any, ...]:
        given: set[int] = set()
        if weights is not None and not _is_nested(weights) and names.find(Name(())) is None:
            self.problems.append(f"weights= must be a mapping from names of terms to weights, not {weights!r}.")
            return tuple(values)
        for name, value in flatten({} if weights is None else weights, self.problems):
            try:
                position = names.index_of(name)
            except UnknownTermError as error:
                self.problems.append(f"A weight is given for {_paths.format(*name)!r}. {error}")
                continue
            text = list(names)[position]
            if position in given:
                self.problems.append(f"The weight of {text!r} is given twice in weights=.")
            elif problem := not_a_weight(value):
                self.problems.append(f"The weight of {text!r}: {problem}")
            elif not isinstance(values[position], numbers.Real) or values[position] != 1.0:
                self.problems.append(f"The weight of {text!r} is given both in its Term and in weights=. Give it once.")
            else:
                values[position] = value
            given.add(position)
        for text, value in zip(names, values, strict=True):
            if is_schedule(value):
                try:
                    value_at(value, 0)
                except ArgumentError as error:
                    self.problems.append(f"The weight of {text!r}: {error}")
            elif isinstance(value, Tensor) and (problem := not_a_weight(float(value))):
                self.problems.append(f"The weight of {text!r}: {problem}")
        return tuple(values)

    def term(self, name: Name, term: Term) -> TermPlan | None:
        text = _paths.format(*name)
        child = _paths.encode(*name)
        positional, keywords = with_defaults(term, name.path)
        if problem := not_a_call(term, positional, keywords):
            self.problems.append(f"Term {text!r}: {problem}")
            return None
        if not any(isinstance(source, Source) for source in (*positional, *keywords.values())):
            self.problems.append(f"Term {text!r} has no source, only constants. Name at least one Output('...').")
            return None
        self.modules[child] = self.module(term.criterion)
        call = self.call(child, positional, keywords)
        call = replace(call, is_elementwise=is_elementwise(term.criterion), is_classwise=is_classwise(term.criterion))
        reads = self.reads(call.arguments)
        where, normalizer = self.condition(term, child), self.normalizer(term)
        masking: tuple[Read, ...] = ()
        if where is not None:
            masking = _WHOLE if isinstance(where, Condition) else self.reads((where,))
        try:
            driver = _driver(reads, masking)
            counted = () if normalizer is None else self.reads((normalizer,))
            if any(read.is_pattern for read in counted):
                raise PathLossError(
                    f"the normalizer {term.normalizer!r} is a pattern. Its count serves all matches, so that every "
                    "process adds up one number; make it with Shared(function, Target('...'))."
                )
        except PathLossError as error:
            self.problems.append(f"Term {text!r}: {error}")
            return None
        return TermPlan(
            name=text,
            path=name.path,
            path_text=_paths.format(name.path),
            call=call,
            sources=", ".join((arguments_text(positional, keywords), *options_text(term))),
            reduction=term.reduction,
            match=term.match,
            reads=reads,
            driver=driver,
            where=where,
            masking=masking,
            normalizer=normalizer,
            arguments=tuple(read for read in reads if read.tree != OUTPUT),
            counted=counted,
        )

    def condition(self, term: Term, child: str) -> Argument | Condition | None:
        if term.where is None or isinstance(term.where, Source):
            return None if term.where is None else self.argument(term.where, "")
        name = f"{child}~where"
        self.modules[name] = self.module(term.where)
        return Condition(name)

    def normalizer(self, term: Term) -> Argument | None:
        return None if term.normalizer is None else self.argument(term.normalizer, "")

    def module(self, function: Callable[..., Any]) -> nn.Module:
        return function if isinstance(function, nn.Module) else FunctionCriterion(function)

    def call(self, child: str, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Call:
        return Call(
            child,
            tuple(self.argument(source, f"{child}~={i}") for i, source in enumerate(positional)),
            tuple((key, self.argument(source, f"{child}~={key}")) for key, source in keywords.items()),
        )

    def argument(self, source: Any, name: str) -> Argument:
        for tree, kind in enumerate((Output, Target, Input)):
            if isinstance(source, kind):
                return Read(tree, source.path, _paths.has_wildcard(source.path))
        if isinstance(source, Shared):
            position = self.share(source)
            return Computed(position, any(read.is_pattern for read in self.shared_reads[position]))
        if isinstance(source, Tensor):
            self.tensors[name] = source
            return Stored(name)
        if isinstance(source, nn.Module):
            self.modules[name] = source
            return Stored(name)
        if _holds(source, (nn.Parameter, nn.Module)):
            self.problems.append(
                f"{_kind(source)} is a constant, and the parameters in it would be neither trained nor moved. "
                "Give them one by one, or as an nn.ModuleList, nn.ModuleDict or nn.ParameterList."
            )
        elif _holds(source, Source):
            self.problems.append(
                f"{source!r} is a constant, and the source in it would not be read. "
                "Give sources one by one, or make the container with Shared(function, *sources)."
            )
        return Constant(source)

    def share(self, shared: Shared) -> int:
        key = _shared_key(shared)
        if key not in self.shared_positions:
            # Inner computations come first, so that the plan can be run from front to back.
            child = f"~shared:{callable_name(shared.function).split('(')[0].translate({ord('.'): '_'})}"
            child = next(n for i in range(1_000_000) if (n := f"{child}:{i}" if i else child) not in self.modules)
            self.modules[child] = self.module(shared.function)
            call = self.call(child, shared.sources, shared.keyword_sources)
            reads = self.reads(call.arguments)
            self.shared_positions[key] = len(self.shared)
            self.shared.append(call)
            self.shared_reads.append(reads)
        return self.shared_positions[key]

    def reads(self, arguments: tuple[Argument, ...]) -> tuple[Read, ...]:
        found: list[Read] = []
        for argument in arguments:
            if isinstance(argument, Read):
                found.append(argument)
            elif isinstance(argument, Computed):
                found.extend(self.shared_reads[argument.index])
        return tuple(dict.fromkeys(found))


def _computed_by(term: TermPlan, shared: list[Call]) -> set[int]:
    """Returns the shared computations that a term uses, directly or through others."""
    return _computed((*term.call.arguments, term.where, term.normalizer), shared)


def _computed(arguments: tuple[Any, ...], shared: list[Call]) -> set[int]:
    direct = {argument.index for argument in arguments if isinstance(argument, Computed)}
    return direct.union(*(_computed(shared[index].arguments, shared) for index in direct))


def _shared_key(shared: Shared) -> Any:
    def key(source: Any) -> Any:
        if isinstance(source, Shared):
            return _shared_key(source)
        if isinstance(source, float):
            return (float, repr(source))  # 0.0 and -0.0 are equal, but not the same
        if isinstance(source, (Source, str, int, bool, type(None))):
            return (type(source), source)
        return id(source)

    named = tuple((name, key(source)) for name, source in shared.keyword_sources.items())
    return (id(shared.function), *map(key, shared.sources), named)


def _holds(value: Any, kind: Any) -> bool:
    """Whether a list, tuple or mapping has something of a kind in it."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(isinstance(v, kind) or _holds(v, kind) for v in value)


def _driver(reads: tuple[Read, ...], where: tuple[Read, ...]) -> Read | None:
    patterns = [read for read in reads if read.is_pattern]
    if not patterns:
        if any(read.is_pattern for read in where):
            raise PathLossError("where is a pattern, but no source of the criterion is. Write its path out.")
        return None
    driver = next((read for read in patterns if read.tree == OUTPUT), patterns[0])
    wildcards = [entry for entry in driver.path if isinstance(entry, _paths.Wildcard)]
    for read in (*patterns, *(read for read in where if read.is_pattern)):
        if [entry for entry in read.path if isinstance(entry, _paths.Wildcard)] != wildcards:
            raise PathLossError(
                f"the patterns {_paths.format(driver.path)!r} of the {TREES[driver.tree]} and "
                f"{_paths.format(read.path)!r} of the {TREES[read.tree]} have different wildcards. "
                "The matches of the first fill the wildcards of the others, so they must agree in kind and order."
            )
    return driver
