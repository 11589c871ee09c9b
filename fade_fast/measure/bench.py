"""Bytes and times of caches with a model of yours, on a text of yours: `fade bench`.

fade bench --model meta-llama/Llama-3.1-8B --length 32768

Each cache is made for its length (`max_length`), takes in the text as one prompt of `generate()`, and then
writes `--new` tokens greedily. Bytes are those of every storage of a cache that holds as many bfloat16
tokens. The first token is that of a run for which kernels are compiled already. The time of a step is the
median after warm-up. A configuration that compressed nothing is an error and not a row. Without a GPU the
model runs in float32, which is faster there.

`fade bench generate` times models of named shapes with random weights, `fade bench parallel` one GPU against
several, `fade bench start` a fresh process, `fade bench choose` what choosing and host memory cost,
`fade bench attention` one layer, `fade bench paged` one layer of the vLLM plugin, `fade bench throughput` its
tokens a second where memory limits the batch, and `fade bench serve` the server.
"""

import argparse
import contextlib
import gc
import json
import statistics
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fade_fast.errors import InputError
from fade_fast.hf.cache import TieredKVCache
from fade_fast.hf.models import text_config

from . import generate, memory, options, runs, texts
from .methods import Method, Unavailable, allocated, compressed_tokens, evicted_tokens, made_for
from .parsers.bench import arguments
from .streams import NothingCompressed, check


@dataclass
class Result:
    """The measurements of a method. None: not measured.

    Attributes:
        method: its name.
        length, new: tokens of the prompt, and tokens written after it.
        bytes: of every distinct storage of a cache that holds as many bfloat16 tokens.
        tables: the part of them that all caches of the model share.
        first_token_s: from the call of generate() to the first token, in seconds.
        ms, tokens_per_s: of a step after warm-up, median.
        compile_s: extra time of the warm-up steps, in seconds.
        read: compressed tokens that a step can read at the end, mean over layers.
        evicted: tokens that are forgotten at the end.
        captured: steps that replayed a CUDA graph; None elsewhere.
        failed: the reason for missing numbers.
    """

    method: str
    length: int
    new: int
    bytes: int | None = None
    tables: int | None = None
    first_token_s: float | None = None
    ms: float | None = None
    tokens_per_s: float | None = None
    compile_s: float | None = None
    read: float | None = None
    evicted: float | None = None
    captured: int | None = None
    failed: str | None = None


@contextlib.contextmanager
def endless(model) -> Iterator[None]:
    """Let no token end a text, so that every method takes as many steps."""
    config = model.generation_config
    before, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = before


def measure(model, m: Method, ids: Tensor, new: int) -> Result:
    """One method: the prompt `ids` int64 [1, length], then `new` tokens.

    Raises `Unavailable`, `NothingCompressed`, and the errors of the model, exhausted memory included.
    """
    length = ids.shape[1]
    result = Result(m.name, length, new)
    make = lambda: made_for(model, m, length + new)  # noqa: E731
    if model.device.type == "cuda":  # kernels are compiled for a length
        generate.run(model, make(), ids, 1, "once")
        gc.collect()
    cache = make()
    clock = generate.run(model, cache, ids, new, "once")
    result.first_token_s, *steps = clock.seconds()
    settled, result.compile_s = generate.steady(steps)
    result.ms = statistics.median(settled) * 1e3
    result.tokens_per_s = 1e3 / result.ms
    if isinstance(cache, TieredKVCache):
        result.tables = cache.memory().tables
        result.captured = cache.decode_graph.replays if clock.cuda else None
    result.read, result.evicted = float(compressed_tokens(cache)), float(evicted_tokens(cache))
    check(m, result.read, result.evicted)
    if model.dtype == torch.bfloat16:
        result.bytes = allocated(cache)
    else:
        result.bytes = memory.filled_bytes(model, m, length + new, reserved=True)
    return result


def run(model, methods: list[Method], ids: Tensor, new: int, say=print) -> list[Result]:
    """Every method on the same prompt `ids` int64 [1, length]. `say` is called with lines of progress."""
    ids, results = ids.to(model.device), []
    with endless(model):
        # The first prefill and step of a process load kernels and allocate memory.
        generate.run(model, methods[0](model, 64), ids[:, :64], 2, "once")
        for m in methods:
            started = time.perf_counter()
            try:
                r = measure(model, m, ids, new)
            except Unavailable as error:
                r = Result(m.name, ids.shape[1], new, failed=str(error))
            except NothingCompressed:
                raise
            except Exception as error:  # one failed method must not end the run
                told = "out of memory" if generate.exhausted(error) else f"{type(error).__name__}: {error}"
                r = Result(m.name, ids.shape[1], new, failed=told[:300])
                if not generate.exhausted(error):
                    traceback.print_exc()
            finally:
                generate.free(model, m.name)
            results.append(r)
            told = r.failed or f"{r.ms:.1f} ms a step"
            say(f"  {m.name}: {told}, {time.perf_counter() - started:.0f} s")
    return results


# -- what is shown

HEAD = (
    "cache", "MiB", "ratio", "first token, s", "ms a step", "tokens/s", "compressed tokens",
    "forgotten tokens",
)  # fmt: skip


def table(results: list[Result]) -> str:
    """Markdown, with one row for each method. Ratios to "dynamic" are those of bytes without tables."""
    dense = next((r.bytes for r in results if r.method == "dynamic"), None)
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for r in results:
        name = "uncompressed (`dynamic`)" if r.method == "dynamic" else f"`{r.method}`"
        if r.failed:
            lines.append(f"| {name} | {r.failed} |" + " |" * (len(HEAD) - 2))
            continue
        own = r.bytes - (r.tables or 0)
        size = f"{own / 2**20:.1f}"
        if (r.tables or 0) > own // 64:  # as `str(cache.memory())` tells them
            size += f" + {r.tables / 2**20:.1f} tables"
        ratio = f"{dense / own:.2f}" if dense else "-"
        lines.append(
            f"| {name} | {size} | {ratio} | {r.first_token_s:.2f} | {r.ms:.2f} "
            f"| {r.tokens_per_s:.1f} | {r.read:.0f} | {r.evicted:.0f} |"
        )
    return "\n".join(lines)


def headline(report: dict) -> str:
    """One line about a run."""
    return (
        "{model}, {dtype}, {device}, torch {torch}, transformers {transformers}; {length} tokens of {text}, "
        "then {new} new ones".format(**report)
    )


def notes(report: dict, results: list[Result]) -> list[str]:
    """What the table cannot say, one line each."""
    said = []
    if report["device"] == "CPU":
        said.append("On a CPU the cache saves memory, and time only in long texts: docs/speed.md.")
    said.append(
        "MiB: with bfloat16 keys and values. Caches of a model share its tables, and ratios leave them out."
    )
    if slow := [r.method for r in results if r.captured is not None and 2 * r.captured < r.new]:
        said.append(f"Steps of {', '.join(slow)} were not captured as CUDA graphs: expect faster ones.")
    if any(r.evicted for r in results):
        said.append("Forgotten tokens are gone: no later question can be answered from them.")
    return said


def show(report: dict, results: list[Result]) -> str:
    """Circumstances, table and notes."""
    return "\n\n".join([headline(report), table(results), *notes(report, results)])


def stored(path: Path) -> tuple[dict, list[Result]]:
    """A report that `--json` wrote, and its results."""
    report = json.loads(path.read_text(encoding="utf-8"))
    return report, [Result(**r) for r in report["results"]]


def prompt(model, tokenizer, text: str, length: int, new: int) -> Tensor:
    """The first `length` tokens of a text, int64 [1, length].

    Raises `InputError` if the text or the model has too few.
    """
    reach = getattr(text_config(model), "max_position_embeddings", None)
    if reach is not None and length + new > reach:
        raise InputError(f"--length {length} and {new} new tokens: the model has {reach} positions")
    return texts.windows(tokenizer, text, 1, length)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report, results = stored(args.show) if args.show else measured(args)
    print("\n" + show(report, results))
    return int(not args.show and any(r.failed and r.failed != "out of memory" for r in results))


def measured(args: argparse.Namespace) -> tuple[dict, list[Result]]:
    """Load, run, and record the circumstances."""
    runs.quiet()
    options.refuse_short([m.name for m in args.methods], args.length, new=args.new)
    text, source = texts.read_or_default(args.text)
    model, tokenizer, name = texts.load_model(args.model, args.device, args.dtype)
    ids = prompt(model, tokenizer, text, args.length, args.new)
    results = run(model, args.methods, ids, args.new, lambda line: print(line, flush=True))
    report = texts.circumstances("bench", model, name, source, args.dtype) | dict(
        length=args.length, new=args.new, results=[asdict(r) for r in results]
    )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report, results


if __name__ == "__main__":
    raise SystemExit(main())
