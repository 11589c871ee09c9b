"""Captured decode steps: what generate() compiles gives what eager steps give, in one graph."""

import contextlib
import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fade_fast
from fade_fast.cache.layer import KVLayer
from fade_fast.cache.reads import AttentionQuery
from fade_fast.formats.rotated import RotatedFormat, RotatedTier
from fade_fast.hf.attention import NAME
from fade_fast.hf.models import CACHE_NAME
from fade_fast.policies import plan
from fade_fast.saved.memory import StorageMeter
from fade_ref.config import FadeConfig

from ..marks import FULL, pairwise, part, slow_but
from ..models import (
    RandomDrafts,
    compressed_tokens,
    drafted_by,
    drafts,
    new_cache,
    predictable,
    prompt,
    tiny_llama,
)

SMALL = dict(recent_window=8, block_size=4)
CONFIGS = {
    "int4": FadeConfig(**SMALL),
    "k3v2": FadeConfig(**SMALL, middle_k_bits=3, middle_v_bits=2),
    "evict": FadeConfig(**SMALL, int4_budget=10),
    "evict, original positions": FadeConfig(**SMALL, int4_budget=10, positions="original"),
    "int4, int2, evict": FadeConfig(**SMALL, int4_budget=10, int2_budget=6),
    "matched": FadeConfig(**SMALL, quant_backend="matched"),
    "matched, evict": FadeConfig(**SMALL, quant_backend="matched", int4_budget=10),
    "matched, two tiers": FadeConfig(
        **SMALL, quant_backend="matched", int4_budget=10, int2_budget=6, positions="original"
    ),
    "select": FadeConfig(recent_window=8, block_size=8, select=8),
    "select, share": FadeConfig(recent_window=8, block_size=8, select=0.6, select_max=16),
    "select, host": FadeConfig(recent_window=8, block_size=8, select=8, cold="host", resident=16),
    "select, matched": FadeConfig(recent_window=8, block_size=8, select=16, quant_backend="matched"),
    "select, two indexes": FadeConfig(recent_window=8, block_size=8, select=8, index="deviation+k2"),
    "select, policy": FadeConfig(
        recent_window=8,
        block_size=8,
        select=8,
        cold="host",
        resident=16,
        index="bounds",
        eviction_policy="h2o",
    ),
    "off": FadeConfig(recent_window=None),
}  # fmt: skip
CONFIGS |= {
    policy: FadeConfig(**SMALL, int4_budget=10, int2_budget=6, eviction_policy=policy)
    for policy in plan.SUPPORTED
    if policy != "position"
}


def compiled(model, cache, inputs, backend="aot_eager", new=24, **kwargs):
    """Tokens of generate() whose steps are compiled, as on a GPU, into one graph without breaks."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    cache.decode_graph.compileable = True
    options = dict(max_new_tokens=new, do_sample=False, compile_config=config) | kwargs
    return model.generate(**inputs, **{CACHE_NAME: cache}, **options)


def eager(model, cache, inputs, new=24, **kwargs):
    options = dict(max_new_tokens=new, do_sample=False) | kwargs
    return model.generate(**inputs, **{CACHE_NAME: cache}, **options)


@pytest.fixture(autouse=True)
def fresh_counters():
    torch._dynamo.reset()
    counters.clear()


#: Tests that compare captured steps with eager steps share this grid. The test is its first axis.
CAPTURED = pairwise(
    ("steps", "beams"),
    CONFIGS,
    (False, True),
    keep=[("steps", "int4, int2, evict", True), ("steps", "h2o", True), ("beams", "evict", False)],
)
#: The test of beams replays steps of every configuration. So the test of replays needs one of each kind.
KINDS = "int4, int2, evict", "matched, two tiers", "select, host", "select, policy", "off", "h2o"
REPLAYED = pairwise(CONFIGS, (False, True)) if FULL else [(name, i % 2 > 0) for i, name in enumerate(KINDS)]


@pytest.mark.parametrize("name, padded", slow_but(part("steps", CAPTURED), ("h2o", True)))
def test_steps_equal_eager_steps(name, padded):
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2, pads=(0, 9) if padded else ())
    theirs = new_cache(model, CONFIGS[name])
    expected = eager(model, theirs, inputs)
    cache = new_cache(model, CONFIGS[name])
    found = compiled(model, cache, inputs)
    assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert name == "off" or compressed_tokens(cache) > 0
    assert cache.get_seq_length() == theirs.get_seq_length()
    assert torch.equal(cache.token_positions.logical, theirs.token_positions.logical)
    for ours, other in zip(cache.tiered, theirs.tiered):
        for a, b in zip(ours.decode_all(), other.decode_all()):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        for records, twin in zip(_records(ours), _records(other)):
            for name in ours.observer.fields if ours.observer else ():
                torch.testing.assert_close(records[name], twin[name], rtol=1e-9, atol=1e-12)


def _records(layer):
    """The buffers that hold tokens; sinks, whose scores mean nothing, are left out."""
    layer.compact()
    exact = {name: layer.dense[name][..., layer.config.n_sink :] for name in layer.dense.fields}
    return [exact] + [tier.records for tier in layer.held_tiers()]


STEADY = {
    "int4": FadeConfig(**SMALL),
    "int4, contiguous": FadeConfig(**SMALL, positions="contiguous"),
    "evict": FadeConfig(**SMALL, int4_budget=12),
    "int4, int2, evict": FadeConfig(**SMALL, int4_budget=12, int2_budget=8),
    "int2, evict": FadeConfig(**SMALL, int4_budget=8, int2_budget=8, middle_k_bits=2, middle_v_bits=2),
    "knorm": FadeConfig(**SMALL, int4_budget=12, int2_budget=8, eviction_policy="knorm"),
    "select": FadeConfig(recent_window=8, block_size=8, select=64),  # more tokens come than are read
    "select, host": FadeConfig(recent_window=8, block_size=8, select=64, cold="host", resident=72),
    "select, bounds": FadeConfig(recent_window=8, block_size=8, select=64, index="bounds+k2"),
    "select, policy": FadeConfig(
        recent_window=8, block_size=8, select=16, cold="host", resident=24, index="deviation",
        eviction_policy="hybrid",
    ),
}  # fmt: skip


WAYS = [("unpadded", name) for name in STEADY] + [("padded", name) for name in STEADY]
WAYS += [("drafted", name) for name in ("int4", "evict", "int4, contiguous", "knorm", "select")]


@pytest.mark.slow
@pytest.mark.parametrize("way, name", slow_but(WAYS, ("unpadded", "int4"), ("padded", "evict")))
def test_demotion_for_graphs_equals_ordinary_demotion(name, way, uncompiled_kernels, monkeypatch):
    """Where a graph would be replayed, the same runs by tensors: to the bit, and counted alike.

    Also while drafts are checked, when more tokens have come than the block that is due.
    """
    padded = way == "padded"
    times, beyond = [], []

    def counts(layers):
        tiers = [[tier.records.count for tier in layer.middle.tiers] for layer in layers]
        return [
            (x.dense.count, held, [part.count for part in x.middle.buffers().values()])
            for x, held in zip(layers, tiers)
        ]

    def watch(decode_graph):
        demote, on_device = decode_graph._demote, decode_graph._demote_on_device

        def demoted():
            beyond.append(decode_graph.layers[0].num_past_threshold)
            demote()

        def replayed():
            twin = copy.deepcopy(decode_graph.layers)
            on_device()
            for layer in twin:
                layer.count_replayed_demotion()
            assert counts(twin) == counts(decode_graph.layers)
            times.append(1)

        decode_graph._demote, decode_graph._demote_on_device = demoted, replayed

    model, inputs = tiny_llama(dtype=torch.float16), prompt(60, batch=2, pads=(0, 11) if padded else ())

    model = predictable(model) if way == "drafted" else model

    def run(cache):
        watch(cache.decode_graph)
        if way != "drafted":
            return compiled(model, cache, inputs, new=60)
        text = eager(model, new_cache(model, STEADY[name], verify=False), prompt(60), new=100)
        with drafts(model, text, most=2) as options:
            return compiled(model, cache, prompt(60), new=100, **options)

    cache = new_cache(model, STEADY[name], verify=False)
    found = run(cache)
    assert len(times) > 3
    assert compressed_tokens(cache) > 0 and (max(beyond) > 0) == (way == "drafted")
    monkeypatch.setattr(KVLayer, "can_replay_demotion", False)
    plain = new_cache(model, STEADY[name], verify=False)
    before = len(times)
    assert torch.equal(found, run(plain))
    assert len(times) == before
    ours, theirs = cache.state_dict()[0], plain.state_dict()[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    for a, b in zip(cache.tiered, plain.tiered):  # what no file holds: numbers of pages, and who is resident
        a, b = ([x.compact(), x.middle][1] for x in (a, b))
        if "index" in a.buffers():
            assert a.summaries.tokens == a.count == b.count
            assert all(torch.equal(a.summaries.pages[x], b.summaries.pages[x]) for x in ("first", "second"))
        if "policy" in name:
            assert torch.equal(a.residency.page_of_slot, b.residency.page_of_slot)
            assert (a.residency.page_of_slot[..., :-1] >= 3).any()  # the first pages have gone


@pytest.mark.slow
def test_caches_alternate_and_start_again_without_recompiling():
    model = tiny_llama(dtype=torch.float64)
    first, second = prompt(30, batch=2), prompt(41, batch=2, seed=1)
    expected = [eager(model, fade_fast.create_cache(model, CONFIGS["int4"]), x) for x in (first, second)]
    one, two = (fade_fast.create_cache(model, CONFIGS["int4"]) for _ in range(2))
    for cache, inputs, tokens in ((one, first, expected[0]), (two, second, expected[1])):
        assert torch.equal(compiled(model, cache, inputs), tokens)
    one.reset()
    assert torch.equal(compiled(model, one, second), expected[1])
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_turns_continue_a_captured_cache():
    """A second turn, eager steps between and a crop leave the next captured steps right."""
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2)

    def talk(step):
        cache = fade_fast.create_cache(model, CONFIGS["int4"])
        out = step(model, cache, inputs, new=9)
        cache.crop(-3)
        for length in (7, 1):
            out = torch.cat(
                (out[:, : cache.get_seq_length()], prompt(length, batch=2, seed=length)["input_ids"]), 1
            )
            turn = dict(input_ids=out, attention_mask=torch.ones_like(out))
            out = step(model, cache, turn, new=9)
            out = eager(model, cache, dict(input_ids=out, attention_mask=torch.ones_like(out)), new=3)
        return out

    assert torch.equal(talk(compiled), talk(eager))


@pytest.mark.slow
def test_beams_and_captured_steps_share_a_cache():
    """Rows reordered in place, as captured steps need it."""
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2)
    outputs = []
    for run in (compiled, eager):
        cache = fade_fast.create_cache(model, CONFIGS["int4"])
        out = run(model, cache, inputs, new=9)
        cache.reorder_cache(torch.tensor([1, 1]))
        turn = dict(input_ids=out[[1, 1]], attention_mask=torch.ones_like(out))
        outputs.append(run(model, cache, turn, new=9))
    assert torch.equal(*outputs)


@pytest.mark.slow
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad], ids=lambda c: c.__name__)
def test_inference_mode(context):
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2)
    with context():
        found = compiled(model, fade_fast.create_cache(model, CONFIGS["int4"]), inputs)
        expected = eager(model, fade_fast.create_cache(model, CONFIGS["int4"]), inputs)
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("run", [compiled, eager], ids=lambda run: run.__name__)
@pytest.mark.parametrize("name", ["int4", "int4, int2, evict", "h2o", "select, host", "off"])
def test_a_cache_goes_in_and_out_of_inference_mode(run, name):
    """Its tensors can be written to in either."""
    model, found = tiny_llama(dtype=torch.float64), []
    within = torch.inference_mode
    for modes in ([torch.no_grad] * 4, [within, torch.no_grad, within, torch.no_grad]):
        cache, out = fade_fast.create_cache(model, CONFIGS[name]), prompt(30, batch=2)["input_ids"]
        for mode in modes:
            with mode():
                out = run(model, cache, dict(input_ids=out, attention_mask=torch.ones_like(out)), new=9)
            cache.crop(-2)
            cache.reorder_cache(torch.tensor([0, 0]))
            out = out[[0, 0], : cache.get_seq_length() + 1]
            assert not any(
                x.is_inference() for x in (*cache.tiered[0].tensors(), *cache.token_positions.tensors())
            )
        found.append(out)
    assert torch.equal(*found) and (name == "off" or compressed_tokens(cache) > 0)
    assert counters["stats"]["unique_graphs"] <= 2 * (run is compiled)  # given ids are of either kind


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["int4", "evict", "h2o", "select, host", "off"])
def test_autocast_reaches_the_model_alone(name, dtype, monkeypatch):
    """Keys and values are stored in its dtype; what they are encoded and attended by is not rounded to it."""
    model, inputs, seen, found = tiny_llama(dtype=dtype), prompt(60, batch=2, pads=(0, 7)), [], []
    for kind in (RotatedTier, RotatedFormat, KVLayer, AttentionQuery):
        for method in ("encode", "decode_keys", "attend"):
            real = vars(kind).get(method)
            if real:
                watched = lambda *args, real=real, **k: (seen.append(_casts()), real(*args, **k))[1]  # noqa: E731
                monkeypatch.setattr(kind, method, watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for run in (eager, compiled):
            cache = new_cache(model, CONFIGS[name])
            found.append(run(model, cache, inputs, new=20))
            assert _casts() and not any(seen) and cache.tiered[0].dense["key"].dtype == torch.bfloat16
            assert name == "off" or (seen and compressed_tokens(cache) > 0)
        if name != "off":
            assert torch.equal(*found)
        else:  # eager steps are SDPA's here, and round otherwise than captured ones
            fade_fast.detach(model)
            assert torch.equal(found[0], eager(model, DynamicCache(config=model.config), inputs, new=20))
    # Begun without it, a text goes on in the dtype that it has.
    cache = new_cache(model, CONFIGS[name])
    out = eager(model, cache, inputs, new=9)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(out[:, 60:])), 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager(model, cache, dict(input_ids=out, attention_mask=mask), new=9)
    assert cache.tiered[0].dense["key"].dtype == dtype and cache.get_seq_length() == 77


def _casts() -> bool:
    return torch.is_autocast_enabled("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(default):
    model, held = tiny_llama(dtype=torch.float32), []
    try:
        for dtype in (torch.float32, default):
            torch.set_default_dtype(dtype)
            cache = fade_fast.create_cache(model, CONFIGS["int4, int2, evict"])
            compiled(model, cache, prompt(60, batch=2))
            held.append(cache.tiered[0].tensors())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, *held)) and [x.dtype for x in held[0]] == [x.dtype for x in held[1]]


def test_a_window_in_a_captured_step_is_refused(monkeypatch):
    """Of a layer with a full cache; ordinary steps heed it."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(30)
    real = ALL_ATTENTION_FUNCTIONS[NAME]
    windowed = lambda *args, **kwargs: real(*args, **kwargs | dict(sliding_window=9))  # noqa: E731
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, NAME, windowed)
    caches = [fade_fast.create_cache(model, CONFIGS["int4"], verify=False) for _ in range(2)]
    with pytest.raises(Exception, match="sliding_window=9 for a layer with full attention"):
        compiled(model, caches[0], inputs)
    found = eager(model, caches[1], inputs)
    monkeypatch.undo()
    whole = eager(model, fade_fast.create_cache(model, CONFIGS["int4"], verify=False), inputs)
    assert compressed_tokens(caches[1]) > 0 and not torch.equal(found, whole)


@pytest.mark.slow
def test_a_model_that_the_user_compiled():
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2)
    expected = eager(model, fade_fast.create_cache(model, CONFIGS["int4"]), inputs)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert torch.equal(eager(model, fade_fast.create_cache(model, CONFIGS["int4"]), inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("run", [compiled, eager], ids=lambda run: run.__name__)
def test_what_torch_compile_made_of_a_model(run, tmp_path):
    """It can be given wherever the model can; and `model.compile()`, before and after."""
    expected, inputs = None, prompt(30, batch=2)
    for when in ("never", "before", "after", "given"):
        torch._dynamo.reset()
        model = tiny_llama(dtype=torch.float64)
        wrapped = torch.compile(model, backend="aot_eager")
        if when == "before":
            model.compile(backend="aot_eager")
        given = wrapped if when == "given" else model
        cache = fade_fast.create_cache(given, CONFIGS["int4"])
        if when == "after":
            model.compile(backend="aot_eager")
        found = run(given, cache, inputs, new=12)
        expected = found if when == "never" else expected
        assert torch.equal(found, expected) and compressed_tokens(cache) > 0
    cache.save(tmp_path / "cache")
    assert fade_fast.load_cache(tmp_path / "cache", wrapped).get_seq_length() == 41
    assert fade_fast.check_model(wrapped).layers
    fade_fast.detach(wrapped)
    assert model.config._attn_implementation == "sdpa"
    assert fade_fast.attach(wrapped)


@pytest.mark.slow
def test_long_uncompressed_texts_are_left_to_flash_attention(short_flash_prefixes):
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(600, batch=2)
    cache = fade_fast.create_cache(model, CONFIGS["off"])
    found = compiled(model, cache, inputs, new=300)
    assert cache.decode_graph.flash_prefix >= 768 and counters["stats"]["unique_graphs"] == 1
    expected = eager(model, fade_fast.create_cache(model, CONFIGS["off"]), inputs, new=300)
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_tokens_left_to_flash_attention_are_cropped(short_flash_prefixes):
    """It sees all that it is given, so an epoch ends where some of that is gone."""
    model, found = tiny_llama(dtype=torch.float64), []
    for run in (compiled, eager):
        cache = fade_fast.create_cache(model, CONFIGS["off"])
        out = run(model, cache, prompt(600, batch=2), new=9)
        flash_prefix = cache.decode_graph.flash_prefix
        cache.crop(-200)
        out = torch.cat((out[:, : cache.get_seq_length()], prompt(1, batch=2, seed=1)["input_ids"]), 1)
        found.append(run(model, cache, dict(input_ids=out, attention_mask=torch.ones_like(out)), new=9))
        assert run is eager or 0 < cache.decode_graph.flash_prefix < flash_prefix
    assert torch.equal(*found)


def test_attach_is_undone():
    model = tiny_llama()
    fade_fast.create_cache(model)
    assert "get_compiled_call" in vars(model)
    fade_fast.detach(model)
    assert "get_compiled_call" not in vars(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(CONFIGS, "h2o"))
def test_a_step_leaves_no_tensor_behind(name):
    """What a captured step makes lies in its graph's memory, so nothing else may keep it."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(30, batch=2)
    cache, meter, left = new_cache(model, CONFIGS[name]), StorageMeter(), []
    run = cache.decode_graph.run

    def watched(*args):
        before = meter.now
        with meter:
            output = run(*args)
        left.append(meter.now - before - output.untyped_storage().nbytes())
        return output

    cache.decode_graph.run = watched
    compiled(model, cache, inputs)
    assert len(left) > 40 and not any(left)


NEW, LAST = 120, 20  # steps of a run, and those after its last demotion that are looked at


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("drafted", [False, True], ids=["", "drafted"])
@pytest.mark.parametrize("name", ["int4", "evict", "select", "select, host", "off"])
def test_steady_steps_neither_wait_nor_allocate_nor_recompile(name, drafted):
    """From one demotion to the next: no host synchronisation, no allocation, no compilation."""
    model = tiny_llama(dtype=torch.bfloat16).cuda()
    inputs = {k: v.cuda() for k, v in prompt(300, batch=1 if drafted else 2).items()}
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    guesses = drafted_by(model, lambda: RandomDrafts(model.config.vocab_size, 3), most=3)
    long = dict(recent_window=8, block_size=64)
    configs = dict(int4=FadeConfig(**long), evict=FadeConfig(**long, int4_budget=64), off=CONFIGS["off"])
    configs["select"] = FadeConfig(**long, select=64)
    configs["select, host"] = FadeConfig(**long, select=64, cold="host")
    # A cache that grows would compile for each larger buffer.
    cache = new_cache(model, configs[name], max_length=300 + NEW + 4)
    decode_graph, seen = cache.decode_graph, []
    begin, end = decode_graph.begin, decode_graph.end

    def strict(*args):
        ready = begin(*args)
        seen.append(
            (torch.cuda.memory_stats()["allocation.all.allocated"], counters["stats"]["unique_graphs"])
        )
        if len(seen) > NEW - LAST:  # what was compiled before had to wait
            torch.cuda.set_sync_debug_mode("error")
        return ready

    def relaxed(new):
        torch.cuda.set_sync_debug_mode("default")
        seen[-1] += (torch.cuda.memory_stats()["allocation.all.allocated"],)
        end(new)

    decode_graph.begin, decode_graph.end = strict, relaxed
    try:
        with guesses if drafted else contextlib.nullcontext({}) as more:
            model.generate(**inputs, **{CACHE_NAME: cache}, **options, **more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert decode_graph.captures and len(seen) > NEW - LAST / 2
    steady = seen[1 - LAST : -1]
    assert len({graphs for _, graphs, _ in steady}) == 1
    assert all(after == before for before, _, after in steady)


@pytest.mark.parametrize("drafted", [False, True], ids=["", "drafted"])
@pytest.mark.parametrize("room", [40, 0, None], ids=["to measure", "too short", "growing"])
def test_uncompressed_buffers_seldom_grow(room, drafted):
    """A kernel is compiled for each size. Drafts may reach beyond a text, and a text beyond its length."""
    model, sizes = tiny_llama(dtype=torch.float64), []
    cache = new_cache(model, CONFIGS["off"], max_length=None if room is None else 30 + room)
    begin = cache.decode_graph.begin

    def watched(*args):
        ready = begin(*args)
        if ready:
            sizes.append(cache.tiered[0].dense.capacity)
        return ready

    cache.decode_graph.begin = watched
    guesses = drafted_by(model, lambda: RandomDrafts(model.config.vocab_size, 3), most=3)
    with guesses if drafted else contextlib.nullcontext({}) as more:
        compiled(model, cache, prompt(30, batch=1), new=40, **more)
    assert len(sizes) > 30 and cache.decode_graph.steps > 30
    assert len(set(sizes)) <= 1 + (room == 0)


@pytest.mark.slow
def test_a_copy_has_captured_steps_of_its_own():
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2)
    cache = fade_fast.create_cache(model, CONFIGS["int4"])
    out = compiled(model, cache, inputs, new=9)
    twin = copy.deepcopy(cache)
    before = [x.clone() for layer in twin.tiered for x in layer.decode_all()]
    turn = dict(input_ids=out, attention_mask=torch.ones_like(out))
    first = compiled(model, cache, turn, new=9)
    assert all(
        torch.equal(a, b) for a, b in zip(before, [x for layer in twin.tiered for x in layer.decode_all()])
    )
    assert torch.equal(compiled(model, twin, turn, new=9), first)


@pytest.mark.slow
def test_steps_follow_a_cache_that_moved():
    """Weighing settles what is due; offloading moves every tensor."""
    model = tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2)
    cache = fade_fast.create_cache(model, CONFIGS["int4"])
    out = inputs["input_ids"]
    for _ in range(8):
        turn = dict(input_ids=out, attention_mask=torch.ones_like(out))
        out = compiled(model, cache, turn, new=3)
        cache.memory()
        for layer in cache.tiered:
            layer.map(torch.clone)
    expected = eager(model, fade_fast.create_cache(model, CONFIGS["int4"]), inputs, new=24)
    assert torch.equal(out, expected)


def test_a_cache_of_another_model_is_refused():
    model, other = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    inputs = prompt(30, batch=2)
    cache = fade_fast.create_cache(model, CONFIGS["int4"])
    out = compiled(model, cache, inputs)
    fade_fast.create_cache(other, CONFIGS["int4"])
    with pytest.raises(ValueError, match="another model"):
        compiled(other, cache, dict(input_ids=out, attention_mask=torch.ones_like(out)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["select, share", "select, host"])
def test_captured_steps_keep_choices_only_while_somebody_listens(name):
    model, inputs = tiny_llama(dtype=torch.float64), prompt(60, batch=2, pads=(0, 9))
    told = []
    for run in (eager, compiled):
        cache, events = new_cache(model, CONFIGS[name]), []
        with cache.listen(events.append):
            text = run(model, cache, inputs)
            newest = [{n: x.clone() for n, x in layer.middle.newest.items()} for layer in cache.tiered]
        told.append((newest, [event | dict(time=0) for event in events if event["event"] == "selection"]))
    (eager_newest, eager_events), (newest, events) = told
    assert cache.decode_graph.steps == 23 and len(events) >= 4 and events == eager_events
    assert all(torch.equal(a[n], b[n]) for a, b in zip(newest, eager_newest, strict=True) for n in a)
    assert all((x["page"] >= 0).any(-1).all() for x in newest)
    ids = {cache.decode_graph.graph_id}
    # Nobody listens any more: the next step is captured without them, and then nothing changes.
    for _ in range(2):
        mask = torch.ones_like(text)
        mask[1, :9] = 0
        text = compiled(model, cache, dict(input_ids=text, attention_mask=mask), new=3)
        ids.add(cache.decode_graph.graph_id)
        kept = [layer.middle.newest for layer in cache.tiered]
        assert kept == [{}, {}] and not any(x.dtype == torch.bool for x in cache.tiered[0].middle.tensors())
    assert len(ids) == 2
    # A listener that comes and goes between two steps costs no capture.
    with cache.listen(events.append):
        pass
    mask = torch.ones_like(text)
    mask[1, :9] = 0
    compiled(model, cache, dict(input_ids=text, attention_mask=mask), new=2)
    assert cache.decode_graph.graph_id in ids


def test_somebody_may_begin_and_end_to_listen_between_two_captured_steps():
    model, inputs = tiny_llama(dtype=torch.float64), prompt(60)
    expected = compiled(model, new_cache(model, CONFIGS["select"]), inputs)
    cache, found, listeners = new_cache(model, CONFIGS["select"]), [], []

    def between(ids, scores, **kwargs):
        layer = cache.tiered[1].middle
        found.append((cache.decode_graph.graph_id, layer.newest["page"].clone() if layer.newest else None))
        if len(found) == 5:
            listeners.append(cache.listen(lambda event: None))
        if len(found) == 12:
            listeners[0].close()
        return torch.zeros(len(ids), dtype=torch.bool)

    assert torch.equal(compiled(model, cache, inputs, stopping_criteria=[between]), expected)
    assert cache.decode_graph.steps == 23 == len(found) - 1
    assert [page is not None for _, page in found] == [False] * 5 + [True] * 7 + [False] * 12
    assert all((page >= 0).all() for _, page in found[5:12])
    assert len({tuple(page.flatten().tolist()) for _, page in found[5:12]}) > 1
    assert len({graph_id for graph_id, _ in found[1:5]}) == 1 != len({graph_id for graph_id, _ in found[4:]})
