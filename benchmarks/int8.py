"""Decode attention over 8-bit codes by FlexAttention: `python -m benchmarks.int8`.

FlexAttention converts 8-bit codes of keys and values to the dtype of the query when it multiplies. The rest
of an INT8 tier goes into its `score_mod`: a score is multiplied by the scale of its key, and the logarithm of
the scale of its value is added, so that the sum over codes is the sum over values. The sum of weights then
holds the scales, too. Channels that hold 1 / scale, after those of the codes, give the sum without them: the
normalizer. Two bytes hold it, as two digits. 16 channels are added, so that rows stay aligned.

The script compares several block sizes, each checked against float64, with FlashAttention over bfloat16 in
the same process. Times are medians of CUDA-graph replays. The bytes are those of codes and scales.
`--json FILE` writes what is shown. Without a GPU everything shrinks, and times mean nothing.
"""

import argparse
import functools
import itertools
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from fade_fast.measure.decode_attention import microseconds, read_bandwidth
from fade_fast.saved.files import write_json

EXTRA = 16  # channels after those of the codes; the first two are the digits of 1 / scale
DIGIT = 127  # of a digit, the base
#: Block sizes, warps, stages, and parts of the text that are read in parallel, for each row and KV head.
TILES = [
    *itertools.product((64, 128), (2, 4), (2, 3), (8,)),
    *itertools.product((64,), (4,), (3,), (4, 16)),
]


@dataclass(frozen=True)
class Shape:
    batch: int = 8
    heads: int = 8
    group: int = 4
    length: int = 32768
    dim: int = 128


@dataclass
class Result:
    """`error`: largest difference from float64, relative to the largest result."""

    block: int
    warps: int
    stages: int
    splits: int
    us: float | None = None
    speedup: float | None = None
    bytes_per_s: float | None = None
    error: float | None = None
    failed: str | None = None


@dataclass
class Coded:
    """Codes of vectors v [B, H, S, D]: v is scale * (code + 1/2)."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Coded":
        """int8 codes [B, H, S, D], float16 scales [B, H, S]."""
        scale = (x.float().abs().amax(-1) / (DIGIT + 0.5)).half()
        codes = (x.float() / scale.float().unsqueeze(-1)).floor().clamp(-DIGIT - 1, DIGIT)
        return cls(codes.to(torch.int8), scale)

    def decoded(self) -> Tensor:
        """float64 [B, H, S, D]."""
        return self.scale.double().unsqueeze(-1) * (self.codes.double() + 0.5)


def with_inverse_scales(values: Coded) -> tuple[Tensor, Tensor]:
    """Codes of values and the digits of least / scale, int8 [B, H, S, D + EXTRA]; and least [B, H, 1, 1]."""
    scale = values.scale.float()
    least = scale.amin(-1, keepdim=True)
    digits = least / scale * DIGIT
    first = digits.floor()
    added = torch.stack((first, ((digits - first) * DIGIT).floor()), dim=-1)
    added = F.pad(added, (0, EXTRA - 2)).to(torch.int8)
    return torch.cat((values.codes, added), dim=-1), least.unsqueeze(-1)


def attend(query: Tensor, keys: Coded, codes: Tensor, least: Tensor, value_scale: Tensor, options) -> Tensor:
    """Attention [B, Hq, 1, D] of `query` [B, Hq, 1, D] over codes; `codes` and `least` by
    `with_inverse_scales`.
    """
    group, dim = query.shape[1] // keys.codes.shape[1], query.shape[-1]
    half = query.float().sum(-1).squeeze(-1) / (2 * math.sqrt(dim))  # of codes, which are 1/2 too small

    def scaled(score, row, head, _, slot):
        score = (score + half[row, head]) * keys.scale[row, head // group, slot]
        return score + value_scale[row, head // group, slot].float().log()

    kind = query.dtype if query.device.type == "cpu" else torch.int8
    found = flex_attention(
        query, keys.codes.to(kind), codes.to(kind), scaled, enable_gqa=True, kernel_options=options
    ).float()
    weight = (found[..., dim : dim + 1] + found[..., dim + 1 : dim + 2] / DIGIT) / DIGIT
    return (found[..., :dim] + 0.5) * (least.repeat_interleave(group, dim=1) / weight)


def measure(shape: Shape, device: str, tiles: list[tuple[int, ...]]) -> tuple[float, list[Result]]:
    """Microseconds of FlashAttention over bfloat16, and a result for each of `tiles`."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    make = lambda heads, n: torch.randn(  # noqa: E731
        shape.batch, heads, n, shape.dim, generator=generator, device=device, dtype=dtype
    )
    query = make(shape.heads * shape.group, 1)
    key, value = make(shape.heads, shape.length), make(shape.heads, shape.length)
    keys, values = Coded.of(key), Coded.of(value)
    codes, least = with_inverse_scales(values)
    exact = torch.cat(
        [
            F.scaled_dot_product_attention(
                query[i : i + 1].double(),
                *(Coded(x.codes[i : i + 1], x.scale[i : i + 1]).decoded() for x in (keys, values)),
                enable_gqa=True,
            )
            for i in range(shape.batch)
        ]
    )
    kernel = SDPBackend.FLASH_ATTENTION if device == "cuda" else SDPBackend.MATH
    # The group as query tokens: each key is then read once.
    rows = query.view(shape.batch, shape.heads, shape.group, shape.dim)
    with sdpa_kernel(kernel):
        plain = microseconds(lambda: F.scaled_dot_product_attention(rows, key, value), device)
    read = sum(x.nbytes for x in (keys.codes, keys.scale, codes, values.scale))
    results = []
    for block, warps, stages, splits in tiles:
        result = Result(block, warps, stages, splits)
        options = dict(BLOCK_N=block, num_warps=warps, num_stages=stages, SPLIT_KV=splits)
        torch._dynamo.reset()
        function = torch.compile(attend, fullgraph=True, dynamic=False) if device == "cuda" else attend
        args = query, keys, codes, least, values.scale, options if device == "cuda" else None
        call = functools.partial(function, *args)
        try:
            with torch.no_grad():
                result.error = float((call().double() - exact).abs().max() / exact.abs().max())
                result.us = microseconds(call, device)
            result.speedup, result.bytes_per_s = plain / result.us, read / result.us * 1e6
        except Exception as error:  # block sizes that the kernel or the device does not take
            result.failed = f"{type(error).__name__}: {error}"[:300]
        results.append(result)
    return plain, results


def row(r: Result) -> str:
    tile = f"| {r.block} | {r.warps} | {r.stages} | {r.splits} |"
    if r.failed:
        return f"{tile} {r.failed.splitlines()[0]} | | | |"
    return f"{tile} {r.us:.1f} | {r.speedup:.2f} | {r.bytes_per_s / 1e12:.2f} | {r.error:.1e} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.int8", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is shown there as well")
    parser.add_argument("--tiles", type=int, default=None, metavar="N", help="only the first N tile sets")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape() if device == "cuda" else Shape(2, 2, 4, 256, 64)
    bandwidth = read_bandwidth(device)
    plain, results = measure(shape, device, TILES[: args.tiles])
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {shape}: bfloat16 {plain:.1f} us")
    print("| block | warps | stages | splits | us | of bfloat16's speed | TB/s | error |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(map(row, results)), flush=True)
    if args.json:
        found = dict(device=name, torch=torch.__version__, shape=asdict(shape), bandwidth=bandwidth)
        found |= dict(bfloat16_us=plain, results=list(map(asdict, results)))
        write_json(args.json, found, indent=1)
    return int(all(r.failed for r in results))


if __name__ == "__main__":
    sys.exit(main())
