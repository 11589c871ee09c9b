"""All measurements of one model in one run: `fade quality --suite report`.

fade quality --suite report --model meta-llama/Llama-3.1-8B --length 32768

For each configuration: perplexity ratio, KL and top-1 agreement on a text; the share of facts that are found
again in long texts; three tasks of RULER; the bytes of a cache; and the time of a step. All are taken at one
`--length`, by the code of `fade quality`, `fade needles`, `fade ruler`, `fade memory` and `fade bench`. Each
row counts the compressed tokens that were read. A configuration that compressed nothing ends the run.

The tables are printed and written to `report-MODEL-LENGTH.md`. All numbers go to a JSON file of the same
name, after every part, so that an interrupted run loses little. `--show FILE` prints the tables of such a
file. In a clone, such a file in benchmarks/results becomes a part of docs/quality.md.

The model runs once for all. Uncompressed logits that would take more than 1 GiB are computed again for each
configuration, chunk by chunk. So a long text needs memory for the model, two caches and a chunk of logits.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from fade_fast.errors import InputError
from fade_fast.hf.models import text_config

from . import bench, memory, needles, options, quality, ruler, runs, texts
from .methods import Method, Unavailable, allocated, compressed_tokens, evicted_tokens
from .parsers.needles import TASKS as FACTS
from .parsers.report import PARTS, arguments
from .streams import check

TASKS = ("niah_single", "niah_multikey", "vt")  # of RULER
DEPTHS = (10, 50, 90)  # of facts, percent
KEPT = 1 << 30  # bytes of uncompressed logits
ROOM = 128  # tokens beside a prompt: the longest answer
TOGETHER = 16384  # tokens of the prompts that are fed at a time


@dataclass
class Weight:
    """Bytes of caches that hold `length` bfloat16 tokens: one that grew, and one that was made for them.

    `read`: the tokens of them that are compressed, mean over layers.
    """

    method: str
    length: int
    grown: int | None = None
    reserved: int | None = None
    read: float | None = None
    failed: str | None = None


def weigh(model, methods: list[Method], length: int) -> list[Weight]:
    """The bytes of every method. Raises `NothingCompressed` for a cache that did nothing to its tokens."""
    found = []
    for m in methods:
        w = Weight(m.name, length)
        try:
            for reserved in (True, False):
                cache = memory.filled(model, m, length, reserved)
                w.read = float(compressed_tokens(cache))
                check(m, w.read, evicted_tokens(cache))
                setattr(w, "reserved" if reserved else "grown", allocated(cache))
                del cache
                gc.collect()
        except Unavailable as error:
            w.failed = str(error)
        except torch.OutOfMemoryError:
            w.failed = "out of memory"
        found.append(w)
    return found


@dataclass(frozen=True)
class Plan:
    """What is measured: texts of `length` tokens, `trials` examples of a task, and `new` timed tokens."""

    length: int
    windows: int
    trials: int
    new: int

    @property
    def chunk(self) -> int:
        """Tokens of a text that are fed at a time: few, since a chunk reads itself uncompressed."""
        return max(64, self.length // 64)

    @property
    def batch(self) -> int:
        """Prompts that are fed at a time."""
        return max(1, TOGETHER // self.length)


def parts(
    model, tokenizer, text: str, methods: list[Method], plan: Plan, say=print
) -> dict[str, Callable[[], list]]:
    """The measurements, by their names in a report. Each gives results of its module."""
    length, trials = plan.length, plan.trials
    words = texts.windows(tokenizer, text, plan.windows, length)  # refuses a short text before any work
    size = max(plan.chunk, min(512, length // 4))

    def perplexity() -> list:
        return quality.run(model, methods, words, plan.chunk, 1, weigh=False, say=say, kept=KEPT)

    def facts() -> list:
        tasks = FACTS
        return needles.run(
            model, tokenizer, methods, tasks, [length], DEPTHS, trials, size, plan.batch, text, say
        )

    def tasks() -> list:
        return ruler.run(
            model, tokenizer, methods, TASKS, [length], trials, size, plan.batch, text, None, say
        )

    return {
        "bytes": lambda: weigh(model, methods, length),
        "quality": perplexity,
        "needles": facts,
        "ruler": tasks,
        "bench": lambda: bench.run(model, methods, words[:1], plan.new, say),
    }


# -- what is shown

KINDS = dict(zip(PARTS, (Weight, quality.Result, needles.Result, ruler.Result, bench.Result)))
HEAD = (
    "cache", "MiB", "ratio", "ratio of a cache that grew", "perplexity ratio", "mean KL", "top-1",
    "facts found", "RULER", "ms a step", "tokens/s", "keeps",
)  # fmt: skip


def parsed(report: dict) -> dict[str, list]:
    """The results of each part that a report has."""
    found = {}
    for part, kind in KINDS.items():
        names = {f.name for f in fields(kind)}
        rows = report.get(part, ())
        found[part] = [kind(**{k: x for k, x in r.items() if k in names}) for r in rows]
    return found


def _of(results: list, name: str) -> list:
    """The results of a method that has numbers."""
    return [r for r in results if r.method == name and not r.failed]


def _share(results: list, name: str, field: str) -> float | None:
    """A mean over the results of a method, which count as their examples do."""
    rows = _of(results, name)
    total = sum(r.trials for r in rows)
    return sum(getattr(r, field) * r.trials for r in rows) / total if total else None


def summary(report: dict) -> str:
    """Markdown: one row for each configuration, with all that was measured of it."""
    found = parsed(report)
    rows = quality.summaries(found["quality"]) if found["quality"] else {}
    dense = {w.method: w for w in found["bytes"]}.get("dynamic")
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    show = lambda x, form: "-" if x is None else format(x, form)  # noqa: E731
    for name in report["configs"]:
        weight = next(iter(_of(found["bytes"], name)), None)
        timed = next(iter(_of(found["bench"], name)), None)
        text = next(iter(_of(found["quality"], name)), None)
        q = rows.get(name)
        cells = ["uncompressed (`dynamic`)" if name == "dynamic" else f"`{name}`"]
        cells += [show(weight and weight.reserved / 2**20, ".1f")]
        cells += [show(weight and dense and dense.reserved / getattr(weight, f), ".2f") for f in SIDES]
        cells += [show(q and getattr(q, f), form) for f, form in QUALITY]
        cells += [show(_share(found["needles"], name, "exact"), ".2f")]
        cells += [show(_share(found["ruler"], name, "score"), ".2f")]
        cells += [show(timed and timed.ms, ".2f"), show(timed and timed.tokens_per_s, ".1f")]
        gone = max((r.evicted or 0.0 for r in (text, timed) if r), default=None)
        cells.append("-" if gone is None else f"all but {gone:.0f} tokens" if gone else "every token")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


SIDES = ("reserved", "grown")
QUALITY = (("ratio", ".4f"), ("kl", ".5f"), ("top1", ".4f"))


def headline(report: dict) -> str:
    """One line about a run."""
    return (
        "{model}, {dtype}, {device}, torch {torch}, transformers {transformers}; {length} tokens of {text}, "
        "{windows} of them, in chunks of {chunk}; {trials} of each task and depth".format(
            **report
            | dict(
                windows="1 window" if report["windows"] == 1 else f"{report['windows']} windows",
                trials="1 example" if report["trials"] == 1 else f"{report['trials']} examples",
            )
        )
    )


def read_by(report: dict) -> str:
    """One line: the fewest compressed tokens that each part of a report read, over its configurations."""
    found = parsed(report)
    least = {
        part: min((r.read for r in rows if r.method != "dynamic" and not r.failed and r.read), default=None)
        for part, rows in found.items()
    }
    told = [f"{part} {n:.0f}" for part, n in least.items() if n is not None]
    return f"Compressed tokens read, least of all configurations: {', '.join(told)}."


def show(report: dict) -> str:
    """Circumstances and tables, as markdown."""
    found = parsed(report)
    blocks = [
        f"{headline(report)}.",
        summary(report),
        "MiB and ratios are those of caches that hold as many bfloat16 tokens, with host memory and with the "
        "tables that all caches of a model share. KL: nats a token. *Facts found*: codes in long "
        "texts that are told exactly (passkey, multikey, recall). *RULER*: the mean "
        f"score of {', '.join(TASKS)}. {read_by(report)}",
    ]
    for part, module in (("needles", needles), ("ruler", ruler)):
        if found[part]:
            blocks.append(module.table(found[part]))
    failed = {
        f"{part}, {r.method}: {r.failed}": None for part, rows in found.items() for r in rows if r.failed
    }
    return "\n\n".join([*blocks, *failed])


# -- the command


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.show:
        print(show(json.loads(args.show.read_text(encoding="utf-8"))))
        return 0
    report, file = measured(args)
    page = args.markdown or file.with_suffix(".md")
    page.write_text(show(report) + "\n", encoding="utf-8")
    print(f"\n{show(report)}\n\nwritten to {file} and {page}")
    return 0


def measured(args: argparse.Namespace) -> tuple[dict, Path]:
    """Load, run, and record the circumstances. Returns the report and its file, written after every part."""
    runs.quiet()
    torch.backends.cuda.matmul.allow_tf32 = False
    plan = Plan(args.length, args.windows, args.trials, args.new)
    options.refuse_short([m.name for m in args.methods], plan.length, plan.chunk)
    text, source = texts.read_or_default(args.text)
    model, tokenizer, name = texts.load_model(args.model, args.device, args.dtype)
    reach = getattr(text_config(model), "max_position_embeddings", None)
    if reach is not None and args.length + ROOM > reach:
        raise InputError(f"--length {args.length} and answers of {ROOM}: the model has {reach} positions")
    report = texts.circumstances("report", model, name, source, args.dtype) | asdict(plan)
    report |= dict(chunk=plan.chunk, configs=[m.name for m in args.methods], seconds={})
    file = args.json or Path(f"report-{name.split('/')[-1]}-{args.length}.json")
    say = lambda line: print(line, flush=True)  # noqa: E731
    for part, run in parts(model, tokenizer, text, args.methods, plan, say).items():
        if part not in args.parts:
            continue
        say(f"{part}:")
        started = time.perf_counter()
        report[part] = [asdict(r) for r in run()]
        report["seconds"][part] = time.perf_counter() - started
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report, file


if __name__ == "__main__":
    raise SystemExit(main())
