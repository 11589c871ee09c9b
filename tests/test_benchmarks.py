"""The decode-step benchmark: it runs without a GPU, and its arithmetic is right."""

import gc
import json
import weakref
from dataclasses import fields, replace

import pytest
import torch
from transformers import DynamicCache

from benchmarks import generate, models
from benchmarks.generate import Case, Result, Target


@pytest.fixture(scope="module")
def model():
    return models.build(models.TINY, "cpu")


def result(case="c", method="safe", **values) -> Result:
    return replace(Result(case, method, 8, 1024, 128, "once"), **values)


def test_the_script_runs_without_a_gpu(tmp_path, capsys):
    file, methods = tmp_path / "out.json", ("dynamic", "static", "fp16", "safe")
    options = ["--device", "cpu", "--methods", ",".join(methods), "--new", "6", "--json", str(file)]
    assert generate.main(options) == 0
    stored = json.loads(file.read_text())
    assert set(stored) == {"device", "torch", "transformers", "bandwidth", "results", "targets"}
    assert stored["device"] == "cpu" and stored["bandwidth"] is None and stored["targets"] == []
    results = {r["method"]: r for r in stored["results"]}
    assert tuple(results) == methods
    case = generate.TINY_CASES[0]
    for r in results.values():
        assert set(r) == {f.name for f in fields(Result)}
        assert not r["failed"] and r["new"] == 6 and r["case"] == case.name
        assert 0 < r["ms"] <= r["worst_ms"] and 0 < r["first_token_s"] and r["compile_s"] >= 0
        assert r["tokens_per_s"] == pytest.approx(case.batch / r["ms"] * 1e3)
        assert r["live"] == case.batch * (case.length + 6 - 1)  # the last token is never fed
        assert r["packed_bytes"] <= r["cache_bytes"] and r["prefill_gb"] is None is r["floor_ms"]
    assert results["safe"]["tokens"]["INT4"] >= 64 * case.batch
    assert results["safe"]["packed_bytes"] < results["dynamic"]["packed_bytes"]
    assert results["fp16"]["tokens"] == results["dynamic"]["tokens"]
    shown = capsys.readouterr().out
    assert all(f"| {case.name} | {method} |" in shown for method in methods)
    assert generate.main(["--show", str(file), str(file)]) == 0
    assert capsys.readouterr().out.count("| safe |") == 1


def test_every_way_to_fill_leaves_the_same_cache(model, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 13)
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    keys = {}
    for fill in generate.FILLS:
        cache = DynamicCache(config=model.config)
        clock = generate.run(model, cache, ids, 2, fill)
        assert len(clock.seconds()) == 2 and cache.get_seq_length() == 41
        keys[fill] = cache.layers[1].keys[:, :, :40].float()
    for fill in ("rows", "chunk"):
        torch.testing.assert_close(keys[fill], keys["once"], rtol=0.05, atol=0.05)
    assert (keys["random"] - keys["once"]).norm() > keys["once"].norm()
    assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)


def test_a_failure_is_a_result_and_leaves_nothing(model, monkeypatch):
    held = []

    def weigh(cache, batch):
        held.append(weakref.ref(cache))
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(generate, "weigh", weigh)
    failed = generate.attempt(model, generate.TINY_CASES[0], "safe", 4, fill="random")
    gc.collect()
    assert failed.failed == "out of memory" and failed.ms is None and held[0]() is None
    assert model.config._attn_implementation == "sdpa" and "_compiled_call" not in vars(model)
    assert failed.failed in generate.table([failed])


def test_the_largest_batch_of_a_tiny_model(model):
    """Without a GPU the room is that of four rows."""
    best = generate.largest_batch(model, generate.TINY_CASES[0], "safe")
    assert best.batch == 4 and best.case == generate.largest_case(models.TINY, 192)
    assert best.tokens["INT4"] >= 4 * 64


@pytest.mark.parametrize("limit", [0, 1, 2, 13, 50, 51])
def test_the_search_for_the_largest_batch(limit):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = generate.largest(fits, 51)
    assert found <= limit <= found + max(1, found // 16) - 1
    assert len(tried) == len(set(tried)) < 12 and all(0 < x <= 51 for x in tried)


def test_steps_after_the_warm_up():
    steps = [3.0] + [1.0] * 39 + [2.0] * 50 + [4.0]
    settled, extra = generate.steady(steps)
    assert settled == [2.0] * 50 + [4.0] and extra == 1.0
    assert generate.steady([5.0, 1.0, 1.0]) == ([1.0, 1.0], 4.0)


def test_ratios_and_targets():
    results = [
        result(ms=10.0, prefill_gb=22.0, over_floor=1.5, batch=42),
        result(method="dynamic", ms=60.0, prefill_gb=20.0, batch=14),
        result(method="static", ms=40.0, failed="out of memory"),
        result("short", "static", ms=8.0),
    ]
    faster = Target("c", "safe", "ms", ("dynamic", "static"), 4.0)
    assert generate.measured(faster, results) == 6.0
    results[2].failed = None  # the better of the two counts
    assert generate.measured(faster, results) == 4.0 and generate.met(faster, 4.0)
    assert not generate.met(faster, 3.9)
    assert generate.measured(replace(faster, against=("static",), at="short"), results) == 0.8
    peak = Target("c", "safe", "prefill_gb", ("dynamic",), 1.1)
    assert generate.measured(peak, results) == pytest.approx(1.1)
    assert generate.met(peak, 1.09) and not generate.met(peak, 1.11)
    assert generate.measured(replace(peak, quantity="over_floor", against=()), results) == 1.5
    batch = replace(peak, quantity="batch", bound=3.0)
    assert generate.measured(batch, results) == 3.0 and generate.met(batch, 3.0)
    for missing in (replace(faster, case="x"), replace(faster, against=("fp16",))):
        assert generate.measured(missing, results) is None


def test_targets_are_of_cases_that_run():
    ran = {(case.name, method) for case in generate.CASES for method in case.methods}
    ran |= {(generate.largest_case(models.LLAMA, 32 * 1024), m) for m in ("dynamic", "safe")}
    for target in generate.TARGETS:
        wanted = {(target.case, target.method)} | {(target.at or target.case, m) for m in target.against}
        assert wanted <= ran, target
    assert {m for case in generate.CASES for m in case.methods} <= set(generate.METHODS)


@pytest.mark.parametrize(
    "name, parameters, untied",
    [(models.LLAMA, 8.03e9, True), (models.QWEN, 7.62e9, True), (models.GEMMA, 3.88e9, False)],
)
def test_models_have_the_size_of_their_namesakes(name, parameters, untied):
    model = models.build(name, "meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)
    read = sum(p.nbytes for p in model.parameters()) - models.step_weights(model)
    assert read == (model.get_input_embeddings().weight.nbytes if untied else 0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    buffers = [b for n, b in model.named_buffers() if n.endswith("inv_freq")]
    assert buffers and all(b.dtype == torch.float32 for b in buffers)
    assert model.config.max_position_embeddings >= 140_000


def test_long_prompts_are_prefilled_so_that_they_fit():
    choose = generate.choose_fill
    assert choose(Case(models.LLAMA, 8, 32 * 1024), "safe") == "rows"
    assert choose(Case(models.LLAMA, 1, 128 * 1024), "safe") == "once"
    assert choose(Case(models.LLAMA, 1, 32 * 1024), "static") == "chunk"
