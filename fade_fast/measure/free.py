"""Free-running quality: `fade quality --free`.

`fade quality` feeds a given text, which hides what accumulates. Here each method writes: it continues a
prompt greedily and reads its own text through its cache. The uncompressed model reads that text beside it. So
both distributions of a token have the same prefix. Four numbers come of it:

- *length*: tokens until the text leaves uncompressed greedy decoding by more than a near-tie. A token leaves
  if its logit in the uncompressed model is more than `--margin` below that model's best logit. Smaller
  distances are near-ties, which rounding can decide, too: at a distance of 0.1, the better token has 1.1
  times the probability. If no token leaves, the length is that of the whole text;
- *same*: tokens until the text differs from that of the uncompressed model at all;
- *near*: the share of all tokens within the margin;
- *KL*: the mean KL divergence of the next-token distribution from the uncompressed one, along the own text.

Tokens that end a text are never chosen, as under `min_new_tokens` of generate(). The tasks of
`fade ruler` give the share of right answers, since those are written freely, too.

Every method of methods.py can run. The cache counts the compressed tokens that it reads while it
writes. A method that reads none, or that should evict and drops none, is an error and not a result.
"""

import argparse
import copy
import functools
import json
import math
import random
import statistics
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from fade_fast.errors import InputError
from fade_fast.hf.models import CACHE_NAME

from . import ruler, runs
from .methods import Method, compressed_tokens, evicted_tokens, method
from .parsers.free import MARGIN, arguments
from .streams import check, stream

STRIDE = 32  # tokens that the uncompressed model reads at a time


@dataclass
class Result:
    """The texts of a method. Lists have an element for each prompt.

    Attributes:
        does: what the method does to tokens, see `methods`.
        length, same, near, kl: see the module.
        gaps: (index of a token, distance of its logit below the best one) where that is not 0, so that other
            margins can be looked at.
        read: compressed tokens that a step read, mean over steps and layers.
        evicted: tokens of a prompt and its text that were lost at the end.
        failed: the reason for missing numbers.
    """

    method: str
    does: str
    config: str = ""
    failed: str | None = None
    length: list[int] = field(default_factory=list)
    same: list[int] = field(default_factory=list)
    near: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    gaps: list[list] = field(default_factory=list)
    read: float | None = None
    evicted: float | None = None
    seconds: float | None = None


@dataclass
class Text:
    """What a method wrote for prompts [B, L], and how the uncompressed model sees it; [B, n] each."""

    tokens: Tensor  # int64
    gaps: Tensor  # float32, of the logit of each token below the best one
    kl: Tensor  # float64, in nats
    read: float
    evicted: float
    config: str


# -- the measurement


def prompts(tokenizer, text: str, count: int, length: int, seed: int) -> Tensor:
    """Pieces of the text at random places: int64 [count, length]. The seed decides the places.

    Raises `InputError` if the text is too short for different ones.
    """
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)
    places = range(0, len(ids) - length + 1)
    if len(places) < count:
        raise InputError(f"the text has {len(ids)} tokens: {count} prompts of {length} need more")
    starts = random.Random(f"{count} {length} {seed}").sample(places, count)
    return torch.stack([ids[i : i + length] for i in starts])


@dataclass
class Exact:
    """The uncompressed model after a prompt: its cache, and the logits [B, 1, V] of the next token."""

    cache: object
    logits: Tensor


@torch.no_grad()
def after(model, ids: Tensor, size: int) -> Exact:
    """Feed prompts [B, L] to the uncompressed model."""
    cache = method("dynamic")(model, ids.shape[1])
    for logits in stream(model, cache, ids, size):
        last = logits[:, -1:]
    return Exact(cache, last)


@torch.no_grad()
def write(model, m: Method, ids: Tensor, new: int, size: int, exact: Exact) -> Text:
    """`new` tokens that a method writes after prompts [B, L]. `exact` is unchanged.

    Raises `NothingCompressed` for a cache that did nothing while the text was written.
    """
    cache, theirs, carried = m(model, ids.shape[1] + new), copy.deepcopy(exact.cache), exact.logits
    for logits in stream(model, cache, ids, size):
        last = logits[:, -1:]
    ends = torch.tensor(sorted(ruler.ends_of_text(model)), dtype=torch.int64, device=ids.device)
    tokens, gaps, kl, read = [], [], [], []
    while (done := sum(x.shape[1] for x in tokens)) < new:
        read.append(float(compressed_tokens(cache)))
        ours, said = [], []
        for _ in range(min(STRIDE, new - done)):
            ours.append(last)
            said.append(last.index_fill(-1, ends, -math.inf).argmax(-1))
            step = model(input_ids=said[-1], **{CACHE_NAME: cache}, use_cache=True)
            last = step.logits[:, -1:]
        said = torch.cat(said, dim=1)
        step = model(input_ids=said, **{CACHE_NAME: theirs}, use_cache=True)  # attached or not: the same
        seen, carried = torch.cat([carried, step.logits[:, :-1]], dim=1), step.logits[:, -1:]
        tokens.append(said)
        gaps.append(behind(seen.index_fill(-1, ends, -math.inf), said))
        kl.append(divergence(torch.cat(ours, dim=1), seen))
    gone = float(evicted_tokens(cache))
    check(m, statistics.mean(read), gone)
    config = str(getattr(cache, "fade_config", ""))
    return Text(*(torch.cat(x, dim=1) for x in (tokens, gaps, kl)), statistics.mean(read), gone, config)


def behind(logits: Tensor, tokens: Tensor) -> Tensor:
    """How far the logits of `tokens` [B, n] are below the best ones of `logits` [B, n, V]: float32 [B, n]."""
    logits = logits.float()
    return logits.amax(-1) - logits.gather(-1, tokens[..., None])[..., 0]


def divergence(ours: Tensor, exact: Tensor) -> Tensor:
    """KL(exact || ours) of logits [B, n, V], in nats: float64 [B, n]."""
    ours, exact = (x.double().log_softmax(-1) for x in (ours, exact))
    return (exact.exp() * (exact - ours)).sum(-1)


def until(bad: Tensor) -> list[int]:
    """How many elements of each row of `bad` [B, n] come before the first true one."""
    return (bad.cumsum(-1) == 0).sum(-1).tolist()


def run(
    model,
    methods: list[Method],
    ids: Tensor,
    new: int,
    size: int,
    batch: int,
    margin: float = MARGIN,
    say=print,
    keep=lambda results: None,
) -> list[Result]:
    """Let every method write `new` tokens after prompts `ids` [N, L], which are fed `size` tokens at a time.

    `margin`: of a near-tie, in logits. `keep` is called after every method with the results so far.
    """  # fmt: skip
    results, dynamic = {m.name: Result(m.name, m.does, seconds=0.0) for m in methods}, method("dynamic")
    for rows in range(0, len(ids), batch):
        part = ids[rows : rows + batch].to(model.device)
        exact = after(model, part, size)
        plain = write(model, dynamic, part, new, size, exact)
        work = functools.partial(_by_rows, model, ids=part, new=new, size=size, exact=exact, plain=plain)
        for m, r, written in runs.each(model, methods, results, work):
            _add(r, written, plain.tokens, margin)
            say(
                f"  {m.name}: {len(r.length)} prompts, {r.seconds:.1f} s, lengths {r.length}, "
                f"{r.read:.0f} compressed tokens read"
            )
            keep(list(results.values()))
    return list(results.values())


def _by_rows(model, m: Method, ids: Tensor, new: int, size: int, exact: Exact, plain: Text) -> list[Text]:
    """Texts of a batch; of single rows, if the method mixes rows. `plain` is that of "dynamic"."""
    if m.name == "dynamic":
        return [plain]
    if m.rowwise or len(ids) == 1:
        return [write(model, m, ids, new, size, exact)]
    rows = [ids[i : i + 1] for i in range(len(ids))]
    return [write(model, m, row, new, size, after(model, row, size)) for row in rows]


def _add(r: Result, written: list[Text], plain: Tensor, margin: float) -> None:
    """Add a batch to a result. `plain` is the uncompressed text [B, n]."""
    before, share = len(r.length), sum(len(t.tokens) for t in written)
    tokens, gaps, kl = (torch.cat([getattr(t, name) for t in written]) for name in ("tokens", "gaps", "kl"))
    r.length += until(gaps > margin)
    r.same += until(tokens != plain)
    r.near += (gaps <= margin).double().mean(-1).tolist()
    r.kl += kl.mean(-1).tolist()
    r.gaps += [[(i, round(x, 4)) for i, x in enumerate(row) if x] for row in gaps.tolist()]
    for name in ("read", "evicted"):
        now = statistics.mean(getattr(t, name) for t in written)
        setattr(r, name, (now * share + (getattr(r, name) or 0.0) * before) / (before + share))
    r.config = written[0].config


# -- what is shown

HEAD = (
    "config", "length", "never left", "same", "near", "KL along its own text", "right answers",
    "compressed tokens a step reads",
)  # fmt: skip


def table(results: list[Result], answers: list[ruler.Result], new: int) -> str:
    """Markdown, with one row for each method. Lengths are means, ± the standard error over prompts."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for r in results:
        if r.failed:
            lines.append(f"| {r.method} | {r.failed} |" + " |" * (len(HEAD) - 2))
            continue
        n = len(r.length)
        spread = f" ± {statistics.stdev(r.length) / math.sqrt(n):.0f}" if n > 1 else ""
        whole = sum(x == new for x in r.length)
        scores = [a.score for a in answers if a.method == r.method and a.score is not None]
        right = f"{statistics.mean(scores):.2f}" if scores else "-"
        lines.append(
            f"| {r.method} | {statistics.mean(r.length):.0f}{spread} | {whole} of {n} "
            f"| {statistics.mean(r.same):.0f} | {statistics.mean(r.near):.3f} | {statistics.mean(r.kl):.5f} "
            f"| {right} | {r.read:.0f} |"
        )
    return "\n".join(lines)


def stored(path: Path) -> tuple[dict, list[Result], list[ruler.Result]]:
    """A report that `--json` wrote, its results, and those of the tasks."""
    return parsed(json.loads(path.read_text(encoding="utf-8")))


def parsed(report: dict) -> tuple[dict, list[Result], list[ruler.Result]]:
    """A report, its results, and those of the tasks."""
    names = {f.name for f in fields(Result)}
    results = [Result(**{k: x for k, x in r.items() if k in names}) for r in report["results"]]
    return report, results, [ruler.Result(**r) for r in report["answers"]]


def show(report: dict) -> str:
    """Circumstances and table of a report."""
    report, results, answers = parsed(report)
    count = max((len(r.length) for r in results), default=0)
    told = (
        f"{report['model']}, {report['dtype']}, {report['device']}, torch {report['torch']}, transformers "
        f"{report['transformers']}; {count} prompts of {report['prompt']} tokens of {report['text']} (seed "
        f"{report['seed']}), {report['new']} new tokens, near-ties within {report['margin']:g}"
    )
    if answers:
        trials, length = max(a.trials for a in answers), answers[0].length
        tasks = ", ".join(dict.fromkeys(a.task for a in answers))
        told += f"; answers to {tasks} of {length} tokens, {trials} example{'s' * (trials > 1)} each"
    return f"{told}.\n\n{table(results, answers, report['new'])}"


def main(argv: list[str]) -> int:
    args = arguments(argv)
    report = json.loads(args.show.read_text(encoding="utf-8")) if args.show else measured(args)
    print("\n" + show(report))
    return 0


def measured(args: argparse.Namespace) -> dict:
    """Load, run, and record the circumstances. The file of `--json` is written after every method."""
    record = runs.Record(
        "free", args, indent=None, prompt=args.length, new=args.new, margin=args.margin, seed=args.seed,
        chunk=args.chunk, results=[], answers=[],
    )  # fmt: skip
    model, tokenizer, text = record.model, record.tokenizer, record.text
    ids = prompts(tokenizer, text, args.prompts, args.length, args.seed)
    found = run(
        model, args.methods, ids, args.new, args.chunk, args.batch, args.margin, runs.say, record.keep
    )
    record.keep(found)
    if args.tasks:
        answers = ruler.run(
            model, tokenizer, args.methods, args.tasks, [args.task_length], args.trials, 512, args.batch,
            text, None, runs.say, lambda found: record.keep(found, "answers"),
        )  # fmt: skip
        record.keep(answers, "answers")
    return json.loads(json.dumps(record.report))
