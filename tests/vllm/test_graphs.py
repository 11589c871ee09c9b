"""Decode steps that are replayed as graphs. Where there is no GPU, a graph is played by Python."""

import pytest
import torch

from fade_fast.vllm import batches, graphs
from fade_fast.vllm.graphs import Graphs

from . import paged
from .paged import HEADS, Engine, matrices
from .test_layer import MEANS, check


class Graph:
    """Recording computes nothing: what the call would overwrite stays as it was."""

    def __init__(self, call):
        self.call, self.replays = call, 0

    def replay(self):
        self.replays += 1
        self.call()


@pytest.fixture
def recorded(monkeypatch):
    made = []

    def record(call, pool):
        made.append(Graph(call))
        return made[-1], None

    monkeypatch.setattr(graphs, "REPLAYS_ON", {"cpu"})
    monkeypatch.setattr(graphs, "record", record)
    return made


def live(engine, seed, steps):
    """Steps of random requests. Returns how many of them were decode steps."""
    draws, decodes = torch.Generator().manual_seed(seed), 0
    whole = [len(x) for x in engine.keys]
    check(engine, [n - 25 for n in whole], rounded=True)
    for _ in range(steps):
        left = torch.tensor([n - d for n, d in zip(whole, engine.done)])
        counts = torch.bernoulli(torch.full((len(whole),), 0.8), generator=draws).long()
        if torch.rand(1, generator=draws) < 0.2:
            counts[torch.randint(len(whole), (1,), generator=draws)] = 4
        counts = torch.minimum(counts, left).tolist()
        if not any(counts):
            break
        decodes += max(counts) == 1
        check(engine, counts, rounded=True, pads=int(torch.randint(3, (1,), generator=draws)))
    return decodes


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 2)])
@pytest.mark.parametrize("options", [dict(), dict(window=20, softcap=5.0), dict(matrices=matrices())])
@pytest.mark.parametrize("seed", range(2))
def test_replayed_steps(bits, options, seed, recorded):
    """Decode steps among others, with requests that wait, and padding: attention in float64."""
    held = Graphs(8, HEADS)
    engine = Engine(bits, [60, 31, 90, 150, 27, 300], means=MEANS, graphs=held, seed=seed, **options)
    decodes = live(engine, seed, 30)
    replays = sum(x.replays for x in recorded)
    assert decodes >= 12 and len(recorded) >= 6 and replays >= 2 * decodes


def test_layers_share_what_a_step_computes_once(recorded, monkeypatch):
    """Two layers of a kind and one with a window: places are found once a step for each kind."""
    made = []
    for options in (dict(), dict(), dict(window=40)):
        made.append(Engine((4, 4), [100, 64], means=MEANS, seed=len(made), **options))
    for engine in made:
        engine.step([90, 50], rounded=True)
    held = Graphs(2, HEADS)
    for engine in made:
        engine.graphs = held
    hold, found = held.hold, {}
    # In vLLM a step is held once for all of its layers.
    monkeypatch.setattr(
        held, "hold", lambda step, slots: found.setdefault(made[0].done[0], None) or hold(step, slots)
    )
    for _ in range(5):
        for engine in made:
            check(engine, [1, 1], rounded=True)
    (tokens,), (rows,) = held.tokens.values(), held.rows.values()
    assert len(tokens.calls) == len(rows.calls) == 3 and len(tokens.fills) == len(rows.fills) == 2
    assert all(x.graph is not None for x in (*tokens.calls.values(), *rows.calls.values()))


def test_what_is_not_replayed(recorded, monkeypatch):
    """Steps with prefill, too many requests, layers that are not compressed, and what cannot be captured."""
    held = Graphs(2, HEADS)
    engine = Engine((4, 4), [60, 31, 90], means=MEANS, graphs=held)
    check(engine, [50, 20, 80], rounded=True)
    check(engine, [1, 2, 0], rounded=True)
    check(engine, [1, 1, 1], rounded=True)
    assert not held.tokens and not recorded
    engine = Engine(None, [60, 31], graphs=held)
    check(engine, [50, 20], rounded=True)
    check(engine, [1, 1], rounded=True)
    assert held.tokens and not held.vectors

    def refuse(call, pool):
        raise RuntimeError("memory is short")

    monkeypatch.setattr(graphs, "record", refuse)
    engine = Engine((4, 4), [60, 31], means=MEANS, graphs=held)
    check(engine, [50, 20], rounded=True)
    for _ in range(3):
        check(engine, [1, 1], rounded=True)
    calls = [x for place in (*held.tokens.values(), *held.rows.values()) for x in place.calls.values()]
    assert len(calls) == 2 and all(x.refused for x in calls)


def test_graphs_of_few_kinds_of_batches_are_kept(recorded, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_BATCHES", 2)
    held = Graphs(8, HEADS)
    engine = Engine((4, 4), [60] * 8, means=MEANS, graphs=held)
    check(engine, [30] * 8, rounded=True)
    for rows in (1, 2, 4, 8, 1, 2, 4, 8):
        check(engine, [1] * rows + [0] * (8 - rows), rounded=True)
    assert len(held.rows) == 2


def test_equal_batches_of_a_step_have_places_of_their_own(recorded):
    """A step may have several batches of as many rows and of as long contexts."""
    held = Graphs(4, HEADS)
    engine = Engine((4, 4), [60] * 4, means=MEANS, graphs=held)
    check(engine, [50] * 4, rounded=True)
    split = batches.split

    def halves(*args, **options):
        step = split(*args, **options)
        (batch,) = step.short
        cut = lambda of: batches.Batch(  # noqa: E731
            batch.tokens[of], batch.at[of], batch.table[of], batch.reach[of], None, batch.targets[of],
            batch.before[of],
        )  # fmt: skip
        step.short = [cut(slice(0, 2)), cut(slice(2, 4))]
        return step

    for _ in range(4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paged, "split", halves)
            check(engine, [1] * 4, rounded=True)
    assert len(held.rows) == 2
