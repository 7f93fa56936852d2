"""Terms and sources: what a criterion is called with, and how its result becomes a value."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_pathloss import _paths
from torch_pathloss._errors import ConstructionError, listed
from torch_pathloss._paths import Path
from torch_pathloss.schedules import Schedule

Criterion: TypeAlias = Callable[..., Tensor]
Reduction: TypeAlias = Literal["mean", "weighted_mean", "sum"]
Match: TypeAlias = Literal["sum", "mean"]

Present: TypeAlias = bool | Tensor
"""Whether a term is present in a call: a 0-dim bool tensor where that depends on data."""

REDUCTIONS = ("mean", "weighted_mean", "sum")
MATCHES = ("sum", "mean")


class Source:
    """Where an argument of a criterion comes from. One of `Output`, `Target`, `Input` and `Shared`."""


class _Node(Source):
    """A source that is a node of one tree."""

    def __init__(self, path: str | Path) -> None:
        self.path = _paths.parse(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_paths.format(self.path)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Node) and type(other) is type(self) and other.path == self.path

    def __hash__(self) -> int:
        return hash((type(self), self.path))


@final
class Output(_Node):
    """The node of the model's output at a path.

    Args:
        path: dotted text, such as ``"student.logits"``, or a tuple of entries. ``""`` is the whole output.

    Raises:
        PathSyntaxError: if the path cannot be parsed.

    Examples:
        >>> from torch_pathloss import Output
        >>> Output("student.logits")
        Output('student.logits')
    """


@final
class Target(_Node):
    """The node of the target at a path. As `Output` otherwise.

    Examples:
        >>> from torch_pathloss import Target
        >>> Target(("boxes", 0))
        Target('boxes[0]')
    """


@final
class Input(_Node):
    """The node at a path of what the call is given as ``input``: the model's input or the whole batch.

    A node that is `None` is passed on as `None`; it does not make the term absent.

    Examples:
        >>> from torch_pathloss import Input
        >>> Input("lengths")
        Input('lengths')
    """


@final
class Shared(Source):
    """A computation that is done once a call, however many terms name it.

    Two `Shared` with the same function and the same sources are one computation, as common-subexpression
    elimination makes them in compiled code. If one of its sources is absent, so is every term that names it.

    Args:
        function: a callable or a module; a module is registered with the container.
        *sources: its arguments: `Output`, `Target`, `Input` or `Shared`; any other value is a constant.
        **keyword_sources: its keyword arguments, as ``sources``.

    Raises:
        ConstructionError: if ``function`` is not callable.

    Examples:
        >>> import torch
        >>> from torch_pathloss import Output, Shared
        >>> Shared(torch.sigmoid, Output("mask"))
        Shared(sigmoid, Output('mask'))
    """

    def __init__(self, function: Callable[..., Any], *sources: Any, **keyword_sources: Any) -> None:
        if problem := not_a_criterion(function):
            raise ConstructionError(f"Shared needs a function: {problem}")
        self.function = function
        self.sources = sources
        self.keyword_sources = keyword_sources

    def __repr__(self) -> str:
        return f"Shared({callable_name(self.function)}, {arguments_text(self.sources, self.keyword_sources)})"


@final
class Term:
    r"""One criterion, what it is called with, and how its result becomes a scalar *value*.

    A plain criterion under a path is short for ``Term(criterion)``. With :math:`a_1, \dots, a_n` the arguments read
    from the sources and :math:`r` the reduction, the value of the term is

    .. math::
        v = r(\mathrm{criterion}(a_1, \dots, a_n))

    and for a pattern with matches :math:`1, \dots, M` it is :math:`\sum_m v_m`, or :math:`\frac1M \sum_m v_m` with
    ``match="mean"``. It enters the total as :math:`w v`, where :math:`w` is the weight.

    With ``where``, a mask :math:`m` with elements 0 and 1 that stand for samples, the arguments of samples that are
    not selected are replaced by finite ones before the criterion sees them, and :math:`r` is taken over the selected
    samples. With ``normalizer``, whose elements add up to :math:`c`, the value is

    .. math::
        v = \frac{W}{\max(1, \sum_{\text{ranks}} c)} \sum_i \ell_i

    where :math:`W` is the number of processes, so that the mean over them, which DistributedDataParallel takes of the
    gradients, is that of one process with the whole batch.

    Args:
        criterion: a module or any callable that returns a tensor.
        *sources: the positional arguments: `Output`, `Target`, `Input`, `Shared`; any other value is a constant.
            Default: ``Output(path), Target(path)`` for the path under which the term stands.
            A constant tensor becomes a buffer that is not saved, a constant parameter a parameter of the container.
        weight: the weight :math:`w`: a float, a 0-dim tensor or a schedule, a function from the step to a float
            (see `torch_pathloss.schedules`). A source given here is the criterion's keyword argument ``weight``
            instead (class weights per batch). Default: 1.0.
        reduction: ``None`` if the criterion returns a scalar. Else what makes a scalar of the unreduced result
            :math:`\ell` with :math:`n` elements and of the sample weights :math:`s` (1 where none are given):
            ``"mean"`` is :math:`\frac1n \sum_i s_i \ell_i` (as Keras does), ``"weighted_mean"`` is
            :math:`\sum_i s_i \ell_i / \sum_i s_i`, and ``"sum"`` is :math:`\sum_i s_i \ell_i`. Default: ``None``.
        where: which samples the term is computed on: a source, or a callable ``(output, target) -> mask``, of a bool
            tensor. 0-dim, it switches the whole term; with more dimensions, which are the first ones of the result and
            of every argument from the output or the target, or for a result of the shape ``(N, d1, ...)`` those of
            arguments ``(N, C, d1, ...)``, it selects samples. Then the criterion must not reduce by itself, and must
            treat samples one by one. The value of an empty selection is 0 with zero gradient, and the term counts as
            absent in `PathLossModule.last` and for a weighting. Default: ``None``, all.
        normalizer: what a summed value is divided by: a source whose elements add up to a count (boxes, tokens, valid
            pixels), at least 1, or a number. Summed over the processes of `torch.distributed`, so every process has
            to call the criterion, and over micro-batches in `PathLossModule.accumulate`. Default: ``None``.
        match: ``"sum"`` or ``"mean"`` over the matches of a pattern. Default: ``"sum"``.
        **keyword_sources: the keyword arguments, as ``sources``. A keyword that names the criterion's first or
            second parameter takes the place of the default source for it.

    Raises:
        ConstructionError: if the criterion is not callable, the weight is not a finite number or a schedule, an option
            is unknown, or a normalizer is given for what is a mean already.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import Input, Output, PathLossModule, Target, Term
        >>> criterion = PathLossModule({"logits": Term(nn.CrossEntropyLoss(), target=Target("label"))})
        >>> loss = criterion({"logits": torch.zeros(2, 4)}, {"label": torch.tensor([0, 3])})
        >>> round(loss.item(), 4)  # ln 4
        1.3863

        >>> Term(nn.CTCLoss(), input_lengths=Input("lengths"), target_lengths=Input("text_lengths"))
        Term(CTCLoss(), input_lengths=Input('lengths'), target_lengths=Input('text_lengths'))

        >>> box = Term(nn.L1Loss(reduction="none"), where=Input("has_box"), reduction="mean")
        >>> output, target = {"box": torch.ones(2, 4)}, {"box": torch.tensor([[3.0] * 4, [torch.nan] * 4])}
        >>> PathLossModule({"box": box})(output, target, input={"has_box": torch.tensor([True, False])})
        tensor(2.)
    """

    def __init__(
        self,
        criterion: Criterion,
        *sources: Any,
        weight: Any = 1.0,
        reduction: Reduction | None = None,
        where: Any = None,
        normalizer: Any = None,
        match: Match = "sum",
        **keyword_sources: Any,
    ) -> None:
        if isinstance(weight, Source):
            keyword_sources["weight"] = weight
            weight = 1.0
        problems = [
            problem
            for problem in (
                not_a_criterion(criterion),
                not_a_weight(weight),
                _not_one_of("reduction", reduction, (None, *REDUCTIONS)),
                _not_a_condition(where),
                _not_a_normalizer(normalizer, reduction, criterion),
                _not_one_of("match", match, MATCHES),
            )
            if problem
        ]
        if problems:
            raise ConstructionError(f"Term cannot be built:{listed(problems)}")
        self.criterion = criterion
        self.sources = sources
        self.keyword_sources = keyword_sources
        self.weight = weight
        self.reduction = reduction
        self.where = where
        self.normalizer = normalizer
        self.match = match

    def __repr__(self) -> str:
        shown = [callable_name(self.criterion)]
        if self.sources or self.keyword_sources:
            shown.append(arguments_text(self.sources, self.keyword_sources))
        if not (isinstance(self.weight, numbers.Real) and self.weight == 1.0):
            shown.append(f"weight={self.weight!r}")
        if self.reduction is not None:
            shown.append(f"reduction={self.reduction!r}")
        shown.extend(options_text(self))
        if self.match != "sum":
            shown.append(f"match={self.match!r}")
        return f"Term({', '.join(shown)})"


def arguments_text(positional: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """Returns sources as they stand in a call, constant tensors by their shapes."""

    def text(source: Any) -> str:
        if isinstance(source, Tensor):
            return f"<{type(source).__name__} of shape {tuple(source.shape)}>"
        return repr(source)

    return ", ".join([*map(text, positional), *(f"{name}={text(source)}" for name, source in keywords.items())])


def _not_one_of(option: str, value: Any, allowed: tuple[Any, ...]) -> str | None:
    if value in allowed:
        return None
    return f"{option} must be one of {', '.join(map(repr, allowed))}, not {value!r}."


def options_text(term: Term) -> list[str]:
    """Returns the options of a term that read something, as they stand in a call."""
    shown = []
    if term.where is not None:
        shown.append(f"where={term.where if isinstance(term.where, Source) else callable_name(term.where)}")
    if term.normalizer is not None:
        shown.append(f"normalizer={term.normalizer!r}")
    return shown


def _not_a_condition(where: Any) -> str | None:
    if where is None or isinstance(where, Source) or (callable(where) and not isinstance(where, type)):
        return None
    return (
        f"where must be a source, such as Input('has_box'), or a callable (output, target) -> bool tensor, "
        f"not {where!r} of type {type(where).__name__}."
    )


def _not_a_normalizer(normalizer: Any, reduction: Any, criterion: Any) -> str | None:
    if normalizer is None:
        return None
    if isinstance(normalizer, bool) or not isinstance(normalizer, (Source, numbers.Real)):
        return (
            f"normalizer must be a source, such as Target('count'), or a number, "
            f"not {normalizer!r} of type {type(normalizer).__name__}."
        )
    if reduction in ("mean", "weighted_mean"):
        return f'normalizer divides a sum, but the reduction is {reduction!r}. Use reduction="sum".'
    if reduction is None and getattr(criterion, "reduction", None) == "mean":
        return (
            f"normalizer divides a sum, but {callable_name(criterion)} returns a mean. "
            'Build it with reduction="sum", or with reduction="none" and the Term with reduction="sum".'
        )
    return None


def not_a_criterion(value: Any) -> str | None:
    """Returns what is wrong with a value that should be a criterion, or `None`."""
    if isinstance(value, type):
        return f"{value.__name__} is a class. Did you mean {value.__name__}()?"
    if not callable(value):
        return f"{value!r} of type {type(value).__name__} is not callable."
    inner = _unwrapped(value)
    if isinstance(inner, nn.Module) and getattr(inner.forward, "__func__", None) is nn.Module.forward:
        return f"a {type(inner).__name__} has no forward, so that it cannot be called."
    return None


def not_a_weight(value: Any) -> str | None:
    """Returns what is wrong with a value that should be a weight or a schedule, or `None`."""
    if is_schedule(value):
        return None
    if isinstance(value, Tensor):
        if value.dim() != 0 or not (value.is_floating_point() or value.dtype in (torch.int32, torch.int64)):
            found = f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            return f"a weight must be a float, a 0-dim tensor or a schedule, not {found}."
        if value.requires_grad:
            return "a weight that requires grad would not be trained, since its value is copied. Pass weight.detach()."
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return f"a weight must be a float, a 0-dim tensor or a schedule, not {value!r} of type {type(value).__name__}."
    if not math.isfinite(value):
        return f"a weight must be finite, not {value!r}."
    if abs(float(value)) > torch.finfo(torch.float32).max:
        return f"a weight is stored in float32, where {value!r} is infinite."
    return None


def is_schedule(weight: Any) -> bool:
    """Whether a weight is a function of the step."""
    return isinstance(weight, Schedule) or (
        callable(weight) and not isinstance(weight, (type, Tensor, nn.Module, Source))
    )


def callable_name(function: Callable[..., Any]) -> str:
    """Returns a criterion as one line of text."""
    if isinstance(function, nn.Module):
        text = repr(function)
        return text if "\n" not in text else f"{type(function).__name__}(...)"
    function = getattr(function, "func", function)  # a functools.partial
    return getattr(function, "__name__", None) or type(function).__name__


class FunctionCriterion(nn.Module):
    """A plain callable as a module, so that every criterion is a child of the container."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        inner = _unwrapped(function)
        if isinstance(inner, nn.Module):  # its parameters and buffers are seen through a functools.partial too
            self.module = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return callable_name(self.function)


def parameters_behind(function: Any, visited: set[int] | None = None) -> list[nn.Parameter]:
    """Returns the parameters of what a plain function closes over, is bound to, or names."""
    visited = set() if visited is None else visited
    if id(function) in visited:
        return []
    visited.add(id(function))
    if isinstance(function, nn.Parameter):
        return [function]
    if isinstance(function, nn.Module):
        return list(function.parameters())
    if isinstance(function, functools.partial):
        behind = [function.func, *function.args, *function.keywords.values()]
    else:
        owner = getattr(function, "__self__", None)
        behind = [owner] if isinstance(owner, nn.Module) else []
        code, known = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        behind += [known[name] for name in (code.co_names if code else ()) if name in known]
        behind += [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    found = [p for inner in behind if _may_hold_parameters(inner) for p in parameters_behind(inner, visited)]
    return list(dict.fromkeys(found))


def _may_hold_parameters(value: Any) -> bool:
    return isinstance(value, (nn.Module, nn.Parameter, functools.partial, types.FunctionType, types.MethodType))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


_ELEMENTWISE_MODULES = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.GaussianNLLLoss,
    nn.HingeEmbeddingLoss,
    nn.KLDivLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    nn.MultiLabelSoftMarginLoss,
)
_ELEMENTWISE_FORWARDS = frozenset(module.forward for module in _ELEMENTWISE_MODULES)
_ELEMENTWISE_FUNCTIONS = frozenset(
    (
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.gaussian_nll_loss,
        F.hinge_embedding_loss,
        F.kl_div,
        F.poisson_nll_loss,
        F.soft_margin_loss,
        F.multilabel_soft_margin_loss,
    )
)


def _unwrapped(criterion: Criterion) -> Criterion:
    """Returns what a `functools.partial` was given, or `torch.compile` if it was a module."""
    if isinstance(criterion, functools.partial):
        return _unwrapped(criterion.func)
    return criterion._modules.get("_orig_mod") or criterion if isinstance(criterion, nn.Module) else criterion


def is_elementwise(criterion: Criterion) -> bool:
    """Whether a criterion is one of torch's that compares element by element, so that shapes must be equal."""
    function = _unwrapped(criterion)
    if isinstance(function, nn.Module):
        return type(function).forward in _ELEMENTWISE_FORWARDS
    try:
        return function in _ELEMENTWISE_FUNCTIONS
    except TypeError:  # unhashable
        return False


_CLASSWISE_FORWARDS = (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)
_CLASSWISE_FUNCTIONS = (F.cross_entropy, F.nll_loss)


def is_classwise(criterion: Criterion) -> bool:
    """Whether a criterion is one of torch's whose arguments have the classes in their second dimension."""
    function = _unwrapped(criterion)
    if isinstance(function, nn.Module):
        return type(function).forward in _CLASSWISE_FORWARDS
    return any(function is known for known in _CLASSWISE_FUNCTIONS)


def signature(criterion: Criterion) -> inspect.Signature | None:
    """Returns the signature of a criterion, or `None` where Python cannot tell."""
    try:
        return inspect.signature(criterion.forward if isinstance(criterion, nn.Module) else criterion)
    except (TypeError, ValueError):
        return None


def with_defaults(term: Term, path: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and keyword sources of a term that stands under a path."""
    if term.sources:
        return term.sources, term.keyword_sources
    keywords = dict(term.keyword_sources)
    known = signature(term.criterion)
    parameters = list(known.parameters.values()) if known else []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]
    if parameters and not positional:
        return (), keywords
    named = [p for p in positional if p.kind is p.POSITIONAL_OR_KEYWORD]
    if named and named[0].name in keywords:
        if len(named) > 1 and named[1].default is named[1].empty:
            keywords.setdefault(named[1].name, Target(path))
        return (), keywords
    if len(named) > 1 and named[1].name in keywords:
        return (Output(path),), keywords
    return (Output(path), Target(path)), keywords


def not_a_call(term: Term, positional: tuple[Any, ...], keywords: dict[str, Any]) -> str | None:
    """Returns why a criterion cannot be called with these sources, or `None`."""
    known = signature(term.criterion)
    if known is None:
        return None
    try:
        known.bind(*positional, **keywords)
    except TypeError as error:
        remedy = "Give its arguments as sources, as in Term(criterion, Output('x'))."
        if "unexpected keyword" in str(error):
            remedy = (
                "Mend or leave out that keyword; "
                "the options of Term are weight, reduction, where, normalizer and match."
            )
        return (
            f"{callable_name(term.criterion)} takes {known} and cannot be called with "
            f"({arguments_text(positional, keywords)}): {error}. {remedy}"
        )
    return None


def reduce(
    result: Tensor, reduction: Reduction, sample_weight: Tensor | None, selected: Tensor | None = None
) -> Tensor:
    """Makes a scalar of an unreduced result; see `Term` for the formulas. At least float32.

    ``selected`` is a mask of at least one dimension; its elements and those of the sample weights stand for the first
    dimensions of the result.
    """
    dtype = torch.promote_types(result.dtype, torch.float32)
    mask = None if selected is None else spread(selected, result)
    share = None if sample_weight is None else spread(sample_weight, result)
    if mask is not None:  # the weights too: what is not selected may be NaN there
        result = torch.where(mask, result, 0)
        share = None if share is None else torch.where(mask, share, 0)
    weighted = result if share is None else result * share
    if mask is None and (reduction == "mean" or (reduction == "weighted_mean" and share is None)):
        return weighted.mean(dtype=dtype)
    total = weighted.sum(dtype=dtype)
    if reduction == "sum":
        return total
    if mask is not None and (share is None or reduction == "mean"):
        return total / _sum_over(result, mask, dtype).clamp(min=1)
    assert share is not None
    count = _sum_over(result, share, dtype)
    return total / torch.where(count == 0, 1, count)


def _sum_over(result: Tensor, share: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sum of a tensor that is spread over a result, without reading it as often."""
    return share.sum(dtype=dtype) * (result.numel() // max(share.numel(), 1))


def spread(tensor: Tensor, result: Tensor) -> Tensor:
    """Returns a tensor of the first dimensions of a result so that it broadcasts over the others."""
    return tensor.reshape(tensor.shape + (1,) * (result.ndim - tensor.ndim))
