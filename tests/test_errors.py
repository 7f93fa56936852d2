"""Exceptions: what catches them, and how they read."""

import pytest

import torch_pathloss
from torch_pathloss import PathLossError, _errors

BUILTINS = {
    "PathSyntaxError": ValueError,
    "ConstructionError": ValueError,
    "PathNotFoundError": KeyError,
    "UnknownTermError": KeyError,
    "CriterionReturnError": TypeError,
    "ArgumentError": ValueError,
    "CheckError": ValueError,
    "CompileError": RuntimeError,
    "MissingPackageError": ImportError,
    "UncoveredError": ValueError,
}


def test_the_table_holds_every_exception_of_the_package():
    defined = {
        name for name, value in vars(_errors).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == {*BUILTINS, "PathLossError", "UncoveredWarning"}
    assert defined <= set(torch_pathloss.__all__)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_an_exception_is_caught_as_its_builtin_and_as_the_package_s_own(name, builtin):
    error = getattr(torch_pathloss, name)
    assert issubclass(error, builtin)
    assert issubclass(error, PathLossError)


@pytest.mark.parametrize("name", BUILTINS)
def test_the_text_of_an_exception_is_its_sentence_without_quotes(name):
    assert str(getattr(torch_pathloss, name)("The output has no 'a'.")) == "The output has no 'a'."


def test_the_warning_is_a_user_warning():
    assert issubclass(torch_pathloss.UncoveredWarning, UserWarning)


def test_one_problem_is_a_sentence_and_more_are_numbered():
    assert _errors.listed(["One."]) == " One."
    assert _errors.listed(["One.", "Two."]) == "\n  1. One.\n  2. Two."


def test_only_a_near_word_is_suggested():
    assert _errors.did_you_mean(_errors.nearest("boxs", ["mask", "boxes"])) == " Did you mean 'boxes'?"
    assert _errors.did_you_mean(_errors.nearest("zzz", ["mask", "boxes"])) == ""
