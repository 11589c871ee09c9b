"""Facts in long texts: `fade needles`.

fade needles --model meta-llama/Llama-3.1-8B-Instruct --lengths 8192

There are three tasks. Each is a prompt of an exact number of tokens, with a five-digit code that nothing
else reveals:

- passkey (arXiv 2305.16300): one sentence with the code among sentences that repeat;
- multikey (after RULER, arXiv 2404.06654): four codes of four people in a real text; the question asks for
  one;
- recall: the start states the code, and it is asked for and answered; after a long detour it is asked for
  again.

The prompt is fed in chunks through the cache. Question and answer follow as one more step, which reads
everything before it as the cache kept it. An example counts if every token of the answer is the best one.
Greedy decoding would then have produced it. The table also shows the scores of the uncompressed model.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fade_fast.errors import InputError

from . import pictures, runs
from .methods import COMPRESSES, Method, compressed_tokens
from .parsers.needles import arguments
from .streams import NothingCompressed, in_parts, of_one_prompt, prefilled, read_by_choice

NAMES = ("Alice", "Bruno", "Clara", "David")
GRASS = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Example:
    """A prompt: `context` and `question` are fed, and `answer` should follow; int64 [n] each."""

    context: Tensor
    question: Tensor
    answer: Tensor


@dataclass
class Result:
    """Scores of a method in a task, at a length and a depth.

    Attributes:
        depth: percent of the text before the fact; always 0 for "recall".
        exact: share of examples answered in full.
        tokens: share of answer tokens that are the best ones.
        nll: of an answer, mean over examples, in nats.
        read: compressed tokens that the step of the question could read, mean over examples and layers.
    """

    task: str
    length: int
    depth: int
    method: str
    trials: int = 0
    exact: float | None = None
    tokens: float | None = None
    nll: float | None = None
    read: float | None = None
    failed: str | None = None


def example(tokenizer, task: str, length: int, depth: int, seed: int, text: Tensor) -> Example:
    """One prompt of `length` tokens, context and question together. The same `seed` gives the same prompt.

    `text`: tokens of a real text, for tasks that put one around the fact.
    """
    rng = random.Random(f"{task} {length} {depth} {seed}")
    codes = [str(rng.randrange(10_000, 100_000)) for _ in NAMES]

    def ids(words: str) -> Tensor:
        return tokenizer(words, return_tensors="pt", add_special_tokens=False).input_ids[0]

    start = ids(tokenizer.bos_token) if tokenizer.bos_token else torch.empty(0, dtype=torch.int64)
    if task == "passkey":
        head = ids("There is important information hidden in a lot of irrelevant text. Remember it.")
        facts = [ids(f" The pass key is {codes[0]}. Remember it. {codes[0]} is the pass key.")]
        asked = ids(" What is the pass key that was hidden in the text above? The pass key is")
        filler = ids(GRASS)
        filler = filler.repeat(-(-length // len(filler)))
    else:
        first = rng.randrange(max(1, len(text) - length))
        filler, head = text[first : first + length], ids("\n")
        told = [
            ids(f"\nThe secret code of {name} is {code}. Remember it.\n") for name, code in zip(NAMES, codes)
        ]
        question = f"What is the secret code of {NAMES[0]}? The secret code of {NAMES[0]} is"
        asked, facts = ids(f"\nNow answer a question about the text above. {question}"), told
        if task == "recall":
            head = torch.cat([told[0], ids(f"{question} {codes[0]}.\n")])
            facts = []
    spare = length - len(start) - len(head) - len(asked) - sum(map(len, facts))
    if spare < 0 or spare > len(filler):
        raise InputError(f"{task}: {length} tokens are too few for the task, or more than the text has")
    # The asked fact at `depth`, the others anywhere.
    places = [round(spare * depth / 100), *(rng.randrange(spare + 1) for _ in facts[1:])]
    parts = [start, head, *woven(filler[:spare], facts, places)]
    return Example(torch.cat(parts), asked, ids(f" {codes[0]}"))


def woven(filler: Tensor, facts: list[Tensor], places: list[int]) -> list[Tensor]:
    """The parts of `filler`, with each of `facts` at its place. Facts of one place stay in their order."""
    parts, last = [], 0
    for place, fact in sorted(zip(places, facts), key=lambda pair: pair[0]):
        parts += [filler[last:place], fact]
        last = place
    return [*parts, filler[last:]]


@torch.no_grad()
def ask(model, methods: list[Method], examples: list[Example], size: int) -> list[tuple]:
    """For each method: which answer tokens are the best ones, bool [N, a]; nll of answers [N]; number of
    compressed tokens that a query read.

    All examples have the same number of tokens in context, question and answer. The methods are a group of
    `of_one_prompt`.
    """
    context, question, answer = (
        torch.stack([getattr(e, part) for e in examples]).to(model.device)
        for part in ("context", "question", "answer")
    )
    length, found = context.shape[1] + question.shape[1], []
    for m, cache in prefilled(model, methods, context, length, size):
        read = float(compressed_tokens(cache))
        if m.does == COMPRESSES and not read > 0:
            raise NothingCompressed(f"{m.name}: the question found no compressed token: use longer prompts")
        step = torch.cat([question, answer[:, :-1]], dim=1)
        logits = in_parts(model, cache, step, m.most)[:, -answer.shape[1] :]
        if m.most is not None:
            read = read_by_choice(m, cache)
        log_p = logits.float().log_softmax(-1)
        nll = -log_p.gather(-1, answer[..., None])[..., 0].sum(-1)
        found.append((log_p.argmax(-1) == answer, nll, read))
    return found


def run(
    model,
    tokenizer,
    methods,
    tasks,
    lengths,
    depths,
    trials: int,
    size: int,
    batch: int,
    text: str,
    say=print,
    keep=lambda results: None,
) -> list[Result]:
    """Scores of every method at every depth and length of every task."""
    words, results = tokenizer(text[: 40 * max(lengths)], verbose=False).input_ids, []
    words = torch.tensor(words)
    for task in tasks:
        for length in lengths:
            where = (0,) if task == "recall" else depths
            n = trials * len(depths) if task == "recall" else trials
            cells = [(d, example(tokenizer, task, length, d, i, words)) for d in where for i in range(n)]
            for group in of_one_prompt(methods, len(cells[0][1].context), size):
                started = time.perf_counter()
                found = score(model, group, task, length, cells, size, batch)
                results += found
                for m in group:
                    mine = [r for r in found if r.method == m.name]
                    best = [r.exact for r in mine if r.exact is not None]
                    told = f"{sum(best) / len(best):.2f} exact" if best else mine[0].failed
                    say(f"  {task} {length}, {m.name}: {told}, {time.perf_counter() - started:.1f} s")
                keep(results)
    return results


def score(model, methods: list[Method], task: str, length: int, cells, size: int, batch: int) -> list[Result]:
    """Methods that share their prefills over `(depth, example)` pairs, in batches."""
    results = {(m.name, d): Result(task, length, d, m.name) for m in methods for d, _ in cells}
    sums: dict[tuple[str, int], list] = {key: [] for key in results}
    step = batch if all(m.rowwise for m in methods) else 1

    def asked() -> None:
        for i in range(0, len(cells), step):
            part = cells[i : i + step]
            found = ask(model, methods, [e for _, e in part], size)
            for m, (right, nll, read) in zip(methods, found, strict=True):
                for (d, _), row, x in zip(part, right.tolist(), nll.tolist()):
                    sums[m.name, d].append((all(row), sum(row) / len(row), x, read))

    _, failed = runs.attempt(model, asked)
    if failed is not None:
        return [Result(task, length, d, name, failed=failed) for name, d in results]
    for key, r in results.items():
        r.trials = len(sums[key])
        r.exact, r.tokens, r.nll, r.read = (sum(column) / r.trials for column in zip(*sums[key]))
    return list(results.values())


# -- what is shown


def table(results: list[Result]) -> str:
    """Markdown: exact matches by depth, a block for each task and length."""
    blocks = []
    for task, length in dict.fromkeys((r.task, r.length) for r in results):
        rows = [r for r in results if (r.task, r.length) == (task, length)]
        depths = sorted({r.depth for r in rows})
        trials = max(r.trials for r in rows)
        head = ["config", *(f"{d} %" for d in depths), "mean", "nll of an answer"]
        lines = [f"**{task}, {length} tokens, {trials} examples a cell**", ""]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name in dict.fromkeys(r.method for r in rows):
            mine = {r.depth: r for r in rows if r.method == name}
            if failed := next((r.failed for r in mine.values() if r.failed), None):
                lines.append(f"| {name} | {failed} |" + " |" * (len(head) - 2))
                continue
            cells = [f"{mine[d].exact:.2f}" for d in depths]
            mean, nll = (sum(getattr(mine[d], f) for d in depths) / len(depths) for f in ("exact", "nll"))
            lines.append(f"| {name} | " + " | ".join([*cells, f"{mean:.2f}", f"{nll:.2f}"]) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def stored(path: Path) -> tuple[dict, list[Result]]:
    report = json.loads(path.read_text(encoding="utf-8"))
    return report, [Result(**r) for r in report["results"]]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report, results = stored(args.show) if args.show else measured(args)
    print(f"\n{report['model']}, {report['dtype']}, {report['device']}\n\n{table(results)}")
    if args.plot:
        pictures.heat_map(results, args.plot)
    return 0


def measured(args: argparse.Namespace) -> tuple[dict, list[Result]]:
    """Load, run, and record the circumstances. The file of `--json` is written after every method."""
    record = runs.Record("needles", args, chunk=args.chunk)
    results = run(
        record.model, record.tokenizer, args.methods, args.tasks, args.lengths, args.depths, args.trials,
        args.chunk, args.batch, record.text, runs.say, record.keep,
    )  # fmt: skip
    return record.report, results


if __name__ == "__main__":
    raise SystemExit(main())
