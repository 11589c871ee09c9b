"""Layers over vLLM's pages against attention in float64 over what the pages hold. No engine is needed."""

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten

from fade_fast.compile.compiled import compiled_of
from fade_fast.vllm import batches, layer, prefill, single
from fade_fast.vllm.layer import CompressedLayer
from fade_fast.vllm.pages import FIRST, SPAN, PageLayout

from . import paged
from .paged import GROUP, HEADS, PAGE, Engine, distance, draw, matrices

WIDTHS = [None, (8, 8), (4, 4), (3, 3), (2, 2), (8, 4), (4, 16), (3, 2)]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SINKS = torch.linspace(-1, 4, HEADS * GROUP)
#: Of contexts up to 512 tokens; neighbors are as far apart as keys are from their mean.
MEANS = draw(HEADS, layer.mean_rows(512), 64, seed=9, dtype=torch.float16)


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialized memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small(monkeypatch):
    """Rows, groups, chunks of keys and scores at a time so small that every loop has several rounds."""
    monkeypatch.setattr(batches, "ROWS", 16)
    monkeypatch.setattr(batches, "LEAST", 32)
    monkeypatch.setattr(batches, "TOGETHER", 2 * PAGE)
    monkeypatch.setattr(layer, "KEYS", 2 * PAGE)
    monkeypatch.setattr(layer, "ELEMENTS", 6 * 16 * 32 * 3)


def check(engine, counts, **options):
    before = list(engine.done)
    found = engine.step(counts, **options)
    for row, (x, start) in enumerate(zip(found, before)):
        if len(x):
            expected = engine.expected(row, start, start + len(x))
            assert distance(x, expected) <= TOLERANCE[engine.dtype], (row, start, len(x))
    return found


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("most", [1, 8])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(window=20, softcap=5.0, s_aux=SINKS), dict(window=20, s_aux=SINKS), dict(window=3)],
    ids=["plain", "all", "no softcap", "narrow"],
)
def test_a_ragged_life(bits, most, options, small):
    """Prefill in chunks, verification of drafts and decode of requests of different lengths, in one step."""
    means = None if bits is None else MEANS
    engine = Engine(bits, [90, 7, 41, 150, 1], means=means, most=most, **options)
    check(engine, [37, 5, 1, 120, 1])
    short, long = engine.batches
    assert long.tokens.shape == (11 + (most < 5), 16)
    assert sum(len(x.tokens) for x in short) == 3 - (most < 5)
    check(engine, [1, 1, 1, 1, 0], pads=3)
    check(engine, [8, 1, 3, 2, 0])
    check(engine, [44, 0, 36, 27, 0], pads=1)
    assert engine.done == [90, 7, 41, 150, 1]
    if bits is not None:
        assert engine.cache.dtype == torch.uint8 and engine.cache.shape[-1] < 0.7 * 2 * 4 * 64


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 3)])
def test_the_matched_format(bits, small):
    """Each head has matrices of its own, for keys and for values."""
    engine = Engine(bits, [60, 33], means=MEANS, matrices=matrices(), window=40)
    for counts in ([50, 3], [1, 1], [9, 29]):
        check(engine, counts)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("place", ["stored", "read from pages", "read as vectors"])
def test_every_key_gets_the_mean_of_its_position(place, window, small, monkeypatch):
    """With the mean of other positions, in one place alone, both a prefill and a decode step are wrong."""
    engine = Engine((8, 8), [200, 130], means=MEANS, window=window)
    found = [check(engine, counts) for counts in ([190, 120], [1, 1])]
    other, made = Engine((8, 8), [200, 130], means=MEANS, window=window), CompressedLayer
    view, row = made.view, single.mean_row
    if place == "stored":
        writes = single.writes
        wrong = lambda at, *more: writes(at, *more)._replace(mean=writes(at + SPAN, *more).mean)  # noqa: E731
        monkeypatch.setattr(single, "writes", wrong)
    elif place == "read from pages":
        wrong = lambda self, cache, table, valid, first, start=0: view(  # noqa: E731
            self, cache, table, valid, first, start + SPAN
        )
        monkeypatch.setattr(made, "view", wrong)
        monkeypatch.setattr(prefill, "mean_row", lambda position, rows: row(position + SPAN, rows))
    else:
        decode = made._attend_short

        def wrong(self, *args):
            with monkeypatch.context() as inside:
                inside.setattr(single, "mean_row", lambda position, rows: row(position + SPAN, rows))
                return decode(self, *args)

        monkeypatch.setattr(made, "_attend_short", wrong)
    for expected, counts in zip(found, ([190, 120], [1, 1])):
        changed = [distance(x, y.double()) for x, y in zip(other.step(counts), expected)]
        untouched = place == "read as vectors" and counts[0] > 1
        assert max(changed) == 0 if untouched else min(changed) > 1e-4, counts


@pytest.mark.parametrize("bits", [(4, 4), (2, 2), (8, 4), (4, 16)])
@pytest.mark.parametrize("page, window", [(32, None), (128, None), (128, 9), (256, 40)])
def test_the_newest_tokens_have_two_records(bits, page, window, small):
    """Steps that end before, at and after the beginning of a page, and chunks shorter than the slots."""
    engine = Engine(bits, [290, 140, 64], page=page, means=MEANS, window=window)
    for counts in ([127, 3, 31], [1, 123, 1], [1, 1, 1], [5, 2, 8], [120, 9, 20], [2, 1, 1], [9, 1, 0]):
        check(engine, counts)
    if (page, window) == (128, None):  # as many tokens as a larger page would have are too many
        engine.page = 256
        with pytest.raises(AssertionError):
            check(engine, [4, 0, 0])


@pytest.mark.parametrize("page", [32, 128])
@pytest.mark.parametrize("most", [1, 8])
def test_tokens_that_are_withdrawn_leave_no_trace(page, most):
    """Three drafts are refused, and others follow. A layer that expects none would read their records."""
    for drafts in (3, 0):
        engine = Engine((4, 4), [200], page=page, means=MEANS, drafts=drafts, most=most)
        assert engine.layer.layout.newest(torch.tensor([page]), page)[0] == 4 * (
            1 + page // 128 + (drafts > 0)
        )
        check(engine, [150])
        check(engine, [4])
        engine.done = [151]
        for side in (engine.keys, engine.values, engine.queries):
            side[0][151:] = side[0][151:].flip(0)
        if drafts:
            check(engine, [1])
            check(engine, [2])
            check(engine, [20])
        else:
            with pytest.raises(AssertionError):
                check(engine, [1])


@pytest.mark.parametrize("bits", WIDTHS[1:4])
@pytest.mark.parametrize("page", [PAGE, 128])
def test_chunks_leave_no_trace(bits, page, small):
    """A prompt in one step and in many steps: the same bytes, and outputs equal up to rounding."""
    found, caches = [], []
    for cuts in ([70], [1] * 10 + [60], [2, 44, 24], [64, 6]):
        engine = Engine(bits, [70], page=page, means=MEANS)
        found.append(torch.cat([engine.step([n])[0] for n in cuts]))
        caches.append(engine.cache[engine.table[0, : -(-70 // page)].long()])
    assert all(distance(x, found[0].double()) < 1e-5 for x in found[1:])
    same = [(x == caches[0]).float().mean() for x in caches[1:]]
    assert min(same) > 0.9999, "the records of a token depend on the step that stored it"


def test_batch_mates_leave_no_trace(small):
    """A request alone, and between others."""
    alone = Engine((4, 4), [60], means=MEANS, seed=300)
    apart = torch.cat([alone.step([50])[0], alone.step([1])[0], alone.step([9])[0]])
    among = Engine((4, 4), [40, 7, 100, 60], means=MEANS)
    for side, other in (
        (among.queries, alone.queries),
        (among.keys, alone.keys),
        (among.values, alone.values),
    ):
        side[3] = other[0]
    steps = [among.step(n)[3] for n in ([1, 7, 99, 50], [30, 0, 1, 1], [9, 0, 0, 9])]
    assert distance(torch.cat(steps), apart.double()) < 1e-5


def test_a_shared_prefix():
    """Two requests whose first pages are the same pages."""
    engine = Engine((4, 4), [60, 60], means=MEANS)
    for side in (engine.queries, engine.keys, engine.values):
        side[1][:32] = side[0][:32]
    engine.table[1, :1] = engine.table[0, :1]
    engine.step([50, 0])
    engine.done[1] = 32  # a prefix hit: those tokens are not computed again
    check(engine, [1, 28])
    check(engine, [9, 0])


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (4, 16)])
@pytest.mark.parametrize("page, start, stop", [(32, 0, 96), (32, 70, 101), (128, 100, 128), (128, 120, 260)])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_pages_are_shared_in_the_step_that_fills_them(bits, page, start, stop, count, small):
    """vLLM counts a page as known from the step that fills it: another request hits it in that step."""
    hit = stop // page * page
    engine = Engine(bits, [300, hit + count + 9], page=page, means=MEANS)
    for side in (engine.queries, engine.keys, engine.values):
        side[1][:hit] = side[0][:hit]
    engine.table[1, : hit // page] = engine.table[0, : hit // page]
    if start:
        check(engine, [start, 0])
    engine.done[1] = hit
    check(engine, [stop - start, count])
    check(engine, [1, 1])
    check(engine, [20, 8])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_dtypes(dtype, bits):
    means = None if bits is None else MEANS
    engine = Engine(bits, [70, 9], dtype=dtype, means=means, window=33, s_aux=SINKS.to(dtype))
    for counts in ([60, 3], [1, 1], [9, 5]):
        check(engine, counts)


@pytest.mark.parametrize("dim, bits", [(128, (4, 4)), (8, (2, 2)), (80, (3, 4)), (256, (8, 3))])
def test_head_dims(dim, bits):
    check(Engine(bits, [40, 20], dim=dim), [40, 20])


@pytest.mark.parametrize("bits", WIDTHS[1:])
@pytest.mark.parametrize("window", [None, 40])
def test_the_kernels_of_a_gpu(bits, window, uncompiled_kernels):
    """Short rows in float16 and padded to powers of two, as on CUDA, but not compiled.

    Queries are small: the kernels keep scores in float16, as a distance from those of the nearest tokens.
    """
    engine = Engine(bits, [300, 40, 90], dtype=torch.float16, means=MEANS, window=window)
    engine.queries = [x * 0.1 for x in engine.queries]
    engine.step([290, 30, 81])
    for counts in ([1, 1, 1], [3, 1, 2], [0, 1, 0]):
        before = list(engine.done)
        for row, x in enumerate(engine.step(counts, rounded=True)):
            if len(x):
                assert distance(x, engine.expected(row, before[row], before[row] + len(x))) <= 5e-3
        for batch in engine.batches[0]:
            assert all(n & (n - 1) == 0 for n in batch.tokens.shape)


@pytest.mark.parametrize("bits", WIDTHS[1:4] + [(8, 4)])
@pytest.mark.parametrize("page, window", [(32, None), (128, 40)])
def test_decode_steps_do_what_other_steps_do(bits, page, window, small):
    """Steps through `single.py` and `prefill.py`, and through the code of all steps: the same outputs."""
    made = []
    for serves in (True, False):
        engine = Engine(bits, [134, 40, 24], page=page, means=MEANS, window=window, serves=serves)
        steps = [engine.step(n) for n in ([124, 31, 15], *[[1, 1, 1]] * 8, [1, 1, 0], [1, 0, 1])]
        used = engine.table[engine.table > 0].long()
        made.append((torch.cat([x for step in steps for x in step]), engine.cache[used], engine.layer.bound))
    (one, cache, bound), (other, expected, wanted) = made
    assert distance(one, other.double()) < 1e-5 and torch.equal(bound, wanted)
    assert (cache == expected).float().mean() > 0.9999


@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (4, 16), None])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_step_of_the_device_alone(bits, rounded):
    """A captured step: rows of the size of the graph, among them padding, and no length on the host."""
    made = []
    for whole in (False, True):
        engine = Engine(bits, [150, 40, 3], means=None if bits is None else MEANS)
        engine.step([149, 39, 2])
        for x in engine.values:
            x[-1] *= 100
        lengths = torch.tensor([150, 40, 3, 0, 0], dtype=torch.int32)
        table = torch.nn.functional.pad(engine.table, (0, 0, 0, 2))
        last = [x[-1:] for side in (engine.queries, engine.keys, engine.values) for x in side]
        pad = lambda xs: torch.cat([*xs, torch.full((2, *xs[0].shape[1:]), torch.nan)])  # noqa: E731
        query, keys, values = (pad(last[i : i + 3]) for i in (0, 3, 6))
        slots = torch.tensor(
            [int(t[(n - 1) // PAGE]) * PAGE + (n - 1) % PAGE for t, n in zip(table, lengths)]
        )
        slots[3:] = -1
        if whole:
            step = batches.uniform(lengths, table, 224, rounded)
            assert step.single and len(step.short[0].tokens) == (8 if rounded else 5)
        else:
            starts = np.array([0, 1, 2, 3, 3, 3])
            step = batches.split(starts, lengths.numpy().astype(np.int64), lengths, table, rounded)
        output = torch.zeros_like(query)
        engine.layer.forward(engine.cache, query, keys, values, slots, step, output)
        made.append((output[:3], engine.cache[1:]))
        if bits is not None:  # new tokens raise the bound, and padding does not
            scales = engine.layer.views(engine.cache)[0].get("value_scale")
            most = 0 if scales is None else scales[engine.table.unique().long()[1:]].nan_to_num(0).max()
            assert most <= engine.layer.bound.max() <= 1e4
    assert distance(made[1][0], made[0][0].double()) < 1e-5
    assert torch.equal(*(x.view(torch.uint8) for _, x in made))


@pytest.mark.slow
def test_decode_steps_compile_once(traced_kernels, compiled_on):
    """Other lengths, tables and layers are served by the same graphs, and lookups read no other page."""
    compiled_on("cpu")
    engine = Engine((4, 4), [130, 70], means=MEANS, dtype=torch.float16)
    engine.queries = [x * 0.1 for x in engine.queries]
    engine.step([120, 60], rounded=True)
    engine.step([1, 1], rounded=True)
    held = {name: len(x.graphs) for name, x in single._compiled.items()}
    # The prompts were stored in one part of 256 tokens.
    assert [held[name] for name in ("writes", "reads", "store", "vectors")] == [2, 1, 2, 1]
    for _ in range(2):
        for row, x in enumerate(engine.step([1, 1], rounded=True)):
            assert distance(x, engine.expected(row, engine.done[row] - 1, engine.done[row])) <= 5e-3
    assert held == {name: len(x.graphs) for name, x in single._compiled.items()}


@pytest.mark.slow
@torch.inference_mode()  # as in vLLM
def test_prefill_compiles_once(traced_kernels, compiled_on, small):
    """Other numbers of tokens, pages, requests and parts are served by the same graphs."""
    compiled_on("cpu")
    engine = Engine((4, 4), [200, 150, 90], means=MEANS, dtype=torch.float16)
    engine.queries = [x * 0.1 for x in engine.queries]
    for counts in ([100, 20, 2], [70, 1, 30]):  # contexts of one page and of many, in one part and in two
        engine.step(counts, rounded=True)
    compiled = lambda: {  # noqa: E731
        name: [len(compiled_of(graph.code)) for graph in x.graphs.values()]
        for name, x in prefill._compiled.items()
    }
    held = compiled()
    assert {name: len(x) for name, x in held.items()} == dict(rows=2, merged=2, finish=2)
    assert {n for x in held.values() for n in x} == {1}
    for counts in ([13, 80, 41], [17, 49, 0]):
        before = list(engine.done)
        for row, x in enumerate(engine.step(counts, rounded=True)):
            if len(x):
                assert distance(x, engine.expected(row, before[row], before[row] + len(x))) <= 5e-3
    assert held == compiled()


def test_the_bound_grows_by_powers_of_two_and_ignores_padding():
    made = CompressedLayer((4, 4), 64, torch.float32, torch.device("cpu"), heads=HEADS, scaling=1.0)
    cache = torch.zeros(3, HEADS, PAGE, made.layout.cell(PAGE), dtype=torch.uint8)
    values = torch.stack([draw(HEADS, 64), torch.full((HEADS, 64), torch.inf)])
    made.append(cache, values, values, torch.tensor([32, -1]), torch.tensor([0, 1]))
    first = made.bound.clone()
    scale = made.views(cache)[0]["value_scale"][1, :, 0].float()
    assert ((first >= scale) & (first <= 4 * scale)).all() and (first.log2() % 1 == 0).all()
    made.append(cache, values / 100, values / 100, torch.tensor([33, -1]), torch.tensor([1, 2]))
    assert torch.equal(made.bound, first)


def cost_of(lengths, rounded):
    """What batches of requests of these lengths cost, in slots."""
    rows = [1 << (len(x) - 1).bit_length() if rounded else len(x) for x in lengths]
    each = batches.BATCH if rounded else batches.EAGER_BATCH
    return sum(n * max(batches.LEAST, *x) + each for n, x in zip(rows, lengths))


def cuts_of(lengths):
    """All ways to cut them where the batches are powers of two, except for the last one."""
    yield [lengths]
    for rows in (1, 2, 4, 8):
        if rows < len(lengths):
            yield from ([lengths[:rows], *rest] for rest in cuts_of(lengths[rows:]))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_batches_follow_live_lengths(rounded, seed):
    """The cheapest batches of all, and finished long rows leave."""
    draws = np.random.default_rng(seed)
    reach = np.exp(draws.uniform(2, 12, draws.integers(1, 11))).astype(np.int64) + 1
    starts = np.arange(len(reach) + 1)
    starts[-1] += 199  # the last one has many new tokens
    reach[-1] += 200
    table = torch.zeros(len(reach), 5000, dtype=torch.int32)
    step = batches.split(starts, reach, torch.from_numpy(reach), table, rounded)
    ordered = list(np.sort(reach[:-1])[::-1])
    found = [[x for x in batch.reach if x > 1] for batch in step.short]
    assert sum(found, []) == ordered
    if ordered:
        assert cost_of(found, rounded) == min(cost_of(x, rounded) for x in cuts_of(ordered))
    assert list(step.long.reach) == [reach[-1], reach[-1] - 72] and (step.long.at >= 0).sum() == 200


def test_batches_of_many_requests():
    """525 requests are not padded to 1024, and requests at all ages cost little more than their contexts."""
    same = batches._parts(np.full(525, 3000), True)
    assert [x.stop - x.start for x in same] == [512, 13]
    spread = np.linspace(3072, 2049, 512).astype(np.int64)
    parts = batches._parts(spread, True)
    assert [x.stop - x.start for x in parts] == [256] * 2
    assert sum(256 * spread[x.start] for x in parts) < 1.11 * spread.sum()
    assert batches._parts(np.full(8, 600), True) == [slice(0, 8)]
    assert batches._parts(np.array([32000] + [600] * 63), True)[0] == slice(0, 2)


def test_groups_of_prefill():
    """Contexts of a group have `TOGETHER` tokens, or belong to one request, and single tokens are apart."""
    count, reach = (
        np.array([1, 900, 700, 2, 1, 9000, 20, 30]),
        np.array([7, 9000, 7000, 20000, 5, 9000, 20, 30]),
    )
    starts, table = np.concatenate(([0], np.cumsum(count))), torch.zeros(8, 200, dtype=torch.int32)
    step = batches.split(starts, reach, torch.from_numpy(reach), table, most=1)
    assert [list(x.counts) for x in step.prefill] == [[900, 700], [2], [9000, 20, 30]]
    assert [x.in_order for x in step.prefill] == [slice(1, 1601), slice(1601, 1603), slice(1604, 10654)]
    assert step.single and sum(len(x.tokens) for x in step.short) == 2
    apart = batches.split(starts[:6], reach[:5], torch.from_numpy(reach)[:5], table[:5], most=1).prefill
    assert torch.equal(apart[1].tokens, torch.tensor([1601, 1602]))


@pytest.mark.parametrize("window", [None, 40])
def test_lengths_on_the_host_may_be_upper_bounds(window, small):
    """With drafts the host knows no exact lengths. Those on the device count."""
    engine = Engine((4, 4), [260], means=MEANS, window=window)
    engine.step([190])
    whole, made = Engine((4, 4), [260], means=MEANS, window=window), batches.split
    whole.step([190])
    later = lambda starts, reach, *more, **options: made(starts, reach + 6, *more, slack=6, **options)  # noqa: E731
    with pytest.MonkeyPatch.context() as inside:
        inside.setattr(paged, "split", later)
        found = engine.step([50])
    assert torch.equal(found[0], whole.step([50])[0])


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("seed", range(4))
def test_host_and_device_plan_the_same(window, seed):
    """A prefill is planned where exact lengths are known: what layers read does not depend on that."""
    draws = np.random.default_rng(seed)
    count = draws.integers(2, 90, 4)
    reach = count + draws.integers(0, 300, 4)
    starts, lengths = np.concatenate(([0], np.cumsum(count))), torch.from_numpy(reach)
    table = torch.from_numpy(draws.permutation(4 * 16)).int().view(4, 16)
    made = Engine((4, 4), [260], means=MEANS, window=window).layer
    plans = []
    for slack in (0, 1):
        (group,) = batches.split(starts, reach, lengths, table, slack=slack, most=1).prefill
        plans.append(tree_flatten(prefill.plan(group, made.kind(PAGE))))
    (one, structure), (other, same) = plans
    assert structure == same
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(one, other))


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_many_tensors(seed):
    """One copy for each dtype, and every tensor begins at a multiple of 16 bytes."""
    draws, calls = np.random.default_rng(seed), []
    kinds = (torch.int64, torch.int32, torch.bool)
    made = [
        torch.from_numpy(draws.integers(0, 2, draws.integers(0, 5, 2))).to(kinds[draws.integers(0, 3)])
        for _ in range(20)
    ]
    made[3] = made[3].mT  # a view

    def copy(x):
        calls.append(x.dtype)
        return x.clone()

    found = prefill.copied_together(made, copy)
    assert sorted(map(str, calls)) == sorted(map(str, {x.dtype for x in made}))
    for x, y in zip(made, found):
        assert x.dtype == y.dtype and torch.equal(x, y)
        assert y.numel() == 0 or y.data_ptr() % 16 == 0


@pytest.mark.parametrize("bits", WIDTHS[1:])
@pytest.mark.parametrize("page", [32, 128])
def test_records_come_back_from_pages(bits, page):
    """Every field of every token, and no byte of another token, in a cache whose pages are far apart."""
    made = CompressedLayer(bits, 64, torch.float32, torch.device("cpu"), heads=HEADS, scaling=1.0)
    layout = made.layout
    cell = layout.cell(page)
    whole = torch.full((9, 2, HEADS, page, cell), 7, dtype=torch.uint8)
    cache = whole[:, 1]
    keys, values = draw(1, HEADS, 24, 64, seed=1), draw(1, HEADS, 24, 64, seed=2)
    records = made.tier.encode(keys, values, made.means[None], False)
    slots = torch.randperm(9 * page, generator=torch.Generator().manual_seed(3))[:24]
    views, second = layout.views(cache)
    layout.write(views, records, slots // page, slots % page)
    back = layout.read(views, (slots // page)[None], (slots % page)[None])
    assert back.keys() == records.keys() and all(torch.equal(back[name], records[name]) for name in back)
    for name, x in second.items():
        assert (x.contiguous().view(torch.uint8) == 7).all(), name
    early = {
        name: x.narrow(-1 if layout.fields[name].axis == -1 else 2, 0, FIRST) for name, x in records.items()
    }
    page_of, at = torch.full((FIRST,), 5), torch.arange(FIRST)
    layout.write(second, early, page_of, at)
    back = layout.read(second, page_of[None], at[None])
    assert all(torch.equal(back[name], early[name]) for name in back)
    again = layout.read(views, (slots // page)[None], (slots % page)[None])
    assert all(torch.equal(again[name], records[name]) for name in again)
    whole[5, 1] = 7
    changed = (whole != 7).sum()
    assert 0 < changed <= 24 * HEADS * layout.record and (whole[:, 0] == 7).all()


@pytest.mark.parametrize(
    "dim, bits, least", [(64, (4, 4), 3.2), (128, (4, 4), 3.5), (64, (8, 8), 1.8), (128, (8, 8), 1.85)]
)
def test_bytes_of_a_token(dim, bits, least):
    made = CompressedLayer(bits, dim, torch.bfloat16, torch.device("cpu"), heads=HEADS, scaling=1.0)
    assert 2 * 2 * dim / made.layout.cell(128) >= least


def test_other_caches_are_refused():
    made = CompressedLayer((4, 4), 64, torch.float32, torch.device("cpu"), heads=HEADS, scaling=1.0)
    cell = made.layout.cell(PAGE)
    good = torch.zeros(3, HEADS, PAGE, cell, dtype=torch.uint8)
    for bad in (good.float(), good[..., :-1], good[:, :, :8], good.mT.contiguous().mT):
        with pytest.raises(ValueError, match="allowed|must be"):
            PageLayout(made.tier).views(bad)
    with pytest.raises(ValueError, match="whole bytes|bytes"):
        CompressedLayer((3, 3), 20, torch.float32, torch.device("cpu"), heads=HEADS, scaling=1.0)
