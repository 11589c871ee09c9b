"""measure.report: one command measures all, and every row has read compressed tokens."""

import json
import math

import pytest
import torch

from fade_fast.cli.command import main
from fade_fast.measure import memory, quality, report, ruler, streams, texts
from fade_fast.measure.methods import method
from fade_fast.measure.streams import NothingCompressed, Uncompressed

from ..cli.test_demo import loud_again, one_line, tiny  # noqa: F401
from ..models import prompt, tiny_llama

LENGTH = 768
CONFIGS = ["int4", "recall", "position:int4_budget=100"]


def test_uncompressed_logits_are_the_same_if_they_are_not_kept():
    """Beside an attached cache, too, whose attention function plain caches then share."""
    model, ids = tiny_llama(dtype=torch.float64), prompt(200)["input_ids"]
    once, again = Uncompressed(model, ids, 64), Uncompressed(model, ids, 64, keep=0)
    first = [logits for _, logits in zip(range(4), once)]  # nothing is asked for after the last
    assert once.kept is not None and all(a is b for a, b in zip(once, first))
    method("int4")(model, 200)  # attaches the model
    found = list(again)
    assert again.kept is None and len(found) == len(first) == 4
    for a, b in zip(found, first):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    both = [method(name) for name in ("dynamic", "int4")]
    kept, free = (quality.run(model, both, ids, 64, 1, weigh=False, kept=n) for n in (streams.KEPT, 0))
    for a, b in zip(kept, free):
        assert a.kl == pytest.approx(b.kl, rel=1e-6, abs=1e-12) and a.nll == pytest.approx(b.nll, rel=1e-9)
        assert a.read == b.read
    assert kept[1].kl[0] > 0 and kept[1].read > 0


@pytest.mark.slow
def test_no_more_than_some_chunks_of_logits_exist():
    """Logits of a long text over a large vocabulary would be larger than everything else together."""
    model, length = tiny_llama(), 1024
    vocabulary = 8192
    torch.manual_seed(0)
    model.resize_token_embeddings(vocabulary)
    ids, peak = prompt(length)["input_ids"], {}
    method("int4")(model, length)  # compares attention functions, once for a model
    for kept in (0, streams.KEPT):
        with memory.StorageMeter() as meter:
            quality.run(model, [method(n) for n in ("dynamic", "int4")], ids, 32, 1, weigh=False, kept=kept)
        peak[kept] = meter.peak
    whole = length * vocabulary * 4
    assert peak[streams.KEPT] > whole and peak[0] < whole / 2


def test_bytes_of_a_cache_that_compressed_nothing_are_refused():
    model = tiny_llama(dtype=torch.bfloat16)
    found = report.weigh(model, [method("dynamic"), method("int8")], 400)
    assert found[1].read > 300 and found[1].reserved <= found[1].grown < found[0].reserved
    with pytest.raises(NothingCompressed, match="int4"):
        report.weigh(model, [method("int4")], 80)


@pytest.mark.slow
def test_the_command(tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    asked = ["quality", "--suite", "report", "--model", tiny, "--device", "cpu", "--dtype", "fp32"]
    asked += ["--text", "built-in", "--length", str(LENGTH), "--new", "4", "--trials", "1"]
    monkeypatch.setattr(report, "DEPTHS", (50,))
    monkeypatch.setattr(report, "TASKS", ("niah_single",))
    assert main([*asked, "--configs", *CONFIGS]) == 0
    (file,), (page,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    data = json.loads(file.read_text())
    assert file.stem == page.stem == f"report-{data['model']}-{LENGTH}" and data["kind"] == "report"
    assert str(tmp_path) not in file.read_text() and data["text"] == "built-in"
    rows = report.parsed(data)
    for part, results in rows.items():
        assert {r.method for r in results} == {"dynamic", *CONFIGS}, part
        assert all(r.failed is None for r in results), part
        assert all(r.read > 50 for r in results if r.method != "dynamic"), part
    # The table has the numbers of the parts.
    said = capsys.readouterr().out
    assert page.read_text().strip() in said
    cells = {
        line.split(" | ")[0]: line.strip("| ").split(" | ") for line in said.splitlines() if " | " in line
    }
    line = cells["| `int4`"]
    weight = next(w for w in rows["bytes"] if w.method == "int4")
    dense = next(w for w in rows["bytes"] if w.method == "dynamic")
    assert line[1:4] == [
        f"{weight.reserved / 2**20:.1f}",
        f"{dense.reserved / weight.reserved:.2f}",
        f"{dense.reserved / weight.grown:.2f}",
    ]
    exact, ours = (next(r for r in rows["quality"] if r.method == n).nll for n in ("dynamic", "int4"))
    assert line[4] == f"{math.exp(ours[0] - exact[0]):.4f}" and line[-1] == "every token"
    assert cells["| `position:int4_budget=100`"][-1].startswith("all but")
    assert main(["quality", "--suite", "report", "--show", str(file)]) == 0
    assert capsys.readouterr().out.strip() == page.read_text().strip()


def test_what_it_refuses(tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    asked = ["quality", "--suite", "report", "--model", tiny, "--device", "cpu", "--text", "built-in"]
    assert main([*asked, "--length", "1000"]) == 2
    assert "--length 1000 and answers of 128: the model has 1024 positions" in one_line(capsys)
    assert main([*asked, "--length", "800", "--windows", "9999"]) == 2
    assert "give a longer one with --text" in one_line(capsys)
    with pytest.raises(SystemExit):
        quality.main(["--suite", "report"])
    assert "fade quality --suite report" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.real_model
def test_a_real_model(smollm2, monkeypatch):
    """All parts on SmolLM2 with 4 bits: the text is predicted as well, and the code is found."""
    model, tokenizer = smollm2
    monkeypatch.setitem(ruler.NEW, "niah_single", 12)  # every token of a wrong answer takes a step
    monkeypatch.setattr(report, "DEPTHS", (50,))
    monkeypatch.setattr(report, "TASKS", ("niah_single",))
    plan = report.Plan(length=512, windows=1, trials=1, new=4)
    methods = [method("dynamic"), method("int4")]
    text = texts.built_in(texts.WORDS)
    found = {part: run() for part, run in report.parts(model, tokenizer, text, methods, plan, print).items()}
    assert all(r.read > 60 for results in found.values() for r in results if r.method == "int4")
    assert quality.summaries(found["quality"])["int4"].ratio < 1.02
    assert [r.exact for r in found["needles"] if (r.task, r.method) == ("passkey", "int4")] == [1.0]
