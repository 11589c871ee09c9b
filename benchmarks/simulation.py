"""The loss of a format without a cache: `python -m benchmarks.simulation`.

This is the control of benchmarks.quality. It runs one forward pass over a window. A mask says which keys
and values attention reads after quantization by the codec of `fade_ref`, and which unchanged. It shares no
code with the cache. The mask "blocks" is the one of a cache that is fed in chunks, so its numbers must be
those of benchmarks.quality. With "last", every query sees the sinks and its last 64 tokens unchanged and
all others quantized. Published measurements of formats assume this, but no cache that compresses by blocks
does it.

`--suite tails` compares formats, published ones included, with equal tails: the same windows, the same
numbers of sinks and recent tokens, and only the mask "last". A group of tokens with common numbers may then
reach into the recent tokens of a query, where a cache would have to wait for the whole group. Product
quantization is among them: `--formats pq-4x256 --codebook-text TEXT` trains its codebooks first.
"""

import argparse
import json
import math
import statistics
import time
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AttentionInterface

import fade_fast
from fade_fast.hf import loading
from fade_fast.measure import options, texts
from fade_fast.measure.methods import key_shape
from fade_fast.measure.quality import Score
from fade_fast.measure.streams import NothingCompressed
from fade_ref.config import FadeConfig

from . import codebooks, readers
from .readers import Read, Reader

NAME = "fade_simulated"
MASKS = ("blocks", "last")
FORMATS = ("int8", "k4v4", "int3", "k4v2", "int2")
MATCHED = ("int4", *(f"{name}:quant_backend=matched" for name in FORMATS[2:]))
#: Formats with equal tails, by bits.
TAILS = (
    "k4v4", MATCHED[0], "kivi4", "kivi4:group=64", "quanto4", "hqq4", "kvarn4", "turboquant4",
    "int3", MATCHED[1], "kivi3", "kvarn3", "turboquant3",
    "k4v2", MATCHED[2], "kivi-k4v2", "kvarn-k4v2", "turboquant-k4v2",
    "int2", MATCHED[3], "kivi2", "kivi2:group=64", "quanto2", "hqq2", "kvarn2", "turboquant2",
)  # fmt: skip
SUITES = {"ours": (FORMATS, MASKS), "tails": (TAILS, ("last",))}


def compressed(length: int, config: FadeConfig, mask: str, chunk: int) -> Tensor:
    """Which keys each query reads quantized, bool [query, key].

    "blocks": the cache is fed `chunk` tokens at a time. The tokens that earlier chunks pushed out of the
    recent region, in whole blocks, are quantized. "last": all tokens but the last `recent_window` are.
    """
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    if mask == "last":
        bound = query - config.recent_window + 1
    else:
        before = query // chunk * chunk - config.n_sink - config.recent_window
        bound = config.n_sink + (before.clamp_min(0) // config.block_size) * config.block_size
    return (key >= config.n_sink) & (key < bound)


def quantized(read: Read, layer: int, keys: Tensor, values: Tensor, n_sink: int) -> tuple[Tensor, Tensor]:
    """Keys (after RoPE) and values [B, H, n, D] as a layer reads them back. Sinks are unchanged."""
    rows = zip(*(x.cpu().double()[:, :, n_sink:] for x in (keys, values)))
    decoded = (torch.stack(x) for x in zip(*(read(layer, *row) for row in rows)))
    return tuple(torch.cat((x[:, :, :n_sink], y.to(x)), dim=2) for x, y in zip((keys, values), decoded))


@contextmanager
def simulating(model, config: FadeConfig, mask: str, chunk: int, read: Read | None = None):
    """Let full-attention layers of the model read quantized keys and values. Sliding layers read them
    unchanged.

    `read`: the format; None: the rotated one with the widths of `config`.
    """
    if read is None:
        bits = config.middle_k_bits, config.middle_v_bits
        read = readers.rotated("", key_shape(model, 0)[1], config, bits).read

    def attention(module, query, keys, values, attention_mask, scaling=None, **kwargs):
        n, group = query.shape[2], query.shape[1] // keys.shape[1]
        place = torch.arange(n, device=query.device)
        distance = place[:, None] - place
        sees, window = distance >= 0, getattr(module, "sliding_window", None)
        coded = compressed(n, config, mask, chunk).to(query.device)
        if window:
            sees, coded = sees & (distance < window), torch.zeros_like(coded)
        whole = lambda x: x.repeat_interleave(group, dim=1)  # noqa: E731
        near = far = keys, values
        if coded.any():
            far = quantized(read, module.layer_idx, keys, values, config.n_sink)
        scores = torch.where(coded, query @ whole(far[0]).mT, query @ whole(near[0]).mT)
        p = (scores * (scaling or query.shape[-1] ** -0.5)).masked_fill(~sees, -torch.inf).softmax(-1)
        out = p.masked_fill(coded, 0) @ whole(near[1]) + p.masked_fill(~coded, 0) @ whole(far[1])
        return out.transpose(1, 2).contiguous(), None

    fade_fast.detach(model)
    AttentionInterface.register(NAME, attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def run(
    model,
    formats: list[Reader],
    ids: Tensor,
    config: FadeConfig,
    masks,
    chunk: int,
    say=print,
    keep=lambda results: None,
) -> list[dict]:
    """Each format under each mask, over windows `ids` [N, L].

    `n_sink`, `recent_window` and `block_size` of `config` hold for all. Results have perplexity ratio, mean
    KL and top-1, negative log-likelihood and KL of each window, and what a token takes. Raises
    `NothingCompressed` if no query reads a quantized token.
    """  # fmt: skip
    reads = {
        mask: compressed(ids.shape[1], config, mask, chunk).sum(-1).double().mean().item() for mask in masks
    }
    if not all(reads.values()):
        raise NothingCompressed(f"{reads}: no query reads a quantized token: use longer windows")
    sums = {(format, mask): ([], [], []) for format in formats for mask in masks}
    exact_nll = []
    for window in ids:
        window = window[None].to(model.device)
        exact, targets = model(input_ids=window).logits, window[:, 1:]
        score = Score(1, window.device)
        score.add(exact, exact, targets)
        exact_nll += score.means()[0]
        for (format, mask), found in sums.items():
            started = time.perf_counter()
            with simulating(model, config, mask, chunk, format.read):
                logits = model(input_ids=window).logits
            score = Score(1, window.device)
            score.add(logits, exact, targets)
            for column, x in zip(found, score.means()):
                column += x
            say(f"  {format.name}, {mask}: KL {found[1][-1]:.5f}, {time.perf_counter() - started:.1f} s")
        say(f"  {len(exact_nll)} windows")
        keep(_rows(sums, exact_nll, reads))
    return _rows(sums, exact_nll, reads)


def _rows(sums: dict, exact_nll: list[float], reads: dict[str, float]) -> list[dict]:
    exact = statistics.mean(exact_nll)
    return [
        dict(
            format=format.name, mask=mask, ratio=math.exp(statistics.mean(nll) - exact),
            kl=statistics.mean(kl), top1=statistics.mean(top1), nll=nll, kls=kl, read=reads[mask],
            source=format.source, key_bytes=format.key_bytes, value_bytes=format.value_bytes,
            tables=format.tables,
        )
        for (format, mask), (nll, kl, top1) in sums.items()
    ]  # fmt: skip


def format_of(name: str, model, config: FadeConfig, tokenizer, training: str | None) -> Reader:
    """The format called `name`. Codebooks of product quantization are trained from the text `training`.

    Raises as `readers.reader` and `codebooks.train`.
    """
    if not codebooks.NAME.fullmatch(name):
        return readers.reader(name, model, config)
    width, centroids, tokens = codebooks.settings(name)
    ids = texts.windows(tokenizer, training, 1, tokens)
    return readers.coded(name, codebooks.train(model, ids, width, centroids))


def table(results: list[dict]) -> str:
    """Markdown, with one row for each format and mask."""
    lines = ["| format | mask | perplexity ratio | mean KL | top-1 |", "|---" * 5 + "|"]
    for r in results:
        lines.append(f"| {r['format']} | {r['mask']} | {r['ratio']:.4f} | {r['kl']:.5f} | {r['top1']:.4f} |")
    return "\n".join(lines)


def tails(report: dict) -> str:
    """Markdown: formats with equal tails and the bytes of a token, and what was equal."""
    head = (
        "format", "bytes of a token and KV head, keys + values", "tables of the model", "perplexity ratio",
        "mean KL", "KL by window", "top-1",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in report["results"]:
        shared = f"{r['tables'] / 2**20:.1f} MiB" if r["tables"] else "-"
        each = ", ".join(f"{x:.4f}" for x in r["kls"])
        lines.append(
            f"| {r['format']} | {r['key_bytes']:g} + {r['value_bytes']:g} | {shared} | {r['ratio']:.4f} "
            f"| {r['kl']:.5f} | {each} | {r['top1']:.4f} |"
        )
    windows = f"{report['windows']} window{'s' * (report['windows'] > 1)} of {report['length']}"
    told = (
        f"{report['model']}, {report['dtype']}, {report['device']}, torch {report['torch']}, transformers "
        f"{report['transformers']}; {report['text']}, {windows}; every query reads {report['n_sink']} sinks "
        f"and its last {report['recent_window']} tokens unchanged, and "
        f"{report['results'][0]['read']:.0f} tokens quantized (mean over queries)."
    )
    return f"{told}\n\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_model(parser)
    options.add_text(parser, "that is read")
    parser.add_argument("--windows", type=int, default=4 if options.on_gpu() else 1, metavar="N")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of a window")
    parser.add_argument("--chunk", type=int, default=64, metavar="N", help="of the mask blocks")
    parser.add_argument("--suite", choices=tuple(SUITES), default="ours", help="formats and masks")
    parser.add_argument(
        "--formats", nargs="+", metavar="NAME", help="these instead; see benchmarks/readers.py"
    )
    parser.add_argument("--masks", nargs="+", choices=MASKS, help="these instead")
    parser.add_argument("--sinks", type=int, default=4, metavar="N", help="first tokens, unchanged")
    parser.add_argument("--recent", type=int, default=64, metavar="N", help="recent tokens, unchanged")
    parser.add_argument(
        "--codebook-text", metavar="TEXT",
        help="named as --text: what codebooks of product quantization (pq-4x256) are trained from",
    )  # fmt: skip
    options.add_output(parser, "simulation")
    args = parser.parse_args(argv)
    if args.show:
        print(shown(json.loads(args.show.read_text(encoding="utf-8"))))
        return 0
    names, masks = SUITES[args.suite]
    names, masks = args.formats or names, args.masks or masks
    if any(codebooks.NAME.fullmatch(name) for name in names) and args.codebook_text is None:
        parser.error("product quantization needs codebooks: name a text to train them with --codebook-text")
    training = args.codebook_text and texts.read(args.codebook_text)
    loading.quiet()
    torch.backends.cuda.matmul.allow_tf32 = False
    started = time.perf_counter()
    text, source = texts.read_or_default(args.text)
    model, tokenizer, called = texts.load_model(args.model, args.device, args.dtype)
    try:
        config = replace(FadeConfig(), n_sink=args.sinks, recent_window=args.recent)
        formats = [format_of(name, model, config, tokenizer, training) for name in dict.fromkeys(names)]
    except ValueError as error:
        parser.error(str(error))
    ids = texts.windows(tokenizer, text, args.windows, args.length)
    report = texts.circumstances("simulation", model, called, source, args.dtype) | dict(
        suite=args.suite,
        length=args.length,
        chunk=args.chunk,
        n_sink=args.sinks,
        recent_window=args.recent,
    )

    def keep(results: list[dict]) -> None:
        report.update(windows=len(results[0]["nll"]), seconds=time.perf_counter() - started, results=results)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    say = lambda line: print(line, flush=True)  # noqa: E731
    keep(run(model, formats, ids, config, masks, args.chunk, say, keep))
    print(shown(report))
    return 0


def shown(report: dict) -> str:
    """The table of a report."""
    return tails(report) if report.get("suite") == "tails" else table(report["results"])


if __name__ == "__main__":
    raise SystemExit(main())
