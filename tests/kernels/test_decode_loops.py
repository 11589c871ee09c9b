"""Compiled loops of a step of one token on a CPU: the same attention, and one compilation for every size."""

import functools
import random

import pytest
import torch
from torch._dynamo.utils import counters

from fade_fast.compile import loops as compiling
from fade_fast.compile import stored
from fade_fast.compile.compiled import Traced
from fade_fast.compile.stored import Stored
from fade_fast.kernels import decode, decode_loops
from fade_fast.kernels.decode_loops import Loops
from parity.tolerances import ATTENTION

from ..marks import slow_but
from .test_decode import ONE, distance, naive, problem, tier

WIDTHS = [(8, 8), (4, 4), (2, 2), (8, 4), (4, 2)]


@pytest.fixture
def few(monkeypatch):
    """Steps over few slots take the loops, too."""
    monkeypatch.setattr(decode_loops, "LEAST", 1)
    monkeypatch.setattr(decode_loops, "available", lambda: True)


@pytest.fixture
def calls(few, monkeypatch):
    """The loops run eagerly, and their calls are counted."""
    made = []

    def run(threads, *args, **constants):
        made.append(constants)
        return decode_loops._attend(*args, **constants)

    monkeypatch.setattr(decode_loops, "_loops", run)
    return made


@pytest.fixture
def traced(few, monkeypatch):
    """The loops are traced for a new graph, but no code is generated."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(decode_loops, "_loops", Loops(decode_loops._attend, decode_loops._lengths))
    monkeypatch.setattr(stored, "name_of", lambda *of: None)  # files hold code
    torch._dynamo.reset()
    counters.clear()


def check(args, options):
    found, (expected, _) = decode.attend(*args, **options), naive(*args, **options)
    assert found.shape == expected.shape and found.dtype == args[0].dtype
    assert distance(found, expected) <= ATTENTION[found.dtype]


@pytest.mark.parametrize("seed", slow_but(range(40), *range(6)))
def test_random_cases(seed, calls):
    """Any shape and mask, poisoned where no query looks."""
    pick = random.Random(seed)
    lengths = [pick.randint(1, 300) for _ in range(pick.choice([1, 1, 2]))]
    check(
        *problem(
            seed,
            batch=pick.randint(1, 3),
            heads=pick.randint(1, 3),
            group=pick.choice([1, 3, 4, 8]),
            dim=pick.choice([64, 80, 128]),
            exact=pick.randint(1, 30),
            lengths=lengths,
            capacities=[n + pick.choice([0, 1, 70]) for n in lengths],
            widths=[pick.choice(WIDTHS) for _ in lengths],
            per_mean=pick.choice([64, 48, ONE]),
            holes=pick.choice([0.0, 0.1, 0.9]),
            dtype=pick.choice([torch.float32, torch.bfloat16]),
            sharp=pick.choice([1.0, 10.0]),
        )
    )
    assert len(calls) == 1


def test_a_full_view_needs_no_mask(calls):
    args, options = problem(holes=0.0, dtype=torch.float32, lengths=(128,))
    draw, valid = torch.Generator().manual_seed(0), torch.ones(2, 1, 128, dtype=torch.bool)
    args[5][0] = tier(draw, valid, (4, 4), heads=2, dim=64)
    plain = decode.attend(*args, **options)
    hidden = args[5][0]._replace(full=True)
    assert torch.equal(decode.attend(*args[:5], [hidden], **options), plain)
    assert len(calls) == 2 and [call["kind"][-1] for call in calls] == [False, True]


def test_a_matrix_of_each_head(calls):
    """Its own for keys and for values, as the `matched` codec has them."""
    args, options = problem(dtype=torch.float32, lengths=(100,), widths=[(2, 2)])
    draw = torch.Generator().manual_seed(0)
    turn = lambda: torch.randn(2, 64, 64, generator=draw) / 8  # noqa: E731
    keys, values = torch.cat((turn(), torch.zeros(2, 1, 64)), dim=1), turn()
    args = (*args[:4], keys, args[5])
    found = decode.attend(*args, **options, value_matrix=values)
    wide = [x.double() for x in args[:3]]
    expected = decode.attend(*wide, *args[3:], **options, value_matrix=values)
    assert len(calls) == 1 and distance(found, expected) <= ATTENTION[torch.float32]


@pytest.mark.parametrize(
    "case",
    [
        dict(new=2, exact=9),
        dict(widths=[(3, 3)]),
        dict(dtype=torch.float64),
        dict(dtype=torch.float16),
        dict(group=16),
        dict(softcap=5.0),
        dict(sinks=True),
        dict(contiguous=True),
    ],
    ids=lambda case: "-".join(case),
)
def test_what_the_loops_leave_to_eager_steps(case, calls):
    args, options = problem(**dict(dtype=torch.float32, lengths=(70,)) | case)
    decode.attend(*args, **options)
    assert not calls


def test_few_slots_and_no_compiler(calls, monkeypatch):
    args, options = problem(dtype=torch.float32, lengths=(70,))
    monkeypatch.setattr(decode_loops, "LEAST", 71)
    decode.attend(*args, **options)
    monkeypatch.setattr(decode_loops, "LEAST", 70)
    monkeypatch.setattr(decode_loops, "available", lambda: False)
    decode.attend(*args, **options)
    assert not calls


def test_without_a_compiler_of_cpp(monkeypatch):
    from torch._inductor import cpp_builder

    def missing():
        raise RuntimeError("no compiler")

    compiling.available.cache_clear()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    try:
        assert not compiling.available()
    finally:
        compiling.available.cache_clear()


#: Batch, uncompressed tokens, slots read, slots of the buffer: one of each, full buffers, and longer ones.
SIZES = [
    (1, 9, 128, 192),
    (1, 10, 192, 192),
    (2, 9, 100, 300),
    (8, 30, 300, 300),
    (1, 1, 5000, 5001),
    (3, 2, 128, 128),
]


def sized(batch, exact, length, capacity):
    return problem(
        length, batch, 2, 2, 64, exact=exact, lengths=(length,), capacities=(capacity,), dtype=torch.float32
    )


@pytest.mark.slow
def test_one_graph_for_every_batch_and_length(traced):
    for size in SIZES:
        check(*sized(*size))
    assert counters["stats"]["unique_graphs"] == 1
    check(*problem(dtype=torch.bfloat16, heads=2, group=2, lengths=(70,)))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not compiling.available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("bits", [(4, 4), (8, 2)])
def test_the_code_that_inductor_generates(few, bits, monkeypatch, tmp_path):
    """It is right for every size, and generated once, whatever size comes first. A file has it for all."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for sizes, stores, graphs in ((SIZES, False, 1), (SIZES[2:], True, 1), (SIZES, True, 0)):
        loops = Loops(decode_loops._attend, decode_loops._lengths)
        monkeypatch.setattr(decode_loops, "_loops", loops)
        torch._dynamo.reset()
        counters.clear()
        with torch._inductor.config.patch(fx_graph_cache=stores):
            for size in sizes:
                make = functools.partial(problem, widths=[bits], dtype=torch.float32)
                check(
                    *make(size[2], size[0], 2, 2, 64, exact=size[1], lengths=size[2:3], capacities=size[3:])
                )
        assert counters["stats"]["unique_graphs"] == graphs
        assert {type(graph) for graph in loops.graphs.values()} == {Stored if stores else Traced}
