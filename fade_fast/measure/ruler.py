"""Tasks of RULER, generated offline and answered freely: `fade ruler`.

fade ruler --model meta-llama/Llama-3.1-8B-Instruct --lengths 8192

Five tasks of RULER (arXiv 2404.06654). Each is a prompt of an exact number of tokens, made from a local text
and a seed:

- niah_single: a number for one word, hidden in a real text;
- niah_multikey: numbers for four words, hidden in a real text; the question names one word;
- vt (variable tracking): a chain of five assignments among sentences that repeat; all variables are asked;
- cwe (common words): a numbered list in which ten words are frequent and all others are not;
- fwe (frequent words): coded words whose frequencies follow a power law. The most frequent one is noise. The
  next three are asked.

The prompt is fed in chunks through the cache. Its last tokens, with the question, are a step of their own.
Then the model answers greedily, step by step, and reads its own answer through the cache. The score of an
example is RULER's: the share of the references that the answer contains, without regard to case. As in
RULER, vt and cwe begin with a solved example. Wordings, words and numbers are our own, and there is no chat
template.
"""

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from fade_fast.errors import InputError

from . import runs
from .methods import Method, compressed_tokens, evicted_tokens
from .needles import GRASS, woven
from .parsers.ruler import arguments
from .streams import check, chunks, in_parts, of_one_prompt, prefilled, read_by_choice

#: Most tokens of an answer, as in RULER.
NEW = {"niah_single": 128, "niah_multikey": 128, "vt": 30, "cwe": 120, "fwe": 50}
KEYS, HOPS, COMMON, FREQUENT = 4, 4, 10, 3
STEP = 64  # tokens of the last step of a prompt, at least the question
NOISE = "..."  # the most frequent "word" of fwe
LETTERS, CAPITALS = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
POOL = 200_000  # characters of the text that words are taken from


@dataclass(frozen=True)
class Example:
    """A prompt int64 [length], whose last `question` tokens ask, and the references of its answer."""

    prompt: Tensor
    question: int
    answers: tuple[str, ...]


@dataclass
class Result:
    """Scores of a method in a task, at a length.

    Attributes:
        score: mean over examples of the share of references that the answer contains.
        full: share of examples whose answer contains all.
        scores: of each example.
        read: compressed tokens that the step of the question could read, mean over examples and layers.
        evicted: tokens of a prompt that were lost by then.
    """

    task: str
    length: int
    method: str
    trials: int = 0
    score: float | None = None
    full: float | None = None
    scores: list[float] = field(default_factory=list)
    read: float | None = None
    evicted: float | None = None
    failed: str | None = None


def score(said: str, answers: Sequence[str]) -> float:
    """Share of the references that an answer contains, without regard to case.

    >>> score("They are Oak and elm.", ["oak", "elm", "ash", "fir"])
    0.5
    """
    return sum(answer.lower() in said.lower() for answer in answers) / len(answers)


# -- prompts


class Source:
    """A local text as a source of prompts: its tokens, its words, and a tokenizer.

    Raises `InputError` if the text has too few words.
    """

    def __init__(self, tokenizer, text: str, longest: int):
        self.tokenizer, self.text = tokenizer, text[: max(POOL, 40 * longest)]
        self.tokens = self.ids(self.text)
        self.words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", self.text[:POOL])))
        if len(self.words) < 200:
            raise InputError(f"the text has {len(self.words)} words of 4 to 9 letters: 200 are needed")
        blank = next(x for x in map(self.ids, ("\n", " ", ".", "a")) if len(x))
        self.blank = blank[:1]

    def ids(self, words: str) -> Tensor:
        """Tokens of a part of a prompt, int64 [n]."""
        found = self.tokenizer(words, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(found, dtype=torch.int64)

    def start(self) -> Tensor:
        return self.ids(self.tokenizer.bos_token) if self.tokenizer.bos_token else self.ids("")

    def some_words(self, rng: random.Random, count: int, apart: Sequence[str] = ()) -> list[str]:
        """Different words of the text, none part of another or of a word in `apart`, nor the other way."""
        found: list[str] = []
        for word in rng.sample(self.words, len(self.words)):
            if len(found) == count:
                return found
            if not any(word in other or other in word for other in (*found, *apart)):
                found.append(word)
        raise InputError(f"the text has too few words: {count} are needed, none part of another")

    def number(self, rng: random.Random, digits: int, apart: Sequence[str] = ()) -> str:
        """A number that neither the text nor `apart` contains."""
        while True:
            found = str(rng.randrange(10 ** (digits - 1), 10**digits))
            if found not in self.text and not any(found in other or other in found for other in apart):
                return found

    def finished(self, parts: list[Tensor], question: str, answers: Sequence[str], length: int) -> Example:
        """The example, filled up to `length` tokens at its start. `parts` must fit."""
        asked = self.ids(question)
        if len(asked) > STEP:
            raise InputError(f"a question of {len(asked)} tokens: {STEP} are the most")
        body = torch.cat([*parts, asked])
        start = self.start()
        spare = length - len(start) - len(body)
        if spare < 0:
            raise InputError(f"{length} tokens are too few for the task: {-spare} more are needed")
        return Example(torch.cat([start, self.blank.repeat(spare), body]), len(asked), tuple(answers))

    def room(self, parts: list[Tensor], question: str, length: int) -> int:
        """Tokens that remain beside these parts. Raises `InputError` if there are none."""
        found = length - sum(map(len, (self.start(), *parts, self.ids(question))))
        if found < 1:
            raise InputError(f"{length} tokens are too few for the task")
        return found


def example(source: Source, task: str, length: int, seed: int) -> Example:
    """One prompt of `length` tokens. The same arguments give the same prompt.

    Raises `InputError` if the length is too short for the task, or the text too short for the length.
    """
    rng = random.Random(f"{task} {length} {seed}")
    if task in ("niah_single", "niah_multikey"):
        return _niah(source, rng, length, KEYS if task == "niah_multikey" else 1)
    return {"vt": _tracking, "cwe": _common, "fwe": _frequent}[task](source, rng, length)


def _woven(rng: random.Random, filler: Tensor, facts: list[Tensor]) -> list[Tensor]:
    """`facts` at random places of `filler`, in their order."""
    return woven(filler, facts, sorted(rng.randrange(len(filler) + 1) for _ in facts))


def _niah(source: Source, rng: random.Random, length: int, keys: int) -> Example:
    words = source.some_words(rng, keys)
    numbers: list[str] = []
    for _ in words:
        numbers.append(source.number(rng, 7, numbers))
    facts = [source.ids(f"\nThe lucky number of {w} is {n}.\n") for w, n in zip(words, numbers)]
    head = source.ids("Lucky numbers of words are hidden in this text. Keep them in mind.\n")
    question = (
        f"\nQuestion: What is the lucky number of {words[0]} in the text?\n"
        f"Answer: The lucky number of {words[0]} is"
    )
    spare = source.room([head, *facts], question, length)
    first = rng.randrange(max(1, len(source.tokens) - spare))
    filler = source.tokens[first : first + spare]
    if len(filler) < spare:
        raise InputError(f"the text has {len(source.tokens)} tokens, {spare} are needed")
    rng.shuffle(facts)
    return source.finished([head, *_woven(rng, filler, facts)], question, numbers[:1], length)


def _tracking(source: Source, rng: random.Random, length: int) -> Example:
    names: list[str] = []
    while len(names) < 2 * (HOPS + 1):
        name = "".join(rng.choices(CAPITALS, k=5))
        if name not in names and name not in source.text:
            names.append(name)
    value = source.number(rng, 5)
    other = source.number(rng, 5, [value])

    def chain(own: list[str], number: str) -> list[str]:
        return [f" VAR {own[0]} = {number}."] + [f" VAR {b} = VAR {a}." for a, b in zip(own, own[1:])]

    def asked(number: str) -> str:
        return (
            f"\nQuestion: Which {HOPS + 1} variables have the value {number}?\n"
            f"Answer: The {HOPS + 1} variables with the value {number} are"
        )

    mine, shown = names[: HOPS + 1], names[HOPS + 1 :]
    solved = f"{GRASS}{''.join(chain(shown, other))}{GRASS}{asked(other)} {', '.join(shown)}.\n\n"
    task = "Follow the assignments of variables that are hidden in a text.\n"
    head = source.ids(task + solved)
    facts = [source.ids(line) for line in chain(mine, value)]
    spare = source.room([head, *facts], asked(value), length)
    noise = source.ids(GRASS)
    filler = noise.repeat(-(-spare // len(noise)))[:spare]
    return source.finished([head, *_woven(rng, filler, facts)], asked(value), mine, length)


def _most(fits, least: int, most: int) -> int:
    """The largest n of `least` to `most` that fits, if every smaller one does. 0: not even `least` fits."""
    if not fits(least):
        return 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def frequencies(length: int) -> tuple[int, int]:
    """How often common and other words are in the list of cwe: RULER's 30 and 3 from 4K tokens on."""
    common = min(30, max(4, length // 128))
    return common, max(1, common // 10)


def _common(source: Source, rng: random.Random, length: int) -> Example:
    often, seldom = frequencies(length)
    common = source.some_words(rng, COMMON)
    shown = source.some_words(rng, COMMON + 5, common)

    def numbered(words: list[str]) -> str:
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))

    question = f"\nQuestion: Which {COMMON} words are the most frequent ones of the list?\nAnswer:"
    question += f" The {COMMON} most frequent words are"
    small = 2 * shown[:COMMON] + shown[COMMON:]
    rng.shuffle(small)
    solved = f"{numbered(small)}{question} {', '.join(shown[:COMMON])}.\n\n"
    head = source.ids("In each list some words are more frequent than others. Find them.\n" + solved)
    spare = source.room([head], question, length)
    others = source.some_words(rng, min(len(source.words) // 2, length // (3 * seldom)), [*common, *shown])

    def listed(count: int) -> Tensor:
        words = often * common + seldom * others[:count]
        random.Random(count).shuffle(words)
        return source.ids(numbered(words))

    count = _most(lambda n: len(listed(n)) <= spare, 1, len(others))
    if not count:
        raise InputError(f"cwe: {length} tokens are too few for the task")
    return source.finished([head, listed(count)], question, common, length)


def _frequent(source: Source, rng: random.Random, length: int) -> Example:
    coded: list[str] = []
    while len(coded) < max(8, length // 50):
        word = "".join(rng.choices(LETTERS, k=6))
        if word not in coded and word not in source.text:
            coded.append(word)
    head = source.ids(f"Find the most frequent coded words of a text. The word {NOISE} does not count.\n")
    question = (
        f"\nQuestion: Which {FREQUENT} coded words are the most frequent ones?\n"
        f"Answer: The {FREQUENT} most frequent coded words are"
    )
    spare = source.room([head], question, length)

    def written(first: int) -> Tensor:
        """The noise `first` times, and the k-th coded word first / (k + 1)^2 times (RULER's alpha is 2)."""
        words = [NOISE] * first
        for rank, word in enumerate(coded, 2):
            words += [word] * (first // rank**2)
        random.Random(first).shuffle(words)
        return source.ids(" ".join(words))

    # From 40 on, the words that are asked and the next one all have different frequencies.
    first = _most(lambda n: len(written(n)) <= spare, 40, length)
    if not first:
        raise InputError(f"fwe: {length} tokens are too few for the task")
    return source.finished([head, written(first)], question, coded[:FREQUENT], length)


# -- answers


@torch.no_grad()
def answer(
    model, tokenizer, methods: list[Method], examples: list[Example], size: int, most: int
) -> list[tuple[list[str], float, float]]:
    """What a model says to prompts of one length, at most `most` tokens each, and what its caches compressed.

    Returns for each method the answers, and the compressed and evicted tokens before the last step of the
    prompts, means over rows. Where queries choose, tokens that they read stand for the compressed ones. Rows
    stop at the end of the text. All stop when every answer contains all references, because more tokens
    cannot change a score. The methods are a group of `of_one_prompt`.

    Raises `NothingCompressed` for a cache that did nothing to the prompt.
    """
    prompts = torch.stack([e.prompt for e in examples]).to(model.device)
    length = prompts.shape[1]
    context = prompts[:, : length - STEP]
    asked = prompts[:, length - STEP :]
    return [
        _answer(model, tokenizer, m, cache, examples, asked, most)
        for m, cache in prefilled(model, methods, context, length, size)
    ]


def _answer(model, tokenizer, m: Method, cache, examples, asked: Tensor, most: int):
    """The answer through the cache of a prompt, whose last tokens are `asked`."""
    step = lambda ids: in_parts(model, cache, ids, m.most)[:, -1]  # noqa: E731
    read, evicted = float(compressed_tokens(cache)), float(evicted_tokens(cache))
    check(m, read, evicted)
    logits = step(asked)
    ends, said = ends_of_text(model), torch.empty(len(examples), 0, dtype=torch.int64)
    while True:
        said = torch.cat([said, logits.argmax(-1, keepdim=True).cpu()], dim=1)
        words = [tokenizer.decode(until_end(row, ends), skip_special_tokens=True) for row in said]
        over = [
            score(told, e.answers) == 1 or len(until_end(row, ends)) < len(row)
            for told, e, row in zip(words, examples, said)
        ]
        if all(over) or said.shape[1] >= most:
            return words, read if m.most is None else read_by_choice(m, cache), evicted
        logits = step(said[:, -1:].to(model.device))


def ends_of_text(model) -> set[int]:
    """Tokens that end a text of the model."""
    known = model.generation_config.eos_token_id
    return set() if known is None else {known} if isinstance(known, int) else set(known)


def until_end(row: Tensor, ends: set[int]) -> Tensor:
    """Tokens before the first end of the text."""
    where = [i for i, token in enumerate(row.tolist()) if token in ends]
    return row[: where[0]] if where else row


def run(
    model,
    tokenizer,
    methods,
    tasks,
    lengths,
    trials: int,
    size: int,
    batch: int,
    text: str,
    most: int | None = None,
    say=print,
    keep=lambda results: None,
) -> list[Result]:
    """Scores of every method in every task, at every length, over seeds 0 to `trials` - 1.

    `most`: tokens of an answer; None: as many as in RULER.
    """  # fmt: skip
    source, results = Source(tokenizer, text, max(lengths)), []
    for task in tasks:
        for length in lengths:
            examples = [example(source, task, length, seed) for seed in range(trials)]
            for group in of_one_prompt(methods, length - STEP, size):
                started = time.perf_counter()
                new = min(NEW[task], most or NEW[task])
                found = measured_in(model, tokenizer, group, task, length, examples, size, batch, new)
                results += found
                for r in found:
                    told = r.failed or f"{r.score:.2f}, {r.read:.0f} compressed tokens"
                    say(f"  {task} {length}, {r.method}: {told}, {time.perf_counter() - started:.1f} s")
                keep(results)
    return results


def measured_in(
    model, tokenizer, methods: list[Method], task: str, length: int, examples, size: int, batch: int, new: int
) -> list[Result]:
    """Methods that share their prefills over the examples of a task, in batches."""
    results = [Result(task, length, m.name) for m in methods]
    read, evicted = ([[] for _ in methods] for _ in range(2))

    def answered() -> None:
        for part in chunks(len(examples), batch if all(m.rowwise for m in methods) else 1):
            answers = answer(model, tokenizer, methods, examples[part], size, new)
            for i, (said, seen, gone) in enumerate(answers):
                results[i].scores += [score(words, e.answers) for words, e in zip(said, examples[part])]
                read[i] += [seen] * len(said)
                evicted[i] += [gone] * len(said)

    _, failed = runs.attempt(model, answered)
    if failed is not None:
        return [Result(task, length, m.name, failed=failed) for m in methods]
    for r, seen, gone in zip(results, read, evicted, strict=True):
        r.trials, r.score = len(r.scores), statistics.mean(r.scores)
        r.full = statistics.mean(float(x == 1) for x in r.scores)
        r.read, r.evicted = statistics.mean(seen), statistics.mean(gone)
    return results


# -- what is shown


def table(results: list[Result]) -> str:
    """Markdown: scores by task, a block for each length."""
    blocks = []
    for length in dict.fromkeys(r.length for r in results):
        rows = [r for r in results if r.length == length]
        tasks = list(dict.fromkeys(r.task for r in rows))
        trials = max(r.trials for r in rows)
        head = ["config", *tasks, "mean", "compressed tokens before the question"]
        lines = [f"**{length} tokens, {trials} example{'s' * (trials > 1)} a task**", ""]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name in dict.fromkeys(r.method for r in rows):
            mine = {r.task: r for r in rows if r.method == name}
            if failed := next((r.failed for r in mine.values() if r.failed), None):
                lines.append(f"| {name} | {failed} |" + " |" * (len(head) - 2))
                continue
            cells = [f"{mine[task].score:.2f}" if task in mine else "-" for task in tasks]
            mean, read = (statistics.mean(getattr(r, f) for r in mine.values()) for f in ("score", "read"))
            lines.append(f"| {name} | " + " | ".join([*cells, f"{mean:.2f}", f"{read:.0f}"]) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def stored(path: Path) -> tuple[dict, list[Result]]:
    """A report that `--json` wrote, and its results."""
    report = json.loads(path.read_text(encoding="utf-8"))
    return report, parsed(report)


def parsed(report: dict) -> list[Result]:
    """The results of a report."""
    names = {f.name for f in fields(Result)}
    return [Result(**{k: x for k, x in r.items() if k in names}) for r in report["results"]]


def headline(report: dict) -> str:
    """One line about a run."""
    most = f"at most {report['most']} tokens an answer" if report["most"] else "answers as long as in RULER"
    return (
        f"{report['model']}, {report['dtype']}, {report['device']}, torch {report['torch']}, transformers "
        f"{report['transformers']}; around text of {report['text']}, prompts in chunks of "
        f"{report['chunk']}, {most}"
    )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report, results = stored(args.show) if args.show else measured(args)
    print(f"\n{headline(report)}\n\n{table(results)}")
    return 0


def measured(args: argparse.Namespace) -> tuple[dict, list[Result]]:
    """Load, run, and record the circumstances. The file of `--json` is written after every method."""
    record = runs.Record("ruler", args, chunk=args.chunk, most=args.most)
    results = run(
        record.model, record.tokenizer, args.methods, args.tasks, args.lengths, args.trials, args.chunk,
        args.batch, record.text, args.most, runs.say, record.keep,
    )  # fmt: skip
    return record.report, results


if __name__ == "__main__":
    raise SystemExit(main())
