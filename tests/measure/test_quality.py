"""measure.quality: its arithmetic, what it refuses, and that the cache is really between."""

import json
import math
from dataclasses import replace

import pytest
import torch

from fade_fast.kernels import rotated
from fade_fast.measure import memory, quality, texts
from fade_fast.measure.methods import Unavailable, at_equal_bytes, compressed_tokens, method, record_bytes
from fade_fast.measure.parsers import bench, free, needles, report, ruler
from fade_fast.measure.parsers import memory as memory_options
from fade_fast.measure.parsers import quality as quality_options
from fade_fast.measure.streams import NothingCompressed
from fade_ref.config import PRESETS, FadeConfig

from ..models import prompt, tiny_llama
from . import models

LENGTH, CHUNK = 384, 64


@pytest.fixture(scope="module")
def model():
    return tiny_llama(dtype=torch.float64)


@pytest.fixture(scope="module")
def ids():
    return prompt(LENGTH, batch=2)["input_ids"]


def run(model, ids, *names, **options):
    found = quality.run(
        model, [method(n) for n in ("dynamic", *names)], ids, CHUNK, 2, **dict(weigh=False) | options
    )
    return {r.method: r for r in found}, quality.summaries(found)


def test_compression_switched_off_changes_nothing(model, ids):
    results, rows = run(model, ids, "off")
    for name in ("dynamic", "off"):
        assert rows[name].ratio == pytest.approx(1, abs=1e-12) and rows[name].kl == pytest.approx(
            0, abs=1e-12
        )
        assert rows[name].top1 == 1 and results[name].read == results[name].evicted == 0


def test_scores_are_those_of_one_forward(model, ids):
    """Perplexity of the stream is that of the whole window at once; every token but the first counts."""
    results, rows = run(model, ids)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for row, mine in zip(range(2), results["dynamic"].nll):
        loss = torch.nn.functional.cross_entropy(logits[row, :-1].float(), ids[row, 1:])
        assert mine == pytest.approx(loss.item(), rel=1e-6)
    assert rows["dynamic"].perplexity == pytest.approx(math.exp(sum(results["dynamic"].nll) / 2))


def test_score_by_hand():
    generator = torch.Generator().manual_seed(0)
    ours, exact = torch.randn(2, 1, 3, 5, generator=generator, dtype=torch.float64)
    targets, score = torch.tensor([[4, 0]]), quality.Score(1, "cpu")
    score.add(ours, exact, targets)
    p, q = exact.float().softmax(-1)[0, :2], ours.float().softmax(-1)[0, :2]
    nll, kl, top1 = (x[0] for x in score.means())
    assert nll == pytest.approx(-(q[0, 4].log() + q[1, 0].log()).item() / 2, rel=1e-6)
    assert kl == pytest.approx((p * (p / q).log()).sum().item() / 2, rel=1e-5)
    assert top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()


@pytest.mark.slow
def test_fewer_bits_cost_more_and_damage_shows(model, ids, monkeypatch):
    _, rows = run(model, ids, "int8", "k4v4", "k4v2", "int2")
    kl = {name: s.kl for name, s in rows.items()}
    assert 0 < kl["int8"] < kl["k4v4"] < kl["k4v2"] < kl["int2"]
    encode = rotated.encode_both
    monkeypatch.setattr(rotated, "encode_both", lambda k, v, *rest: encode(k, v.flip(-1), *rest))
    assert run(model, ids, "k4v4")[1]["k4v4"].kl > 10 * kl["k4v4"]


@pytest.mark.slow
def test_compressed_tokens_read_are_counted(model, ids):
    """With 4 sinks and recent blocks of 64, chunk i finds 64 (i - 2) compressed tokens from i = 3 on."""
    streams = "streaming:recent_window=100"
    results, _ = run(model, ids, "int4", "balanced", streams)
    found = [max(0, 64 * (i - 2)) if i > 2 else 0 for i in range(LENGTH // CHUNK)]
    assert results["int4"].read == sum(found) / len(found) and results["int4"].evicted == 0
    assert results["balanced"].read > 0
    assert results[streams].read == 0 < results[streams].evicted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "balanced"])
def test_a_cache_that_compressed_nothing_is_an_error(model, ids, name):
    with pytest.raises(NothingCompressed, match=f"{name}: no query read"):
        run(model, ids[:, :120], name)


@pytest.mark.slow
def test_a_cache_that_evicted_nothing_is_an_error(model, ids):
    streams = "streaming:recent_window=300"
    with pytest.raises(NothingCompressed, match="no token was evicted"):
        run(model, ids[:, :300], streams)


@pytest.mark.slow
def test_windows_of_a_batch_are_independent(model, ids):
    names = ("int3", "h2o:int4_budget=40", "keydiff:int4_budget=40")
    together, _ = run(model, ids, *names)
    for row in range(2):
        alone, _ = run(model, ids[row : row + 1], *names)
        for name in names:
            assert together[name].nll[row] == pytest.approx(alone[name].nll[0], rel=1e-9)
            assert together[name].read > 0 and together[name].read == pytest.approx(alone[name].read)


def test_policies_get_equal_bytes():
    """At 8192 tokens of bfloat16: what is held is within 2 % of `position`, for all but what cannot fit."""
    model = tiny_llama(layers=1)
    bytes_of = lambda name: memory.filled_bytes(model, method(name), 8192)  # noqa: E731
    expected = bytes_of("position")
    assert bytes_of("dynamic") / expected > 10
    for name in ("streaming", "h2o", "ema", "adaptive", "snapkv", "tova", "knorm", "keydiff"):
        assert expected * 0.98 <= bytes_of(name) <= expected * 1.02, name
    position, h2o = (at_equal_bytes(model, policy, 8192, {}) for policy in ("position", "h2o"))
    assert h2o.int4_budget < position.int4_budget == 2048 - 4 - 64 - 64
    assert record_bytes(model, h2o)[1] > record_bytes(model, position)[1]
    with pytest.raises(Unavailable, match="leaves no room"):
        at_equal_bytes(model, "position", 512, {})


def test_what_names_mean(model):
    for name in PRESETS:
        cache, config = method(name)(model, 64), FadeConfig.preset(name)
        assert cache.fade_config == (config if cache.choice is None else cache.choice.apply(config))
    config = method("k8v3:recent_window=16:positions=contiguous")(model, 64).fade_config
    assert (config.middle_k_bits, config.middle_v_bits, config.recent_window) == (8, 3, 16)
    assert config.positions == "contiguous"
    for wrong in (
        "int5",
        "nothing",
        "int4:bits=3",
        "int4:recent_window",
        "dynamic:n_sink=2",
        "int4:n_sink=-1",
    ):
        with pytest.raises(ValueError):
            method(wrong)
    assert compressed_tokens(method("dynamic")(model, 64)) == 0


@pytest.mark.parametrize(
    "suite",
    [
        *quality_options.SUITES.values(),
        *(x.SUITE for x in (bench, free, memory_options, needles, report, ruler)),
    ],
    ids=lambda suite: suite[0],
)
def test_a_suite_has_every_configuration_once_and_presets_by_name(suite):
    """A preset and its widths are never two rows, and a preset is not named by its widths."""
    config = lambda c: c and replace(c, loss_bound=None)  # noqa: E731
    found = {name: config(method(name).config) or name for name in suite}
    assert len({str(x) for x in found.values()}) == len(suite)
    if suite is not quality_options.SWEEP:  # which looks for presets
        presets = {config(FadeConfig.preset(name)) for name in PRESETS}
        assert not [name for name, x in found.items() if x in presets and name not in PRESETS]


def test_a_method_that_is_not_installed_has_a_row(model, ids, monkeypatch):
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    found = quality.run(model, [method("dynamic"), method("quanto4")], ids, CHUNK, 2, weigh=False)
    assert found[1].failed == "quanto is not installed: pip install optimum-quanto" and not found[1].nll
    assert "| quanto4 | quanto is not installed: pip install optimum-quanto |" in quality.table(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_the_command(folder, tmp_path, capsys):
    text, file, page = tmp_path / "text.txt", tmp_path / "out.json", tmp_path / "out.md"
    text.write_text(models.words(1000))
    options = ["--model", folder, "--text", str(text), "--length", "256", "--windows", "3", "--batch", "2"]
    options += ["--device", "cpu", "--configs", "k4v4", "streaming:recent_window=60", "learned"]
    assert quality.main([*options, "--json", str(file), "--markdown", str(page)]) == 0
    report, results = quality.stored(file)
    assert report["device"] == "CPU" and report["windows"] == 3 and report["text"] == "text.txt"
    assert str(tmp_path) not in file.read_text()
    rows = {r.method: r for r in results}
    assert len(rows["k4v4"].nll) == 3 and rows["k4v4"].read > 0
    assert rows["k4v4"].dense / rows["k4v4"].bytes > 3
    first = capsys.readouterr().out
    assert quality.main(["--show", str(file)]) == 0
    assert page.read_text().strip() in first and page.read_text().strip() in capsys.readouterr().out


def test_texts(tmp_path):
    (tmp_path / "a.json").write_text("\n".join(json.dumps({"text": x}) for x in ("aa ab", "ac")))
    (tmp_path / "b.csv").write_text("other\nx\n")
    assert texts.read(str(tmp_path / "a.json")) == "aa ab\n\nac"
    with pytest.raises(ValueError, match="no column 'text': there are other"):
        texts.read(str(tmp_path / "b.csv"))
    tokenizer = models.tokenizer()
    found = texts.windows(tokenizer, models.words(40), 3, 12)
    assert found.flatten().tolist() == tokenizer(models.words(40)).input_ids[:36]
    with pytest.raises(ValueError, match="40 tokens: 4 windows of 12 need 48"):
        texts.windows(tokenizer, models.words(40), 4, 12)


def test_the_text_that_needs_no_download(monkeypatch):
    """It is taken where no hub answers, is long enough for 32K tokens, and repeats no chapter."""
    monkeypatch.setattr(texts.loading, "hub_reachable", lambda: False)
    text, name = texts.read_or_default(None)
    assert name == "built-in" == texts.read_or_default("built-in")[1] and len(text.split()) > 40_000
    chapters = [x for x in text.split("\n\n") if len(x) > 400]
    assert len(set(chapters)) == len(chapters)
    assert len(texts.built_in(100).split()) == 100 and text.startswith(texts.built_in(100))


@pytest.mark.slow
@pytest.mark.real_model
def test_a_real_model_and_text(smollm2, wikitext):
    """One window of 256 tokens: INT4 is hardly felt, INT2 is, and both were really read."""
    model, tokenizer = smollm2
    window, names = texts.windows(tokenizer, wikitext, 1, 256), [f"int{n}:recent_window=16" for n in (4, 2)]
    results, rows = run(model, window, *names)
    assert all(results[name].read > 40 for name in names)
    int4, int2 = (rows[name] for name in names)
    assert 1e-6 < int4.kl < 0.05 and int4.kl < int2.kl < 0.5
    assert 0.95 < int4.ratio < 1.05 and int4.top1 > 0.85


def test_what_did_not_drop_a_token_yet_is_told():
    about = dict(model="m", dtype="fp32", device="CPU", torch="2", transformers="5", text="t", length=8)
    report = about | dict(windows=1, chunk=4)
    row = dict(does="compresses", nll=[1.0], kl=[0.0], top1=[1.0], read=1.0)
    exact = quality.Result("dynamic", "exact", nll=[1.0], kl=[0.0], top1=[1.0], read=0.0, evicted=0.0)
    for gone, said in ((0.0, True), (3.0, False)):
        found = [
            exact,
            quality.Result("balanced", config=str(FadeConfig.preset("balanced")), evicted=gone, **row),
            quality.Result("safe", config=str(FadeConfig.preset("safe")), evicted=0.0, **row),
        ]
        shown = quality.show(report | dict(results=[vars(r) for r in found]), found)
        assert ("balanced did not drop a token yet" in shown) == said
