"""What compiled twins are compiled for, and when not again."""

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import fade_fast
from fade_fast.compile import compiled as compiling
from fade_fast.compile import tiles
from fade_fast.kernels import decode, dense, packed, rotated
from fade_fast.policies import scores

from ..cache.test_decode_graph import CONFIGS, eager
from ..cache.test_decode_graph import compiled as captured
from ..marks import slow_but
from ..models import compressed_tokens, drafts, predictable, prompt, tiny_llama

TRACE = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)


@pytest.fixture
def twin(traced_kernels):
    """A twin of `x * 2 + marker's length`."""
    return compiling.Compiled(lambda dynamic_sizes, x, *, factor: x * factor + len(dynamic_sizes[0]))


def dynamic_size(n: int) -> Tensor:
    x = torch.empty(1).expand(n)
    torch._dynamo.mark_dynamic(x, 0)
    return x


def graphs() -> int:
    return counters["stats"].get("unique_graphs", 0)


def tripled(dynamic_sizes, x, *, more):
    return 3 * x + more


def test_run_chooses_by_the_device_and_finds_the_eager_function_at_the_call(
    traced_kernels, compiled_on, monkeypatch
):
    kernel = compiling.Compiled(tripled, options={})
    compiled_on("cuda")
    x = torch.ones(3)
    assert kernel.run(x, x, more=1).eq(4).all() and not kernel.graphs
    monkeypatch.setitem(globals(), "tripled", lambda dynamic_sizes, x, *, more: x - more)
    assert kernel.run(x, x, more=1).eq(0).all()
    compiled_on("cpu")
    assert kernel.run(x, x, more=1).eq(4).all() and len(kernel.graphs) == graphs() == 1


def test_one_graph_a_shape_and_constant(twin):
    for n in (5, 6, 9):
        assert twin([dynamic_size(n)], dict, torch.ones(3), factor=2).eq(2 + n).all()
    assert graphs() == 1
    for x, factor in ((torch.ones(4), 2), (torch.ones(3), 3), (torch.ones(3, dtype=torch.float64), 2)):
        assert twin([dynamic_size(5)], dict, x, factor=factor).eq(factor + 5).all()
    assert graphs() == 4
    assert twin([dynamic_size(7)], dict, torch.ones(6)[::2], factor=2).eq(9).all()
    assert graphs() == 5


def test_what_the_compiler_forgot_is_compiled_with_its_tiles(twin):
    """Not as the compiler would by itself, in the next call."""
    pinned = []
    for _ in range(2):
        for n in (5, 6):
            assert (
                twin([dynamic_size(n)], lambda: pinned.append(1) or {}, torch.ones(3), factor=2)
                .eq(2 + n)
                .all()
            )
        torch._dynamo.reset()
    assert len(pinned) == 2 and len(twin.graphs) == 1


def test_no_second_graph_inside_another_compiled_one(twin):
    """The first call of the outer graph dispatches otherwise than later ones: the inner must not see it."""

    @torch.library.custom_op("fade_test::inner", mutates_args=())
    def inner(x: Tensor) -> Tensor:
        return twin([dynamic_size(5)], dict, x + torch.zeros_like(x), factor=2)

    inner.register_fake(torch.empty_like)
    outer = TRACE(lambda x: inner(inner(x)) - 1)
    with torch.no_grad():
        for _ in range(3):
            assert outer(torch.ones(3)).eq(18).all()
        twin([dynamic_size(5)], dict, torch.ones(3), factor=2)
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "context", slow_but([torch.no_grad, torch.inference_mode], torch.no_grad), ids=lambda c: c.__name__
)
@pytest.mark.parametrize("name", slow_but(["int4", "int4, int2, evict", "h2o", "ema", "snapkv"], "h2o"))
def test_twins_inside_captured_steps(name, context, traced_kernels, compiled_on):
    """A GPU's whole decode path traced on the CPU: every twin of every kernel is compiled once."""
    compiled_on("cpu")
    config, counts = CONFIGS[name], []
    model = tiny_llama(dtype=torch.float16)
    with context():
        for seed in range(3):
            cache = fade_fast.create_cache(model, config)
            captured(model, cache, prompt(40, batch=2, seed=seed), new=20)
            assert compressed_tokens(cache) > 0
            counts.append(graphs())
    assert len(decode._compiled.graphs) > 0 and len(rotated._compiled.graphs) > 0
    assert counts[1] == counts[2]
    twins = decode._compiled, rotated._compiled, dense._compiled_store, scores._compiled
    assert bool(scores._compiled.graphs) == (name in ("h2o", "ema"))
    assert counts[2] == 1 + sum(len(twin.graphs) for twin in twins)


@pytest.mark.slow
def test_twin_of_long_uncompressed_texts(traced_kernels, compiled_on, short_flash_prefixes):
    """The same for what FlashAttention leaves over; the settled part moves on, the twin stays."""
    compiled_on("cpu")
    tail = dense._compiled
    model = tiny_llama(dtype=torch.float32)
    inputs = prompt(600, batch=2)
    cache = fade_fast.create_cache(model, CONFIGS["off"], max_length=1500)
    found = captured(model, cache, inputs, new=300)
    assert cache.decode_graph.flash_prefix >= 768
    assert len(tail.graphs) == len(dense._compiled_store.graphs) == 1 and graphs() == 3
    assert torch.equal(found, eager(model, fade_fast.create_cache(model, CONFIGS["off"]), inputs, new=300))
    found, expected = (drafted(run, model, CONFIGS["off"], prompt(600), 60) for run in (captured, eager))
    assert torch.equal(found, expected)
    assert {shapes[0][0][2] for shapes, *_ in tail.graphs} == {1, 2, 4, 8}


def drafted(run, model, config, inputs, new):
    """Tokens of assisted decoding."""
    text = eager(model, fade_fast.create_cache(model, config), inputs, new=new)
    cache = fade_fast.create_cache(model, config)
    with drafts(model, text, most=7) as options:
        found = run(model, cache, inputs, new=new, **options)
    assert config is CONFIGS["off"] or compressed_tokens(cache) > 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "int4, int2, evict"])
def test_twins_inside_steps_that_check_drafts(name, traced_kernels, compiled_on):
    """Steps of 2 to 8 tokens, for which the model is compiled once, and attention for 2, 4 and 8."""
    compiled_on("cpu")
    model = predictable(tiny_llama(dtype=torch.float16))
    found = [drafted(captured, model, CONFIGS[name], prompt(40), 60) for _ in range(2)]
    assert torch.equal(*found)
    sizes = [(shapes[0][0][2], shapes[1][0][2]) for shapes, *_ in decode._compiled.graphs]
    # The first step has no draft, and room for none.
    assert sorted(sizes) == [(1, 16), (1, 32), (2, 32), (4, 32), (8, 32)]
    twins = decode._compiled, rotated._compiled, dense._compiled_store
    assert graphs() == 2 + sum(len(twin.graphs) for twin in twins)


@pytest.mark.parametrize("name", slow_but(["h2o", "ema"], "h2o"))
def test_counting_compiled_counts_the_same(name, traced_kernels, compiled_on):
    """A row of padding, real queries of the other: fields of the uncompressed slots and of a tier."""
    draw, found = torch.Generator().manual_seed(0), []
    sums = [torch.rand(2, 3, n, generator=draw) for n in (20, 48)]
    seen = [torch.rand(2, 1, n, generator=draw) < 0.7 for n in (20, 48)]
    for fused in ((), ("cpu",)):
        compiled_on(*fused)
        observer = scores.observer(CONFIGS[name])
        observer.allocate(3, torch.float16, "cpu")
        buffers = [observer.arrive(2, n, "cpu") for n in (20, 48)]
        for taken in (5, 6, 5):
            observer.add_step(buffers, sums, seen, torch.tensor([True, False]), 4, torch.tensor([taken]))
        found.append([x for fields in buffers for x in fields.values()])
    assert len(scores._compiled.graphs) == graphs() == 1
    for plain, compiled, fresh in zip(*found, 2 * list(observer.fresh.values())):
        assert torch.equal(plain, compiled) and not torch.equal(plain[0], plain[1])
        assert (plain[1] == fresh).all()


@pytest.mark.slow
@pytest.mark.parametrize("step", slow_but([1, 48, 64, None], 64))
def test_three_graphs_encode_prompts_of_all_lengths(step, traced_kernels, compiled_on, monkeypatch):
    """`step` tokens share a mean, or all do. A permutation as rotation, so that no sum depends on tiles."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.eye(16)[torch.randperm(16, generator=draw)]
    monkeypatch.setattr(rotated, "MOST", 2 * 3 * 16 * 4000)  # 4000 tokens, 500 and 256
    whole = torch.randn(2, 3, 16, 9100, generator=draw).mT  # strided, as a model's are
    for length in (257, 400, 500, 501, 1999, 2001, 4000, 4001, 8999):
        length = -(-length // (step or 1)) * (step or 1)
        keys, values = whole[:, :, 4 : 4 + length], whole[:, :, -length:]
        mean = torch.randn(2, 3, length // step if step else 1, 16, generator=draw)
        args = keys, values, mean, matrix, (4, 2)
        compiled_on()
        expected = rotated._encode_both([], *args[:-1], bits=(4, 2))
        several = rotated.encode_both(*args)
        compiled_on("cpu")
        for found in (several, rotated.encode_both(*args)):
            for x, y in zip(itertools.chain(*found), itertools.chain(*expected)):
                assert x is y is None or torch.equal(x, y), length
    assert graphs() == len(rotated._compiled.graphs) == 3


def test_tiles_are_powers_of_two():
    """Triton has no others; and what is multiplied has 16 numbers at least."""
    for dim, rows, bits in itertools.product(
        (64, 80, 96, 128, 160, 192, 256), (2, 3, 7, 16, 64), (8, 4, 3, 2)
    ):
        width = packed.field_width(bits, dim)
        for chunk, heads, length in ((128, 2, 5), (256, 8, 80), (2048, 64, 200)):
            pinned = tiles.tier_tiles(heads, rows, 4, chunk, (bits, bits), (width, width), dim)
            pinned |= tiles.step_tiles(heads, rows, length, 4, dim)
            for (_, summed), tile in pinned.items():
                sizes = [n for name, n in tile.items() if name.endswith("BLOCK")]
                assert all(n & (n - 1) == 0 for n in sizes), (dim, rows, bits, tile)
                assert summed < 16 or tile.get("R0_BLOCK", 16) >= 16
