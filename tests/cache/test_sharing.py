"""A step of a beam search reads once what the rows of a text share, and finds the same beams."""

import random
from types import SimpleNamespace

import pytest
import torch

from fade_fast.cache import beams, decode_graph, sharing
from fade_fast.cache.sharing import Sharing
from fade_fast.formats.rotated import RotatedFormat
from fade_fast.kernels import decode, packed
from fade_ref.config import FadeConfig

from ..marks import pairwise, slow_but
from ..models import compressed_tokens, dense, new_cache, predictable, prompt, tiny_llama
from .test_ahead import record_demotions
from .test_beams import CONFIGS, PADS, search
from .test_cuda_graph import tapes  # noqa: F401 - a fixture

READS_ALONE = ("recall", "recall, policy", "select", "off", "balanced", "h2o")


class Steps(list):
    """What each step read in its layers: `(rows, slots)` of each tier, and how many beams share them."""

    def __init__(self, monkeypatch):
        super().__init__()
        attend = RotatedFormat.attend

        def watched(own, query, keys, values, visible, tiers, views, slots_read, **options):
            rows = [len(view.keys.codes) for view in views]
            self.append([*zip(rows, slots_read, (view.beams for view in views))])
            return attend(own, query, keys, values, visible, tiers, views, slots_read, **options)

        monkeypatch.setattr(RotatedFormat, "attend", watched)

    @property
    def shared(self) -> list[bool]:
        return [any(beams > 1 for _, _, beams in step) for step in self]

    @property
    def slots(self) -> int:
        return sum(rows * slots for step in self for rows, slots, _ in step)


@pytest.fixture
def sharing_from(monkeypatch):
    """A function that sets from how many spared slots on rows share; None: they never do."""

    def set_to(least: int | None) -> None:
        for name in ("LEAST_EAGER", "LEAST_COMPILED"):
            monkeypatch.setattr(sharing, name, 1 << 60 if least is None else least)

    set_to(1)
    return set_to


@pytest.fixture
def as_on_a_gpu(tapes, uncompiled_kernels, monkeypatch):  # noqa: F811
    """Steps, demotions and reorderings are recorded on the CPU, and read slots in small buckets."""

    class Tape:
        def __init__(self, call, arguments):
            self.call, self.arguments = call, arguments

        def replay(self):
            self.call(**self.arguments)

    def record(call, pool=None, **arguments):
        return Tape(call, arguments), None

    monkeypatch.setattr(decode_graph, "CAPTURES_ON", {"cpu"})
    monkeypatch.setattr(decode_graph, "record", record)
    record_demotions(monkeypatch, [])
    monkeypatch.setattr(packed, "_best_step", lambda heads: 128)
    monkeypatch.setattr(packed, "coarsest", lambda heads: 64)
    monkeypatch.setattr(packed, "spare", lambda view: 32)


def hold_nearly_the_same(cache, other):
    for layer, twin in zip(cache.tiered, other.tiered):
        assert layer.length == twin.length and layer.dense.count == twin.dense.count
        for ours, theirs in zip(layer.decode_all(), twin.decode_all()):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def compare(model, config, inputs, new, sharing_from, monkeypatch, captured=False, **options):
    """The search with and without sharing: equal texts and caches. Returns the cache, and both `Steps`."""
    found = []
    for least in (1, None):
        sharing_from(least)
        with monkeypatch.context() as patch:
            watched = Steps(patch)
            cache = new_cache(model, config, **options)
            cache.decode_graph.compileable = captured
            found.append((search(model, cache, inputs, new=new), cache, watched))
    (text, cache, ours), (expected, other, theirs) = found
    assert torch.equal(text, expected) and not any(theirs.shared)
    hold_nearly_the_same(cache, other)
    assert all(layer.sharing is None for layer in cache.tiered)  # the search is over
    return cache, ours, theirs


CASES = pairwise(CONFIGS, PADS, ("eager", "captured"), keep=[("safe", "padded", "captured")])


@pytest.mark.parametrize(
    "name, pads, steps",
    slow_but(CASES, *[case for case in CASES if case[0] in ("safe", "select") and case[2] == "eager"]),
)
def test_beams_are_those_of_rows_that_read_alone(name, pads, steps, tapes, sharing_from, monkeypatch):  # noqa: F811
    model, inputs = tiny_llama(layers=1, dtype=torch.float64), prompt(60, batch=2, pads=PADS[pads])
    captured = steps == "captured"
    cache, ours, theirs = compare(
        model, CONFIGS[name], inputs, 48, sharing_from, monkeypatch, captured=captured
    )
    assert bool(cache.decode_graph.replays) == captured
    if name in READS_ALONE:
        assert not any(ours.shared)
        return
    assert all(ours.shared) and len(ours) == len(theirs) and compressed_tokens(cache) > 0
    assert ours.slots < theirs.slots
    config = CONFIGS[name]
    later = 60 - config.n_sink - config.recent_window  # tokens of the prompt that can be compressed
    assert ours[0] == [(2, later // config.block_size * config.block_size, 3)]


@pytest.mark.slow
def test_captured_steps_share_as_on_a_gpu(as_on_a_gpu, tapes, sharing_from, monkeypatch):  # noqa: F811
    """Slots are read in buckets, and demotions and reorderings are replayed; a step reads more once."""
    monkeypatch.setattr(beams, "MIN_REACH", 8)
    model, config = tiny_llama(layers=1, dtype=torch.float64), FadeConfig(recent_window=8, block_size=16)
    inputs = prompt(300, batch=2, pads=(0, 9))
    options = dict(captured=True, max_length=700)
    cache, ours, theirs = compare(model, config, inputs, 300, sharing_from, monkeypatch, **options)
    counts = cache.decode_graph.counts
    assert all(ours.shared) and compressed_tokens(cache) > 400 and ours.slots < theirs.slots
    read = {tuple(step) for step in ours}
    assert read == {((2, 384, 3), (6, 256, 1)), ((2, 384, 3), (6, 384, 1))}
    assert counts["demotion, replayed"] > 5 and counts["reordering, captured"] > 1
    # Positions grow once, which a GPU would do in advance.
    assert counts["step, captured"] == counts["step, not captured"] == 2 and counts["more slots"] == 1
    assert counts["step, captured ahead"] >= 1


@pytest.mark.parametrize("index", [[3, 4, 5, 0, 1, 2], [0, 0, 0, 0, 0, 0]])
@pytest.mark.parametrize("captured", slow_but([False, True], False))
def test_rows_that_leave_their_text_read_alone(index, captured, tapes, sharing_from, monkeypatch):  # noqa: F811
    model, moved = tiny_llama(dtype=torch.float64), []

    def searched(cache):
        def by_hand(ids, scores, **kwargs):
            if ids.shape[1] == 60 + 12:
                moved.append([layer.sharing for layer in cache.tiered])
                cache.reorder_cache(torch.tensor(index))
                assert not any(layer.sharing for layer in cache.tiered)
            return torch.zeros(len(ids), dtype=torch.bool)

        return search(model, cache, prompt(60, batch=2), stopping_criteria=[by_hand])

    found = []
    for least in (1, None):
        sharing_from(least)
        cache = new_cache(model, CONFIGS["safe"])
        cache.decode_graph.compileable = captured
        found.append((searched(cache), cache))
    (text, cache), (expected, other) = found
    assert torch.equal(text, expected) and all(moved[0]) and not any(moved[1])
    hold_nearly_the_same(cache, other)


def test_a_search_after_another_shares_more(sharing_from, monkeypatch):
    """And steps that are not those of a search read alone."""
    model, config, sizes = tiny_llama(dtype=torch.float64), CONFIGS["safe"], []
    for least in (1, None):
        sharing_from(least)
        cache, steps = new_cache(model, config), Steps(monkeypatch)
        text = search(model, cache, prompt(60, batch=2), new=20)
        again = search(model, cache, dict(input_ids=text, attention_mask=torch.ones_like(text)), new=20)
        sizes.append([step[0][1] for step in steps if step[0][2] > 1])
        count = len(steps)
        cache.reset()
        both = prompt(60, batch=6)
        model.generate(**both, past_key_values=cache, max_new_tokens=10, do_sample=False)
        assert not any(steps[count:] and steps.shared[count:])
        sizes.append(again)
    shared, ours, alone, theirs = sizes
    assert torch.equal(ours, theirs) and not alone and len(set(shared)) == 2 and shared[0] < shared[-1]


def a_tier(rows, heads, count, capacity, compiled=True, step=64):
    """What `Sharing` asks of a tier."""
    codes = torch.empty(rows, heads, capacity, 8, dtype=torch.uint8, device="meta")
    records = SimpleNamespace(tensors={"key_codes": codes}, compiled=compiled, step=step, count=count)
    return SimpleNamespace(records=records, most_read=packed.longest(rows * heads, capacity))


@pytest.mark.parametrize("of_text, group, expected", [(4, 4, 4), (20, 4, 10), (17, 4, None), (3, 32, None)])
def test_some_beams_read_together_where_all_are_too_many(of_text, group, expected):
    found = Sharing.of(a_tier(2 * of_text, 2, 8192, 10_000, compiled=False), of_text, 8192, group)
    assert (found and found.beams) == expected


def test_slots_that_are_read_are_in_use_and_lie_in_the_buffer():
    """For any sizes: all slots in use are read, in whole chunks, and no number is one that compiles anew."""
    pick, found = random.Random(0), 0
    for _ in range(3000):
        beams_of, texts, heads = pick.choice([2, 3, 4, 8]), pick.randint(1, 4), pick.choice([1, 2, 8, 32])
        rows = beams_of * texts
        count = pick.randint(1, 1000) * 64
        capacity = packed.whole(rows * heads, count + pick.randint(0, 9000))
        tier = a_tier(rows, heads, count, capacity + packed.spare(capacity))
        share = Sharing.of(tier, beams_of, pick.randint(1, count // 64) * 64, 4)
        if share is None:
            continue
        found += 1
        reads = share.reads(tier)
        assert share.slots <= reads.shared <= tier.most_read and reads.first % 64 == 0
        assert 0 < reads.first <= share.slots and count <= reads.first + reads.own <= tier.most_read
        for heads_read, slots in ((rows // beams_of * heads, reads.shared), (rows * heads, reads.own)):
            for query_rows in (4, 4 * beams_of):
                assert slots % packed.chunk_of(heads_read, slots, query_rows) == 0
                assert slots > packed.chunk_of(heads_read, slots, query_rows)
        more = share.more_at(tier)
        assert more is None or share.reads(tier, more) != reads == share.reads(tier, more - 1)
    assert found > 500


def test_the_beams_of_an_uncompressed_cache(sharing_from, monkeypatch):
    """At 8 bits, where no token is close: those of transformers' own cache, in float64."""
    model = predictable(tiny_llama(dtype=torch.float64))
    config = FadeConfig(recent_window=8, block_size=4, middle_k_bits=8, middle_v_bits=8)
    steps, cache, inputs = Steps(monkeypatch), new_cache(model, config), prompt(60, batch=2)
    found = search(model, cache, inputs)
    assert all(steps.shared) and torch.equal(found, search(model, dense(model), inputs))


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_searches_on_a_gpu_share_and_compile_once(dtype, sharing_from):
    """Prompts of any length share by the same kernels, in replayed steps. In float32, which tiles serve, they
    give the texts of rows that read alone.
    """
    model, config = tiny_llama(dtype=dtype).cuda(), FadeConfig(recent_window=16, block_size=64)
    compiled = []
    for length in (4500, 5300):
        texts, inputs = [], {name: x.cuda() for name, x in prompt(length, batch=2, pads=(0, 9)).items()}
        for least in (1, None):
            sharing_from(least)
            cache, variants = new_cache(model, config, max_length=5600), []
            graph, begin = cache.decode_graph, cache.decode_graph.begin
            graph.begin = lambda *args, b=begin, g=graph, v=variants: (b(*args), v.append(g.variant))[0]
            texts.append(search(model, cache, inputs, new=160)[:, length : length + 40])
            assert all((v[0][-1] == -3) == (least == 1) for v in variants) and graph.replays > 120
            compiled.append(len(decode._compiled.graphs))
        assert dtype == torch.bfloat16 or torch.equal(*texts)
    assert compiled[1:] == [compiled[1]] * 3
