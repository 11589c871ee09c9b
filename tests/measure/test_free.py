"""measure.quality --free: texts are those of generate(), distances those of the uncompressed model."""

import json

import pytest
import torch

import fade_fast
from fade_fast.hf.models import CACHE_NAME
from fade_fast.kernels import rotated
from fade_fast.measure import free, quality, ruler
from fade_fast.measure.methods import method
from fade_fast.measure.streams import NothingCompressed

from ..marks import slow_but
from ..models import prompt, tiny_llama
from . import models
from .test_ruler import words

LENGTH, NEW, CHUNK = 200, 24, 64


@pytest.fixture(scope="module")
def model():
    return tiny_llama(dtype=torch.float64)


@pytest.fixture(scope="module")
def ids():
    return prompt(LENGTH, batch=2)["input_ids"]


def run(model, ids, *names, new=NEW, **options):
    options = dict(size=CHUNK, batch=2, say=lambda line: None) | options
    found = free.run(model, [method(name) for name in names], ids, new, **options)
    return {r.method: r for r in found}


def test_compression_switched_off_changes_nothing(model, ids):
    found = run(model, ids, "dynamic", "off")
    for r in found.values():
        assert r.length == r.same == [NEW] * 2 and r.near == [1, 1] and r.gaps == [[], []]
        assert r.kl == pytest.approx([0, 0], abs=1e-12) and r.read == r.evicted == 0


@pytest.mark.parametrize("name", slow_but(["int2", "streaming:recent_window=60"], "int2"))
def test_a_text_is_that_of_generate_and_the_distances_those_of_one_forward(model, ids, name):
    m, one = method(name), ids[:1]
    exact = free.after(model, one, LENGTH)
    text = free.write(model, m, one, NEW, LENGTH, exact)
    out = model.generate(
        one, **{CACHE_NAME: m(model, LENGTH + NEW)}, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW,
        return_dict_in_generate=True, output_logits=True, attention_mask=torch.ones_like(one),
    )  # fmt: skip
    fade_fast.detach(model)
    assert torch.equal(text.tokens, out.sequences[:, LENGTH:])
    with torch.no_grad():
        seen = model(input_ids=out.sequences, use_cache=False).logits[:, LENGTH - 1 : -1]
    ours = torch.stack(out.logits, dim=1).double()
    p, q = seen.double().log_softmax(-1), ours.log_softmax(-1)
    torch.testing.assert_close(text.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-6, atol=1e-9)
    allowed = seen.clone()
    allowed[..., sorted(ruler.ends_of_text(model))] = -torch.inf
    gaps = allowed.amax(-1) - allowed.gather(-1, text.tokens[..., None])[..., 0]
    torch.testing.assert_close(text.gaps, gaps.float(), rtol=1e-4, atol=1e-5)
    assert text.gaps.max() > free.MARGIN and text.kl.mean() > 1e-3  # it was really compressed


@pytest.mark.slow
def test_worse_formats_leave_earlier(model, ids):
    found = run(model, ids, "int8", "int4", "int2")
    kl = {name: sum(r.kl) / 2 for name, r in found.items()}
    assert 0 < kl["int8"] < kl["int4"] < kl["int2"]
    length = {name: sum(r.length) for name, r in found.items()}
    assert length["int8"] > length["int2"] and all(r.read > 40 for r in found.values())
    assert sum(found["int8"].near) > sum(found["int2"].near)
    assert all(s <= n for r in found.values() for s, n in zip(r.same, r.length) if r.length[0] < NEW)


@pytest.mark.slow
def test_damage_shows(model, ids, monkeypatch):
    before = run(model, ids, "k4v4")["k4v4"]
    encode = rotated.encode_both
    monkeypatch.setattr(rotated, "encode_both", lambda k, v, *rest: encode(k, v.flip(-1), *rest))
    after = run(model, ids, "k4v4")["k4v4"]
    assert sum(after.kl) > 10 * sum(before.kl) and sum(after.length) < sum(before.length)


@pytest.mark.parametrize(
    "name, why",
    [("int4:recent_window=400", "no query read"), ("streaming:recent_window=400", "no token was evicted")],
)
def test_a_cache_that_did_nothing_is_an_error(model, ids, name, why):
    with pytest.raises(NothingCompressed, match=why):
        run(model, ids, name, new=4)


def test_the_matched_codec_writes_too(model, ids):
    found = run(model, ids, "int2:quant_backend=matched", new=8)["int2:quant_backend=matched"]
    assert found.read > 40 and sum(found.kl) > 0 and "matched" in found.config


@pytest.mark.slow
def test_prompts_of_a_batch_are_independent(model, ids):
    names = ("int3", "h2o:int4_budget=40")
    together = run(model, ids, *names)
    apart = run(model, ids, *names, batch=1)
    for name in names:
        for field in ("length", "same", "near", "gaps"):
            assert getattr(together[name], field) == getattr(apart[name], field), field
        assert together[name].kl == pytest.approx(apart[name].kl, rel=1e-9)
        assert together[name].read == pytest.approx(apart[name].read)
    assert together["h2o:int4_budget=40"].evicted > 0


@pytest.mark.slow
def test_a_method_that_mixes_rows_writes_one_at_a_time(model, ids, monkeypatch):
    sizes = []
    write = free.write
    monkeypatch.setattr(
        free,
        "write",
        lambda model, m, ids, *rest: sizes.append((m.name, len(ids))) or write(model, m, ids, *rest),
    )
    mixing = free.Method("mixing", "compresses", method("int2").make, rowwise=False)
    found = {r.method: r for r in free.run(model, [mixing], ids, 8, CHUNK, 2, say=lambda line: None)}
    assert sizes == [("dynamic", 2), ("mixing", 1), ("mixing", 1)]
    same = run(model, ids, "int2", new=8)["int2"]
    assert found["mixing"].gaps == same.gaps and found["mixing"].kl == pytest.approx(same.kl, rel=1e-9)


def test_a_method_that_is_not_installed_has_a_row(model, ids, monkeypatch):
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    found = run(model, ids, "quanto4", new=4)["quanto4"]
    assert found.failed == "quanto is not installed: pip install optimum-quanto" and not found.length
    assert "| quanto4 | quanto is not installed: pip install optimum-quanto |" in free.table([found], [], 4)


def test_distances_by_hand():
    logits = torch.tensor([[[1.0, 3.0, 2.95], [0.0, 0.5, 2.0], [4.0, 1.0, 1.0]]])
    gaps = free.behind(logits, torch.tensor([[2, 1, 0]]))
    torch.testing.assert_close(gaps, torch.tensor([[0.05, 1.5, 0.0]]))
    assert free.until(gaps > 0.1) == [1] and free.until(gaps > 0) == [0] and free.until(gaps > 2) == [3]
    p, q = (x.softmax(-1) for x in (logits.double()[0, 0], logits.double()[0, 1]))
    found = free.divergence(logits[:, 1:2], logits[:, :1])
    assert found.item() == pytest.approx((p * (p / q).log()).sum().item())


@pytest.mark.slow
def test_the_margin_is_of_logits(model, ids):
    """Other margins can be looked at in the stored distances."""
    tight, loose = (run(model, ids, "int2", margin=x)["int2"] for x in (0.0, 1.0))
    assert tight.gaps == loose.gaps and sum(tight.length) < sum(loose.length)
    for r, margin in ((tight, 0.0), (loose, 1.0)):
        left = [next((i for i, x in row if x > margin), NEW) for row in r.gaps]
        assert r.length == left


def test_prompts_are_decided_by_the_seed():
    tokenizer, text = models.tokenizer(), models.words(300)
    ids = torch.tensor(tokenizer(text).input_ids)
    found, again, other = (free.prompts(tokenizer, text, 4, 50, seed) for seed in (0, 0, 1))
    assert torch.equal(found, again) and not torch.equal(found, other)
    pieces = ids.unfold(0, 50, 1).tolist()
    assert all(row in pieces for row in found.tolist()) and len({tuple(x) for x in found.tolist()}) == 4
    with pytest.raises(ValueError, match="300 tokens: 4 prompts of 299 need more"):
        free.prompts(tokenizer, text, 4, 299, 0)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    text, file = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(words(4000))
    options = ["--free", "--model", models.save(tmp_path / "model"), "--text", str(text), "--prompts", "3"]
    options += ["--length", "200", "--new", "20", "--batch", "2", "--device", "cpu", "--json", str(file)]
    options += ["--configs", "int2", "int2:quant_backend=matched", "--trials", "1", "--task-length", "400"]
    assert quality.main([*options, "--tasks", "fwe"]) == 0
    report, results, answers = free.stored(file)
    assert report["kind"] == "free" and str(tmp_path) not in file.read_text()
    rows = {r.method: r for r in results}
    assert set(rows) == {"dynamic", "int2", "int2:quant_backend=matched"}
    assert all(len(r.length) == len(r.kl) == len(r.gaps) == 3 for r in results)
    assert rows["dynamic"].length == rows["dynamic"].same == [20] * 3
    assert all(rows[name].read > 0 for name in rows if name != "dynamic")
    assert {(a.task, a.method) for a in answers} == {("fwe", name) for name in rows}
    assert json.loads(file.read_text())["answers"]
    shown = capsys.readouterr().out
    assert quality.main(["--free", "--show", str(file)]) == 0
    assert capsys.readouterr().out.strip() in shown and "| dynamic | 20 ± 0 | 3 of 3 | 20 | 1.000 |" in shown
