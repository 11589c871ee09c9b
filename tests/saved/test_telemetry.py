"""Events of a cache: exactly those that a trace implies, in every sink, and none where nothing listens."""

import collections
import copy
import json
import logging

import pytest
import torch

import fade_fast
from fade_fast.cache.layer import KVLayer
from fade_fast.hf.models import CACHE_NAME
from fade_fast.saved import telemetry
from fade_ref.config import FadeConfig

from ..marks import pairwise, slow_but
from ..models import compressed_tokens, generate, prompt, teacher_forced, tiny_llama

SMALL = dict(recent_window=8, block_size=4)
CONFIGS = {
    "int4": FadeConfig(**SMALL),
    "evict": FadeConfig(**SMALL, int4_budget=10),
    "two tiers": FadeConfig(**SMALL, int4_budget=10, int2_budget=6),
    "demote": FadeConfig(**SMALL, int4_budget=10, int2_budget=None),
    "h2o": FadeConfig(**SMALL, int4_budget=10, eviction_policy="h2o"),
    "knorm": FadeConfig(**SMALL, int4_budget=6, int2_budget=4, eviction_policy="knorm"),
}


def events_of(name, chunks, seed=0, pads=(0, 0)):
    """A cache fed in chunks, its events by kind, and `memory()` after each chunk."""
    model = tiny_llama(seed=seed)
    cache, events, memories = fade_fast.create_cache(model, CONFIGS[name]), [], []
    inputs = prompt(sum(chunks), batch=len(pads), pads=pads, seed=seed)
    with cache.listen(events.append):
        start = 0
        for n in chunks:
            part = {k: x[:, start : start + n] for k, x in inputs.items()}
            if not start:
                teacher_forced(model, cache, part, [n])
            else:
                mask, position = inputs["attention_mask"], inputs["attention_mask"].cumsum(-1) - 1
                with torch.no_grad():
                    model(
                        input_ids=part["input_ids"],
                        attention_mask=mask[:, : start + n],
                        position_ids=position[:, start : start + n].clamp_min(0),
                        **{CACHE_NAME: cache},
                    )
            start += n
            memories.append((cache.memory(), len(events)))
    return cache, events, memories


QUICK = [(name, 0, pads) for name in ("two tiers", "h2o") for pads in ((0, 0), (0, 11))]


@pytest.mark.parametrize(
    "name, seed, pads",
    slow_but(pairwise(CONFIGS, range(2), [(0, 0), (0, 11)], keep=QUICK), QUICK[0], QUICK[-1]),
    ids=str,
)
def test_events_are_those_that_the_trace_implies(name, seed, pads):
    """At every point of a random trace, the counts in the events so far are the cache's own."""
    draw = torch.Generator().manual_seed(seed)
    chunks = [24, *(int(n) for n in torch.randint(1, 24, (12,), generator=draw))]
    cache, events, memories = events_of(name, chunks, seed, pads)
    layers = len(cache.tiered)
    assert compressed_tokens(cache) > 0
    for memory, count in memories:
        total = collections.Counter()
        for event in events[:count]:
            total[event["event"]] += event.get("tokens", 0)
        compressed = sum(n for tier, n in memory.tokens.items() if tier not in ("FP16", "EVICTED"))
        assert total["demotion"] == layers * (compressed + memory.tokens.get("EVICTED", 0))
        assert total["eviction"] == layers * memory.tokens.get("EVICTED", 0)
        plans = {e["layer"]: e for e in events[:count] if e["event"] == "plan"}
        if plans:
            for tier in ("INT4", "INT2"):
                kept = sum(e["kept"].get(tier, 0) for e in plans.values())
                assert kept == layers * memory.tokens.get(tier, 0)
    by_kind = collections.Counter(e["event"] for e in events)
    config = CONFIGS[name]
    assert by_kind["plan"] == (by_kind["demotion"] if config.relocatable else 0)
    assert (by_kind["eviction"] > 0) == config.evicts and (by_kind["renumbering"] > 0) == config.evicts
    assert json.loads(json.dumps(events)) == events
    for event in events:
        assert event["event"] in telemetry.KINDS and event["time"] > 0
        if event["event"] == "demotion":
            assert event["columns"] % 4 == 0 and event["seconds"] > 0
            assert event["bytes_after"] < event["bytes_before"]
        if event["event"] == "plan" and event["score_kept"] is not None:
            assert event["score_min"] <= event["score_kept"] <= event["score_max"]
            assert event["score_min"] <= event["score_mean"] <= event["score_max"]


@pytest.mark.parametrize("name", ["evict", "knorm"])
def test_renumbering_counts_the_tokens_that_moved(name, monkeypatch):
    """Against positions read from the middle itself, before and after each demotion."""
    moved = []
    demote = KVLayer._demote

    def places(layer):
        found = {}
        if layer.middle.evicted is not None:
            found = {p: p + int(layer.middle.evicted[0]) for p in range(layer.config.n_sink)}
        for tier in layer.middle.tiers:
            if tier.records.count:
                position, at = layer.middle.position(tier)[0, 0], layer.middle.read_at(tier)[0, 0]
                found |= {p: a for p, a in zip(position.tolist(), at.tolist()) if p >= 0}
        return found

    def watched(layer, tokens, first, *counters):
        before = places(layer)
        demote(layer, tokens, first, *counters)
        shifts = [abs(at - before.get(p, p)) for p, at in places(layer).items()]
        if any(shifts):
            moved.append((sum(x > 0 for x in shifts), max(shifts)))

    monkeypatch.setattr(KVLayer, "_demote", watched)
    _, events, _ = events_of(name, [24] + [5] * 10, pads=(0,))
    found = [(e["tokens"], e["shift"]) for e in events if e["event"] == "renumbering"]
    assert found == moved and len(found) > 5


def test_growth_adds_up_to_what_is_allocated():
    model = tiny_llama()
    cache, events = fade_fast.create_cache(model, CONFIGS["int4"]), []
    with cache.listen(events.append):
        generate(model, cache, prompt(30), new=60)
        cache.memory()
    rooms = collections.defaultdict(int)
    for e in events:
        if e["event"] == "growth":
            place = (None if e["buffer"] == "timeline" else e["layer"], e["buffer"])
            assert rooms[place] == e["before"] < e["after"]
            rooms[place] = e["after"]
    for layer in cache.tiered:
        assert rooms[layer.index, "exact"] == layer.dense.capacity
        assert rooms[layer.index, "INT4"] == layer.middle.tiers[0].records.capacity
        assert rooms[layer.index, "means"] == layer.middle.means.capacity
    assert rooms[None, "timeline"] == cache.token_positions.buffer.shape[1]


def test_nothing_is_computed_without_a_listener(monkeypatch):
    def never(*args, **kwargs):
        pytest.fail("computed for nobody")

    for method in ("emit", "deliver", "stored", "demotion", "_plan", "_dropped", "_grown"):
        monkeypatch.setattr(telemetry.Telemetry, method, never)
    model = tiny_llama()
    cache = fade_fast.create_cache(model, CONFIGS["evict"])
    generate(model, cache, prompt(30), new=30)
    assert compressed_tokens(cache) > 0 and all(layer.telemetry is None for layer in cache.tiered)


def test_listening_changes_no_bit_and_ends():
    model, inputs = tiny_llama(), prompt(30)
    outs = []
    for listens in (False, True):
        cache, events = fade_fast.create_cache(model, CONFIGS["h2o"]), []
        if listens:
            with cache.listen(events.append):
                outs.append(generate(model, cache, inputs, new=30))
            told = len(events)
            assert told > 0
            text = torch.cat((inputs["input_ids"], outs[0], torch.ones(1, 20, dtype=torch.long)), dim=1)
            generate(model, cache, dict(input_ids=text, attention_mask=torch.ones_like(text)), new=4)
            assert len(events) == told
        else:
            outs.append(generate(model, cache, inputs, new=30))
    assert torch.equal(*outs)
    assert not telemetry.callback_handler.start_callbacks


def test_a_file_and_a_logger_say_the_same(tmp_path, caplog):
    model, path, events = tiny_llama(), tmp_path / "events.jsonl", []
    cache = fade_fast.create_cache(model, CONFIGS["evict"])
    caplog.set_level(logging.INFO, "cache")
    with cache.listen(path), cache.listen(logging.getLogger("cache")), cache.listen(events.append):
        generate(model, cache, prompt(30), new=20)
    assert telemetry.read(path) == events == [record.fade for record in caplog.records]
    assert caplog.records[0].getMessage().startswith(events[0]["event"])
    with path.open("ab") as file:
        file.write(b'{"event": "demo')  # as a crash would leave it
    assert telemetry.read(path) == events
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: no event"):
        telemetry.read(path)
    path.write_text("...\n")
    with pytest.raises(ValueError, match="line 1: no JSON"):
        telemetry.read(path)


def test_a_sink_that_fails_is_dropped_and_the_cache_goes_on():
    model, inputs, told = tiny_llama(), prompt(30), []
    expected = generate(model, fade_fast.create_cache(model, CONFIGS["evict"]), inputs, new=20)
    cache = fade_fast.create_cache(model, CONFIGS["evict"])

    def bad(event):
        told.append(event)
        raise OSError("disk full")

    with cache.listen(bad), pytest.warns(UserWarning, match="disk full"):
        assert torch.equal(generate(model, cache, inputs, new=20), expected)
    assert len(told) == 1 and cache.tiered[0].telemetry is None
    with pytest.raises(TypeError, match="a sink is"):
        cache.listen(3)


def test_a_copy_is_not_listened_to():
    model, events = tiny_llama(), []
    cache = fade_fast.create_cache(model, CONFIGS["evict"])
    with cache.listen(events.append):
        text = torch.cat((prompt(30)["input_ids"], generate(model, cache, prompt(30), new=2)), dim=1)
        twin, told = copy.deepcopy(cache), len(events)
        text = torch.cat((text, torch.ones(1, 48, dtype=torch.long)), dim=1)
        generate(model, twin, dict(input_ids=text, attention_mask=torch.ones_like(text)), new=4)
        assert len(events) == told > 0
        assert cache.tiered[0].telemetry is not None


def test_compilation_is_told():
    events, cache = [], fade_fast.create_cache(tiny_llama(), "safe")
    with cache.listen(events.append):
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    (event,) = [e for e in events if e["event"] == "recompilation"]
    assert not event["again"] and event["seconds"] > 0


def test_numbers_on_their_way_keep_the_order(monkeypatch):
    """An event whose numbers have not arrived holds back later ones; nothing waits but `flush`."""
    arrived, waited, events = [False], [], []

    def fetch(event, later):
        def ready(wait):
            if wait:
                waited.append(True)
            if arrived[0] or wait:
                event.update({name: x.item() for name, x in later.items()})
            return arrived[0] or wait

        return ready

    monkeypatch.setattr(telemetry, "_fetch", fetch)
    hub = telemetry.Telemetry([])
    hub.add(events.append)
    hub.emit("eviction", dict(layer=0), dict(tokens=torch.tensor(3)), nonzero="tokens")
    hub.emit("growth", dict(layer=1))
    hub.emit("eviction", dict(layer=2), dict(tokens=torch.tensor(0)), nonzero="tokens")
    hub.deliver()
    assert not events and not waited
    arrived[0] = True
    hub.deliver()
    assert [(e["event"], e["layer"]) for e in events] == [("eviction", 0), ("growth", 1)]
    arrived[0] = False
    hub.emit("eviction", dict(layer=3), dict(tokens=torch.tensor(1)), nonzero="tokens")
    hub.deliver()
    assert len(events) == 2 and not waited
    hub.deliver(wait=True)
    assert events[-1]["layer"] == 3 and waited
    hub.drop(events.append)
