"""Functions whose calls are replayed. Where there is no GPU, a graph is played by Python."""

import pytest
import torch

from fade_fast.compile import replay
from fade_fast.compile.replay import Replayed, rehearsal


class Graph:
    """Recording computes nothing that stays; a replay writes the outputs that the recording gave."""

    def __init__(self, call):
        self.call, self.replays = call, 0
        self.output = [torch.full_like(x, torch.nan) for x in call()]

    def replay(self):
        self.replays += 1
        for own, x in zip(self.output, self.call()):
            own.copy_(x)


@pytest.fixture
def graphs(monkeypatch):
    made = []

    def record(call):
        made.append(Graph(call))
        return made[-1], made[-1].output

    monkeypatch.setattr(replay, "REPLAYS_ON", {"cpu"})
    monkeypatch.setattr(replay, "record", record)
    return made


def scaled(x, y, table=None, *, times):
    return [x * times + y, x - y if table is None else x @ table]


@pytest.mark.parametrize("with_table", (False, True))
def test_replays_compute_each_call_anew(graphs, with_table):
    """Results are those of the function, and no call overwrites the results of an earlier one."""
    subject, draw, results = Replayed(scaled, most=100), torch.Generator().manual_seed(0), []
    for i in range(12):
        n, times = 2 + i % 2, 3 + i // 8
        x, y = (torch.randn(n, 4, generator=draw) for _ in range(2))
        table = torch.randn(4, 4, generator=draw) if with_table else None
        results.append((subject(x, y, table, times=times), scaled(x, y, table, times=times)))
    for found, expected in results:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(graphs) == 4 and sum(x.replays for x in graphs) == 8  # two sizes, two constants


def test_what_is_not_replayed(graphs, monkeypatch):
    """A large call, a call of another device, and one that cannot be recorded."""
    subject = Replayed(scaled, most=8)
    large = torch.ones(3, 4)
    for _ in range(3):
        subject(large, large, times=2)
    assert not graphs and not subject.known

    def refuse(call):
        raise RuntimeError("memory is short")

    monkeypatch.setattr(replay, "record", refuse)
    small = torch.ones(2, 4)
    for _ in range(3):
        assert torch.equal(subject(small, small, times=2)[0], 3 * small)
    assert [x.refused for x in subject.known.values()] == [True]


def test_few_graphs_are_kept(graphs):
    subject = Replayed(scaled, most=1000)
    for n in (*range(2, 9), *range(2, 9)):
        x = torch.ones(n, 4)
        assert torch.equal(subject(x, x, times=1)[0], 2 * x)
    assert len(subject.known) == replay.MOST_GRAPHS


def test_a_rehearsal_calls_the_function(graphs):
    """A replay would not compile what a recording needs, after `torch.compiler.reset()`."""
    called = []

    def function(x):
        called.append(len(x))
        return [2 * x]

    subject, x = Replayed(function, most=100), torch.ones(2, 4)
    for _ in range(4):
        subject(x)
    made, before = len(graphs), len(called)
    replays = graphs[0].replays
    with rehearsal():
        assert torch.equal(subject(x)[0], 2 * x)
    assert len(called) == before + 1 and (len(graphs), graphs[0].replays) == (made, replays)
    subject(x)
    assert graphs[0].replays == replays + 1


def test_first_call_and_recording_have_the_same_strides(graphs):
    """Parts of larger tensors, as vLLM gives them: a recording must not compile for strides of its own."""
    seen = []

    def function(x, y):
        seen.append((x.stride(), y.stride()))
        return [x + y]

    subject, draw = Replayed(function, most=100), torch.Generator().manual_seed(0)
    for _ in range(4):
        whole = torch.randn(5, 3, 8, generator=draw)
        x, y = whole[..., 2:6], whole.mT[:, 1:5].mT
        assert not x.is_contiguous() and torch.equal(subject(x, y)[0], x + y)
    assert len(graphs) == 1 and graphs[0].replays == 3 and len(set(seen)) == 1
