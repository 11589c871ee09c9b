"""The spread of step times, and what is told of slow steps."""

import gc
from types import SimpleNamespace

import pytest
import torch

from fade_fast.measure.steps import FIRST, SKIPPED, SLOW, Slow, Spread, Watch


def test_the_spread_leaves_out_the_first_steps():
    steps = [50.0] * SKIPPED + [1.0] * 199 + [3.0]
    found = Spread.of(steps)
    assert found.mean == pytest.approx(202 / 200) and found.worst == 3.0
    assert found.p99 == 1.0  # the 198th of 200
    assert found.first_ms == [x * 1e3 for x in steps[:FIRST]]
    assert Spread.of([*steps, 4.0, 5.0]).p99 == 3.0  # the 200th of 202
    assert Spread.of([9.0, 2.0, 4.0]).worst == 4 / 3  # few steps: the second half, [2, 4]


def test_what_happened_at_slow_steps():
    graph = SimpleNamespace(counts={"demotion": 4}, eager_steps=3)
    watch = Watch(SimpleNamespace(decode_graph=graph))
    double = torch.compile(lambda x: 2 * x, backend="eager")
    with watch.watching():
        watch.read()
        graph.counts, graph.eager_steps = {"demotion": 5}, 0  # another text counts its steps anew
        watch.read()
        double(torch.ones(2))
        gc.collect()
        watch.read()
    double(torch.ones(3, dtype=torch.float64))  # after the watch
    watch.read()
    steps = [3.0, SLOW, 1.0, 1.0, 1.0, 1.0]  # more steps than readings: the last ones were not watched
    first, second = watch.slow(steps)
    assert (first.step, first.ms) == (1, 3e3) and first.what["demotion"] == 1
    assert second.step == 2 and second.times == 2.0 and second.host_ms > 0
    assert second.what["compilation"] == 1 and second.what["compilation, ms"] > 0
    assert second.what["garbage collection 2, ms"] > 0 and "demotion" not in second.what
    assert "demotion" in first.text() and "nothing counted" in Slow(1, 2.0, 2.0).text()
    assert watch.readings[-1][1] == watch.readings[-2][1]
