"""Exceptions and warnings.

Each class subclasses the nearest builtin, so that code which knows nothing of this package can catch it.
A message says what was asked, what was found, what there was, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PathLossError(Exception):
    """Base class of every exception that this package raises on purpose."""

    # KeyError shows the repr of its argument, which would put a whole sentence in quotes.
    __str__ = Exception.__str__


class PathSyntaxError(PathLossError, ValueError):
    """A path cannot be parsed."""


class ConstructionError(PathLossError, ValueError):
    """The arguments of a constructor do not fit together. Lists every problem that was found."""


class PathNotFoundError(PathLossError, KeyError):
    """A path leads nowhere, or to two places, in the output, the target or the input."""


class UnknownTermError(PathLossError, KeyError):
    """A weight or a sample weight names a term that does not exist."""


class CriterionReturnError(PathLossError, TypeError):
    """A criterion returned something other than what its term needs."""


class ArgumentError(PathLossError, ValueError):
    """The arguments of a call do not fit together: shapes, devices or sample weights."""


class CheckError(PathLossError, ValueError):
    """`PathLossModule.check` found problems. Lists all of them."""


class CompileError(PathLossError, RuntimeError):
    """A criterion cannot be traced into one graph."""


class MissingPackageError(PathLossError, ImportError):
    """Something needs a package that only an extra installs."""


class UncoveredError(PathLossError, ValueError):
    """An output leaf is reached by no term, and the module was built with ``uncovered="error"``."""


class UncoveredWarning(UserWarning):
    """An output leaf is reached by no term, and the module was built with ``uncovered="warn"``."""


def nearest(word: str, possible: Iterable[str]) -> str | None:
    """Returns what a misspelt word probably means, or `None` where nothing is near."""
    return next(iter(difflib.get_close_matches(word, list(possible), n=1)), None)


def did_you_mean(word: str | None) -> str:
    """Returns `` Did you mean 'word'?``, or an empty string for `None`."""
    return "" if word is None else f" Did you mean {word!r}?"


def listed(problems: list[str]) -> str:
    """Returns what follows a colon: a blank and the sentence for one problem, a numbered list for more."""
    if len(problems) == 1:
        return f" {problems[0]}"
    return "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))


def _show_public_module() -> None:
    """Lets tracebacks say where users import the classes from."""
    for error in (*PathLossError.__subclasses__(), PathLossError, UncoveredWarning):
        error.__module__ = "torch_pathloss"


_show_public_module()
