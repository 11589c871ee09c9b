"""measure.paged_attention: the plugin's layers over pages, without vLLM and without a GPU."""

import json
from dataclasses import fields, replace

import pytest
import torch

from fade_fast.measure import paged_attention
from fade_fast.measure.paged_attention import (
    CASES,
    SMALL,
    Case,
    Pool,
    Result,
    Shape,
    error_of,
    graph_of,
    make_layer,
    measure,
)
from fade_fast.vllm.batches import uniform

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.slow
def test_everything_is_measured(tmp_path, capsys):
    file = tmp_path / "out.json"
    options = ["--quick", "--device", "cpu", "--only", "1 x", "--json", str(file)]
    assert paged_attention.main(options) == 0
    stored = json.loads(file.read_text())
    assert stored["failed"] == {} and stored["quick"]
    assert [r["name"] for r in stored["results"]] == [
        "1 x 600, INT4 rotated", "1 x 600, INT8 rotated", "1 x 600, INT4 matched"
    ]  # fmt: skip
    for r in stored["results"]:
        assert set(r) == {f.name for f in fields(Result)}
        assert 0 < r["error"] < 5e-3 and min(r["us"], r["eager_us"], r["forward_us"], r["dense_us"]) > 0
        assert r["speedup"] == pytest.approx(min(r["kernels"].values()) / r["us"])
        assert r["tokens"] == 600 and r["dense_bytes"] == 600 * 2 * 4 * 64
    assert [(x["bits"], x["codec"]) for x in stored["storing"]] == paged_attention.STORED
    assert len(stored["prefill"]["rows"]) == 4 and stored["prefill"]["dense_ms"] > 0
    shown = capsys.readouterr().out
    assert all(f"| {r['name']} |" in shown for r in stored["results"]) and "INT8 matched" in shown


def test_a_failing_case_does_not_stop_the_others(tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    monkeypatch.setattr(paged_attention, "_moved", lambda *args: 0.0)
    options = ["--quick", "--device", "cpu", "--skip-encode", "--only", "INT8", "--json", str(file)]
    assert paged_attention.main(options) == 1
    stored = json.loads(file.read_text())
    assert not stored["results"] and all("other pages" in why for why in stored["failed"].values())


def test_capacity_of_the_shape_of_the_targets():
    """As docs/vllm.md states it: head_dim 128 and pages of 128 tokens."""
    ratios = [x["ratios"][128] for x in paged_attention.capacity(Shape(), (128,))]
    assert [round(x, 2) for x in ratios] == [1.88, 3.53, 1.9, 3.63]


def test_ragged_requests_hold_as_many_tokens():
    for case in CASES:
        lengths = case.lengths()
        assert sum(lengths) == case.requests * case.length and len(lengths) == case.requests
        assert (len(set(lengths)) > 9) == case.ragged and max(lengths) <= Shape().most


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(3, 600, 4), Case(5, 300, 8, "matched", ragged=True)])
def test_the_kernels_of_a_gpu(case, uncompiled_kernels):
    """Shapes and precision as on CUDA, uncompiled. A CPU sums products in float16."""
    result = measure(case, replace(SMALL, page=64), "cpu")
    assert 0 < result.error < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("bits, codec", [(4, "rotated"), (8, "rotated"), (4, "matched")])
def test_a_captured_step_serves_other_lengths(bits, codec, device):
    """Lengths, slots, queries and tokens of a second step are written into the tensors of the first."""
    shape = replace(SMALL, page=64)
    layer = make_layer(shape, bits, codec, torch.device(device))
    pool = Pool(shape, layer, [600, 90, 300], device)
    pool.fill()
    fresh, held = pool.cache.clone(), [x for x in pool.decode() if isinstance(x, torch.Tensor)]
    output, longest = held.pop(), torch.tensor(pool.lengths, dtype=torch.int32, device=device)

    def step():
        made = uniform(longest, pool.table, shape.most, rounded=device == "cuda")
        layer.forward(pool.cache, *held, made, output)

    step()
    replay = graph_of(step) if device == "cuda" else step
    for lengths in ([600, 90, 300], [131, 3, 65]):
        pool.lengths = lengths
        pool.cache.copy_(fresh)
        query, keys, values, slots, *_ = pool.decode()
        exact = pool.exact(query, keys, values)
        for x, new in zip((*held, longest), (query, keys, values, slots, torch.tensor(lengths))):
            x.copy_(new)
        replay()
        assert error_of(output, exact) < 1e-2


def test_wrong_outputs_are_seen():
    pool = Pool(SMALL, make_layer(SMALL, 4, "rotated", torch.device("cpu")), [300, 90], "cpu")
    pool.fill()
    query, keys, values, slots, step, output = pool.decode()
    exact = pool.exact(query, keys, values)
    pool.layer.forward(pool.cache, query, keys, values, slots, step, output)
    assert error_of(output, exact) < 5e-3 < 2e-2 < error_of(1.1 * output, exact)
    pool.table[1, 0] = pool.table[0, 0]
    assert error_of(output, pool.exact(query, keys, values)) > 0.1
