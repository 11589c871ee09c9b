"""Beams of one text share their prompt: a reordering moves what was written later, and nothing is lost."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fade_fast.cache import beams, decode_graph
from fade_fast.cache.buffers import cut, take_rows
from fade_fast.hf.cache import TieredKVCache
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import FadeConfig

from ..marks import pairwise, slow_but
from ..models import OFF, compressed_tokens, dense, new_cache, prompt, teacher_forced, tiny_llama
from .test_ahead import record_demotions
from .test_cuda_graph import tapes  # noqa: F401 - a fixture

SMALL = dict(recent_window=8, block_size=4)
PAGES = dict(recent_window=8, block_size=8, select=8)
CONFIGS = {
    "safe": FadeConfig(**SMALL, quant_backend="matched"),
    "int2": FadeConfig(**SMALL, middle_k_bits=2, middle_v_bits=2),
    "before RoPE": FadeConfig(**SMALL, positions="contiguous"),
    "long window": FadeConfig(recent_window=40, block_size=4),
    "recall": FadeConfig(**PAGES, quant_backend="matched", cold="host", resident=16),
    "recall, policy": FadeConfig(
        **PAGES, cold="host", resident=16, index="bounds", eviction_policy="h2o"
    ),
    "select": FadeConfig(**PAGES, index="deviation+k2"),
    "off": OFF,
    "balanced": FadeConfig(**SMALL, int4_budget=10),
    "h2o": FadeConfig(**SMALL, int4_budget=10, int2_budget=6, eviction_policy="h2o"),
}  # fmt: skip
MOVES_ALL = ("balanced", "h2o")  # tokens change slots
PADS = {"unpadded": (), "padded": (0, 9), "two real tokens": (0, 48)}


class Copied(TorchDispatchMode):
    """Counts the bytes that are copied in place."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.bytes += args[0].nbytes
        if function is torch.ops.aten._foreach_copy_.default:
            self.bytes += sum(x.nbytes for x in args[0])
        return function(*args, **kwargs or {})


class Moves(list):
    """What each reordering of a cache moved, as (all or not, bytes, order)."""

    def __init__(self, cache):
        super().__init__()
        known, reorder, reaches = cache.decode_graph.beams, cache.reorder_cache, []
        reach = known.reach

        def watched(index):
            with Copied() as copied:
                reorder(index)
            self.append((reaches.pop() is None, copied.bytes, index.tolist()))

        known.reach = lambda *args, **how: (reaches.append(reach(*args, **how)), reaches[-1])[1]
        cache.reorder_cache = watched

    @property
    def all_or_not(self) -> list[bool]:
        return [whole for whole, _, _ in self]

    @property
    def bytes(self) -> list[int]:
        return [n for _, n, _ in self]

    def mixes(self) -> bool:
        """Whether rows changed places, after the first time, in a text that had several kinds of rows."""
        return any(2 < len(set(order)) and order != sorted(set(order)) for _, _, order in self[1:])


def search(model, cache, inputs, new=40, **options):
    options = dict(max_new_tokens=new, min_new_tokens=new, num_beams=3, length_penalty=0.0) | options
    return model.generate(**inputs, **{CACHE_NAME: cache}, do_sample=False, **options)


@pytest.fixture
def moving_all(monkeypatch):
    """Within it, every reordering moves everything."""

    def begin():
        monkeypatch.setattr(beams.Beams, "continue_search", lambda self: None)

    return begin


def hold_the_same(cache, other, unsaved=True):
    """All that a file would have, to the bit, and positions. `unsaved`: also bounds, and pages on the GPU."""
    ours, theirs = cache.state_dict()[0], other.state_dict()[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert torch.equal(cache.token_positions.logical, other.token_positions.logical)
    assert not unsaved or all(map(torch.equal, not_in_files(cache), not_in_files(other)))


def not_in_files(cache) -> list[torch.Tensor]:
    stores = [layer.middle for layer in cache.tiered if layer.middle is not None]
    found = [tier.bound for store in stores for tier in store.tiers if tier.bound is not None]
    for store in stores:
        if getattr(store, "residency", None):
            found += [*store.resident.values(), *store.residency.of_rows()]
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.int64])
@pytest.mark.parametrize(
    "shape, axis", [((4, 2, 32), 2), ((4, 2, 32, 5), 2), ((4, 2, 5, 32), -1), ((4, 32), 1)]
)
def test_some_slots_are_moved_and_no_others(shape, axis, dtype):
    """In words or not, wherever they begin and end."""
    x = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for slots in (
        range(0, 8),
        range(8, 16),
        range(3, 5),
        range(24, 99),
        range(7, 7),
        range(40, 41),
        range(4, 99),
    ):
        expected, index = x.clone(), torch.tensor([2, 0, 0, 3])
        first, count = min(slots.start, 32), len(range(32)[slots.start : slots.stop])
        whole = 2 * count >= 32
        part = expected if whole else expected.narrow(axis, first, count)
        part.copy_(part[index])
        found = x.clone()
        take_rows(cut(found, axis, slots), index)
        assert torch.equal(found, expected) and whole == (slots == range(4, 99))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in MOVES_ALL])
def test_all_that_rows_hold_moves(name):
    """If every slot is written, every tensor that has rows moves, whatever it holds."""
    model, everything, index = tiny_llama(layers=1), range(10**6), torch.tensor([2, 0, 0, 1])
    cache = new_cache(model, CONFIGS[name])
    teacher_forced(model, cache, prompt(60, batch=4, pads=(0, 9, 3, 1)), [50] + [1] * 10)
    (layer,) = cache.tiered
    random = torch.Generator().manual_seed(0)
    layer.map(lambda x: x.copy_(torch.randint(0, 2, x.shape, generator=random)))
    twin = copy.deepcopy(cache).tiered[0]
    twin.select_rows(index)
    beams.move(layer, index, beams.Slots(everything, everything))
    assert len(with_rows(layer)) >= 2 and all(map(torch.equal, with_rows(layer), with_rows(twin)))


def with_rows(layer) -> list[torch.Tensor]:
    found = []
    layer.map(lambda x: (found.append(x), x)[1])
    return found


CASES = pairwise(
    CONFIGS, PADS, (None, 160), ("eager", "captured"), keep=[("safe", "padded", 160, "captured")]
)


@pytest.mark.parametrize(
    "name, pads, max_length, steps",
    slow_but(CASES, *[case for case in CASES if case[0] in ("safe", "recall") and case[3] == "eager"]),
)
def test_beams_are_those_of_full_moves(name, pads, max_length, steps, tapes, moving_all, monkeypatch):  # noqa: F811
    monkeypatch.setattr(beams, "MIN_REACH", 4)
    model, found = tiny_llama(layers=1, dtype=torch.float64), []
    inputs = prompt(50, batch=2, pads=PADS[pads])
    for all_of_it in (False, True):
        if all_of_it:
            moving_all()
        cache = new_cache(model, CONFIGS[name], max_length=max_length)
        cache.decode_graph.compileable = steps == "captured"
        moves = Moves(cache)
        text = search(model, cache, inputs, new=56)
        assert len(moves) == 56 and bool(cache.decode_graph.replays) == (steps == "captured")
        assert moves.all_or_not == [True] + 55 * [all_of_it or name in MOVES_ALL] and moves.mixes()
        found.append((text, cache, sum(moves.bytes)))
    (text, cache, moved), (expected, other, moved_all) = found
    assert torch.equal(text, expected)
    assert name == "off" or compressed_tokens(cache) > 0
    hold_the_same(cache, other)
    assert name in MOVES_ALL or moved < moved_all


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["int4", "recall"])
def test_presets_give_the_beams_of_full_moves(preset, moving_all):
    model, inputs, found = tiny_llama(layers=1), prompt(800, batch=2, pads=(0, 50)), []
    for all_of_it in (False, True):
        if all_of_it:
            moving_all()
        cache = new_cache(model, FadeConfig.preset(preset))
        moves = Moves(cache)
        found.append((search(model, cache, inputs, new=140), cache))
        assert moves.mixes()
    (text, cache), (expected, other) = found
    assert torch.equal(text, expected) and compressed_tokens(cache) > 0
    hold_the_same(cache, other)


@pytest.mark.parametrize("max_length", [None, 2100])
@pytest.mark.parametrize(
    "name",
    slow_but([name for name in CONFIGS if name not in MOVES_ALL and "recall" not in name], "safe", "off"),
)
def test_the_length_of_the_prompt_does_not_matter(name, max_length, moving_all):
    """Bytes that a reordering copies, in eager steps, and what they would be for full moves."""
    model = tiny_llama(layers=1, head_dim=32)

    def moved(length):
        cache = new_cache(model, CONFIGS[name], max_length=max_length)
        moves = Moves(cache)
        search(model, cache, prompt(length, batch=2), new=12, num_beams=2)
        assert name == "off" or compressed_tokens(cache) > 0
        return moves.bytes[1:]

    short, long = moved(500), moved(2004)
    assert short == long and 0 < max(short) < 2**20
    moving_all()
    short, long = moved(500), moved(2004)
    assert min(long) > 2 * min(short) if max_length is None else min(short) > 20 * 2**10


@pytest.mark.slow
def test_recorded_reorderings_serve_several_steps(tapes, uncompiled_kernels, monkeypatch, moving_all):  # noqa: F811
    """One is recorded for a number of tokens, and another one when more have come, or for another search."""
    made = []

    class Tape:
        def __init__(self, call, arguments):
            self.call, self.arguments, self.replays = call, arguments, 0

        def replay(self):
            self.replays += 1
            self.call(**self.arguments)

    def record(call, pool=None, **arguments):
        made.append(Tape(call, arguments))
        return made[-1], None

    monkeypatch.setattr(decode_graph, "CAPTURES_ON", {"cpu"})
    monkeypatch.setattr(decode_graph, "record", record)
    record_demotions(monkeypatch, [])
    monkeypatch.setattr(beams, "MIN_REACH", 8)
    model, first, found = tiny_llama(dtype=torch.float64), prompt(30, batch=2), []
    for all_of_it in (False, True):
        if all_of_it:
            moving_all()
        cache = new_cache(model, CONFIGS["safe"], max_length=120)
        cache.decode_graph.compileable = True
        text = search(model, cache, first)
        turn = dict(input_ids=text, attention_mask=torch.ones_like(text))
        moves = Moves(cache)
        found.append((search(model, cache, turn, new=30), cache, made[:]))
        assert moves.mixes()
        made.clear()
    (text, cache, shared), (expected, other, whole) = found
    assert torch.equal(text, expected)
    hold_the_same(cache, other)
    assert [len(tape.arguments["written"].positions) for tape in shared] == [8, 16, 32, 64, 8, 16, 32]
    assert sum(tape.replays for tape in shared) > 60
    assert whole and all(tape.arguments["written"] is None for tape in whole)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("preset", ["int4", "recall", "lossless", "balanced"])
def test_beams_on_a_gpu_are_those_of_full_moves(preset, moving_all):
    """Reorderings are replayed from CUDA graphs, of which a search of 300 tokens needs two."""
    model, found = tiny_llama(dtype=torch.bfloat16).cuda(), []
    inputs = {name: x.cuda() for name, x in prompt(700, batch=2, pads=(0, 50)).items()}
    for all_of_it in (False, True):
        if all_of_it:
            moving_all()
        cache = new_cache(model, FadeConfig.preset(preset), max_length=1100)
        found.append((search(model, cache, inputs, new=300), cache))
        graph = cache.decode_graph
        assert graph.replays > 200
        assert graph.counts["reordering, captured"] >= (1 if all_of_it or preset == "balanced" else 2)
        assert compressed_tokens(cache) > 0
    (text, cache), (expected, other) = found
    assert torch.equal(text, expected)
    hold_the_same(cache, other, unsaved=False)  # writes that mean nothing come in any order


@pytest.mark.slow
def test_a_second_turn_and_a_prefill_in_chunks(moving_all):
    """Rows that differ after a search are equal again when the next one has moved them for the first time."""
    model, found = tiny_llama(dtype=torch.float64), []
    for all_of_it in (False, True):
        if all_of_it:
            moving_all()
        cache = new_cache(model, CONFIGS["safe"])
        first = search(model, cache, prompt(30, batch=2), prefill_chunk_size=8)
        moves = Moves(cache)
        text = torch.cat((first, prompt(20, batch=2, seed=1)["input_ids"]), dim=1)
        turn = dict(input_ids=text, attention_mask=torch.ones_like(text))
        found.append((search(model, cache, turn), cache))
        assert moves.all_or_not == [True] + 39 * [all_of_it] and moves.mixes()
    (text, cache), (expected, other) = found
    assert torch.equal(text, expected)
    hold_the_same(cache, other)


def test_rows_that_come_from_several_move_wholly():
    """Where few tokens are allowed, the first beams of a text come from several of its rows."""
    model, cache = tiny_llama(dtype=torch.float64), new_cache(tiny_llama(), OFF)
    inputs, found = prompt(30, batch=2), []
    for cache in (dense(model), new_cache(model, OFF)):
        moves = Moves(cache) if isinstance(cache, TieredKVCache) else []
        allowed = lambda row, ids: [5] if len(ids) == 30 else list(range(1, 256))  # noqa: E731
        found.append(search(model, cache, inputs, new=12, prefix_allowed_tokens_fn=allowed))
    assert torch.equal(*found) and moves.all_or_not == 12 * [True]


@pytest.mark.parametrize("index", [[3, 4, 5, 0, 1, 2], [0, 0, 0, 0, 0, 0]])
def test_rows_that_leave_their_text_move_wholly(index):
    """By a hand, within a search or after it: the rows are those of full moves."""
    model = tiny_llama(dtype=torch.float64)
    cache, index, compared = new_cache(model, CONFIGS["safe"]), torch.tensor(index), []

    def by_hand(ids, scores, **kwargs):
        if ids.shape[1] in (30 + 12, 30 + 39):
            reorder_and_compare()
        return torch.zeros(len(ids), dtype=torch.bool)

    def reorder_and_compare():
        twin = copy.deepcopy(cache)
        for layer in twin.tiered:
            layer.select_rows(index)
        twin.token_positions.select_rows(index)
        cache.reorder_cache(index)
        compared.append(hold_the_same(cache, twin))

    search(model, cache, prompt(30, batch=2, pads=(0, 9)), stopping_criteria=[by_hand])
    reorder_and_compare()
    assert len(compared) == 3
