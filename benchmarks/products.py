"""Products of a few rows with a model's weights, a library's and generated: `python -m benchmarks.products`.

The products of a decode step of Llama-3.1-8B's shape, with what surrounds them, each compiled as generate()
compiles a step: by Inductor with a library's products, and with generated ones, `row_products()`. Times
are medians of CUDA-graph replays over several copies of the weights, so that no cache holds them; errors are
against float32. `--sweep` times further tiles, from which those of `rows.FEW` are to be chosen.
`--json FILE` writes what is shown. Without a GPU everything shrinks, and times mean nothing.
"""

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fade_fast.compile import compiled as compiling
from fade_fast.compile import inductor
from fade_fast.compile.small_matmul import few_tile, tile
from fade_fast.measure.decode_attention import microseconds, read_bandwidth
from fade_fast.saved.files import write_json

ROWS = (1, 2, 4, 8)
CACHED = 1 << 28  # bytes of weights to read, several times the size of an L2 cache
BLOCKS = [(8, 512), (8, 1024), (16, 256), (16, 512), (32, 128), (32, 256), (32, 512), (64, 64), (64, 128)]
#: The tiles of `--sweep`: results and summands, warps, stages.
TILES = [(*blocks, w, s) for blocks, w, s in itertools.product(BLOCKS, (2, 4, 8), (3, 4, 5))]


def residual(x: Tensor, weights: list[Tensor], added: Tensor) -> Tensor:
    return added + F.linear(x, weights[0])


def both(x: Tensor, weights: list[Tensor], added: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, weights[0]), F.linear(x, weights[1])


def gated(x: Tensor, weights: list[Tensor], added: Tensor) -> Tensor:
    return F.silu(F.linear(x, weights[0])) * F.linear(x, weights[1])


def alone(x: Tensor, weights: list[Tensor], added: Tensor) -> Tensor:
    return F.linear(x, weights[0])


@dataclass(frozen=True)
class Shape:
    """`count` products of the same rows, each of `results` and `summands`, and a function of the results."""

    name: str
    function: object
    results: int
    summands: int
    count: int = 1

    @property
    def bytes(self) -> int:
        return 2 * self.count * self.results * self.summands


SHAPES = [
    Shape("q, or o and a residual", residual, 4096, 4096),
    Shape("k and v", both, 1024, 4096, 2),
    Shape("gate and up", gated, 14336, 4096, 2),
    Shape("down and a residual", residual, 4096, 14336),
    Shape("head", alone, 128256, 4096),
]
TINY = [Shape("tiny", gated, 512, 256, 2)]


@dataclass
class Result:
    """One product. `tiles` is None for the library; `error` is relative to the norm of the float32 result."""

    shape: str
    rows: int
    how: str
    tiles: dict | None = None
    us: float | None = None
    bandwidth: float | None = None  # bytes of weights per second
    error: float | None = None
    failed: str | None = None


def compiled(shape: Shape, rows: int, tiles: dict | None, inputs: tuple):
    """The function, compiled and called once. `tiles` None means the products of the library."""
    torch._dynamo.reset()
    function = compiling.bind(shape.function, {})
    graph = torch.compile(function, fullgraph=True, dynamic=False)
    tag = torch.compiler.config.patch(cache_key_tag=f"{rows} {tiles}")  # apart in the disk cache
    with torch.no_grad(), tag, mock.patch.object(inductor, "few_tile", lambda *args: dict(tiles)):
        with inductor.row_products() if tiles else contextlib.nullcontext():
            return graph, graph(*inputs)


def measure(shape: Shape, rows: int, device: str, sweep: bool) -> Iterator[Result]:
    """The products of the library, then the generated ones."""
    torch.manual_seed(0)
    options = dict(device=device, dtype=torch.bfloat16)
    x, added = torch.randn(rows, shape.summands, **options), torch.randn(rows, shape.results, **options)
    copies = max(1, CACHED // shape.bytes) if device == "cuda" else 1
    size = (shape.results, shape.summands)
    weights = [[0.02 * torch.randn(*size, **options) for _ in range(shape.count)] for _ in range(copies)]
    exact = _flat(shape.function(x.float(), [w.float() for w in weights[0]], added.float()))
    own = few_tile(shape.results, shape.summands) if rows > 1 else tile(shape.summands)
    ways = [None, own]
    for width, block, warps, stages in TILES if sweep and rows > 1 else ():
        ways.append(own | dict(XBLOCK=width, R0_BLOCK=block, num_warps=warps, num_stages=stages))
    for tiles in ways:
        result = Result(shape.name, rows, "generated" if tiles else "library", tiles)
        try:
            graph, found = compiled(shape, rows, tiles, (x, weights[0], added))
            result.error = float((_flat(found) - exact).norm() / exact.norm())
            with torch.no_grad():
                call = functools.partial(_each, graph, x, weights, added)
                total = microseconds(call, device, repeats=10, inner=3)
            result.us = total / copies
            result.bandwidth = shape.bytes / result.us * 1e6
        except Exception as error:  # tiles that do not fit; the others are still measured
            result.failed = f"{type(error).__name__}: {error}"[:200]
        yield result


def _each(graph, x: Tensor, weights: list[list[Tensor]], added: Tensor) -> None:
    for w in weights:
        graph(x, w, added)


def _flat(found) -> Tensor:
    return torch.cat([x.float().flatten() for x in (found if isinstance(found, tuple) else (found,))])


def table(results: list[Result], bandwidth: float) -> str:
    """The products of the library, and the fastest generated ones first."""
    lines = [
        "| product | rows | how | us | of a copy's bandwidth | error | tiles |",
        "|---|---|---|---|---|---|---|",
    ]
    ranked = sorted(results, key=lambda r: (r.shape, r.rows, r.how != "library", r.us or 1e9))
    for r in ranked:
        tiles = "" if r.tiles is None else " ".join(f"{name} {n}" for name, n in r.tiles.items())
        numbers = r.failed or f"{r.us:.2f} | {r.bandwidth / bandwidth:.0%} | {r.error:.1e}"
        lines.append(f"| {r.shape} | {r.rows} | {r.how} | {numbers} | {tiles} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="rows of the products")
    parser.add_argument("--only", default="", help="products whose name has this in it")
    parser.add_argument("--sweep", action="store_true", help="time further tiles, some 80 a product")
    parser.add_argument("--json", type=Path, help="write what is shown")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bandwidth, results = read_bandwidth(device), []
    for shape in SHAPES if device == "cuda" else TINY:
        for rows in args.rows if args.only in shape.name else ():
            results += measure(shape, rows, device, args.sweep)
        if args.json:
            head = dict(
                device=torch.cuda.get_device_name() if device == "cuda" else "cpu", torch=torch.__version__
            )
            write_json(args.json, head | dict(bandwidth=bandwidth, results=[asdict(r) for r in results]))
    print(table(results, bandwidth))
    return int(any(r.failed and not args.sweep for r in results))


if __name__ == "__main__":
    sys.exit(main())
