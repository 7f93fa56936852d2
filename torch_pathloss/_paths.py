"""Paths as text: parse, format, encode. Knows strings only; trees are `_tree`'s."""

from __future__ import annotations

import ast
import enum
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from torch_pathloss._errors import PathSyntaxError


class Wildcard(enum.Enum):
    """An entry that stands for others."""

    ONE = "*"
    MANY = "**"


@dataclass(frozen=True)
class Number:
    """A bare decimal number in a text: a sequence index, or in a mapping the string key, then the int key."""

    value: int


Entry: TypeAlias = str | int | Number | Wildcard
"""A `str` or `int` matches exactly; see `Number` and `Wildcard` for the others."""

Path: TypeAlias = tuple[Any, ...]
"""Entries, outermost first; the empty tuple is the root."""


class Name(NamedTuple):
    """What identifies a term: a path, and a label where several criteria stand on one node."""

    path: Path
    label: str | None = None


_NUMBER = re.compile(r"-?[1-9][0-9]*|0")
_DIGITS = 4000  # of a number; Python refuses to read or write more than 4300
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|' r"'(?:[^'\\]|\\.)*'", re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES_OF_PYTHON = frozenset("\\'\"abfnrtvxuUN")
_RESERVED = frozenset(".:[]\"'*")


def _is_bare(text: str) -> bool:
    """Whether a text can stand in a path without brackets and quotes."""
    return text != "" and text.isprintable() and not any(c in _RESERVED or c.isspace() for c in text)


def _quote(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode-escape").decode("ascii") for c in shown)


class _Scanner:
    """Reads one path text from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, found: str, remedy: str) -> PathSyntaxError:
        return PathSyntaxError(f"Cannot parse the path {self.text!r}: {found} at position {self.at}. {remedy}")

    @property
    def rest(self) -> str:
        return self.text[self.at :]

    def name(self) -> Name:
        entries: list[Entry] = []
        while self.rest and not self.rest.startswith(":"):
            if self.rest.startswith("["):
                entries.append(self.bracket())
                continue
            if entries:
                if not self.rest.startswith("."):
                    raise self.fail("a dot or a bracket is missing", "Join entries with dots, as in 'a.b'.")
                self.at += 1
            entries.append(self.bare())
        if not self.rest:
            return Name(tuple(entries))
        self.at += 1
        return Name(tuple(entries), self.label())

    def word(self) -> str:
        end = self.at
        while end < len(self.text) and self.text[end] not in ".:[":
            end += 1
        return self.text[self.at : end]

    def bare(self) -> Entry:
        word = self.word()
        if word == "" and self.rest.startswith("["):
            raise self.fail("a dot stands before a bracket", "Leave it out, as in 'a[0]'.")
        if word == "":
            raise self.fail("an entry is empty", 'Write an empty key as [""].')
        if word in ("*", "**"):
            entry: Entry = Wildcard(word)
        elif "*" in word:
            raise self.fail(
                f"a star stands inside the entry {word!r}",
                f"A wildcard stands for a whole entry; quote a key with a star: [{_quote(word)}].",
            )
        elif not _is_bare(word):
            raise self.fail(
                f"the entry {word!r} holds a bracket, a quote, a blank or a character that does not print",
                f"Quote it: [{_quote(word)}].",
            )
        else:
            entry = Number(self.integer(word)) if _NUMBER.fullmatch(word) else word
        self.at += len(word)
        return entry

    def bracket(self) -> Entry:
        if quoted := _QUOTED.match(self.text, self.at + 1):
            entry: Entry = self.unquote(quoted.group())
            end = quoted.end()
        elif number := _NUMBER.match(self.text, self.at + 1):
            entry, end = self.integer(number.group()), number.end()
        else:
            raise self.fail(
                "a bracket holds neither a quoted key nor an integer", 'Write ["key"] for a key or [0] for an index.'
            )
        if not self.text.startswith("]", end):
            raise self.fail("a bracket is not closed", 'Write ["key"] for a key or [0] for an index.')
        self.at = end + 1
        return entry

    def integer(self, digits: str) -> int:
        if len(digits) > _DIGITS:
            raise self.fail(f"a number has {len(digits)} digits", 'Write ["..."] around a key that is a string.')
        return int(digits)

    def unquote(self, quoted: str) -> str:
        try:
            # Python only warns of an escape that it does not know, and keeps the backslash.
            if not set(_ESCAPED.findall(quoted)) <= _ESCAPES_OF_PYTHON:
                raise ValueError
            return str(ast.literal_eval(quoted))
        except (SyntaxError, ValueError):
            raise self.fail(f"the quoted key {quoted} is not a string literal", "Mend its escapes.") from None

    def label(self) -> str:
        label = self.rest
        if not _is_bare(label):
            raise self.fail(
                f"the label {label!r} is empty or holds a dot, colon, bracket, quote, star or blank",
                "Write one plain word after the colon, as in 'mask:dice'.",
            )
        return label


@lru_cache(maxsize=4096)
def _parse_text(text: str) -> Name:
    return _Scanner(text).name()


def parse_name(name: str | Path) -> Name:
    """Parses the name of a term: a path with an optional label.

    A tuple is taken as it is: its entries match exactly and it has no label.

    Raises:
        PathSyntaxError: if a text does not follow the grammar or a tuple holds anything but `str` and `int`.

    Examples:
        >>> parse_name("mask:dice")
        Name(path=('mask',), label='dice')
    """
    if isinstance(name, str):
        return _parse_text(name)
    if not isinstance(name, tuple):
        raise PathSyntaxError(
            f"A path must be a str or a tuple of str and int, not {name!r} of type {type(name).__name__}."
        )
    for entry in name:
        if isinstance(entry, bool) or not isinstance(entry, (str, int, Number, Wildcard)):
            raise PathSyntaxError(
                f"Every entry of the tuple path {name!r} must be a str or an int; "
                f"found {entry!r} of type {type(entry).__name__}."
            )
    return Name(tuple(_plain(entry) for entry in name))


def _plain(entry: Any) -> Entry:
    """Returns a member of a str or int Enum as the plain key that it is equal to."""
    if isinstance(entry, str):
        return str.__str__(entry)
    return int(entry) if isinstance(entry, int) else entry


def parse(path: str | Path) -> Path:
    """Parses a path.

    Raises:
        PathSyntaxError: as `parse_name`, and if the text ends in a label.

    Examples:
        >>> parse('heads.0["x.y"]')
        ('heads', Number(value=0), 'x.y')
        >>> parse(("heads", 0))
        ('heads', 0)
    """
    parsed, label = parse_name(path)
    if label is not None:
        raise PathSyntaxError(
            f"Cannot parse the path {path!r}: it ends in the label {label!r}. "
            "A label belongs to the name of a term; a path to a node has none."
        )
    return parsed


def format(path: Path, label: str | None = None) -> str:
    """Returns the canonical text of a path or, with a label, of a term's name.

    Examples:
        >>> format(("heads", Number(0), "x.y"))
        'heads.0["x.y"]'
        >>> format(("mask",), "dice")
        'mask:dice'
    """
    text = ""
    for entry in path:
        bare = _format_bare(entry)
        if bare is None:
            text += f"[{_quote(entry) if isinstance(entry, str) else _format_exact(entry)}]"
        else:
            text += f".{bare}" if text else bare
    return text if label is None else f"{text}:{label}"


def _format_exact(entry: Any) -> str:
    return repr(entry if isinstance(entry, bool) else _plain(entry))


def _format_bare(entry: Entry) -> str | None:
    if isinstance(entry, Wildcard):
        return str(entry.value)
    if isinstance(entry, Number):
        return str(entry.value)
    if isinstance(entry, str) and _is_bare(entry) and not _NUMBER.fullmatch(entry):
        return str.__str__(entry)
    return None


_ESCAPES = str.maketrans({"~": "~0", "/": "~1", ".": "~2", ":": "~3"})


def encode(path: Path, label: str | None = None) -> str:
    """Returns the name of the child module that stands at a path.

    Injective, readable, without dots, and stable, since the keys of a `state_dict` are made of it.
    Each entry follows a slash, with ``~``, ``/``, ``.`` and ``:`` escaped as ``~0`` to ``~3`` (after RFC 6901);
    the root is ``/``. ``~i`` marks an exact integer, ``~s`` a string that reads as something else.

    Examples:
        >>> encode(("detection", "bbox")), encode(("aux", Wildcard.ONE), "dice"), encode(("a.b", "0", 0))
        ('/detection/bbox', '/aux/*:dice', '/a~2b/~s0/~i0')
    """
    text = "".join(f"/{_encode_entry(entry)}" for entry in path) or "/"
    return text if label is None else f"{text}:{label.translate(_ESCAPES)}"


def _encode_entry(entry: Entry) -> str:
    if isinstance(entry, str):
        special = entry in ("", "*", "**") or _NUMBER.fullmatch(entry)
        return ("~s" if special else "") + entry.translate(_ESCAPES)
    if isinstance(entry, int):
        return f"~i{entry}"
    return str(entry.value)


def same_node(a: Path, b: Path) -> bool:
    """Whether two paths, spelt as they may be, reach the same node wherever both reach one.

    A bare number reaches what the exact string or the exact integer reaches.
    """
    return len(a) == len(b) and all(_same_entry(x, y) for x, y in zip(a, b, strict=True))


def _same_entry(a: Entry, b: Entry) -> bool:
    if isinstance(a, Number) and not isinstance(b, (Number, Wildcard)):
        return b == a.value or b == str(a.value)
    if isinstance(b, Number) and not isinstance(a, (Number, Wildcard)):
        return _same_entry(b, a)
    return a == b


def has_wildcard(path: Path) -> bool:
    """Whether a path is a pattern."""
    return any(isinstance(entry, Wildcard) for entry in path)


def fill(path: Path, captures: tuple[Path, ...]) -> Path:
    """Returns a pattern with its wildcards replaced, in order, by what they stand for."""
    remaining = iter(captures)
    filled: list[Entry] = []
    for entry in path:
        filled.extend(next(remaining) if isinstance(entry, Wildcard) else (entry,))
    return tuple(filled)
