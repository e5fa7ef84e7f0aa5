"""Arguments and results as they travel: what comes out is what went in, or nothing goes in."""

from __future__ import annotations

import enum
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from zmq_autograd.compat.rpc.errors import CannotTravel, NotAllowed
from zmq_autograd.compat.rpc.names import Names
from zmq_autograd.compat.rpc.values import Values
from zmq_autograd.compat.rpc.worker_info import WorkerInfo
from zmq_autograd.wire.limits import MAX_NUMBER_KEYS


class Pair(NamedTuple):
    left: Any
    right: Any


class Colour(enum.Enum):
    RED = 1


@dataclass
class Point:
    x: Any
    y: Any

    def norm(self) -> float:
        return float((self.x**2 + self.y**2) ** 0.5)


class Sub(Point):
    pass


def double(x: Any) -> Any:
    return 2 * x


@pytest.fixture
def values() -> Values:
    """What can travel where this module is allowed."""
    names = Names()
    names.allow_module(__name__)
    return Values(names)


def sent(values: Values, value: Any, to: Values | None = None) -> Any:
    packed = values.pack(value)
    return (to or values).unpack(packed.skeleton, packed.tensors, packed.rrefs, lambda *a: a)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, 2**70, 0.5, 1j, "text", b"bytes", [], (), {}, set()),
        [1, [2, (3, {"a": [None]})]],
        {"a": 1, 2: "b", (1, 2): [3], None: 0.5},
        {1, 2},
        frozenset("ab"),
        slice(1, None, 2),
        range(3, 9, 2),
        torch.Size([2, 3]),
        torch.float32,
        torch.strided,
        torch.channels_last,
        torch.device("cpu"),
        WorkerInfo("worker0", 0),
        Pair(1, [2]),
        Colour.RED,
        double,
        torch.add,
        Point,
        Tensor,
        torch.optim.SGD,
        int,
        ["list", "tensor", 0],
        ("rref", 0),
        {"dict": ["tensor", 0]},
    ],
)
def test_a_value_comes_out_as_it_went_in(values: Values, value: Any) -> None:
    came = sent(values, value)
    assert came == value
    assert type(came) is type(value)


def test_what_operators_return_comes_out_as_it_went_in(values: Values) -> None:
    x = torch.rand(2, 3, requires_grad=True)
    for value in (x.max(1), x.topk(2), torch.linalg.svd(x), torch.linalg.slogdet(x[:, :2])):
        came = sent(values, value)
        assert type(came) is type(value)
        assert [id(item) for item in came] == [id(item) for item in value]
    with pytest.raises(TypeError, match="2-sequence"):
        values.unpack(["return_types.max", 1], [], [], lambda *a: a)


def test_a_packed_sequence_comes_out_as_it_went_in(values: Values) -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.zeros(2)])
    came = sent(values, packed)
    assert type(came) is type(packed)
    assert came.data is packed.data


def test_an_ordered_dict_keeps_its_order(values: Values) -> None:
    came = sent(values, OrderedDict(b=1, a=2))
    assert list(came) == ["b", "a"]
    assert type(came) is OrderedDict


def test_tensors_travel_beside_the_rest_in_their_order(values: Values) -> None:
    a, b = torch.ones(2), torch.zeros(3, requires_grad=True)
    packed = values.pack([a, {"k": (b, a)}, {a: 1}])
    assert [id(t) for t in packed.tensors] == [id(t) for t in (a, b, a, a)]
    came = values.unpack(packed.skeleton, packed.tensors, [], lambda *a: a)
    assert came[0] is a
    assert came[1]["k"][0] is b
    assert came[2] == {a: 1}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.rand(5, 5).narrow(1, 2, 2),
        torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.rand(4, 4)[::2, ::2],
    ],
)
def test_a_tensor_keeps_its_strides(values: Values, tensor: Tensor) -> None:
    packed = values.pack(tensor)
    came = values.unpack(packed.skeleton, [tensor.contiguous()], [], lambda *a: a)
    assert came.stride() == tensor.stride()
    assert torch.equal(came, tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3).expand(4, 3),
        torch.rand(100, 100)[:, 0],
        torch.rand(2, 3, requires_grad=True).t(),
        torch.empty(0, 3).t(),
        torch.eye(3).to_sparse(),
        torch.rand(3),
    ],
)
def test_strides_that_cost_too_much_do_not_travel(values: Values, tensor: Tensor) -> None:
    packed = values.pack(tensor)
    assert packed.skeleton == ["tensor", 0]
    assert packed.tensors[0] is tensor


@pytest.mark.parametrize("strides", [[1], [0, 1], [1, 1], [-1, 3], [1000, 1], [0.5, 1], [True, 2]])
def test_strides_that_cannot_be_are_refused(values: Values, strides: list[Any]) -> None:
    with pytest.raises(ValueError, match="strides"):
        values.unpack(["tensor", 0, *strides], [torch.rand(2, 3)], [], lambda *a: a)


def test_objects_go_by_their_codec(values: Values) -> None:
    values.codec(Point, pack=lambda p: [p.x, p.y], unpack=lambda parts: Point(*parts))
    tensor = torch.ones(2)
    came = sent(values, [Point(tensor, 1), Sub(3, 4)])
    assert came[0].x is tensor
    assert came[1] == Point(3, 4)  # a subclass travels as the class that has the codec


def test_a_codec_may_let_an_object_travel_as_it_is(values: Values) -> None:
    values.codec(
        Pair,
        pack=lambda pair: pair if pair.left else pair.right,
        unpack=lambda right: Pair(0, right),
    )
    assert values.pack(Pair(0, 3)).skeleton == ["coded", f"{__name__}:Pair", 3]
    assert sent(values, [Pair(1, 2), Pair(0, 3)]) == [Pair(1, 2), Pair(0, 3)]


def test_a_method_goes_with_its_object(values: Values) -> None:
    values.codec(Point, pack=lambda p: [p.x, p.y], unpack=lambda parts: Point(*parts))
    assert sent(values, Point(3, 4).norm)() == 5


def test_a_type_without_a_codec_is_refused(values: Values) -> None:
    for value in (Point(1, 2), nn.Linear(1, 1), object(), bytearray(), torch.Generator()):
        with pytest.raises(CannotTravel):
            values.pack([value])
    with pytest.raises(CannotTravel, match=r"rpc\.codec"):
        values.pack(Point(1, 2))


def test_a_codec_that_the_other_side_lacks_is_refused_there(values: Values) -> None:
    values.codec(Point, pack=lambda p: [p.x, p.y], unpack=lambda parts: Point(*parts))
    with pytest.raises(NotAllowed, match="no codec"):
        sent(values, Point(1, 2), Values(Names()))


@pytest.mark.parametrize("value", [double, Point, Pair(1, 2), Colour.RED, torch.optim.SGD])
def test_names_are_looked_up_where_they_arrive(values: Values, value: Any) -> None:
    stranger = Values(Names())
    if value is torch.optim.SGD:  # a plain type: harmless by itself
        assert sent(values, value, stranger) is value
    else:
        with pytest.raises(NotAllowed):
            sent(values, value, stranger)


@pytest.mark.parametrize("value", [lambda: 1, torch.futures.Future(), print, open])
def test_functions_without_names_and_futures_do_not_travel(values: Values, value: Any) -> None:
    with pytest.raises(CannotTravel):
        values.pack(value)


@pytest.mark.parametrize("kind", [set, frozenset, dict])
def test_keys_that_could_be_made_to_collide_are_few(values: Values, kind: Any) -> None:
    numbers = range(MAX_NUMBER_KEYS + 1)
    value = dict.fromkeys(numbers, 0) if kind is dict else kind(numbers)
    with pytest.raises(CannotTravel, match="numbers"):
        values.pack(value)
    skeleton = ["dict", *range(4 * MAX_NUMBER_KEYS)] if kind is dict else [kind.__name__, *numbers]
    with pytest.raises(ValueError, match="numbers"):
        values.unpack(skeleton, [], [], lambda *a: a)
    assert sent(values, set(map(str, numbers))) == set(map(str, numbers))


@pytest.mark.parametrize(
    "skeleton",
    [
        ["name", "os:system"],
        ["name", "builtins:eval"],
        ["name", "torch:load"],
        ["type", "subprocess:Popen"],
        ["type", "torch:add"],
        ["enum", "builtins:int", "real"],
        ["enum", "subprocess:Popen", "x"],
        ["named", "builtins:list", 1],
        ["named", "subprocess:Popen", "sh"],
        ["coded", "os:system", "true"],
        ["method", ["list"], "append"],
        ["method", 1, "__class__"],
        ["tensor", 7],
        ["rref", 7],
        ["torch", "torch.load"],
        ["device", "no such device"],
        ["worker", "worker0"],
        ["dict", 1],
        ["slice", 1, 2, 3, 4],
        ["no such tag"],
        [],
        [["list"]],
        ["coded"],
    ],
)
def test_what_nobody_packs_raises_and_does_nothing(values: Values, skeleton: Any) -> None:
    with pytest.raises((NotAllowed, ValueError, LookupError, TypeError, RuntimeError)):
        values.unpack(skeleton, [], [], lambda *a: a)


def test_nothing_is_pickled(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickled")

    for name in ("dumps", "loads", "dump", "load", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    values.codec(Point, pack=lambda p: [p.x, p.y], unpack=lambda parts: Point(*parts))
    assert sent(values, [Point(1, 2), {"a": double}, Colour.RED])[0] == Point(1, 2)
