"""How the container compiles itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from torch_pathloss._errors import CompileError, listed
from torch_pathloss._evaluate import Evaluation

T = TypeVar("T")

# Ten small losses are ten small kernels, which Inductor can launch as one. Its gates are meant for kernels among which
# fusion is a gamble: at most 8 nodes (torch 2.13), and a limit on peak memory that outputs of losses do not reach.
# Set are only the options that this torch has: 2.11 has the first alone.
_OPTIONS = {
    "combo_kernels": True,
    "combo_kernel_max_num_nodes": 64,
    "combo_kernel_peak_memory_pct_threshold": None,
}
_PLAN = "self._plan"  # what Dynamo calls the plan in code that is compiled by `PathLossModule.compile`


def options() -> dict[str, Any]:
    """Returns our options of Inductor, those that this torch has."""
    known = torch._inductor.list_options()
    return {name: value for name, value in _OPTIONS.items() if name in known}


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `torch.compile`: what was given, and our defaults where it leaves room."""
    result: dict[str, Any] = {"fullgraph": True, **given}
    if given.get("options") is not None:
        result["options"] = dict(given["options"])  # torch takes some out of it (2.13)
    if result.get("backend", "inductor") != "inductor":
        return result
    mode = result.pop("mode", None)  # torch takes a mode or options, but a mode is nothing but options
    result["options"] = {
        **options(),
        **({} if mode is None else torch._inductor.list_mode_options(mode)),
        "guard_filter_fn": without_plan,
        **(given.get("options") or {}),
    }
    return result


def may_overwrite_results(arguments: dict[str, Any]) -> bool:
    """Whether a compiled function may give the same memory at its next call, as a replayed CUDA graph does."""
    if arguments.get("backend", "inductor") != "inductor":
        return arguments["backend"] not in ("eager", "aot_eager")
    chosen = arguments["options"].get("triton.cudagraphs")
    return bool(torch._inductor.config.triton.cudagraphs if chosen is None else chosen)


def without_plan(guards: Sequence[Any]) -> list[bool]:
    """Returns which of Dynamo's guards to keep: one on the plan's identity, and all that are not on the plan.

    A plan is frozen, but Dynamo asks at every call for each of its fields whether it is still the same: two thirds of
    all guards, and a tenth of a step of ten small terms. Constants in it may change, and keep theirs.
    """
    if all(guard.name != f"{_PLAN}.identity" for guard in guards):
        return [True] * len(guards)
    return [f"{_PLAN}." not in guard.name or ".identity" in guard.name or ".value" in guard.name for guard in guards]


NO_CLOSURES = (
    "A criterion that is a plain function closes over parameters, which would get no gradient where gradients are "
    "computed in forward and compiled. Make it a module that holds them, or build the container with "
    "grad_in_forward=False."
)
NO_FEATURE = (
    "The weighting takes the norms of gradients at a feature of the model, whose graph is not part of what is "
    "compiled. Build it with feature=None, which takes them at the outputs, or do not compile the criterion."
)


@contextmanager
def traced_autograd() -> Iterator[None]:
    """Lets Dynamo trace `torch.autograd.grad`, which it refuses by default (torch 2.11 to 2.13)."""
    config: Any = torch._dynamo.config
    before = config.trace_autograd_ops
    if before:  # reading is cheap, writing is not
        yield
        return
    config.trace_autograd_ops = True
    try:
        yield
    finally:
        config.trace_autograd_ops = before


def naming_terms(
    function: Callable[..., T], evaluate: Callable[..., Evaluation], differentiates: bool
) -> Callable[..., T]:
    """Returns a compiled function whose failure to trace names the terms that cause it, or is the error of eager mode.

    Args:
        function: what is compiled.
        evaluate: makes an evaluation of the same arguments, which waits for no other process: they may not have failed.
        differentiates: whether gradients are computed in it. The flag for that is set at every call, which costs as
            much as a small kernel.
    """

    def call(*args: Any, **kwargs: Any) -> T:
        try:
            if not differentiates:
                return function(*args, **kwargs)
            with traced_autograd():
                return function(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            failure = error
        evaluation = evaluate(*args, **kwargs)
        with torch.no_grad():
            evaluation.values()  # raises what is wrong in eager mode too, of which Dynamo keeps no word
            causes = _untraceable(evaluation)
        if causes:
            raise CompileError(f"The criterion cannot be compiled:{listed(causes)}")
        raise failure

    return call


def _untraceable(evaluation: Evaluation) -> list[str]:
    causes = []
    for term in evaluation.plan.terms:

        def value(term: Any = term) -> Any:
            return evaluation.value(term)

        try:
            torch.compile(value, backend="eager", fullgraph=True)()
        except torch._dynamo.exc.TorchDynamoException as error:
            what, *rest = str(error).splitlines()
            why = next((line.strip() for line in rest if line.strip().startswith("Explanation:")), "")
            causes.append(
                f"Term {term.name!r}: its criterion cannot be traced into one graph. {what}. {why} "
                "Mend it, or do not compile the criterion; eager mode runs it."
            )
    return causes
