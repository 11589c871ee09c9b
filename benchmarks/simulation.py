"""The loss of a format without a cache: `python -m benchmarks.simulation`.

This is the control of benchmarks.quality. It runs one forward pass over a window. A mask says which keys
and values attention reads after quantization by the codec of `fade_ref`, and which unchanged. It shares no
code with the cache. The mask "blocks" is the one of a cache that is fed in chunks, so its numbers must be
those of benchmarks.quality. With "last", every query sees the sinks and its last 64 tokens unchanged and
all others quantized. Published measurements of formats assume this, but no cache that compresses by blocks
does it.
"""

import argparse
import json
import math
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface

import fade_fast
from fade_fast.hf import loading
from fade_ref.config import FadeConfig
from fade_ref.rotation import RotatedCodec, key_mean, qr_rotation

from . import texts
from .methods import WIDTHS
from .quality import Score

NAME = "fade_simulated"
MASKS = ("blocks", "last")
FORMATS = ("int8", "int4", "int3", "k4v2", "int2")


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


def quantized(keys: Tensor, values: Tensor, config: FadeConfig) -> tuple[Tensor, Tensor]:
    """Decoded keys (after RoPE) and values [B, H, n, D], float64. Sinks are unchanged."""
    dim, block, sinks = keys.shape[-1], config.block_size, config.n_sink
    rotation = qr_rotation(dim)
    key_codec, value_codec = (
        RotatedCodec(b, dim, rotation) for b in (config.middle_k_bits, config.middle_v_bits)
    )
    middle, found = keys.cpu().double()[:, :, sinks:], []
    for part in middle.split(block, dim=2):
        mean = key_mean(part)
        found.append(key_codec.decode(key_codec.encode(part, mean), mean))
    middle = values.cpu().double()[:, :, sinks:]
    decoded = torch.cat(found, dim=2), value_codec.decode(value_codec.encode(middle))
    return tuple(torch.cat((x[:, :, :sinks], y.to(x)), dim=2) for x, y in zip((keys, values), decoded))


@contextmanager
def simulating(model, config: FadeConfig, mask: str, chunk: int):
    """Let full-attention layers of the model read quantized keys and values. Sliding layers read them
    unchanged.
    """

    def attention(module, query, keys, values, attention_mask, scaling=None, **kwargs):
        n, group = query.shape[2], query.shape[1] // keys.shape[1]
        place = torch.arange(n, device=query.device)
        distance = place[:, None] - place
        sees, window = distance >= 0, getattr(module, "sliding_window", None)
        read = compressed(n, config, mask, chunk).to(query.device)
        if window:
            sees, read = sees & (distance < window), torch.zeros_like(read)
        whole = lambda x: x.repeat_interleave(group, dim=1)  # noqa: E731
        near, far = (keys, values), quantized(keys, values, config)
        scores = torch.where(read, query @ whole(far[0]).mT, query @ whole(near[0]).mT)
        p = (scores * (scaling or query.shape[-1] ** -0.5)).masked_fill(~sees, -torch.inf).softmax(-1)
        out = p.masked_fill(read, 0) @ whole(near[1]) + p.masked_fill(~read, 0) @ whole(far[1])
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
def run(model, formats, ids: Tensor, chunk: int, say=print) -> list[dict]:
    """Perplexity ratio, mean KL and top-1 of each format under each mask, over windows `ids` [N, L]."""
    sums = {(name, mask): ([], [], []) for name in formats for mask in MASKS}
    exact_nll = []
    for window in ids:
        window = window[None].to(model.device)
        exact, targets = model(input_ids=window).logits, window[:, 1:]
        score = Score(1, window.device)
        score.add(exact, exact, targets)
        exact_nll += score.means()[0]
        for (name, mask), found in sums.items():
            both, key, value = WIDTHS.fullmatch(name).groups()
            config = FadeConfig(middle_k_bits=int(both or key), middle_v_bits=int(both or value))
            with simulating(model, config, mask, chunk):
                logits = model(input_ids=window).logits
            score = Score(1, window.device)
            score.add(logits, exact, targets)
            for column, x in zip(found, score.means()):
                column += x
        say(f"  {len(exact_nll)} windows")
    exact = statistics.mean(exact_nll)
    return [
        dict(
            format=name, mask=mask, ratio=math.exp(statistics.mean(nll) - exact),
            kl=statistics.mean(kl), top1=statistics.mean(top1),
        )
        for (name, mask), (nll, kl, top1) in sums.items()
    ]  # fmt: skip


def table(results: list[dict]) -> str:
    lines = ["| format | mask | perplexity ratio | mean KL | top-1 |", "|---" * 5 + "|"]
    for r in results:
        lines.append(f"| {r['format']} | {r['mask']} | {r['ratio']:.4f} | {r['kl']:.5f} | {r['top1']:.4f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", default=texts.SMOLLM2, help="hub id, folder (of GGUF, too), or smollm2")
    parser.add_argument("--text", default=texts.WIKITEXT, help="see benchmarks/texts.py")
    parser.add_argument("--windows", type=int, default=4 if cuda else 1, metavar="N")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of a window")
    parser.add_argument("--chunk", type=int, default=64, metavar="N", help="of the mask blocks")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="NAME")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=tuple(loading.DTYPES), default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.formats if not WIDTHS.fullmatch(name)]:
        parser.error(f"--formats: {', '.join(unknown)}: like int4 or k4v2")
    loading.quiet()
    torch.backends.cuda.matmul.allow_tf32 = False
    started = time.perf_counter()
    model, tokenizer, name = texts.load_model(args.model, args.device, args.dtype)
    ids = texts.windows(tokenizer, texts.read(args.text), args.windows, args.length)
    results = run(model, args.formats, ids, args.chunk, lambda line: print(line, flush=True))
    print(table(results))
    if args.json:
        report = texts.circumstances("simulation", model, name, args.text, args.dtype) | dict(
            windows=args.windows,
            length=args.length,
            chunk=args.chunk,
            seconds=time.perf_counter() - started,
            results=results,
        )
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
