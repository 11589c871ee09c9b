"""Changes of operations: what each does to small functions, which operation it finds, and what it refuses."""

import functools
import math
import random

import pytest
import torch

from parity import mutation
from parity.mutation import (
    Change,
    Stale,
    assignment,
    attribute,
    binary,
    call,
    changed,
    choice,
    compare,
    condition,
    constant,
    function_at,
    item,
    iterable,
    logical,
    name,
)

TABLE = [5, 7, 11]


def total(x: int | None, y, more=3):
    """The annotation's `|`, the default and this text are no operations: + - *."""
    result = 2 * x + y
    if x < y and y > 0:
        result -= 4
    return result if x != y else TABLE[1] - result


def clipped(x, low=-1.0):
    best = x.clamp(0, 6).clamp(min=low, max=2).sum(-1, dtype=torch.float64)
    return torch.exp(best) + max(math.sqrt(4.0), 1)


def looped(x):
    out = [3 * y for y in x if y > 1]
    for y in x:
        out.append(-y)
    return out, x[-1], x[0]


def said(x):
    """A name that is alike in all processes, as an expected function's is not."""
    return str(x) if isinstance(x, Change) else "-"


def drawn(count=20):
    source = random.Random(0)
    return [(source.randint(-9, 9), source.randint(-9, 9)) for _ in range(count)]


@pytest.mark.parametrize(
    "change, expected",
    [
        (compare("<").to("<="), lambda x, y: total(x, y) + 4 * (x == y > 0)),
        (compare("<").becomes("False"), lambda x, y: 2 * x + y if x != y else 7 - 3 * x),
        (compare(">").becomes("_0 > _1 + 100"), lambda x, y: 2 * x + y if x != y else 7 - 3 * x),
        (logical("and").to("or"), lambda x, y: _total(x, y, x < y or y > 0)),
        (logical("and").becomes("_0"), lambda x, y: 2 * x + y - 4 * (x < y) if x != y else 7 - 3 * x),
        (condition()[0].becomes("not _"), lambda x, y: _total(x, y, not (x < y and y > 0))),
        (condition()[-1].becomes("not _"), lambda x, y: _total(x, y, x < y and y > 0, x == y)),
        (assignment("result")[1].drop(), lambda x, y: _total(x, y, False)),
        (assignment("result")[1].value.becomes("_ + 1"), lambda x, y: _total(x, y, x < y and y > 0, by=5)),
        (constant(4).becomes("_ + 1"), lambda x, y: _total(x, y, x < y and y > 0, by=5)),
        (binary("+").becomes("_1"), lambda x, y: _total(0, y, x < y and y > 0, x != y)),
        (binary("*").to("+"), lambda x, y: _total(x, y, x < y and y > 0, start=2 + x + y)),
        (binary("-").becomes("_1 - _0"), lambda x, y: total(x, y) * (1 if x != y else -1)),
        (item("TABLE").index.becomes("2"), lambda x, y: total(x, y) + 4 * (x == y)),
        (choice().becomes("_0"), lambda x, y: _total(x, y, x < y and y > 0, True)),
        (name("x")[0].becomes("0"), lambda x, y: _total(0, y, x < y and y > 0, x != y)),
        (name("TABLE").becomes("_[::-1]"), total),
        (name("x")[1].exchange(name("y")[1]), lambda x, y: _total(x, y, y < x and y > 0)),
        (
            constant(4).becomes("0") & constant(2).becomes("3"),
            lambda x, y: _total(x, y, False, x != y, start=3 * x + y),
        ),
    ],
    ids=said,
)
def test_changes_of_numbers(change, expected):
    before = [total(x, y) for x, y in drawn()]
    wanted = [expected(x, y) for x, y in drawn()]
    with changed(total, change):
        assert [total(x, y) for x, y in drawn()] == wanted
    assert [total(x, y) for x, y in drawn()] == before


def _total(x, y, less, first=None, by=4, start=None):
    result = (2 * x + y if start is None else start) - by * less
    return result if (x != y if first is None else first) else 7 - result


@pytest.mark.parametrize(
    "change, expected",
    [
        (call("exp").drop(), lambda x: x.clamp(0, 2).sum(-1).double() + 2),
        (call("clamp")[0].drop(), lambda x: x.clamp(-1, 2).sum(-1).double().exp() + 2),
        (call("clamp").taking(constant(0)).drop(), lambda x: x.clamp(-1, 2).sum(-1).double().exp() + 2),
        (
            call("clamp")[1].argument("max").becomes("_ / 2"),
            lambda x: x.clamp(0, 1).sum(-1).double().exp() + 2,
        ),
        (call("clamp")[0].argument(1).becomes("1"), lambda x: x.clamp(0, 1).sum(-1).double().exp() + 2),
        (call("sum").rename("amax"), TypeError),
        (call("sum").becomes("_of.amax(_0).double()"), lambda x: x.clamp(0, 2).amax(-1).double().exp() + 2),
        (call("sum").given(dtype="torch.float32"), lambda x: x.clamp(0, 2).sum(-1).exp() + 2),
        (call("sum").given(keepdim="True"), lambda x: x.clamp(0, 2).sum(-1, keepdim=True).double().exp() + 2),
        (attribute("float64").rename("float32"), lambda x: x.clamp(0, 2).sum(-1).exp() + 2),
        (
            call("sum").object.becomes("_.flip(-1)[..., :1]"),
            lambda x: x.clamp(0, 2)[:, -1].double().exp() + 2,
        ),
        (call("max").rename("min"), lambda x: x.clamp(0, 2).sum(-1).double().exp() + 1),
        (call("sqrt").inside(call("max")).drop(), lambda x: x.clamp(0, 2).sum(-1).double().exp() + 4),
        (call("max").having(constant(4.0)).becomes("0"), lambda x: x.clamp(0, 2).sum(-1).double().exp()),
        (call("clamp").on("x").rename("mul"), TypeError),
        (constant(-1).becomes("0"), lambda x: x.clamp(0, 2).sum(0).double().exp() + 2),
        (call("clamp").every().drop(), lambda x: x.sum(-1).double().exp() + 2),
    ],
    ids=said,
)
def test_changes_of_calls(change, expected):
    x = torch.randint(-8, 9, (4, 4), generator=torch.Generator().manual_seed(0)).float()
    with changed(clipped, change):
        if expected is TypeError:
            with pytest.raises(TypeError):
                clipped(x)
        else:
            torch.testing.assert_close(clipped(x), expected(x))


def test_changes_of_loops():
    x = [1, 2, 3]
    assert looped(x) == ([6, 9, -1, -2, -3], 3, 1)
    for change, expected in (
        (iterable()[0].becomes("_[:0]"), ([-1, -2, -3], 3, 1)),
        (iterable()[1].becomes("reversed(_)"), ([6, 9, -3, -2, -1], 3, 1)),
        (condition().becomes("True"), ([3, 6, 9, -1, -2, -3], 3, 1)),
        (call("append").drop(), ([6, 9], 3, 1)),
        (item(at=-1).becomes("0"), ([6, 9, -1, -2, -3], 0, 1)),
        (item("x", at=0).becomes("9"), ([6, 9, -1, -2, -3], 3, 9)),
        (item("x")[0].exchange(item("x")[1]), ([6, 9, -1, -2, -3], 1, 3)),
    ):
        with changed(looped, change):
            assert looped(x) == expected, change


def first_form(scores, seen, softcap):
    capped = softcap * torch.tanh(scores / softcap)
    return capped.masked_fill(~seen, -torch.inf).softmax(-1)


def second_form(x, visible, cap):
    """The same, as others might write it."""
    x = x / cap
    x = torch.tanh(x)
    x = x * cap
    hidden = ~visible
    x = x.masked_fill(hidden,
                      -torch.inf)  # fmt: skip
    return x.softmax(-1)


@pytest.mark.parametrize(
    "change",
    [call("tanh").drop(), call("masked_fill").drop(), call("softmax").argument(0).becomes("0")],
    ids=str,
)
def test_a_change_is_of_the_operation_and_not_of_the_text(change):
    generator = torch.Generator().manual_seed(0)
    args = torch.randn(5, 6, generator=generator) * 9, torch.rand(5, 6, generator=generator) < 0.8, 4.0
    plain = first_form(*args)
    torch.testing.assert_close(second_form(*args), plain)
    with changed(first_form, change), changed(second_form, change):
        torch.testing.assert_close(first_form(*args), second_form(*args), equal_nan=True)
        assert not torch.equal(first_form(*args), plain)


@pytest.mark.parametrize(
    "change, said",
    [
        (call("nonesuch").drop(), r"call\('nonesuch'\) is there 0 times"),
        (call("clamp").drop(), r"call\('clamp'\) is there 2 times"),
        (call("clamp")[2].drop(), "0 times"),
        (call("clamp")[-3].drop(), "0 times"),
        (call("clamp")[0].argument("max").becomes("1"), "0 times"),
        (call("clamp").on("nonesuch").drop(), "0 times"),
        (call("max").every().becomes("_"), "alters nothing"),
        (call("max").becomes("_7"), "has no _7"),
        (call("max").becomes("_of"), "has no _of"),
        (constant(4.0).drop(), "leaves nothing"),
        (constant(True).becomes("False"), "0 times"),
        (constant(6).exchange(call("clamp")), r"call\('clamp'\) is there 2 times"),
    ],
    ids=said,
)
def test_what_is_not_there_or_not_one_is_stale(change, said):
    own = clipped.__code__
    with pytest.raises(Stale, match=said), changed(clipped, change):
        pass
    assert clipped.__code__ is own


def test_chained_comparisons():
    def between(x):
        return 0 < x <= 5

    assert not between(0)
    with changed(between, compare("<=").becomes("_0 < _1")):
        assert between(3) and not between(0)
    with pytest.raises(Stale, match="more than two"), changed(between, compare("<=").to("<")):
        pass


# -- where functions are


def wrapped(function):
    @functools.wraps(function)
    def inside(*args):
        return function(*args) + 100

    return inside


@wrapped
@torch.no_grad()
def decorated(x):
    return x + 1


@functools.lru_cache
def cached(x):
    return x + 1


def made(offset):
    unused = offset * 2

    def add(x):
        return x + offset + 0 * unused

    return add


class Base:
    def grown(self, x):
        return x + 1


class Thing(Base):
    @property
    def size(self):
        return 3 + 1

    @staticmethod
    def doubled(x):
        return x * 2

    @classmethod
    def named(cls, x):
        return cls.__name__ + x

    @functools.cached_property
    def once(self):
        return 5 + 1

    @wrapped
    def grown(self, x):
        return super().grown(x) * 2


ALIAS = decorated


@torch.library.custom_op("fade_test::mutated", mutates_args=())
def operator(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_every_holder_of_a_function_sees_the_change():
    here = __name__
    minus = binary("+").to("-")
    with changed(function_at(f"{here}.decorated"), minus):
        assert decorated(1) == ALIAS(1) == 100
    assert decorated(1) == 102
    partial = functools.partial(decorated, 1)
    with changed(partial, minus):
        assert partial() == 100
    assert cached(1) == 2
    with changed(function_at(f"{here}.cached"), minus):
        assert cached(1) == 0
    assert cached(1) == 2
    one, other = made(10), made(20)
    with changed(one, binary("+")[0].becomes("_0")):  # reads `offset` no more
        assert one(1) == 1 and other(1) == 21
    assert one(1) == 11
    x = torch.zeros(2)
    with changed(function_at(f"{here}.operator"), minus):
        assert torch.equal(operator(x), x - 1)
    assert torch.equal(operator(x), x + 1)


def test_members_of_classes():
    here, minus = f"{__name__}.Thing", binary("+").to("-")
    with changed(function_at(f"{here}.size"), minus), changed(function_at(f"{here}.once"), minus):
        assert Thing().size == 2 and Thing().once == 4
    with changed(function_at(f"{here}.doubled"), binary("*").to("+")):
        assert Thing.doubled(5) == 7
    with changed(function_at(f"{here}.named"), binary("+").becomes("_1 + _0")):
        assert Thing.named("x") == "xThing"
    with changed(function_at(f"{here}.grown"), binary("*").to("+")):
        assert Thing().grown(1) == 104
    with changed(function_at(f"{here}.grown"), call("grown").becomes("7")):  # reads `super()` no more
        assert Thing().grown(1) == 114
    assert Thing().grown(1) == 104 and Thing().size == 4 and Thing.named("x") == "Thingx"


def test_what_names_no_function_is_stale():
    for path in ("parity.nonesuch", "nonesuch.parity", f"{__name__}.TABLE", f"{__name__}.Thing.nonesuch"):
        with pytest.raises(Stale):
            function_at(path)


def test_a_failure_inside_takes_the_change_back():
    with pytest.raises(RuntimeError), changed(total, binary("+").to("-")):
        raise RuntimeError
    assert total(1, 2) == 0


def test_a_change_reads_as_it_is_written():
    change = call("narrow").on("x")[1].argument(2).becomes("_ - 1") & compare("<").to("<=")
    assert str(change) == "call('narrow').on('x')[1].argument(2).becomes('_ - 1') & compare('<').to('<=')"
    assert eval(str(change), vars(mutation)).text == change.text
