"""One walk for every container."""

import types
from collections import OrderedDict, UserDict, UserString, defaultdict, deque, namedtuple
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import pytest
import torch
import torch.distributions as D
from hypothesis import given
from hypothesis import strategies as st
from strategies import trees
from tensordict import TensorDict
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from torch_pathloss import Output as At
from torch_pathloss import PathLossModule, PathNotFoundError, Term, _paths, _tree

Pair = namedtuple("Pair", "left right")


Methods = namedtuple("Methods", "count keys")  # a tuple has a method count, a mapping a method keys


@dataclass
class Data:
    logits: Any
    hidden: Any = None


@dataclass(frozen=True)
class Frozen:
    logits: Any


class Plain:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def method(self):
        return 1


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Registered:
    """A node of a user's own, whose children have no attributes."""

    def __init__(self, *children):
        self._children = children


optree.register_pytree_node(
    Registered,
    lambda node: (node._children, None, tuple(range(len(node._children)))),
    lambda metadata, children: Registered(*children),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)


@dataclass
class Output(ModelOutput):
    logits: Any = None
    hidden: Any = None


X, Y = torch.zeros(1), torch.ones(2)


def walk(tree, path):
    return _tree.walk(tree, _paths.parse(path), "output")


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": {"b": X}}, "a.b"),
        (OrderedDict(a=X), "a"),
        (UserDict(a=X), "a"),
        (defaultdict(list, a=X), "a"),
        (Output(logits=X), "logits"),
        (SequenceClassifierOutput(logits=X, hidden_states=(Y, X)), "hidden_states.1"),
        ([Y, X], "1"),
        ([Y, X], "-1"),
        ([Y, X], "[-1]"),
        ((Y, (X,)), "1.0"),
        (deque([Y, X]), "1"),
        (Pair(Y, X), "right"),
        (Pair(Y, X), "1"),
        (Pair(Y, X), "-1"),
        (torch.return_types.max((Y, X)), "indices"),
        (torch.return_types.max((Y, X)), "1"),
        (Data(logits=X), "logits"),
        (Frozen(logits={"a": X}), "logits.a"),
        (Plain(a=Plain(b=X)), "a.b"),
        (Slots(X), "x"),
        (Registered(Y, X), "1"),
        (Registered(Y, X), "[1]"),
        ({"0": X, "a": Y}, "0"),
        ({0: X, "a": Y}, "0"),
        ({0: X, "0": Y}, "[0]"),
        ({0: Y, "0": X}, '["0"]'),
        ({"x.y": X}, '["x.y"]'),
        ({"": X}, '[""]'),
        ({"-1": X, "a": Y}, "-1"),
        ({-1: X, "a": Y}, "-1"),
        (Methods(X, Y), "count"),
        (Methods(Y, X), "keys"),
        ({"keys": X, "items": Y}, "keys"),
        ([Output(logits=[Data(X)])], "0.logits.0.logits"),
        (X, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_one_walk_serves_every_container(tree, path):
    assert walk(tree, path) is X


def test_a_tensor_dict_is_a_mapping():
    tree = TensorDict({"a": {"b": torch.arange(3.0)}}, batch_size=3)
    assert torch.equal(walk(tree, "a.b"), torch.arange(3.0))
    assert [path for path, _ in _tree.leaves(tree)] == [("a", "b")]


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": X}, "keys"),
        ({"a": X}, "__len__"),
        ({"ab": X}, "a"),
        ([X], "1"),
        ([X], "-2"),
        ([X], "append"),
        ((X,), "count"),
        (Pair(X, X), "count"),
        (Pair(X, X), "_fields"),
        (Pair(X, X), "2"),
        (Plain(a=X), "method"),
        (Plain(a=X), "0"),
        ({"a": X}, "[0]"),
        ("text", "0"),
        (X, "0"),
        (X, "grad"),
        (torch.ones(3, 3), "shape"),
        (torch.nn.Linear(1, 1), "weight"),
        (3.5, "real"),
        (Registered(X), "1"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_walk_reaches_no_method_no_row_and_nothing_that_is_not_there(tree, path):
    with pytest.raises(PathNotFoundError):
        walk(tree, path)


def test_none_on_the_way_is_none():
    assert walk({"a": None}, "a.b.0") is None
    assert walk(Output(logits=X), "hidden") is None  # a field that ModelOutput leaves out of its keys


def test_reading_does_not_insert_a_key():
    tree = defaultdict(dict)
    with pytest.raises(PathNotFoundError):
        walk(tree, "a.b")
    assert tree == {}


def message(tree, path):
    with pytest.raises(PathNotFoundError) as caught:
        walk(tree, path)
    return str(caught.value)


def test_the_message_says_where_the_walk_stopped_and_what_was_there():
    tree = {
        "head": {"boxes": X},
        "list": [X],
        "pair": Pair(X, X),
        "data": Data(X),
        "t": Y,
        "other": {"score": X},
        "e": {},
    }
    where = "The walk stopped at"
    assert message(tree, "head.box") == (
        f"the output has no 'head.box'. {where} 'head', a dict with the keys 'boxes'. Did you mean 'head.boxes'?"
    )
    assert message(tree, "heads.boxes") == (
        f"the output has no 'heads.boxes'. {where} the root, a dict with the keys 'head', 'list', 'pair', 'data', 't', "
        "'other', 'e'. Did you mean 'head.boxes'?"
    )
    assert message(tree, "list.3") == f"the output has no 'list.3'. {where} 'list', a list of length 1."
    assert message(tree, "pair.lefd") == (
        f"the output has no 'pair.lefd'. {where} 'pair', a Pair with the fields 'left', 'right'. "
        "Did you mean 'pair.left'?"
    )
    assert message(tree, "data.logit") == (
        f"the output has no 'data.logit'. {where} 'data', a Data with the attributes 'logits', 'hidden'. "
        "Did you mean 'data.logits'?"
    )
    assert message(tree, "t.0") == (
        f"the output has no 't.0'. {where} 't', a Tensor of shape (2,). A path never goes into a tensor."
    )
    assert message(tree, "head.score") == (
        f"the output has no 'head.score'. {where} 'head', a dict with the keys 'boxes'. Did you mean 'other.score'?"
    )
    assert message(tree, "e.x") == f"the output has no 'e.x'. {where} 'e', a dict without keys."
    assert message({f"k{i}": X for i in range(20)}, "zzz") == (
        "the output has no 'zzz'. The walk stopped at the root, a dict with the keys 'k0', 'k1', 'k2', 'k3', 'k4', "
        "'k5', 'k6', 'k7', 'k8', 'k9', 'k10', 'k11' and 8 more."
    )


def test_a_number_that_is_two_keys_is_ambiguous():
    assert message({0: X, "0": Y}, "0") == (
        "the entry 0 is ambiguous: the mapping has both the key '0' and the key 0. "
        'Write ["0"] for the string or [0] for the integer.'
    )


def expand(tree, path):
    parsed = _paths.parse(path)
    return [_paths.format(_paths.fill(parsed, captures)) for captures in _tree.expand(tree, parsed, "output")]


def test_one_star_stands_for_one_entry():
    tree = {"aux": [X, {"y": Y}], "heads": {"b": {"x": X}, "a": {"x": X, "z": X}}, "pair": Pair(X, None)}
    assert expand(tree, "aux.*") == ["aux.0", "aux.1"]
    assert expand(tree, "heads.*.x") == ["heads.b.x", "heads.a.x"]
    assert expand(tree, "heads.*.z") == ["heads.a.z"]
    assert expand(tree, "pair.*") == ["pair.left", "pair.right"]
    assert expand(tree, "*.*.x") == ["heads.b.x", "heads.a.x"]


def test_two_stars_stand_for_any_number_and_end_at_leaves():
    tree = {"a": X, "b": [X, {"a": Y}], "c": None, "d": {"b": {"a": X}}}
    assert expand(tree, "**") == ["a", "b.0", "b.1.a", "d.b.a"]
    assert expand(tree, "**.a") == ["a", "b.1.a", "d.b.a"]
    assert expand(tree, "b.**") == ["b.0", "b.1.a"]
    assert expand(tree, "d.**.a") == ["d.b.a"]
    assert expand(tree, "a.**") == ["a"]
    assert expand(tree, "c.**.zz") == expand(tree, "**.c.*") == []


@pytest.mark.parametrize("tree", [{"a": []}, {"a": {}}, {"a": None}, {"a": ()}], ids=repr)
def test_a_pattern_over_nothing_matches_nothing(tree):
    assert expand(tree, "a.*") == expand(tree, "a.*.b") == []


@pytest.mark.parametrize(
    ("tree", "path", "text"),
    [
        ({"b": X}, "a.*", "the output has no 'a'."),
        ({"a": X}, "a.*", "the output has no 'a.*'. The walk stopped at 'a', a Tensor of shape (1,)."),
        (
            {"h": {"logits": X}},
            "**.logtis",
            "the output has no '**.logtis'. Nothing below the root, a dict with the keys 'h', is called 'logtis'. "
            "Did you mean 'logits'?",
        ),
        ({"a": [{"x": X}]}, "a.*.y", "the output has no 'a.0.y'. The walk stopped at 'a.0', a dict with the keys 'x'."),
    ],
)
def test_a_pattern_that_cannot_match_raises(tree, path, text):
    with pytest.raises(PathNotFoundError) as caught:
        expand(tree, path)
    assert str(caught.value).startswith(text)


def test_leaves_come_in_the_tree_s_own_order_with_the_entries_that_reach_them():
    tree = {
        "z": [X, None],
        "a": Pair(X, {"k": 1}),
        "data": Data(logits=X),
        "user": UserDict(x=X),
        "hf": Output(logits=X),
        "plain": Plain(p=X, _hidden=X),
        "registered": Registered(X, [X]),
        "max": torch.return_types.max((X, Y)),
        "empty": {},
    }
    assert [_paths.format(path) for path, _ in _tree.leaves(tree)] == [
        *("z[0]", "z[1]", "a.left", "a.right.k", "data.logits", "data.hidden", "user.x", "hf.logits", "plain.p"),
        *("registered[0]", "registered[1][0]", "max.values", "max.indices"),
    ]


@given(trees(st.integers() | st.none()))
def test_optree_and_the_walk_find_the_same_leaves(tree):
    found = _tree.leaves(tree)
    visited = []
    _tree.visit_leaves(lambda path, leaf: visited.append((path, leaf)), tree)
    assert found == visited
    for path, leaf in found:
        assert _tree.walk(tree, path, "output") == leaf
        assert _tree.locate(tree, path, "output") == path


@given(trees(st.integers()))
def test_mapping_leaves_keeps_the_tree(tree):
    assert _tree.map_leaves(lambda leaf: leaf, tree) == tree
    assert _tree.leaves(_tree.map_leaves(lambda leaf: -leaf, tree)) == [(p, -leaf) for p, leaf in _tree.leaves(tree)]


def test_mapping_leaves_keeps_the_kind_of_every_container():
    tree = {
        "pair": Pair(X, X),
        "data": Data(X),
        "frozen": Frozen(X),
        "hf": Output(logits=X),
        "plain": Plain(a=X),
        "registered": Registered(X),
        "max": torch.return_types.max((X, Y)),
        "td": TensorDict({"a": X}, batch_size=1),
        "deque": deque([X]),
        "ordered": OrderedDict(a=X),
        "default": defaultdict(int, a=X),
    }
    twin = _tree.map_leaves(lambda leaf: leaf + 5 if isinstance(leaf, torch.Tensor) else leaf, tree)
    assert {name: type(node) for name, node in twin.items()} == {name: type(node) for name, node in tree.items()}
    assert twin["frozen"].logits.item() == twin["td"]["a"].item() == twin["hf"].logits.item() == 5
    assert tree["frozen"].logits.item() == tree["hf"]["logits"].item() == tree["plain"].a.item() == 0


def test_children_are_set_in_place_where_that_is_possible():
    for tree, path in (
        ({"a": X}, ("a",)),
        ([X], (0,)),
        (Data(X), ("logits",)),
        ({"a": [Frozen(X)]}, ("a", 0, "logits")),
    ):
        assert _tree.put_at(tree, path, None)
        assert _tree.find(tree, path) is None
    for tree, path in (((X,), (0,)), (Pair(X, X), ("left",)), (X, ())):
        assert not _tree.put_at(tree, path, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda **leaves: leaves,
        lambda **leaves: Output(**leaves),
        lambda **leaves: Data(**leaves),
        lambda **leaves: Plain(**leaves),
        lambda **leaves: UserDict(leaves),
        lambda **leaves: TensorDict(leaves, batch_size=3),
    ],
    ids=["dict", "ModelOutput", "dataclass", "plain object", "UserDict", "TensorDict"],
)
def test_a_criterion_works_on_every_container_in_every_way(make):
    criterion = PathLossModule({"logits": torch.nn.MSELoss(), "hidden": torch.nn.L1Loss()})
    target = {"logits": torch.zeros(3), "hidden": torch.zeros(3)}
    by_hand = torch.full((3,), 2 * 2.0 / 3), torch.full((3,), 1 / 3)
    for way in ("call", "backward", "consume"):
        logits, hidden = (torch.full((3,), value, requires_grad=True) for value in (2.0, 5.0))
        output = make(logits=logits * 1, hidden=hidden * 1)
        if way == "call":
            criterion(output, target).backward()
        else:
            criterion.backward(output, target, consume=way == "consume")
        torch.testing.assert_close((logits.grad, hidden.grad), by_hand)
    _, gradients = criterion.value_and_grad(make(logits=torch.full((3,), 2.0), hidden=torch.full((3,), 5.0)), target)
    torch.testing.assert_close(_tree.find(gradients, ("logits",)), by_hand[0])


def test_a_number_is_no_key_of_a_tensor_dict_but_its_text_is():
    tree = TensorDict({"0": torch.arange(3.0)}, batch_size=[])
    assert torch.equal(walk(tree, "0"), torch.arange(3.0))
    where = "The walk stopped at the root, a TensorDict with the keys '0'."
    assert message(tree, "1") == f"the output has no '1'. {where}"
    assert message(tree, "[0]").startswith(f"the output has no '[0]'. {where}")


def test_two_double_stars_find_a_node_once():
    assert expand({"b": X, "c": {"d": X}}, "**.**") == ["b", "c.d"]
    assert expand({"b": {"b": {"x": X}}}, "**.b.**") == ["b.b.x"]


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict], ids=lambda kind: kind.__name__)
def test_a_pattern_goes_through_keys_that_no_text_can_name(kind):
    tree = kind({("a", "b"): X, None: X, 1.5: X, 3: X})
    assert _tree.expand(tree, _paths.parse("*"), "output") == [((key,),) for key in tree]
    assert all(_tree.walk(tree, (key,), "output") is X for key in tree)


@pytest.mark.parametrize("entry", ["__class__", "__doc__", "__dict__"])
def test_what_python_keeps_about_an_object_is_no_part_of_it(entry):
    assert message(Plain(a=X), entry) == (
        f"the output has no {entry!r}. The walk stopped at the root, a Plain with the attributes 'a'."
    )


@pytest.mark.parametrize(
    "text", ["ab", b"ab", bytearray(b"ab"), memoryview(b"ab"), UserString("ab")], ids=lambda text: type(text).__name__
)
def test_text_is_a_leaf(text):
    assert _tree.leaves({"a": text}) == [(("a",), text)]


class Private:
    """An object whose tensor is reached through a property."""

    def __init__(self, x):
        self._x = x

    @property
    def x(self):
        return self._x


class ReadOnly(Mapping):
    def __init__(self, **items):
        self._items = items

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Wrapper(ReadOnly, MutableMapping):
    """A mapping whose shallow copy shares its storage."""

    def __setitem__(self, key, value):
        self._items[key] = value

    def __delitem__(self, key):
        del self._items[key]


class ReadOnlySequence(Sequence):
    def __init__(self, *items):
        self._items = items

    def __getitem__(self, index):
        return self._items[index]

    def __len__(self):
        return len(self._items)


class Attribute:
    """Registered with optree under indices, and read by attribute."""

    def __init__(self, x):
        self.x = x


optree.register_pytree_node(
    Attribute,
    lambda node: ((node.x,), None),
    lambda metadata, children: Attribute(*children),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)


def negative_log_likelihood(distribution, value):
    return -distribution.log_prob(value).sum()


def square(x):
    return x.square().sum()


def test_objects_that_know_one_another_are_searched_once():
    friends = [Plain() for _ in range(30)]
    for friend in friends:
        friend.__dict__.update({f"friend{i}": other for i, other in enumerate(friends)})
    tree = {"a": X, "friend": friends[0]}
    assert [path for path, _ in _tree.leaves(tree)] == [("a",), ("friend",)]  # 30 ** 8 ways without


@pytest.mark.parametrize("depth", [1, 7])
def test_a_tensor_deep_in_objects_is_found(depth):
    node = Plain(x=X)
    for _ in range(depth - 1):
        node = Plain(inner=[node]) if depth < 4 else Plain(inner=node)
    assert [leaf for _, leaf in _tree.leaves(node)] == [X]


def test_a_key_with_dots_that_is_not_quoted_is_suggested():
    assert message({"head": {"box.xy": X}}, "head.box.xy") == (
        "the output has no 'head.box.xy'. The walk stopped at 'head', a dict with the keys 'box.xy'. "
        "Did you mean 'head[\"box.xy\"]'?"
    )


READ = [
    ("object in an object", lambda x: Plain(a=Plain(b=x)), {"": Term(lambda o: square(o.a.b), At(""))}),
    ("path into an object in an object", lambda x: Plain(a=Plain(b=x)), {"a.b": Term(square, At("a.b"))}),
    ("deque in an object", lambda x: Plain(a=deque([x])), {"a.0": Term(square, At("a.0"))}),
    ("slots", Slots, {"x": Term(square, At("x"))}),
    ("property", Private, {"x": Term(square, At("x"))}),
    ("read-only mapping", lambda x: ReadOnly(x=x), {"x": Term(square, At("x"))}),
    ("mapping proxy", lambda x: types.MappingProxyType({"x": x}), {"x": Term(square, At("x"))}),
    ("wrapping mapping", lambda x: Wrapper(x=x), {"x": Term(square, At("x"))}),
    ("read-only sequence", lambda x: ReadOnlySequence(x), {"0": Term(square, At("0"))}),
    ("registered, by attribute", Attribute, {"x": Term(square, At("x"))}),
    ("registered, by index", Attribute, {"0": Term(square, At("0"))}),
    ("torch.Size beside", lambda x: {"x": x, "size": x.shape}, {"x": Term(square, At("x"))}),
    (
        "ModelOutput as a subtree",
        lambda x: SequenceClassifierOutput(logits=x * 1, hidden_states=(x * 2,)),
        {"": Term(lambda o: square(o.logits) + square(o.hidden_states[0]), At(""))},
    ),
    (
        "nested TensorDict as a subtree",
        lambda x: TensorDict({"a": {"x": x * 1}}, batch_size=3),
        {"": Term(lambda o: square(o["a", "x"]), At(""))},
    ),
    ("Normal", lambda x: D.Normal(x * 1, x.exp()), {"": negative_log_likelihood}),
    ("Independent", lambda x: D.Independent(D.Normal(x * 1, x.exp()), 1), {"": negative_log_likelihood}),
    (
        "MultivariateNormal",
        lambda x: D.MultivariateNormal(x * 1, scale_tril=torch.diag(x.exp())),
        {"": negative_log_likelihood},
    ),
    (
        "MixtureSameFamily",
        lambda x: D.MixtureSameFamily(D.Categorical(logits=x * 1), D.Normal(x * 2, x.exp())),
        {"": Term(negative_log_likelihood, At(""), torch.tensor(0.5))},
    ),
]


@pytest.mark.parametrize("way", ["backward", "consume", "value_and_grad", "grad_in_forward"])
@pytest.mark.parametrize(("make", "losses"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_every_way_to_gradients_finds_what_a_call_reads(make, losses, way):
    start, target = torch.tensor([0.3, 0.2, 0.5]), torch.ones(3)
    by_call = start.clone().requires_grad_()
    PathLossModule(losses)(make(by_call), target).backward()
    x = start.clone().requires_grad_()
    output = make(x)
    criterion = PathLossModule(losses, grad_in_forward=way == "grad_in_forward")
    if way == "grad_in_forward":
        criterion(output, target).backward()
    elif way == "value_and_grad":
        before = visited(output)
        _, gradients = criterion.value_and_grad(output, target)
        assert all(old is new for old, new in zip(before, visited(output), strict=True))
        pairs = [p for p in zip(before, visited(gradients), strict=True) if isinstance(p[1], torch.Tensor)]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    else:
        criterion.backward(output, target, consume=way == "consume")
    torch.testing.assert_close(x.grad, by_call.grad)


def visited(tree):
    found = []
    _tree.visit_leaves(lambda path, leaf: found.append(leaf), tree)
    return found


def test_a_registered_node_that_is_read_by_attribute_is_covered():
    criterion = PathLossModule({"x": Term(square, At("x"))}, uncovered="error")
    assert criterion(Attribute(torch.ones(3))).item() == 3
