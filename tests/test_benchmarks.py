"""The benchmarks: they run without a GPU, and their arithmetic is right."""

import gc
import json
import weakref
from dataclasses import fields, replace

import pytest
import torch
from transformers import DynamicCache

from benchmarks import int8, products
from fade_fast.measure import decode_attention, generate, models
from fade_fast.measure.generate import Case, Result, Target
from fade_fast.measure.parsers.generate import FILLS


@pytest.fixture(scope="module")
def model():
    return models.build(models.TINY, "cpu")


def result(case="c", method="safe", **values) -> Result:
    return replace(Result(case, method, 8, 1024, 128, "once"), **values)


def test_the_script_runs_without_a_gpu(tmp_path, capsys):
    file, methods = tmp_path / "out.json", ("dynamic", "static", "fp16", "safe")
    options = ["--device", "cpu", "--methods", ",".join(methods), "--new", "6", "--json", str(file)]
    assert generate.main([*options, "--only", "B 2"]) == 0
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


@pytest.mark.slow
def test_products_are_measured_without_a_gpu(tmp_path, capsys, monkeypatch):
    """Tiles that do not work are shown as that, beside those that do."""
    real, file = products.compiled, tmp_path / "out.json"

    def refuses(shape, rows, tiles, inputs):
        if tiles and tiles.get("XBLOCK") == 64:
            raise RuntimeError("out of shared memory")
        return real(shape, rows, tiles, inputs)

    monkeypatch.setattr(products, "compiled", refuses)
    monkeypatch.setattr(products, "TILES", [(8, 256, 2, 3), (64, 64, 2, 3)])
    assert products.main(["--rows", "1", "8", "--sweep", "--json", str(file)]) == 0
    stored = json.loads(file.read_text())
    ways = [(r["rows"], r["how"], r["failed"] is not None) for r in stored["results"]]
    assert ways[:3] == [(1, "library", False), (1, "generated", False), (8, "library", False)]
    assert ways[3:] == [(8, "generated", False)] * 2 + [(8, "generated", True)]
    assert all(r["error"] < 4e-3 and r["us"] > 0 for r in stored["results"] if not r["failed"])
    assert "out of shared memory" in capsys.readouterr().out
    monkeypatch.setattr(products, "compiled", lambda *args: 1 / 0)
    assert products.main(["--rows", "2"]) == 1


def test_eight_bits_by_flex_attention(tmp_path, capsys):
    """The normalizer comes from two digits, and both offsets of codes are undone."""
    file = tmp_path / "out.json"
    assert int8.main(["--tiles", "2", "--json", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert len(results) == 2 and all(r["failed"] is None and 0 < r["error"] < 1e-4 for r in results)
    assert capsys.readouterr().out.count("| 64 |") == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dynamic", "fp16", "safe"])
def test_drafts_are_checked_step_by_step(model, method, request):
    """Each step is stamped once; of a draft hardly a token is right."""
    widths = []
    watch = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[1])
    )
    request.addfinalizer(watch.remove)
    case = generate.Case(models.TINY, 1, 192, mode="drafted")
    cache = generate.make_cache(model, method, None, 256)
    ids = torch.randint(model.config.vocab_size, (1, 192), generator=torch.Generator().manual_seed(1))
    widths.clear()
    clock = generate.run(model, cache, ids, 12, "once", case.mode)
    prompt, *steps = widths[-len(clock.stamps) + 1 :]
    assert prompt == 191 + 1 + generate.DRAFT and len(steps) > 6
    assert set(steps) == {generate.DRAFT + 1}
    generate.free(model, method)


@pytest.mark.slow
@pytest.mark.parametrize("mode, held", [("padded", 2 * 203 - 48), ("sampled", 2 * 203), ("beams", 8 * 203)])
def test_other_ways_to_decode(model, mode, held):
    """Of two rows the second has 48 tokens of padding; beams are rows of the cache."""
    case = generate.Case(models.TINY, 2, 192, mode=mode)
    for method in ("dynamic", "safe"):
        found = generate.attempt(model, case, method, 12)
        assert not found.failed and found.case == f"tiny B 2 x S 192 {mode}"
        assert (found.reorder_ms is not None) == (mode == "beams")
        if method == "safe":
            assert found.live == held and found.tokens["INT4"] > 0
    again = generate.attempt(model, case, "safe", 12, "random")
    if mode == "beams":  # rows that are filled anyhow are equal when a search has moved them once
        assert not again.failed and again.live == held and again.reorder_ms > 0
    else:
        assert "'random'" in again.failed


def test_every_way_to_fill_leaves_the_same_cache(model, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 13)
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    keys = {}
    for fill in FILLS:
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


@pytest.mark.slow
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


# -- decode attention


def test_decode_attention_runs_without_a_gpu(tmp_path, capsys):
    """All kinds of case, by names that take part of the list; every quantity is measured."""
    file = tmp_path / "out.json"
    for only, count in (("INT3", 1), ("q 4", 1), ("of 400", 2)):
        assert decode_attention.main(["--device", "cpu", "--only", only, "--json", str(file)]) == 0
        stored = json.loads(file.read_text())
        assert set(stored) == {"device", "torch", "bandwidth", "results"} and stored["bandwidth"] > 0
        assert len(stored["results"]) == count
        for r in stored["results"]:
            assert set(r) == {f.name for f in fields(decode_attention.Result)}
            assert r["error"] < 5e-3 and r["us"] > 0 and r["sdpa_us"] > 0 and r["compile_s"] > 0
            assert (r["tier_error"] or 0) < 1e-5 and (r["mass_error"] or 0) < 1e-5
            assert (r["tier_us"] is None) == ("of 400" in r["name"])
            assert (r["scores_percent"] is None) == ("then INT2" not in r["name"])
        shown = capsys.readouterr().out
        assert all(f"| {r['name']} |" in shown for r in stored["results"])


def test_other_measurements_run_without_a_gpu(tmp_path, capsys):
    file = tmp_path / "out.json"
    options = ["--device", "cpu", "--lengths", "--encode", "--json", str(file)]
    assert decode_attention.main(options) == 0
    stored = json.loads(file.read_text())
    assert set(stored) == {"device", "torch", "bandwidth", "lengths", "encode"}
    lengths, encode = stored["lengths"], stored["encode"]
    assert lengths["capacity"] > max(lengths["lengths"]) and lengths["graphs"] == 0
    assert len(lengths["us"]) == len(lengths["lengths"]) and min(lengths["us"]) > 0
    assert encode["share"] == pytest.approx(
        encode["encode_ms"] / (encode["attention_ms"] + encode["linear_ms"])
    )
    shown = capsys.readouterr().out
    assert "graphs" in shown and "of 400" not in shown


def test_pages_are_measured_without_a_gpu(tmp_path, capsys):
    """Both sizes of a page, against float64, and with a table that is not the identity."""
    file = tmp_path / "out.json"
    options = ["--device", "cpu", "--paged", "--only", "B 1 x S 32", "--json", str(file)]
    assert decode_attention.main(options) == 0
    stored = json.loads(file.read_text())
    assert set(stored) == {"device", "torch", "bandwidth", "paged"}
    rows = stored["paged"]["rows"]
    assert [r["page"] for r in rows] == [16, 64]
    for r in rows:
        assert r["error"] < 4e-3 and r["tier_error"] < 1e-5 and r["target"] == 1.15
        assert r["step_ratio"] == pytest.approx(r["paged_step_us"] / r["step_us"])
        assert r["tier_ratio"] == pytest.approx(r["paged_tier_us"] / r["tier_us"])
    assert capsys.readouterr().out.count(f"| {rows[0]['case']} | 16 |") == 2
    assert {case.bits for case in decode_attention.PAGED} == {8, 4, 3, 2}


def test_a_table_that_is_not_read_is_noticed():
    """By pages in order, and by an output that does not change with the table."""
    case = decode_attention.Case("tiny", 4, 2, 512, heads=2, head_dim=64)
    problem = decode_attention.Problem(case, "cpu")
    problem.draw = lambda n: torch.arange(float(n))
    problem.move(16)
    with pytest.raises(AssertionError, match="in the order"):
        decode_attention.check_pages(problem)
    problem.draw = lambda n: -torch.arange(float(n))
    problem.move(16)
    decode_attention.check_pages(problem)
    found = problem.attend()
    problem.attend = lambda mass=None: found
    with pytest.raises(AssertionError, match="another table"):
        decode_attention.check_pages(problem)


@pytest.mark.slow
def test_compiling_twice_runs_without_a_gpu(capsys):
    """The same case and nothing else, in two processes."""
    assert decode_attention.main(["--device", "cpu", "--processes"]) == 0
    assert capsys.readouterr().out.count("process ") == 2
    assert sum(decode_attention.CASES[3].name in case.name for case in decode_attention.CASES) == 1


def test_a_decode_step(benchmark):
    """A small step under pytest-benchmark: INT4, two rows, eager on the CPU."""
    case = decode_attention.Case("tiny", 4, 2, 512, heads=2, head_dim=64)
    problem = decode_attention.Problem(case, "cpu")
    output = benchmark(problem.attend)
    assert output.shape == (2, 1, 8, 64) and problem.errors(True, True)[0] < 5e-3


@pytest.mark.slow
def test_one_graph_of_a_tier_serves_every_length(traced_kernels):
    """What CUDA compiles of a tier alone, traced by the same code without code generation."""
    problem = decode_attention.Problem(decode_attention.Case("tiny", 4, 1, 132 + 1000, head_dim=64), "cpu")
    compiled = decode_attention.compiled_tier
    compiled.graphs.clear()
    for length in (900, 700):
        problem.live(length)
        exact = problem.errors(True, False)[1]
        problem.device = "cuda"
        assert exact < 1e-6 < problem.errors(True, False)[1] < 0.02  # a CPU rounds sums of float16 products
        problem.device = "cpu"
    assert len(compiled.graphs) == 1
    compiled.graphs.clear()


def test_a_wrong_step_is_seen():
    """The check before the clock: of the step, its tier and its probabilities, by what each depends on."""
    case = decode_attention.Case("tiny", 4, 2, 512, heads=2, head_dim=64)
    problem = decode_attention.Problem(case, "cpu")
    right = problem.errors(True, True)
    exact = problem.decoded
    problem.decoded = lambda i, row: tuple(1.05 * x for x in exact(i, row))
    assert all(a < 1e-2 < b for a, b in zip(right, problem.errors(True, True)))


def test_bytes_of_a_step():
    """Two vectors a token and head, a mean a block, and the uncompressed tokens in bfloat16."""
    case = decode_attention.Case("tiny", 4, 2, 132 + 130, heads=3)
    assert case.tiers == [(4, 130)]
    assert case.tier_bytes == 2 * 3 * (130 * 2 * (64 + 4) + 3 * 256)
    assert case.bytes == case.tier_bytes + 2 * 3 * 132 * 2 * 256
    two = replace(case, length=132 + 500, budget=400)
    assert two.tiers == [(4, 400), (2, 100)]
    assert two.tier_bytes == 2 * 3 * (400 * 136 + 100 * 2 * (32 + 2) + 2 * 256)
    assert replace(two, evicts=True).tiers == [(4, 400)]
    problem = decode_attention.Problem(replace(case, head_dim=64), "cpu")
    keys = problem.tiers[0].keys
    assert sum(x[:, :, :130].nbytes for x in keys) == 2 * 3 * 130 * (32 + 4)


def test_comparisons_of_a_case():
    case = decode_attention.Case("tiny", 4, 1, 4096)
    found = decode_attention.Result(case.name, 2.5, case.bytes, 0.0, us=20.0, tier_us=10.0, sdpa_us=40.0)
    found.scores_us = 21.0
    found.compare(case, case.bytes / 10e-6)  # a copy of the bytes would take 10 us
    assert (found.speedup, found.tier_speedup) == (2.0, 4.0)
    assert found.floor_us == pytest.approx(10.0) and found.fraction_of_floor == pytest.approx(0.5)
    assert found.tier_fraction == pytest.approx(case.tier_bytes / case.bytes)
    assert found.scores_percent == pytest.approx(5.0)
    assert " 2.00 | 4.00 | 2.50 |" in decode_attention.table([found])


def test_the_line_through_times_by_length():
    found = decode_attention.line([1024, 2048, 4096], [7.0, 9.0, 13.0])
    assert found["us_per_k"] == pytest.approx(2.0) and found["intercept_us"] == pytest.approx(5.0)
    assert found["farthest"] == pytest.approx(0.0, abs=1e-12)
    assert decode_attention.line([1024, 2048, 4096], [7.0, 9.0, 14.0])["farthest"] > 0.01


def test_the_cases_cover_the_targets():
    """Those of the table that decode attention is to reach."""
    targets = {
        (c.bits, c.model, c.batch, c.length // 1024): c.target for c in decode_attention.CASES if c.target
    }
    llama, qwen, llama2 = decode_attention.LLAMA, decode_attention.QWEN, decode_attention.LLAMA2
    assert targets == {
        (4, llama, 8, 32): 2.5, (4, llama, 1, 128): 2.5, (4, llama, 1, 32): 2.0, (4, llama, 1, 8): 1.0,
        (4, qwen, 8, 16): 2.0, (4, llama2, 8, 16): 2.5, (2, llama, 8, 32): 3.0, (8, llama, 8, 32): 1.85,
        (3, llama, 8, 32): 2.2,
    }  # fmt: skip
    assert len({case.name for case in decode_attention.CASES}) == len(decode_attention.CASES)
