"""Perplexity through real caches: `fade quality`.

fade quality --model meta-llama/Llama-3.1-8B --text mine.txt

A text is fed to the model in chunks, through the cache. Every chunk attends to itself and to the tokens
that the cache kept. So everything except sinks, recent tokens and the chunk itself is read compressed, as
in generation. Every next-token distribution is scored against the text (perplexity) and against an
uncompressed `DynamicCache` that got the same chunks (KL, top-1). The cache counts the compressed tokens
that the queries read. A method that reads none, or that should evict and drops none, is an error and not a
result. Bytes are those of every storage of a cache made for 8192 bfloat16 tokens, when it holds them.

`--free` lets every method write a text of its own instead: see free.py, whose options it has then.

`--json FILE` writes all numbers, and `--show FILE` prints the tables of such files. `--markdown FILE` and
`--plot FILE` write table and picture. docs/quality.md explains the method.
"""

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

import fade_fast

from . import free, memory, pictures, runs, texts
from .methods import Method, evicted_tokens, method
from .parsers.quality import arguments
from .streams import KEPT, Reader, Uncompressed, check, chunks, read_by_choice, stream

AT = 8192  # tokens in the caches whose bytes are counted


@dataclass
class Result:
    """The measurements of a method. None: not measured.

    Attributes:
        method: its name.
        config: the configuration of our cache.
        failed: the reason for missing numbers.
        nll, kl: of every window, mean over its scored tokens, in nats.
        top1: of every window, share of scored tokens whose best next token is that of the uncompressed model.
        read: compressed tokens that a query read, mean over queries and layers.
        evicted: tokens of a window that were lost at its end.
        bytes, dense: allocated by a cache made for `AT` bfloat16 tokens, and by a `DynamicCache`.
        seconds: for all windows.
    """

    method: str
    does: str
    config: str = ""
    failed: str | None = None
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    read: float | None = None
    evicted: float | None = None
    bytes: int | None = None
    dense: int | None = None
    seconds: float | None = None


@dataclass
class Summary:
    """A row of the table. Ratios are to the uncompressed run; `se` is the standard error over windows."""

    perplexity: float
    ratio: float
    ratio_se: float | None
    kl: float
    kl_se: float | None
    top1: float
    bytes_per_token: float | None
    smaller: float | None


# -- the measurement


class Score:
    """Sums of each row of a batch, float64 on the device."""

    def __init__(self, rows: int, device):
        self.nll, self.kl, self.top1 = torch.zeros(3, rows, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, logits: Tensor, exact: Tensor, targets: Tensor) -> None:
        """Score `logits` [B, n, V] against `targets` [B, n or n - 1] and uncompressed `exact` [B, n, V]."""
        n = targets.shape[1]  # the token after the window is not known
        ours, theirs = (x[:, :n].float().log_softmax(-1) for x in (logits, exact))
        self.nll -= ours.gather(-1, targets[..., None])[..., 0].sum(-1, dtype=torch.float64)
        self.top1 += (ours.argmax(-1) == theirs.argmax(-1)).sum(-1)
        self.kl += (theirs.exp() * (theirs - ours)).sum(-1).sum(-1, dtype=torch.float64)
        self.count += n

    def means(self) -> tuple[list[float], list[float], list[float]]:
        return tuple((x / self.count).tolist() for x in (self.nll, self.kl, self.top1))


def measure(model, m: Method, ids: Tensor, exact: Iterable[Tensor], size: int) -> tuple:
    """(nll, kl, top1) of each row of `ids` [B, L], compressed tokens read, tokens evicted, configuration.

    `exact`: the uncompressed logits, chunk by chunk. Raises `NothingCompressed`, or `Unavailable`.
    """
    if m.name == "dynamic":  # the uncompressed logits are its own
        sums = Score(len(ids), ids.device)
        for where, logits in zip(chunks(ids.shape[1], size), exact):
            sums.add(logits, logits, ids[:, 1:][:, where])
        return *sums.means(), 0.0, 0.0, ""
    groups = [slice(0, len(ids))] if m.rowwise else [slice(i, i + 1) for i in range(len(ids))]
    score, read, gone, config = ([], [], []), [], [], ""
    for rows in groups:
        part = ids[rows]
        cache, reader, sums = m(model, ids.shape[1]), Reader(), Score(len(part), ids.device)
        targets = part[:, 1:]
        for where, theirs, logits in zip(
            chunks(ids.shape[1], size), exact, stream(model, cache, part, size, reader, m.most)
        ):
            sums.add(logits, theirs[rows], targets[:, where])
        for all_rows, mine in zip(score, sums.means()):
            all_rows.extend(mine)
        read.append(reader.mean() if m.most is None else read_by_choice(m, cache))
        gone.append(evicted_tokens(cache))
        config = str(getattr(cache, "fade_config", ""))
    check(m, statistics.mean(read), statistics.mean(gone))
    return *score, statistics.mean(read), statistics.mean(gone), config


def run(
    model,
    methods: list[Method],
    ids: Tensor,
    size: int,
    batch: int,
    weigh: bool = True,
    say=print,
    compiled: bool = False,
    keep=lambda results: None,
    kept: int = KEPT,
) -> list[Result]:
    """Every method over every window. Uncompressed logits are computed once per batch, if they can be kept.

    Args:
        ids: windows [N, L]; `size` tokens of `batch` windows are fed at a time.
        weigh: whether to weigh caches of `AT` tokens, too.
        say: called with each line of progress.
        compiled: whether kernels run compiled on a GPU, as under `generate()`.
        keep: called after every batch with the results so far.
        kept: most bytes of uncompressed logits that are kept. If they take more, they are computed for every
            method, and no more than a chunk of them exists at a time.
    """
    results = {m.name: Result(m.name, m.does, seconds=0.0) for m in methods}
    dynamic = method("dynamic")
    for first in range(0, len(ids), batch):
        part = ids[first : first + batch].to(model.device)
        fade_fast.detach(model)
        exact = Uncompressed(model, part, size, kept)
        work = functools.partial(measure, model, ids=part, exact=exact, size=size)
        for m, r, found in runs.each(model, methods, results, work, compiled):
            nll, kl, top1, read, evicted, r.config = found
            share = len(part) / (len(r.nll) + len(part))
            r.read = read * share + (r.read or 0.0) * (1 - share)
            r.evicted = evicted * share + (r.evicted or 0.0) * (1 - share)
            r.nll, r.kl, r.top1 = r.nll + nll, r.kl + kl, r.top1 + top1
            say(f"  {m.name}: {len(r.nll)} windows, {r.seconds:.1f} s, {r.read:.0f} compressed tokens read")
        keep(list(results.values()))
    if weigh:
        dense = memory.filled_bytes(model, dynamic, AT)
        for m in methods:
            if not results[m.name].failed:
                held = memory.filled_bytes(model, m, AT, reserved=True)
                results[m.name].bytes, results[m.name].dense = held, dense
    return list(results.values())


# -- what is shown


def summary(r: Result, exact_nll: list[float]) -> Summary:
    """The row of a result, from the uncompressed nll of each window."""
    more = [mine - theirs for mine, theirs in zip(r.nll, exact_nll)]
    ratio, n = math.exp(statistics.mean(more)), len(more)
    error = lambda x: statistics.stdev(x) / math.sqrt(n) if n > 1 else None  # noqa: E731
    se = error(more)
    return Summary(
        perplexity=math.exp(statistics.mean(r.nll)),
        ratio=ratio,
        ratio_se=None if se is None else ratio * se,
        kl=statistics.mean(r.kl),
        kl_se=error(r.kl),
        top1=statistics.mean(r.top1),
        bytes_per_token=r.bytes and r.bytes / AT,
        smaller=r.bytes and r.dense / r.bytes,
    )


def summaries(results: list[Result]) -> dict[str, Summary]:
    """The row of every method that ran, by name. Needs the result of "dynamic"."""
    exact = next(r for r in results if r.method == "dynamic").nll
    return {r.method: summary(r, exact) for r in results if not r.failed}


RECALL = "facts found"


def share(recall: dict[str, float], name: str) -> str:
    """A cell of the column `RECALL`."""
    return f"{recall[name]:.2f}" if name in recall else "-"


HEAD = (
    "config", "perplexity ratio", "mean KL", "top-1", "allocated at 8K", "compressed tokens a query reads",
    "evicted of a window",
)  # fmt: skip


def table(results: list[Result], recall: dict[str, float] | None = None) -> str:
    """Markdown, with one row for each method.

    `recall`: the share of facts that a method finds again in long texts, by name, for a column of its own.
    """
    head = HEAD if recall is None else (*HEAD, RECALL)
    rows, lines = summaries(results), ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in results:
        if r.failed:
            lines.append(f"| {r.method} | {r.failed} |" + " |" * (len(head) - 2))
            continue
        s = rows[r.method]
        spread = "" if s.ratio_se is None else f" ± {s.ratio_se:.4f}"
        weight = (
            "-" if s.smaller is None else f"{s.bytes_per_token / 1024:.2f} KiB a token, 1/{s.smaller:.2f}"
        )
        lines.append(
            f"| {r.method} | {s.ratio:.4f}{spread} | {s.kl:.5f} | {s.top1:.4f} | {weight} | {r.read:.0f} "
            f"| {r.evicted:.0f} |" + ("" if recall is None else f" {share(recall, r.method)} |")
        )
    return "\n".join(lines)


def best_trades(results: list[Result]) -> str:
    """One line: the configurations that no other one beats in bytes and KL."""
    rows = {name: s for name, s in summaries(results).items() if s.smaller}
    names = pictures.front({name: (s.bytes_per_token, s.kl) for name, s in rows.items()})
    return (
        f"No other is both smaller and nearer to uncompressed (KL) than: {', '.join(names)}." if names else ""
    )


def headline(report: dict) -> str:
    """One line about a run."""
    exact = next(r for r in report["results"] if r["method"] == "dynamic")
    windows = "1 window" if report["windows"] == 1 else f"{report['windows']} windows"
    weighed = report.get("weighed_on", report["device"])
    return (
        f"{report['model']}, {report['dtype']}, {report['device']}, torch {report['torch']}, transformers "
        f"{report['transformers']}; {report['text']}, {windows} of {report['length']}, in chunks of "
        f"{report['chunk']}; uncompressed perplexity {math.exp(statistics.mean(exact['nll'])):.4f}"
        + ("" if weighed == report["device"] else f"; caches weighed on {weighed}")
    )


def stored(path: Path) -> tuple[dict, list[Result]]:
    """A report that `--json` wrote, and its results."""
    report = json.loads(path.read_text(encoding="utf-8"))
    names = {f.name for f in fields(Result)}
    return report, [Result(**{k: x for k, x in r.items() if k in names}) for r in report["results"]]


def show(report: dict, results: list[Result]) -> str:
    blocks = [headline(report), table(results)]
    told = ["KL: nats a token. top-1: share of predictions with the same most likely token."]
    if any(r.bytes for r in results):
        told.append(f"Allocated: by a cache of {AT} bfloat16 tokens, with the tables that caches share.")
    late = [r.method for r in results if "int4_budget=" in r.config and "int4_budget=None" not in r.config]
    if late := [name for name in late if not next(r.evicted for r in results if r.method == name)]:
        told.append(
            f"In windows of this length {', '.join(late)} did not drop a token yet: longer ones cost more."
        )
    return "\n\n".join([*blocks, " ".join(told), best_trades(results)]).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--free" in argv:
        return free.main([x for x in argv if x != "--free"])
    args = arguments(argv)
    report, results = stored(args.show) if args.show else measured(args)
    print("\n" + show(report, results))
    if args.markdown:
        args.markdown.write_text(show(report, results), encoding="utf-8")
    if args.plot:
        pictures.pareto(summaries(results), args.plot)
    return 0


def measured(args: argparse.Namespace) -> tuple[dict, list[Result]]:
    """Load, run, and record the circumstances. The file of `--json` is written after every batch."""
    record = runs.Record(
        "quality", args, windows=args.windows, length=args.length, chunk=args.chunk, weighed_at=AT
    )
    ids = texts.windows(record.tokenizer, record.text, args.windows, args.length)
    runs.say(f"ready after {record.seconds():.0f} s")
    results = run(
        record.model, args.methods, ids, args.chunk, args.batch, args.weigh, runs.say, args.compiled,
        record.keep,
    )  # fmt: skip
    record.keep(results)
    return record.report, results


if __name__ == "__main__":
    raise SystemExit(main())
