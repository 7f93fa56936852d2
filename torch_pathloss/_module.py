"""`PathLossModule`: the container."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from torch_pathloss import _backward, _compare, _compile, _inspect, _paths, _ranks, _tree
from torch_pathloss._conflicts import Conflicts
from torch_pathloss._errors import ArgumentError, CheckError, CompileError, ConstructionError, PathLossError
from torch_pathloss._evaluate import Evaluation
from torch_pathloss._inspect import UNCOVERED, Explanation, Uncovered
from torch_pathloss._last import Last, seen_of
from torch_pathloss._plan import OUTPUT, TREES, bind
from torch_pathloss._term import FunctionCriterion, Present, callable_name, not_a_criterion, parameters_behind
from torch_pathloss._weights import Combined, Weights, weighted_sum
from torch_pathloss.weighting import Scalarizer, Weighting


@final
class PathLossModule(nn.Module):
    r"""One criterion for a model with a nested output: a weighted sum of criteria, each at a path.

    With :math:`v_k` the value of term :math:`k` (see `Term`) and :math:`w_k` its weight, the total is

    .. math::
        L = \sum_{k=1}^{K} w_k v_k

    where :math:`k` runs over the terms in the order in which they were declared. A term is *absent* in a call, and
    adds 0, when a node that it reads in the output or the target is `None` or its pattern matches nothing.

    Args:
        losses: a mapping from paths to criteria, or a nested structure that mirrors the output (mappings, lists,
            tuples, namedtuples, `None` for no loss), or both mixed. One bare criterion stands at the root. A criterion
            is a module, any callable, or a `Term`.
        weights: the weights :math:`w_k`, by name of the term, as floats, 0-dim tensors or schedules
            (`torch_pathloss.schedules`); flat or nested as ``losses``. Default: the weight of the `Term`, which is 1.0
            by default.
        weighting: a rule that makes the total of values and weights instead of the sum
            (`torch_pathloss.weighting`), or any module or function ``[K] values -> scalar``, such as a ``Scalarizer``
            of TorchJD. Default: ``None``, the sum.
        uncovered: what to do with tensors of the output that no term reaches: ``"ignore"``, ``"warn"`` (once for
            each set of them; not in compiled code) or ``"error"``. Default: ``"ignore"``.
        grad_in_forward: whether a call computes the gradients at the outputs too, and its ``backward()`` only
            multiplies them by the incoming gradient. See `backward` for the way without that product.
            Default: ``False``.

    Shape:
        - output, target, input: any tree of mappings, sequences, namedtuples, dataclasses, attributes.
        - Returns: scalar, at least float32.

    Raises:
        ConstructionError: listing every problem: a path that cannot be parsed or is given twice, a value that is not
            callable, a weight for a term that does not exist, sources that do not fit a criterion, no terms.

    Attributes:
        weights: the weights by name; ``criterion.weights["detection.bbox"] = 0.3`` writes in place. See `Weights`.
        last: values, weights and total of the latest call, detached. See `Last`.
        annotate: whether each term stands in the traces of `torch.profiler` as ``pathloss/<name>``, in eager mode.
            Default: ``False``.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> criterion = PathLossModule(
        ...     {
        ...         "classification": nn.CrossEntropyLoss(),
        ...         "detection.bbox": nn.SmoothL1Loss(),
        ...         "detection.confidence": nn.BCEWithLogitsLoss(),
        ...     },
        ...     weights={"detection.bbox": 5.0},
        ... )
        >>> output = {
        ...     "classification": torch.zeros(2, 4, requires_grad=True),
        ...     "detection": {"bbox": torch.zeros(2, 4), "confidence": torch.zeros(2)},
        ... }
        >>> target = {
        ...     "classification": torch.tensor([0, 3]),
        ...     "detection": {"bbox": torch.ones(2, 4), "confidence": torch.ones(2)},
        ... }
        >>> loss = criterion(output, target)
        >>> loss.backward()
        >>> round(loss.item(), 4)  # ln 4 + 5 * 0.5 + ln 2
        4.5794
    """

    weights: Weights
    last: Last
    weighting: Weighting | None
    annotate: bool = False

    _accumulates: bool = False
    _gives_away: bool = True
    _divisors: Tensor | None
    _compiled_pass: Callable[..., tuple[Tensor, list[Tensor | None], list[Tensor | None]]] | None = None

    def __init__(
        self,
        losses: Any,
        *,
        weights: Any = None,
        weighting: Weighting | Callable[[Tensor], Tensor] | None = None,
        uncovered: Uncovered = "ignore",
        grad_in_forward: bool = False,
    ) -> None:
        super().__init__()
        if uncovered not in UNCOVERED:
            raise ConstructionError(f"uncovered must be one of {', '.join(map(repr, UNCOVERED))}, not {uncovered!r}.")
        bound = bind(losses, weights)
        self._plan = bound.plan
        self._uncovered: Uncovered = uncovered
        self._grad_in_forward = grad_in_forward
        self._warned: set[tuple[str, ...]] = set()
        for name, module in bound.modules.items():
            self.add_module(name, module)
        for name, tensor in bound.tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=False)
        self._closures = tuple(
            name
            for name, module in bound.modules.items()
            if isinstance(module, FunctionCriterion) and parameters_behind(module.function)
        )
        self.weights = Weights(bound.names, bound.weights)
        self.last = Last(bound.names)
        self.weighting = None if weighting is None else self._bound_weighting(weighting)
        counts = any(term.normalizer is not None for term in self._plan.terms)
        self.register_buffer("_divisors", torch.ones(len(self.weights)) if counts else None, persistent=False)

    def _bound_weighting(self, weighting: Any) -> Weighting:
        if not isinstance(weighting, Weighting):
            if problem := not_a_criterion(weighting):
                raise ConstructionError(f"weighting= must be a weighting or a function [K] values -> scalar: {problem}")
            weighting = Scalarizer(weighting)
        bound: Weighting = weighting.bind(tuple(self.weights))
        if weighting.uses_gradients and any(True for _ in weighting.parameters()):
            raise ConstructionError(
                f"The weighting {type(weighting).__name__} uses gradients and has parameters, which would get none. "
                "Keep its state in buffers."
            )
        return bound

    def forward(self, output: Any, target: Any = None, *, input: Any = None, sample_weight: Any = None) -> Tensor:
        """Returns the total.

        Args:
            output: the model's output.
            target: the tree of references, addressed by the same paths. Further keys in it do no harm.
            input: the model's input or the whole batch, for sources `Input`.
            sample_weight: a tensor for every term, or a tree of tensors by name or path of a term; its first dimensions
                are those of the unreduced result. Every term that it concerns needs a ``reduction``.

        Raises:
            PathNotFoundError: if a path does not exist in a tree.
            CriterionReturnError: if a criterion does not return a scalar and its term has no ``reduction``.
            ArgumentError: if shapes, devices or sample weights do not fit.
            UncoveredError: if a leaf is uncovered and the module was built with ``uncovered="error"``.
        """
        modules = self._modules
        weighting: Weighting | None = modules.get("weighting")  # type: ignore[assignment]
        if torch.is_grad_enabled() and (self._grad_in_forward or (weighting is not None and weighting.needs_norms())):
            return self._forward_with_gradients(output, target, input, sample_weight)
        evaluation = self._evaluation(output, target, input, sample_weight)
        if self._uncovered != "ignore":
            _inspect.report_uncovered(evaluation, self._uncovered, self._warned)
        values, present = evaluation.values()
        if weighting is None:
            total, stacked, weights = weighted_sum(values, modules["weights"]._buffers["value"])  # type: ignore[union-attr, arg-type]
        else:
            total, stacked, weights = self._combine(values, present)
        modules["last"].write(values, stacked, present, weights, total)  # type: ignore[union-attr, operator]
        return total

    def _combine(self, values: list[Tensor], present: list[Present], norms: Tensor | None = None) -> Combined:
        """Returns what the weighting makes of the values, or their weighted sum without one."""
        weights = self.weights.value
        if self.weighting is None:
            return weighted_sum(values, weights)
        self.weighting.check_present(present)
        stacked = torch.stack(values)
        seen = seen_of(present, torch.ones(len(values), dtype=torch.bool, device=weights.device))
        total, effective = self.weighting(stacked, seen, weights, norms)
        return total, stacked.detach().squeeze(), effective

    def step(self) -> None:
        """Advances the step of the schedules by one, as the ``step`` of a learning-rate scheduler does.

        Call it after each optimizer step, or once an epoch. The step is a buffer of `weights`, saved with the
        `state_dict`. Nothing is read from the device.

        Raises:
            ArgumentError: if a schedule gives no finite number.
        """
        self.weights.advance()

    @torch.no_grad()
    def update(self, output: Any, target: Any = None, *, input: Any = None, sample_weight: Any = None) -> None:
        """Tells the weighting the values after the optimizer step, on the batch of that step, as `FAMO` needs them.

        Args:
            output: what the model returns for the same batch after the step.
            target: as in a call.
            input: as in a call.
            sample_weight: as in a call.

        Raises:
            ArgumentError: if the weighting uses no such values.
            The errors of a call.
        """
        update = getattr(self.weighting, "update", None)
        if update is None:
            found = "there is none" if self.weighting is None else f"this one is {type(self.weighting).__name__}"
            raise ArgumentError(
                f"update() is for a weighting that uses the values after the step, such as FAMO, but {found}. "
                "Leave the call out."
            )
        values, present = self._evaluation(output, target, input, sample_weight).values()
        update(torch.stack(values), seen_of(present, torch.ones_like(self.weights.value, dtype=torch.bool)))

    @contextmanager
    def accumulate(self, targets: Iterable[Any], *, inputs: Iterable[Any] | None = None) -> Iterator[None]:
        r"""Normalises by the counts of all micro-batches of one optimizer step, and of all processes.

        With :math:`n` micro-batches and :math:`W` processes, a term with a ``normalizer`` divides the sum of each
        micro-batch by

        .. math::
            \frac{1}{n W} \max\Big(1, \sum_{\text{ranks}} \sum_{i=1}^{n} c_i\Big)

        so that the mean over the micro-batches, which a loop takes with ``loss / n``, and over the processes, which
        DistributedDataParallel takes of the gradients, is the value of one process with the whole batch.
        Inside of it, call the criterion once for each micro-batch. Every process has to enter it.

        Args:
            targets: the target of each micro-batch.
            inputs: the ``input`` of each micro-batch, if a normalizer reads it. Default: ``None``.

        Raises:
            ArgumentError: if no term has a normalizer, a normalizer reads the output, which is not known yet, there are
                no micro-batches or not as many inputs as targets, or it is entered already.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from torch_pathloss import PathLossModule, Target, Term
            >>> boxes = Term(nn.L1Loss(reduction="sum"), normalizer=Target("count"))
            >>> criterion = PathLossModule({"box": boxes})
            >>> targets = [{"box": torch.zeros(n), "count": n} for n in (1, 3)]
            >>> with criterion.accumulate(targets):
            ...     total = sum(criterion({"box": torch.ones(t["count"])}, t) / len(targets) for t in targets)
            >>> total  # 4 ones over 4 boxes
            tensor(1.)
        """
        if self._accumulates:
            raise ArgumentError("accumulate() is entered twice. Leave it after the micro-batches of one step.")
        if isinstance(targets, (Mapping, Tensor)):
            found = _tree.describe(targets)
            raise ArgumentError(f"accumulate() needs a list with the target of each micro-batch, not {found}.")
        evaluations = self._evaluations_of(list(targets), None if inputs is None else list(inputs))
        assert self._divisors is not None
        self._divisors = divisors = self._divisors.float()  # half() makes it too short for counts
        with torch.no_grad():
            counts = [evaluation.counts() for evaluation in evaluations]
            total = _ranks.sum_over_ranks(torch.stack(counts).sum(0)).clamp(min=1)
            divisors.copy_(total / (len(counts) * _ranks.world_size()))
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False

    def _evaluations_of(self, targets: list[Any], inputs: list[Any] | None) -> list[Evaluation]:
        if self._divisors is None:
            raise ArgumentError("accumulate() sums normalizers, but no term has one. Leave it out.")
        if not targets or (inputs is not None and len(inputs) != len(targets)):
            found = f"{len(targets)} targets" + ("" if inputs is None else f" and {len(inputs)} inputs")
            raise ArgumentError(f"accumulate() needs the target of each micro-batch, and as many inputs, not {found}.")
        for term in self._plan.terms:
            if any(read.tree == OUTPUT for read in term.counted):
                raise ArgumentError(
                    f"Term {term.name!r}: its normalizer reads the output, which accumulate() does not have yet. "
                    "Count with Target('...') or Input('...')."
                )
        return [
            self._evaluation(None, target, None if inputs is None else inputs[position], None)
            for position, target in enumerate(targets)
        ]

    def _divisor(self, name: str) -> Tensor | None:
        """Returns what `accumulate` has a term divided by, or `None` outside of it."""
        return self._divisors[self.weights._names.index(name)] if self._accumulates else None  # type: ignore[index]

    def value_and_grad(
        self, output: Any, target: Any = None, *, input: Any = None, sample_weight: Any = None
    ) -> tuple[Tensor, Any]:
        r"""Returns the total and its gradients :math:`\partial L / \partial o` at the leaves :math:`o` of the output.

        Neither touches the model's graph, nor any ``.grad``. In eager mode the terms are differentiated in groups, each
        group's graph freed before the next. Traced, it is one graph, with ``fullgraph=True`` too.

        Returns:
            The total, detached, and a tree like the output: a gradient at each floating-point leaf that a term depends
            on, and `None` at all other leaves.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from torch_pathloss import PathLossModule
            >>> criterion = PathLossModule({"a": nn.MSELoss()})
            >>> criterion.value_and_grad({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.zeros(2)})
            (tensor(1.), {'a': tensor([1., 1.]), 'b': None})
        """
        if self._compiled_pass is not None and not torch.compiler.is_compiling():
            arguments = (output, target, input, sample_weight, None)
            total, gradients, _ = self._compiled_pass(*arguments, every=True, further=[])
        else:
            _, leaves = _backward.leaves_of(output, every=True)
            result = self._pass(output, target, input, sample_weight, leaves, [], None, every=True)
            total, gradients = result.total, result.leaves
        return total, _backward.mirrored(output, gradients)

    def backward(
        self,
        output: Any,
        target: Any = None,
        *,
        input: Any = None,
        sample_weight: Any = None,
        scale: float | Tensor | None = None,
        consume: bool = False,
    ) -> Tensor:
        """Does what ``criterion(output, target).backward()`` does, in one pass, and returns the total, detached.

        The gradients of all terms are computed at the output leaves with the total, merged, and go into the model as
        one gradient a leaf. Parameters of the criterion get theirs. In eager mode the terms are differentiated in
        groups, each group's graph freed before the next, so that the peak of memory is lower.

        Args:
            output: the model's output, still in its graph.
            target: as in a call.
            input: as in a call.
            sample_weight: as in a call.
            scale: what the gradients are multiplied by, a float or a 0-dim tensor on the outputs' device; the total
                that is returned is not. With a `torch.amp.GradScaler`, ``scaler.scale(torch.ones((), device=...))``.
            consume: lets go of each output leaf as soon as its gradient exists. Its place in the output's dicts, lists
                and objects becomes `None`; leaves in tuples stay. For callers that need the output no more.

        Raises:
            The errors of a call.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from torch_pathloss import PathLossModule
            >>> model, criterion = nn.Linear(2, 1), PathLossModule({"y": nn.MSELoss()})
            >>> total = criterion.backward({"y": model(torch.ones(3, 2))}, {"y": torch.zeros(3, 1)})
            >>> model.weight.grad.shape
            torch.Size([1, 2])
        """
        paths, leaves = _backward.leaves_of(output, every=False)
        further = self._further(output, target, input, sample_weight)
        parameters = self._trained_parameters(further)
        if scale is not None and not isinstance(scale, Tensor):
            scale = torch.full((), scale, device=self.weights.value.device)
        tensors: list[Any] = [*leaves, *parameters]
        if consume:
            tensors[: len(leaves)] = [get_gradient_edge(leaf) for leaf in leaves]

        def release(position: int) -> None:
            leaves[position] = torch.empty(0)
            _tree.put_at(output, paths[position], None)

        if self._compiled_pass is not None:
            arguments = (output, target, input, sample_weight, scale)
            total, gradients, own = self._compiled_pass(*arguments, every=False, further=further)
            gradients = [*gradients, *own]
            del own
        else:
            result = self._pass(
                output, target, input, sample_weight, leaves, parameters, scale, False, release if consume else None
            )
            total, gradients = result.total, [*result.leaves, *result.parameters]
            del result  # which would hold a gradient that `.grad` shall take over
        for position in range(len(leaves) if consume else 0):  # what was not let go of on the way
            if gradients[position] is not None:
                release(position)
        _backward.into_model(tensors, gradients, self._compiled_pass is None or self._gives_away)
        return total

    def terms(
        self, output: Any, target: Any = None, *, input: Any = None, sample_weight: Any = None
    ) -> dict[str, Tensor]:
        """Returns the unweighted value of each term by name, differentiable, in declared order; 0 for an absent one.

        The arguments and errors are those of a call, of which this is the same computation. `last` is not written.
        """
        values, _ = self._evaluation(output, target, input, sample_weight).values()
        return dict(zip(self.weights, values, strict=True))

    def explain(self, output: Any, target: Any = None, *, input: Any = None, sample_weight: Any = None) -> Explanation:
        """Returns the output's tree, one line a leaf, with the terms that reach it.

        Leaves that no term reaches and leaves that several terms reach are marked. Below stand the terms with their
        criteria, weights and sources, and what is absent or does not fit. A string; rich prints it in colours.
        """
        evaluation = self._evaluation(output, target, input, None)
        return _inspect.explain(evaluation, self.weights.texts())

    def check(self, output: Any, target: Any = None, *, input: Any = None, sample_weight: Any = None) -> None:
        """Raises on everything that a call could raise on, in one message.

        Run it once before `torch.compile`, which hides messages. Buffers and random numbers are left as they were.

        Raises:
            CheckError: listing every problem.
        """
        try:
            evaluation = self._local_evaluation(output, target, input, sample_weight)
        except PathLossError as error:
            raise CheckError(str(error)) from None
        _inspect.check(evaluation, self._uncovered, self.weighting)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises if a parameter of the criterion is not trained by the optimizer.

        Raises:
            CheckError: naming the parameters.
        """
        _inspect.check_optimizer(self, optimizer)

    def output_gradients(
        self, output: Any, target: Any = None, *, input: Any = None, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Returns the gradients of each unweighted value at the leaves of the output, by name of the term.

        For diagnosis: norms, cosines, terms that oppose each other, leaves that are counted twice. Neither touches the
        model's graph, nor any ``.grad``. `last` is not written. The arguments and errors are those of a call.

        Returns:
            For each term a tree like the output: a gradient at each floating-point leaf that the term depends on, and
            `None` at all other leaves.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from torch_pathloss import PathLossModule
            >>> criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.L1Loss()})
            >>> ones, zeros = torch.ones(2), torch.zeros(2)
            >>> criterion.output_gradients({"a": ones, "b": ones}, {"a": zeros, "b": zeros})["b"]
            {'a': None, 'b': tensor([0.5000, 0.5000])}
        """
        _, leaves = _backward.leaves_of(output, every=True)

        def evaluate(cut: Any) -> Evaluation:
            return self._local_evaluation(cut, target, input, sample_weight)

        terms = _backward.of_each_term(evaluate, output, leaves)
        return {name: _backward.mirrored(output, of.leaves) for name, of in zip(self.weights, terms, strict=True)}

    def conflicts(
        self,
        output: Any,
        target: Any = None,
        *,
        input: Any = None,
        sample_weight: Any = None,
        wrt: _compare.Wrt = None,
        threshold: float = 0.0,
    ) -> Conflicts:
        """Compares the gradients of the unweighted values: their norms, and the cosine of each pair of terms.

        For diagnosis: it differentiates each term by itself, and reads from the device once. No ``.grad``, no buffer
        and no random number is changed, `last` is not written, and the model's graph can still run backward. Of several
        processes, one may call it by itself: gradients, and the counts of normalizers, are its own. The errors are
        those of a call.

        Args:
            output: the model's output; still in its graph if ``wrt`` is given.
            target: as in a call.
            input: as in a call.
            sample_weight: as in a call.
            wrt: what the gradients are taken by. A tensor or an iterable of tensors that the output was computed from:
                a shared feature, or parameters such as ``model.backbone.parameters()``, of which the frozen ones are
                left out; or the path of a node of the output, as text, for a feature that the model returns. Each term
                then goes backward through the model. Default: ``None``, the leaves of the output, where it does not.
            threshold: the cosine below which two terms oppose each other. Default: 0.0.

        Returns:
            A table that prints, with its numbers as attributes and a heat map. See `Conflicts`.

        Raises:
            ArgumentError: if no term depends on ``wrt``, or it holds something other than tensors.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from torch_pathloss import PathLossModule, Target, Term
            >>> criterion = PathLossModule({"x:near": nn.MSELoss(), "x:far": Term(nn.MSELoss(), target=Target("y"))})
            >>> weight = torch.ones(2, requires_grad=True)
            >>> output, target = {"x": weight * 3.0}, {"x": torch.zeros(2), "y": torch.full((2,), 5.0)}
            >>> conflicts = criterion.conflicts(output, target, wrt=weight)
            >>> conflicts.opposing
            (('x:near', 'x:far', -1.0),)
            >>> {name: round(norm, 3) for name, norm in conflicts.norms.items()}  # 3 * 3 * sqrt(2), 3 * 2 * sqrt(2)
            {'x:near': 12.728, 'x:far': 8.485}
        """

        def evaluate(cut: Any) -> Evaluation:
            return self._local_evaluation(cut, target, input, sample_weight)

        weights = self.weights.value if self.weighting is None else torch.stack(list(self.last.weights.values()))
        return _compare.compare(evaluate, output, wrt, weights, threshold)

    def compile(self, **kwargs: Any) -> None:
        """Compiles the call, `value_and_grad` and `backward` in place, for many small independent losses.

        On CUDA, Inductor's ``combo_kernels`` put the kernels of independent terms into one launch. A function that is
        not traced into one graph is an error by default.

        Args:
            **kwargs: arguments of `torch.compile`, which take precedence. A ``mode`` is added to the options.

        Raises:
            CompileError: at the first call, if a criterion cannot be traced; it names the term.
        """
        if self.weighting is not None and self.weighting.feature is not None:
            raise CompileError(_compile.NO_FEATURE)
        super().compile(**_compile.arguments(kwargs))
        differentiates = self._grad_in_forward or (self.weighting is not None and self.weighting.uses_gradients)

        def evaluate(
            output: Any, target: Any = None, input: Any = None, sample_weight: Any = None, *_: Any, **__: Any
        ) -> Any:
            return self._local_evaluation(output, target, input, sample_weight)

        assert self._compiled_call_impl is not None
        self._compiled_call_impl = _compile.naming_terms(self._compiled_call_impl, evaluate, differentiates)
        arguments = _compile.arguments(kwargs)
        self._gives_away = not _compile.may_overwrite_results(arguments)
        compiled = torch.compile(self._traced_pass, **arguments)
        self._compiled_pass = _compile.naming_terms(compiled, evaluate, differentiates=True)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # without torch's own compiled call; a copy compiles anew
        return {**state, "_compiled_pass": None}

    def _evaluation(self, output: Any, target: Any, input: Any, sample_weight: Any) -> Evaluation:
        weights: Any = self._modules["weights"]
        trees = (output, target, input)
        return Evaluation(self._plan, self, trees, sample_weight, weights._buffers["value"].device, weights.inactive)

    def _local_evaluation(self, output: Any, target: Any, input: Any, sample_weight: Any) -> Evaluation:
        """Makes an evaluation that waits for no other process: one may look while the others go on."""
        evaluation = self._evaluation(output, target, input, sample_weight)
        evaluation.is_local = True
        return evaluation

    def _forward_with_gradients(self, output: Any, target: Any, input: Any, sample_weight: Any) -> Tensor:
        _, leaves = _backward.leaves_of(output, every=False)
        further = self._further(output, target, input, sample_weight)
        parameters = self._trained_parameters(further)

        def compute() -> tuple[Tensor, list[Tensor | None]]:
            result = self._pass(output, target, input, sample_weight, leaves, parameters, None, every=False)
            return result.total, [*result.leaves, *result.parameters]

        inputs = [*leaves, *parameters]
        if torch.compiler.is_compiling():  # Dynamo refuses one tensor twice (torch 2.13)
            inputs = [tensor.view_as(tensor) for tensor in inputs]
        total: Tensor = _backward.GradientInForward.apply(compute, *inputs)  # type: ignore[no-untyped-call]
        return total

    def _pass(
        self,
        output: Any,
        target: Any,
        input: Any,
        sample_weight: Any,
        leaves: list[Tensor],
        parameters: list[Tensor],
        scale: Tensor | None,
        every: bool,
        release: Callable[[int], None] | None = None,
    ) -> _backward.Pass:
        """Computes the total and its gradients, and records them in `last`."""

        def evaluate(cut: Any) -> Evaluation:
            return self._evaluation(cut, target, input, sample_weight)

        if self._uncovered != "ignore":
            _inspect.report_uncovered(evaluate(output), self._uncovered, self._warned)
        weighting = self.weighting
        if weighting is not None and weighting.needs_norms():
            feature = self._feature(weighting, output)
            result = _backward.balanced(evaluate, output, leaves, parameters, self._combine, scale, every, feature)
        elif not torch.compiler.is_compiling() and weighting is None:
            weights = self.weights.value
            result = _backward.term_by_term(evaluate, output, leaves, parameters, weights, scale, every, release)
        elif parameters or not torch.compiler.is_compiling() or torch._dynamo.config.trace_autograd_ops:
            result = _backward.at_once(evaluate, output, leaves, parameters, self._combine, scale, every)
        else:
            result = _backward.functional(evaluate, output, leaves, self._combine, every)
        self.last.write(result.values, result.stacked, result.present, result.weights, result.total)
        return result

    def _weighted_gradients(
        self,
        output: Any,
        target: Any,
        input: Any,
        sample_weight: Any,
        leaves: list[Tensor],
        parameters: list[Tensor],
    ) -> _backward.Rows:
        """Computes the gradients of weight times value of each term, and records the values in `last`."""

        def evaluate(cut: Any) -> Evaluation:
            return self._evaluation(cut, target, input, sample_weight)

        if self._uncovered != "ignore":
            _inspect.report_uncovered(evaluate(output), self._uncovered, self._warned)
        terms = list(_backward.of_each_term(evaluate, output, leaves, parameters, every=False))
        values, present = [term.value for term in terms], [term.present for term in terms]
        total, stacked, weights = weighted_sum(values, self.weights.value)
        self.last.write(values, stacked, present, weights, total)
        rows = [
            [None if g is None else g * weight.to(g.dtype) for g in (*term.leaves, *term.parameters)]
            for term, weight in zip(terms, weights, strict=True)
        ]
        return _backward.Rows(total, present, rows)

    def _feature(self, weighting: Weighting, output: Any) -> Tensor | None:
        """Returns the tensor of the output at which a weighting wants the norms of gradients."""
        if weighting.feature is None:
            return None
        if torch.compiler.is_compiling():
            raise ArgumentError(_compile.NO_FEATURE)
        feature = _tree.walk(output, weighting.feature, TREES[OUTPUT])
        if not isinstance(feature, Tensor) or not feature.requires_grad:
            found = "a tensor without gradient" if isinstance(feature, Tensor) else _tree.describe(feature)
            raise ArgumentError(
                f"The weighting {type(weighting).__name__} takes the norms of gradients at "
                f"{_paths.format(weighting.feature)!r} of the output, but that is {found}. "
                "It must be a tensor of the model's graph."
            )
        return feature

    def _traced_pass(
        self,
        output: Any,
        target: Any,
        input: Any,
        sample_weight: Any,
        scale: Tensor | None,
        every: bool,
        further: list[Tensor],
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """What `compile` compiles: `_pass` with plain arguments and results."""
        _, leaves = _backward.leaves_of(output, every)
        parameters = [] if every else self._trained_parameters(further)
        result = self._pass(output, target, input, sample_weight, leaves, parameters, scale, every)
        return result.total, result.leaves, result.parameters

    def _further(self, output: Any, target: Any, input: Any, sample_weight: Any) -> list[Tensor]:
        """Returns what else a call gives gradients to: arguments, and parameters that plain functions close over."""
        found: list[Tensor] = self._evaluation(output, target, input, sample_weight).trained_arguments()
        if torch.compiler.is_compiling() and self._closures:
            raise ArgumentError(_compile.NO_CLOSURES)
        for name in self._closures:
            behind = parameters_behind(self._modules[name].function)  # type: ignore[union-attr]
            found.extend(parameter for parameter in behind if parameter.requires_grad)
        return found

    def _trained_parameters(self, further: Sequence[Tensor] = ()) -> list[Tensor]:
        found: list[Tensor] = [parameter for parameter in self._parameters.values() if parameter is not None]
        for child in self._modules.values():
            if child is not None and (child._parameters or child._modules):  # most criteria have neither
                found.extend(child.parameters())
        return list(dict.fromkeys([*(parameter for parameter in found if parameter.requires_grad), *further]))

    def __repr__(self) -> str:
        rows = [
            [
                f"({_inspect.shown_name(term.name)}):",
                callable_name(self.get_submodule(term.call.child)),
                f"weight {weight}",
                term.sources,
            ]
            for term, weight in zip(self._plan.terms, self.weights.texts(), strict=True)
        ]
        if self.weighting is not None:
            rows.append(["(weighting):", repr(self.weighting), "", ""])
        lines = "".join(f"\n  {line}" for line in _inspect.columns(rows))
        return f"{type(self).__name__}({lines}\n)"
