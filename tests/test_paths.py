"""Parsing, formatting and encoding paths."""

import enum

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import TRICKY, labels, paths, tuple_paths
from torch import nn

from torch_pathloss import PathSyntaxError, _paths
from torch_pathloss._paths import Name, Number, Wildcard

ONE, MANY = Wildcard.ONE, Wildcard.MANY


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", ()),
        ("a", ("a",)),
        ("a.b.c", ("a", "b", "c")),
        ("a.0.-1", ("a", Number(0), Number(-1))),
        ("a.01.-0.+1.1e3", ("a", "01", "-0", "+1", "1e3")),
        ('a["x.y"].b', ("a", "x.y", "b")),
        ("a['x.y'].b", ("a", "x.y", "b")),
        ('["a"]["b"]', ("a", "b")),
        ('[""]', ("",)),
        ('["0"][0][-1]', ("0", 0, -1)),
        ("*", (ONE,)),
        ("a.**.b.*", ("a", MANY, "b", ONE)),
        ('["*"]', ("*",)),
        (r'["a\"b\\c\n"]', ('a"b\\c\n',)),
        ("größe.日本", ("größe", "日本")),
        ("a-b_c/d~e", ("a-b_c/d~e",)),
    ],
)
def test_text_is_parsed_by_the_grammar(text, path):
    assert _paths.parse(text) == path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mask:dice", Name(("mask",), "dice")),
        (":kl", Name((), "kl")),
        ("a.*:x", Name(("a", ONE), "x")),
        ("a", Name(("a",))),
    ],
)
def test_a_label_is_part_of_the_name_not_of_the_path(text, name):
    assert _paths.parse_name(text) == name
    assert _paths.format(*name) == text


def test_a_tuple_is_taken_as_it_is():
    assert _paths.parse(("a", "x.y", 0, "0", "*")) == ("a", "x.y", 0, "0", "*")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a..b", 'Cannot parse the path \'a..b\': an entry is empty at position 2. Write an empty key as [""].'),
        (".a", 'Cannot parse the path \'.a\': an entry is empty at position 0. Write an empty key as [""].'),
        ("a.", 'Cannot parse the path \'a.\': an entry is empty at position 2. Write an empty key as [""].'),
        (
            "aux_*",
            "Cannot parse the path 'aux_*': a star stands inside the entry 'aux_*' at position 0. "
            'A wildcard stands for a whole entry; quote a key with a star: ["aux_*"].',
        ),
        (
            "a b",
            "Cannot parse the path 'a b': the entry 'a b' holds a bracket, a quote, a blank or a character that does "
            'not print at position 0. Quote it: ["a b"].',
        ),
        (
            "a[b]",
            "Cannot parse the path 'a[b]': a bracket holds neither a quoted key nor an integer at position 1. "
            'Write ["key"] for a key or [0] for an index.',
        ),
        (
            'a["b"',
            "Cannot parse the path 'a[\"b\"': a bracket is not closed at position 1. "
            'Write ["key"] for a key or [0] for an index.',
        ),
        (
            '["a"]b',
            "Cannot parse the path '[\"a\"]b': a dot or a bracket is missing at position 5. "
            "Join entries with dots, as in 'a.b'.",
        ),
        (
            "a:",
            "Cannot parse the path 'a:': the label '' is empty or holds a dot, colon, bracket, quote, star or blank at "
            "position 2. Write one plain word after the colon, as in 'mask:dice'.",
        ),
        ('["\\xzz"]', "Cannot parse the path '[\"\\\\xzz\"]': the quoted key \"\\xzz\" is not a string literal at "
         "position 0. Mend its escapes."),
        (
            r'["\d"]',
            "Cannot parse the path '[\"\\\\d\"]': the quoted key \"\\d\" is not a string literal at position 0. "
            "Mend its escapes.",
        ),
        (
            "a.[0]",
            "Cannot parse the path 'a.[0]': a dot stands before a bracket at position 2. Leave it out, as in 'a[0]'.",
        ),
        (1, "A path must be a str or a tuple of str and int, not 1 of type int."),
        (
            ("a", 1.5),
            "Every entry of the tuple path ('a', 1.5) must be a str or an int; found 1.5 of type float.",
        ),
        (
            ("a", True),
            "Every entry of the tuple path ('a', True) must be a str or an int; found True of type bool.",
        ),
    ],
)  # fmt: skip
def test_what_does_not_follow_the_grammar_raises(path, message):
    with pytest.raises(PathSyntaxError) as caught:
        _paths.parse_name(path)
    assert str(caught.value) == message


@given(paths, labels)
def test_parse_is_the_inverse_of_format(path, label):
    assert _paths.parse_name(_paths.format(path, label)) == Name(path, label)


@given(st.text(alphabet="ab0-1.*[]\"':\\ ", max_size=10))
def test_format_is_the_inverse_of_parse_on_canonical_text(text):
    try:
        name = _paths.parse_name(text)
    except PathSyntaxError:
        return
    canonical = _paths.format(*name)
    assert _paths.parse_name(canonical) == name
    assert _paths.format(*_paths.parse_name(canonical)) == canonical


@given(tuple_paths)
def test_a_tuple_path_has_a_text(path):
    assert _paths.parse(_paths.format(path)) == path


@given(paths, labels, paths, labels)
def test_child_names_are_injective(path, label, other, other_label):
    same = (path, label) == (other, other_label)
    assert (_paths.encode(path, label) == _paths.encode(other, other_label)) == same


def test_child_names_of_tricky_keys_differ():
    entries = [*TRICKY, 0, -1, Number(0), Number(-1), ONE, MANY]
    alone = [(entry,) for entry in entries]
    pairs = [(a, b) for a in entries for b in entries]
    names = [_paths.encode(path) for path in [(), *alone, *pairs]]
    assert len(set(names)) == len(names)


@given(paths, labels)
def test_every_child_name_is_accepted_by_a_module(path, label):
    module = nn.Module()
    name = _paths.encode(path, label)
    module.add_module(name, nn.Identity())
    assert name.startswith("/")
    assert module.get_submodule(name) is not None


def test_child_names_are_readable():
    assert [_paths.encode(_paths.parse(text)) for text in ("detection.bbox", "aux.*", "aux.0", "", "**.logits")] == [
        "/detection/bbox",
        "/aux/*",
        "/aux/0",
        "/",
        "/**/logits",
    ]


@given(paths, paths)
def test_paths_that_reach_one_node_are_alike_both_ways(path, other):
    assert _paths.same_node(path, path)
    assert _paths.same_node(path, other) == _paths.same_node(other, path)


def test_a_bare_number_is_alike_the_string_and_the_index_but_those_are_not():
    assert _paths.same_node((Number(0),), (0,))
    assert _paths.same_node(("0",), (Number(0),))
    assert not _paths.same_node(("0",), (0,))
    assert not _paths.same_node((Number(0),), (ONE,))


def test_captures_fill_wildcards_in_order():
    assert _paths.fill(("a", ONE, "b", MANY), (("x",), (0, "y"))) == ("a", "x", "b", 0, "y")


def test_a_number_that_python_refuses_to_read_is_a_syntax_error():
    for text in ("9" * 5000, f"[{'9' * 5000}]"):
        with pytest.raises(PathSyntaxError, match=r"a number has 5000 digits at position"):
            _paths.parse(text)


class Head(str, enum.Enum):
    BOX = "box"


class Level(enum.IntEnum):
    FIRST = 0


def test_a_member_of_an_enum_is_the_key_that_it_is_equal_to():
    path = _paths.parse((Head.BOX, Level.FIRST))
    assert [type(entry) for entry in path] == [str, int]
    assert _paths.format((Head.BOX, Level.FIRST)) == _paths.format(path) == "box[0]"
    assert _paths.format((True,)) == "[True]"  # a key that a message shows, though no path reaches it
