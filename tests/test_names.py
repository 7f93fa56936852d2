"""Names of terms, found by any spelling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import labels, paths

from torch_pathloss import UnknownTermError, _paths
from torch_pathloss._names import Names


def names(*texts):
    return Names(map(_paths.parse_name, texts))


def test_names_keep_their_order_and_are_found_by_any_spelling():
    found = names("b", "a.0", 'x["y.z"]:l')
    assert list(found) == ["b", "a.0", 'x["y.z"]:l']
    assert [found.index(n) for n in ("b", ("b",), '["b"]', "a.0", "a[0]", ("a", 0), ("a", "0"), "x['y.z']:l")] == [
        *(0, 0, 0, 1, 1, 1, 1, 2),
    ]


def test_the_string_and_the_integer_are_two_names():
    found = names('a["0"]', "a[0]")
    assert (found.index(("a", "0")), found.index(("a", 0))) == (0, 1)


def test_a_bare_number_that_may_be_two_names_raises():
    with pytest.raises(UnknownTermError) as caught:
        names('a["0"]', "a[0]").index("a.0")
    assert str(caught.value) == """The name 'a.0' may mean 'a["0"]' or 'a[0]'. Write one of them."""


@pytest.mark.parametrize("name", ["detection.box", "b:x", ("b", "c")])
def test_an_unknown_name_raises(name):
    with pytest.raises(UnknownTermError, match=r"^There is no term '.*'\. The terms are 'b', 'detection\.bbox'\."):
        names("b", "detection.bbox").index(name)


def test_a_name_that_cannot_be_parsed_raises_the_same_error():
    with pytest.raises(UnknownTermError, match=r"^Cannot parse the path 'a\.\.b'"):
        names("a").index("a..b")


@given(st.lists(st.tuples(paths, labels), unique=True, max_size=6))
def test_every_name_that_was_added_is_found(added):
    found = Names()
    kept = []
    for path, label in added:
        name = _paths.Name(path, label)
        if found.find(name) is None:
            found.add(name)
            kept.append(name)
    assert [found.find(name) for name in kept] == list(range(len(kept)))
    assert [found.index(_paths.format(*name)) for name in kept] == list(range(len(kept)))
