"""What is captured before it is due: demotions, and steps that read more slots. Python plays a graph."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fade_fast.cache import cuda_graph, decode_graph, demotion, together
from fade_fast.cache.budget_store import BudgetStore
from fade_fast.compile import replay
from fade_fast.kernels import matched, packed
from fade_ref.config import FadeConfig

from ..marks import slow_but
from ..models import compressed_tokens, new_cache, prompt, tiny_llama
from .test_cuda_graph import tapes  # noqa: F401
from .test_decode_graph import SMALL, STEADY, compiled

POLICIES = ("h2o", "snapkv", "keydiff")
CASES = STEADY | {p: FadeConfig(**SMALL, int4_budget=12, int2_budget=8, eviction_policy=p) for p in POLICIES}


class OnDevice(TorchDispatchMode):
    """Refuses operations for which the host would look at data: a capture does not allow them."""

    LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if name == "index" else []
        assert name not in self.LOOKS and not masks, function
        return function(*args, **(kwargs or {}))


class Demotion:
    """A graph of a demotion, or of a part of it. Recording changes no tensor; a replay changes nothing in
    Python.
    """

    def __init__(self, call, arguments):
        self.call, self.arguments, self.replays = call, arguments, 0
        self.layers, self.counters = arguments["layers"], arguments["counters"]
        self.graph = next(x for x in decode_graph._graphs.values() if self.layers[0] in x.layers)
        self.is_part = call is together.encode
        self.dense = self.layers[0].dense.count  # a block is due, or counted as due
        with kept(self.graph), OnDevice():
            self.output = call(**arguments)

    def pool(self):
        return None

    def replay(self) -> None:
        self.replays += 1
        layers, positions, length = self.graph.layers, self.graph.token_positions, int(self.counters.length)
        counts, seen = counted(layers), positions.length
        for layer in layers:  # as they were at the capture
            layer.dense.count, layer.length = self.dense, length
            if not self.is_part:
                layer.middle.count_replayed_demotion(-layer.config.block_size)
        positions.length = length
        for known, new in zip(self.output or (), self.call(**self.arguments) or ()):
            known.copy_(new)
        positions.length = seen
        if self.is_part:
            for layer, (dense, _, own) in zip(layers, counts):
                layer.dense.count, layer.length = dense, own
        assert counted(layers) == counts


class kept:
    """Where tensors get their values back at the end."""

    def __init__(self, graph):
        self.graph = graph

    def __enter__(self):
        layers, groups = self.graph.layers, self.graph.groups
        held = [x for layer in layers for x in layer.tensors()]
        held += [x for layer in layers for view in layer.static_views for x in (view.valid, view.read_at)]
        held += [x for group in groups for x in (group.slot, group.held)]
        self.held = [(x, x.clone()) for x in held if x is not None]

    def __exit__(self, *exception):
        for x, value in self.held:
            x.copy_(value)


def counted(layers):
    return [
        (x.dense.count, {name: b.count for name, b in x.middle.buffers().items()}, x.length) for x in layers
    ]


@pytest.fixture
def demotions(monkeypatch, uncompiled_kernels):
    """Demotions are captured on the CPU; those that were."""
    made = []

    monkeypatch.setattr(decode_graph, "CAPTURES_ON", {"cpu"})
    record_demotions(monkeypatch, made)
    return made


def record_demotions(monkeypatch, made: list) -> None:
    """Let Python record demotions, into `made`."""

    def record(call, pool=None, **arguments):
        made.append(Demotion(call, arguments))
        return made[-1], made[-1].output

    monkeypatch.setattr(demotion, "record", record)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(CASES, "int4", "h2o"))
def test_a_demotion_is_captured_before_it_is_due(name, demotions, monkeypatch):
    """Then every demotion is replayed, and the cache holds the bits of ordinary ones."""

    def run():
        model = tiny_llama(dtype=torch.float16)
        cache = new_cache(model, CASES[name], verify=False)
        out = compiled(model, cache, prompt(60, batch=2), backend="eager", new=60)
        return out, cache

    monkeypatch.setattr(decode_graph, "SETTLED", 2)
    found, cache = run()
    counts = cache.decode_graph.counts
    # At first there are no more tokens than are read. With a policy of residents, such demotions are not
    # replayed, because their pages get slots of their own.
    graph_ids = 2 if "select" in name and "policy" not in name else 1
    eager = 4 if "policy" in name else 1
    made, whole, parts = (
        len(demotions),
        *([x for x in demotions if x.is_part == is_part] for is_part in (False, True)),
    )
    assert counts["demotion, captured ahead"] == graph_ids == len(whole)
    assert counts["demotion, replayed"] == sum(x.replays for x in whole) > 3
    assert len({x.replays for x in parts}) == bool(parts)  # equally often
    assert bool(parts) == cache.tiered[0].middle.writes_ahead
    assert counts["demotion, a part ahead"] == sum(x.replays for x in parts)
    assert counts["demotion, not captured"] <= eager and not counts["demotion, captured"]
    monkeypatch.setattr(decode_graph, "SETTLED", 0)
    monkeypatch.setattr(decode_graph, "CAPTURES_ON", set())
    expected, other = run()
    assert torch.equal(found, expected) and compressed_tokens(cache) > 0 and len(demotions) == made
    ours, theirs = cache.state_dict()[0], other.state_dict()[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize("name", ["evict", "int4, int2, evict", "h2o"])
def test_padded_rows_are_demoted_by_graphs_once_tiers_are_full(name, demotions, monkeypatch):
    """Then no row decides any more how many slots there are, and the bits are those of looked-at plans."""
    model, inputs = tiny_llama(dtype=torch.float16), prompt(60, batch=2, pads=(0, 45))

    def run():
        cache = new_cache(model, CASES[name], verify=False)
        return compiled(model, cache, inputs, backend="eager", new=60), cache

    monkeypatch.setattr(decode_graph, "SETTLED", 2)
    found, cache = run()
    assert cache.decode_graph.counts["demotion, replayed"] > 8 and len(demotions) == 1
    assert len(together.groups(cache.tiered)) == 1
    sizes = BudgetStore._sizes
    unknown = lambda self, new: None if self.token_positions.has_padding else sizes(self, new)  # noqa: E731
    monkeypatch.setattr(BudgetStore, "_sizes", unknown)
    expected, other = run()
    assert not other.decode_graph.counts["demotion, replayed"]
    assert torch.equal(found, expected) and cache.memory().forgotten
    ours, theirs = cache.state_dict()[0], other.state_dict()[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize("name", ["int4", "matched"])
def test_parts_of_a_demotion_run_in_the_steps_before(name, demotions, monkeypatch):
    """One part a step. What they write is read only when it is counted."""
    monkeypatch.setattr(decode_graph, "SETTLED", 1)
    monkeypatch.setattr(together, "MOST", 0)  # each layer is a part
    config = FadeConfig(**SMALL, quant_backend="matched" if name == "matched" else "rotated")
    model = tiny_llama(dtype=torch.float16, layers=3)
    cache, steps = new_cache(model, config, verify=False), []
    begin = cache.decode_graph.begin

    def watched(*args):
        before = cache.decode_graph.counts["demotion, a part ahead"]
        ready = begin(*args)
        steps.append(cache.decode_graph.counts["demotion, a part ahead"] - before)
        return ready

    cache.decode_graph.begin = watched
    found = compiled(model, cache, prompt(60, batch=2), backend="eager", new=60)
    ours = cache.state_dict()[0]
    (whole,), parts = ([x for x in demotions if x.is_part == is_part] for is_part in (False, True))
    assert len(parts) == 3 and whole.replays > 8
    assert all(0 <= x.replays - whole.replays <= 1 for x in parts)  # the next demotion has begun
    assert max(steps) == 1 and sum(steps) > 3 * whole.replays - 3  # hardly any when it is due
    monkeypatch.setattr(decode_graph, "CAPTURES_ON", set())
    other = new_cache(model, config, verify=False)
    expected = compiled(model, other, prompt(60, batch=2), backend="eager", new=60)
    assert torch.equal(found, expected) and compressed_tokens(cache) > 0
    assert all(torch.equal(x, other.state_dict()[0][name]) for name, x in ours.items())


def test_parts_are_done_again_after_tokens_are_taken_back(demotions, monkeypatch):
    """Other tokens may have come to their slots."""
    monkeypatch.setattr(decode_graph, "SETTLED", 1)
    model, config = tiny_llama(dtype=torch.float16), FadeConfig(recent_window=4, block_size=8)
    found = []
    for captures in ({"cpu"}, set()):
        monkeypatch.setattr(decode_graph, "CAPTURES_ON", captures)
        cache = new_cache(model, config, verify=False)
        graph, text = cache.decode_graph, prompt(60)["input_ids"]
        while text.shape[1] < 80 or cache.tiered[0].num_past_threshold:  # until a block is due
            text = compiled(model, cache, {"input_ids": text}, backend="eager", new=3)
        assert not captures or graph.demotion.done == 1
        cache.crop(-10)
        text = text[:, : cache.get_seq_length() + 1].clone()
        text[0, -1] = (text[0, -1] + 1) % 50
        replayed = graph.counts["demotion, replayed"]
        text = compiled(model, cache, {"input_ids": text}, backend="eager", new=40)
        assert not captures or graph.counts["demotion, replayed"] > replayed
        found.append((text, cache.state_dict()[0]))
    (text, ours), (expected, theirs) = found
    assert torch.equal(text, expected)
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_a_demotion_runs_once_before_it_is_captured_when_due(demotions, monkeypatch):
    """A capture does not allow compilation. Steps with drafts reach the next block before `SETTLED` steps."""
    events, rehearse, record = [], decode_graph.together.rehearse, demotion.record
    monkeypatch.setattr(decode_graph, "SETTLED", 1000)
    logs = lambda name, call: lambda *args, **more: (events.append(name), call(*args, **more))[1]  # noqa: E731
    monkeypatch.setattr(decode_graph.together, "rehearse", logs("rehearsed", rehearse))
    monkeypatch.setattr(demotion, "record", logs("recorded", record))
    model = tiny_llama(dtype=torch.float16)
    cache = new_cache(model, CASES["h2o"], verify=False)
    compiled(model, cache, prompt(60, batch=2), backend="eager", new=30)
    assert cache.decode_graph.counts["demotion, captured"] == 1 and compressed_tokens(cache) > 0
    assert events == ["rehearsed", "recorded"]


@pytest.mark.parametrize("name", ["int4", "evict"])
@pytest.mark.parametrize("settled", [2, 1000])
def test_what_cannot_be_captured_is_demoted_without_a_graph(name, settled, demotions, monkeypatch):
    """Ahead and when it is due: an operation that a capture does not allow costs time, and no text."""
    model, found, record = tiny_llama(dtype=torch.float16), [], demotion.record
    monkeypatch.setattr(decode_graph, "SETTLED", settled)

    def refused(call, pool=None, **arguments):
        record(call, pool, **arguments)  # counts what it demotes
        raise RuntimeError("operation not permitted when stream is capturing")

    for recorded in (refused, record):
        monkeypatch.setattr(demotion, "record", recorded)
        cache = new_cache(model, CASES[name], verify=False)
        text = compiled(model, cache, prompt(60, batch=2), backend="eager", new=40)
        found.append((text, cache.state_dict()[0], cache.decode_graph.counts))
    (text, ours, counts), (expected, theirs, _) = found
    assert counts["demotion, not captured"] > 5 and not counts["demotion, replayed"]
    assert torch.equal(text, expected) and compressed_tokens(cache) > 0
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_a_rehearsal_encodes_without_replays(demotions, monkeypatch):
    """A replay of the encoder would hide that its compiled version is gone, and the capture would compile."""
    model, codec = tiny_llama(dtype=torch.float16), matched._replayed
    cache = new_cache(model, FadeConfig(**SMALL, quant_backend="matched"), verify=False)
    told = []

    def replayed(*args, **constants):
        told.append(replay._rehearses.get())
        return codec.function(*args, **constants)

    monkeypatch.setattr(matched, "_replayed", replayed)
    monkeypatch.setattr(decode_graph, "SETTLED", 1000)
    compiled(model, cache, prompt(60, batch=2), backend="eager", new=30)
    assert cache.decode_graph.counts["demotion, captured"] == 1 and compressed_tokens(cache) > 0
    assert told.count(True) == 1 and told.index(True) > 0


@pytest.mark.slow
def test_the_step_that_reads_more_slots_is_captured_ahead(tapes, uncompiled_kernels, monkeypatch):  # noqa: F811
    """It is replayed at once when the text has outgrown the slots that were read, under the same graph id."""
    monkeypatch.setattr(packed, "_best_step", lambda heads: 128)
    monkeypatch.setattr(packed, "spare", lambda view: 32)
    model, config = tiny_llama(dtype=torch.float16), FadeConfig(recent_window=8, block_size=16)
    ids, found, ids_seen = prompt(258, batch=2), {}, set()
    for soon in (cuda_graph.SOON, 0):
        monkeypatch.setattr(cuda_graph, "SOON", soon)
        monkeypatch.setattr(cuda_graph, "AGAIN", cuda_graph.AGAIN if soon else 10**6)
        del tapes[:]
        cache = new_cache(model, config, verify=False, max_length=600)
        graph = cache.decode_graph
        real, variants = graph.begin, []

        def begin(*args, real=real, graph=graph, variants=variants):
            ready = real(*args)
            variants.append(graph.variant)
            ids_seen.add(graph.graph_id)
            return ready

        graph.begin = begin
        text = compiled(model, cache, ids, backend="aot_eager", new=110)
        found[soon] = text, cache, graph.counts, variants
    (text, cache, counts, variants), (same, other, plain, _) = found.values()
    assert len(set(variants)) == 2 and len(ids_seen) == 2  # one graph id a cache
    assert counts["step, captured ahead"] >= 1 and counts["step, captured"] == 1
    assert counts["step, not captured"] == 1 < plain["step, not captured"] == 2 == plain["step, captured"]
    assert torch.equal(text, same) and compressed_tokens(cache) > 200
    ours, theirs = cache.state_dict()[0], other.state_dict()[0]
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
