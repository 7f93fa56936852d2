"""Hypothesis strategies for entries, paths and trees."""

from collections import namedtuple

from hypothesis import strategies as st

from torch_pathloss._paths import Number, Wildcard

# Keys that a child module could not be called, or that a path would read as something else.
TRICKY = [
    *(
        "type",
        "keys",
        "training",
        "half",
        "a/b",
        "a~b",
        "a.b",
        "",
        "0",
        "-1",
        "*",
        "**",
        "a b",
        "ä",
        "日本",
        "\n",
        "\x00",
    ),
    *("a:b", "a[0]", '"', "'", "\\", "~s0", "~i0", "~0", "\u2028", "\ud800"),
]

keys = st.sampled_from(TRICKY) | st.text(max_size=4)
exact_entries = keys | st.integers(-12, 12)
entries = exact_entries | st.builds(Number, st.integers(-12, 12)) | st.sampled_from(list(Wildcard))
paths = st.lists(entries, max_size=4).map(tuple)
tuple_paths = st.lists(exact_entries, max_size=4).map(tuple)
labels = st.none() | st.sampled_from(["dice", "a~b", "a/b", "0", "日本"])

Pair = namedtuple("Pair", "left right")


def trees(leaf):
    """Trees of dicts, lists, tuples and namedtuples with the given leaves."""
    names = st.sampled_from(["a", "b", "c", "x.y"])
    return st.recursive(
        leaf,
        lambda child: (
            st.dictionaries(names, child, min_size=1, max_size=3)
            | st.lists(child, max_size=3)
            | st.lists(child, min_size=1, max_size=2).map(tuple)
            | st.builds(Pair, child, child)
        ),
        max_leaves=8,
    )
