"""measure.ruler: prompts have their length and one right answer, scores are RULER's, caches are read."""

import random
import re

import pytest
import torch

from fade_fast.measure import ruler
from fade_fast.measure.methods import method
from fade_fast.measure.parsers.ruler import TASKS
from fade_fast.measure.streams import NothingCompressed

from ..marks import slow_but
from ..models import tiny_llama
from . import models

SYLLABLES = [c + v for c in "bdfgklmnprst" for v in "aeiou"]


def words(count: int, seed: int = 0) -> str:
    """A text of words of 4 to 8 letters."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(count)) + "."


class Pieces:
    """A tokenizer with tokens of up to three letters."""

    bos_token = None

    def __init__(self):
        self.known: dict[str, int] = {}

    def __call__(self, text, **options):
        pieces = re.findall(r"\w{1,3}|\s|[^\w\s]", text)
        ids = [self.known.setdefault(piece, len(self.known)) for piece in pieces]
        return type("Encoded", (), dict(input_ids=ids))

    def decode(self, ids, **options):
        pieces = list(self.known)
        return "".join(pieces[int(i)] for i in ids)


class Bytes:
    """A tokenizer whose tokens are bytes, for a model of 256 tokens."""

    bos_token = None

    def __call__(self, text, **options):
        return type("Encoded", (), dict(input_ids=list(text.encode())))

    def decode(self, ids, **options):
        return bytes(int(i) for i in ids).decode(errors="replace")


TEXT, TOKENIZER = words(3000), Pieces()


@pytest.fixture(scope="module")
def source():
    return ruler.Source(TOKENIZER, TEXT, 8192)


def parts(found: ruler.Example) -> tuple[str, str]:
    """Context and question of an example."""
    context, question = found.prompt[: -found.question], found.prompt[-found.question :]
    return TOKENIZER.decode(context), TOKENIZER.decode(question)


CASES = [(task, length) for task in TASKS for length in (2048, 8192)]


@pytest.mark.parametrize("task, length", CASES)
def test_prompts(source, task, length):
    """The length is exact, seeds decide everything, and the question reveals no reference."""
    found, again = (ruler.example(source, task, length, 3) for _ in range(2))
    assert found.prompt.shape == (length,) and found.prompt.dtype == torch.int64
    assert torch.equal(found.prompt, again.prompt) and found.answers == again.answers
    assert 0 < found.question <= ruler.STEP
    other = ruler.example(source, task, length, 4)
    assert not torch.equal(found.prompt, other.prompt) and found.answers != other.answers
    context, question = parts(found)
    assert "Question:" in question and question.rstrip().endswith(("is", "are"))
    assert all(a in context and a not in question for a in found.answers)
    assert len(set(found.answers)) == len(found.answers) == {"vt": 5, "cwe": 10, "fwe": 3}.get(task, 1)
    # No reference is part of another: each needs to be said.
    assert not any(a in b for a in found.answers for b in found.answers if a is not b)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("task, keys", [("niah_single", 1), ("niah_multikey", ruler.KEYS)])
def test_numbers_of_words(source, task, keys, seed):
    """Only the asked word has the answer, and no distractor has its number."""
    found = ruler.example(source, task, 2048, seed)
    context, question = parts(found)
    told = re.findall(r"The lucky number of (\w+) is (\d{7})\.", context)
    asked = re.search(r"lucky number of (\w+) in the text", question)[1]
    assert len(told) == len(dict(told)) == len({number for _, number in told}) == keys
    assert found.answers == (dict(told)[asked],)
    assert context.count(found.answers[0]) == 1 and found.answers[0] not in TEXT
    rest = re.sub(r"\nThe lucky number of \w+ is \d+\.\n", "", context).split("mind.\n")[1]
    assert rest in TEXT  # a piece of the real text, cut where facts are


def test_needles_are_anywhere(source):
    places = []
    for seed in range(30):
        context, _ = parts(found := ruler.example(source, "niah_single", 2048, seed))
        places.append(context.index(found.answers[0]) / len(context))
    assert min(places) < 0.2 and max(places) > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_variables_form_a_chain(source, seed):
    """Following the assignments by hand gives the references; the solved example shares nothing with them."""
    found = ruler.example(source, "vt", 2048, seed)
    context, question = parts(found)
    solved, task = context.split("\n\n")
    value = re.search(r"have the value (\d+)\?", question)[1]
    holds = {}
    for name, right in re.findall(r"VAR (\w{5}) = (VAR \w{5}|\d+)\.", task):
        holds[name] = holds[right[4:]] if right.startswith("VAR") else right
    assert tuple(name for name, x in holds.items() if x == value) == found.answers
    assert list(holds) == list(found.answers)  # told in this order
    assert value not in solved and not any(a in solved for a in found.answers)
    assert solved.count("VAR") == 9 and "are " in solved.splitlines()[-1]


@pytest.mark.parametrize("length", (2048, 4096, 8192))
def test_common_words_are_the_most_frequent(source, length):
    found = ruler.example(source, "cwe", length, 1)
    solved, listed = parts(found)[0].split("\n\n")[-2:]
    counts: dict[str, int] = {}
    for _, word in re.findall(r"(\d+)\. (\w+)", listed):
        counts[word] = counts.get(word, 0) + 1
    often, seldom = ruler.frequencies(length)
    assert {w for w, n in counts.items() if n == often} == set(found.answers)
    assert {n for w, n in counts.items() if w not in found.answers} == {seldom} and often >= 4 * seldom
    assert not any(a in w for a in found.answers for w in counts if w != a)
    assert not any(a in solved for a in found.answers)
    assert [int(i) for i, _ in re.findall(r"(\d+)\. (\w+)", listed)] == list(
        range(1, sum(counts.values()) + 1)
    )


def test_frequencies_are_those_of_ruler_from_4k_on():
    assert [ruler.frequencies(n) for n in (1024, 2048, 4096, 8192)] == [(8, 1), (16, 1), (30, 3), (30, 3)]


@pytest.mark.parametrize("length", (1024, 1500, 2048, 4096, 8192))
def test_frequent_words_are_the_next_after_the_noise(source, length):
    found = ruler.example(source, "fwe", length, 2)
    text = parts(found)[0].split("count.\n")[1].split()
    counts = {word: text.count(word) for word in set(text)}
    ranked = sorted(counts, key=counts.get, reverse=True)
    assert ranked[0] == ruler.NOISE and tuple(ranked[1:4]) == found.answers
    assert len({counts[w] for w in ranked[:4]}) == 4 and counts[ranked[4]] < counts[ranked[3]]
    assert not any(word in TEXT for word in found.answers)
    assert counts[ranked[1]] == counts[ruler.NOISE] // 4 and counts[ranked[2]] == counts[ruler.NOISE] // 9


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_scores_one_and_a_wrong_answer_none(source, task):
    found = ruler.example(source, task, 2048, 5)
    assert ruler.score(f"They are: {'; '.join(found.answers)}!", found.answers) == 1
    assert ruler.score(f"They are: {'; '.join(found.answers)}!".swapcase(), found.answers) == 1
    assert ruler.score("", found.answers) == ruler.score("I do not know 123.", found.answers) == 0
    other = ruler.example(source, task, 2048, 6).answers
    assert ruler.score(" ".join(other), found.answers) < 0.5
    some = found.answers[: (len(found.answers) + 1) // 2]
    assert ruler.score(" ".join(some), found.answers) == pytest.approx(len(some) / len(found.answers))


@pytest.mark.parametrize("task", slow_but(TASKS, "cwe", "niah_multikey"))
def test_too_short_a_prompt(source, task):
    with pytest.raises(ValueError, match="too few for the task"):
        ruler.example(source, task, 60, 0)


def test_too_short_a_text():
    with pytest.raises(ValueError, match="200 are needed"):
        ruler.Source(Bytes(), "some few words", 1024)
    with pytest.raises(ValueError, match="the text has"):
        ruler.example(ruler.Source(Pieces(), words(400), 1024), "niah_single", 8192, 0)


# Answers


@pytest.fixture(scope="module")
def model():
    return tiny_llama(dtype=torch.float64)


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.setattr(ruler, "STEP", 128)  # a question has many bytes
    source = ruler.Source(Bytes(), TEXT, 1024)
    return [ruler.example(source, "niah_multikey", 700, seed) for seed in range(2)]


def test_answers_are_greedy(model, examples):
    """They are the tokens that `generate` of transformers gives, and rows do not influence each other."""
    ((said, read, evicted),) = ruler.answer(model, Bytes(), [method("dynamic")], examples, 256, 12)
    assert read == evicted == 0
    for e, words in zip(examples, said):
        out = model.generate(
            e.prompt[None], do_sample=False, max_new_tokens=12, attention_mask=torch.ones(1, 700),
            pad_token_id=0,
        )  # fmt: skip
        assert words == Bytes().decode(ruler.until_end(out[0, 700:], ruler.ends_of_text(model)))


def test_compression_is_used(model, examples):
    one = examples[:1]
    ((exact, *_),) = ruler.answer(model, Bytes(), [method("dynamic")], one, 700, 6)
    ((off, *_),) = ruler.answer(model, Bytes(), [method("off")], one, 700, 6)
    assert off == exact
    ((said, read, _),) = ruler.answer(model, Bytes(), [method("int2")], one, 256, 6)
    assert read > 400 and said != exact
    ((_, read, _),) = ruler.answer(model, Bytes(), [method("int2:quant_backend=matched")], one, 256, 1)
    assert read > 400
    ((_, read, evicted),) = ruler.answer(model, Bytes(), [method("streaming:recent_window=60")], one, 256, 1)
    assert read == 0 and evicted > 400


@pytest.mark.parametrize("name", slow_but(["int4:recent_window=640", "streaming:recent_window=640"]))
def test_a_cache_that_did_nothing_is_an_error(model, examples, name):
    with pytest.raises(NothingCompressed):
        ruler.answer(model, Bytes(), [method(name)], examples[:1], 256, 1)


def test_answers_end_with_the_text_or_with_all_references(model, examples, monkeypatch):
    first = ruler.answer(model, Bytes(), [method("dynamic")], examples[:1], 256, 6)[0][0][0]
    steps = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, *a, **k: steps.append(1) or forward(self, *a, **k)
    )
    known = [ruler.Example(e.prompt, e.question, (first[:2],)) for e in examples[:1]]
    ((said, *_),) = ruler.answer(model, Bytes(), [method("dynamic")], known, 700, 6)
    assert said[0] == first[:2] and len(steps) == 1 + 1 + 1  # context, question, and one token more
    end = examples[0].prompt.new_tensor(list(first.encode(errors="replace")))
    assert ruler.until_end(end, {int(end[1])}).tolist() == end[:1].tolist()
    assert ruler.until_end(end, set()).tolist() == end.tolist()


def test_scores_are_means(model, monkeypatch):
    told = iter([["a b", "a"], ["c"]])
    monkeypatch.setattr(ruler, "answer", lambda *args: [(next(told), 8.0, 0.0)])
    cells = [ruler.Example(torch.zeros(1), 1, ("a", "b"))] * 3
    (r,) = ruler.measured_in(model, Bytes(), [method("int4")], "vt", 700, cells, 256, 2, 5)
    assert (r.scores, r.trials, r.score, r.read) == ([1.0, 0.5, 0.0], 3, 0.5, 8.0)
    assert r.full == pytest.approx(1 / 3)
    assert "| int4 | 0.50 | 0.50 | 8 |" in ruler.table([r]) and "3 examples a task" in ruler.table([r])


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    text, file = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(words(4000))
    options = ["--model", models.save(tmp_path / "model"), "--text", str(text), "--lengths", "900"]
    options += [
        "--trials",
        "2",
        "--device",
        "cpu",
        "--configs",
        "int2",
        "streaming",
        "quanto4",
        "--most",
        "3",
    ]
    assert ruler.main([*options, "--tasks", "niah_single", "fwe", "--json", str(file)]) == 0
    report, results = ruler.stored(file)
    assert report["kind"] == "ruler" and report["most"] == 3 and str(tmp_path) not in file.read_text()
    by_name = {name: [r for r in results if r.method == name] for name in ("dynamic", "int2", "streaming")}
    assert all(len(rows) == 2 for rows in by_name.values())
    assert all(r.read > 0 and len(r.scores) == 2 for r in by_name["int2"])
    assert all(r.evicted > 0 or r.failed for r in by_name["streaming"])
    shown = capsys.readouterr().out
    assert ruler.main(["--show", str(file)]) == 0
    assert capsys.readouterr().out.strip() in shown
