"""measure.needles: prompts are what they say, and an answer counts only if all of it is right."""

import pytest
import torch

from fade_fast.measure import needles
from fade_fast.measure.methods import method
from fade_fast.measure.parsers.needles import TASKS
from fade_fast.measure.streams import NothingCompressed, of_one_prompt

from ..marks import slow_but
from ..models import tiny_llama
from . import models


class Bytes:
    """A tokenizer whose tokens are bytes."""

    bos_token = None

    def __call__(self, text, **options):
        ids = list(text.encode())
        return type(
            "Encoded", (), dict(input_ids=torch.tensor([ids]) if options.get("return_tensors") else ids)
        )


def decoded(ids) -> str:
    return bytes(ids.tolist()).decode()


TEXT = torch.tensor(list(models.words(1000).encode()))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", slow_but([0, 35, 100], 35))
def test_prompts(task, depth):
    found = needles.example(Bytes(), task, 1200, depth, 3, TEXT)
    assert len(found.context) + len(found.question) == 1200
    context, question, answer = (decoded(x) for x in (found.context, found.question, found.answer))
    code = answer.strip()
    assert len(code) == 5 and code.isdigit() and code in context and code not in question
    place = context.index(code) / len(context)
    if task == "recall":
        assert place < 0.2 and context.count(code) == 2 and context.count("secret code") == 3
    else:
        assert abs(place - depth / 100) < 0.25 if depth == 35 else (place < 0.2) == (depth == 0)
    if task == "multikey":
        assert all(f"code of {name} is" in context for name in needles.NAMES)
        assert f"code of {needles.NAMES[0]} is {code}" in context
    again, other = (needles.example(Bytes(), task, 1200, depth, seed, TEXT) for seed in (3, 4))
    assert torch.equal(found.context, again.context) and not torch.equal(found.answer, other.answer)


def test_too_short_a_prompt():
    with pytest.raises(ValueError, match="too few for the task"):
        needles.example(Bytes(), "passkey", 100, 50, 0, TEXT)


def test_answers_are_scored_as_one_forward_would():
    model = tiny_llama(dtype=torch.float64)
    examples = [needles.example(Bytes(), "passkey", 600, d, 0, TEXT) for d in (5, 60)]
    ((right, nll, read),) = needles.ask(model, [method("dynamic")], examples, 256)
    for i, e in enumerate(examples):
        with torch.no_grad():
            whole = torch.cat([e.context, e.question, e.answer])[None]
            log_p = model(input_ids=whole).logits[0, -1 - len(e.answer) : -1].float().log_softmax(-1)
        assert nll[i].item() == pytest.approx(-log_p.gather(1, e.answer[:, None]).sum().item(), rel=1e-5)
        assert right[i].tolist() == (log_p.argmax(-1) == e.answer).tolist()
    assert read == 0
    ((_, compressed, read),) = needles.ask(model, [method("int2")], examples, 256)
    assert read > 300 and not torch.allclose(compressed, nll, rtol=1e-3)
    with pytest.raises(NothingCompressed):
        needles.ask(model, [method("int4:recent_window=600")], examples, 256)


def test_one_prefill_serves_methods_that_differ_in_what_queries_read():
    """To the bit, each method finds what it finds alone."""
    model = tiny_llama(dtype=torch.float64)
    examples = [needles.example(Bytes(), "passkey", 600, d, 0, TEXT) for d in (5, 60)]
    names = ["recall:select=64", "recall:select=16:resident=64", "recall:select=0.5:select_max=128"]
    others = ["dynamic", "recall:select=64:recent_window=32", "int4"]
    methods = [method(name) for name in (*names, *others)]
    groups = of_one_prompt(methods, len(examples[0].context), 200)
    assert [[m.name for m in group] for group in groups] == [names, *([name] for name in others)]
    together = needles.ask(model, groups[0], examples, 200)
    alone = [needles.ask(model, [m], examples, 200)[0] for m in groups[0]]
    for (_, ours, read), (_, theirs, again), most in zip(together, alone, (64, 16, 128), strict=True):
        assert torch.equal(ours, theirs) and read == again and 8 <= read <= most
    assert len({read for *_, read in together}) == 3
    # A last chunk of few tokens chooses already what it reads.
    assert all(len(group) == 1 for group in of_one_prompt(methods, 200 + 16, 200))


def test_only_whole_answers_count(monkeypatch):
    right = iter([[[True] * 3, [True, False, True]], [[False] * 3]])
    monkeypatch.setattr(
        needles, "ask", lambda *args: [(torch.tensor(found := next(right)), torch.ones(len(found)), 8.0)]
    )
    cells = [(5, None), (5, None), (50, None)]
    five, fifty = needles.score(tiny_llama(), [method("int4")], "passkey", 600, cells, 256, 2)
    assert (five.depth, five.exact, five.trials, five.read) == (5, 0.5, 2, 8.0)
    assert five.tokens == pytest.approx(5 / 6) and fifty.exact == fifty.tokens == 0.0


def test_the_command(tmp_path, capsys):
    text, file = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(models.words(3000))
    options = ["--model", models.save(tmp_path / "model"), "--text", str(text), "--lengths", "300"]
    options += ["--depths", "5", "95", "--trials", "1", "--device", "cpu", "--configs", "int4", "streaming"]
    assert needles.main([*options, "--json", str(file)]) == 0
    report, results = needles.stored(file)
    assert {(r.task, r.depth) for r in results} == {
        ("passkey", 5), ("passkey", 95), ("multikey", 5), ("multikey", 95), ("recall", 0)
    }  # fmt: skip
    by_name = {name: [r for r in results if r.method == name] for name in ("dynamic", "int4", "streaming")}
    assert all(r.read > 0 and r.exact is not None for r in by_name["int4"])
    assert all("leaves no room" in r.failed for r in by_name["streaming"])
    assert report["kind"] == "needles" and str(tmp_path) not in file.read_text()
    shown = capsys.readouterr().out
    assert needles.main(["--show", str(file)]) == 0
    assert capsys.readouterr().out.strip() in shown
