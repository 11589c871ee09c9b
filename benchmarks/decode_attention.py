"""Decode attention over packed tiers against SDPA over bfloat16: `python -m benchmarks.decode_attention`.

One attention layer, one query token, random data of a model's shape. Times are medians of CUDA-graph
replays in one process, SDPA (`enable_gqa=True`, which picks FlashAttention) beside each case. Every
case is checked against float64 with the same codes before it is timed. Without a GPU the cases shrink
and only the check runs. `--json FILE` writes what the table shows.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from fade_fast.kernels import packed, rotated
from fade_ref.tiers import token_bytes

BLOCK = 64  # slots a mean


@dataclass(frozen=True)
class Case:
    """A shape to measure, and how much faster than SDPA it should be."""

    model: str
    bits: int
    batch: int
    length: int
    target: float | None
    heads: int = 8
    group: int = 4
    head_dim: int = 128

    @property
    def name(self) -> str:
        return f"INT{self.bits} {self.model} B {self.batch} x S {self.length}"

    @property
    def bytes(self) -> int:
        """Packed bytes that must be read: keys, values and key means."""
        vector = 2 * token_bytes(self.bits, self.head_dim) + 2 * self.head_dim / BLOCK
        return int(self.batch * self.heads * self.length * vector)


K = 1024
LLAMA, QWEN, LLAMA2 = "Llama-3.1-8B", "Qwen2.5-7B", "Llama-2-7B"
CASES = [
    Case(LLAMA, 4, 8, 32 * K, 2.5),
    Case(LLAMA, 4, 1, 128 * K, 2.5),
    Case(LLAMA, 4, 1, 32 * K, 2.0),
    Case(LLAMA, 4, 1, 8 * K, 1.0),
    Case(QWEN, 4, 8, 16 * K, 2.0, heads=4, group=7),
    Case(LLAMA2, 4, 8, 16 * K, 2.5, heads=32, group=1),
    Case(LLAMA, 2, 8, 32 * K, 3.0),
    Case(LLAMA, 8, 8, 32 * K, 1.85),
    Case(LLAMA, 4, 1, 16 * K, None),
    Case(LLAMA, 4, 1, 64 * K, None),
]


@dataclass
class Result:
    """What was measured of a case; times in microseconds, None without a GPU."""

    name: str
    error: float
    us: float | None = None
    sdpa_us: float | None = None
    speedup: float | None = None
    target: float | None = None
    floor_us: float | None = None
    fraction_of_floor: float | None = None
    compile_s: float | None = None


class Problem:
    """Random codes of a case, and the query that attends to them."""

    def __init__(self, case: Case, device: str, seed: int = 0):
        self.case, generator = case, torch.Generator(device).manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
        b, h, n, d = case.batch, case.heads, case.length, case.head_dim
        self.matrix = rotated.rotation(d).float().to(device)
        offset = draw(1, h, 1, d)
        keys, values, means = [], [], []
        for _ in range(b):  # a row at a time: float32 keys of all rows need not fit
            k = draw(1, h, n, d) + offset
            mean = k.unflatten(2, (-1, BLOCK)).mean(3).half()
            means.append(mean)
            keys.append(rotated.encode(k, mean.repeat_interleave(BLOCK, dim=2), self.matrix, case.bits))
            values.append(rotated.encode(draw(1, h, n, d), None, self.matrix, case.bits))
        join = lambda packed: [None if x[0] is None else torch.cat(x) for x in zip(*packed)]  # noqa: E731
        self.keys, (codes, *rest) = join(keys), join(values)
        self.value_rows = codes
        self.values = [codes.mT.contiguous(), *rest]
        self.means = torch.cat(means)
        self.query = draw(b, h, case.group, d).bfloat16().float() * d**-0.5
        self.valid = torch.ones(b, 1, n, dtype=torch.bool, device=device)
        self.valid[:, :, -5:] = False
        self.bound = self.values[1].float().amax(-1)
        self.half = device == "cuda"

    def prepare(self):
        """What depends on the query alone: rotated, its products with the means, a reference score."""
        bias = self.query @ self.means.float().mT
        return self.query @ self.matrix.mT, bias.amax(-1), bias

    def attend(self, turned, reference, bias):
        bits = (self.case.bits,) * 2
        return packed.attend(
            turned, reference, bias, self.valid, self.keys, self.values, self.bound, bits, half=self.half
        )

    def error(self) -> float:
        """Relative to float64 attention over the same codes, in the rotated domain."""
        part = self.attend(*self.prepare())
        ours = part.acc / part.total[..., None]
        different = total = 0.0
        turned, bits = self.query.double() @ self.matrix.double().mT, self.case.bits
        for b in range(self.case.batch):
            for h in range(self.case.heads):
                row = (slice(b, b + 1), slice(h, h + 1))
                pick = lambda x, row=row: None if x is None else x[row]  # noqa: E731
                k = rotated.dequantize(rotated.Packed(*map(pick, self.keys)), bits, torch.float64)
                v = rotated.Packed(pick(self.value_rows), *map(pick, self.values[1:]))
                bias = self.query[row].double() @ self.means[row].double().mT
                s = turned[row] @ k.mT + bias.repeat_interleave(BLOCK, dim=-1)
                s = s.masked_fill(~self.valid[b, 0], -torch.inf)
                exact = s.softmax(-1) @ rotated.dequantize(v, bits, torch.float64)
                different += float((ours[row] - exact).norm() ** 2)
                total += float(exact.norm() ** 2)
        return (different / total) ** 0.5


def microseconds(function, repeats: int = 20, inner: int = 10) -> float:
    """Median time of a call, from replays of a CUDA graph of `inner` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            function()
    times = []
    for _ in range(repeats + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / inner)
    return statistics.median(times[3:])


def read_bandwidth() -> float:
    """Bytes a second of a large elementwise copy, read and written."""
    x = torch.rand(2**28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / (microseconds(lambda: torch.add(x, 1, out=y), inner=3) * 1e-6)


def measure(case: Case, device: str, bandwidth: float | None) -> Result:
    problem = Problem(case, device)
    started = time.perf_counter()
    prepared = problem.prepare()
    problem.attend(*prepared)
    if device == "cuda":
        torch.cuda.synchronize()
    compiled = time.perf_counter() - started
    result = Result(case.name, problem.error(), target=case.target)
    if device == "cuda":
        result.compile_s = compiled
        result.us = microseconds(lambda: problem.attend(*prepared))
        del problem
        shape = (case.batch, case.heads, case.length, case.head_dim)
        k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        q = torch.randn(shape[0], shape[1] * case.group, 1, shape[3], device=device, dtype=torch.bfloat16)
        result.sdpa_us = microseconds(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
        result.speedup = result.sdpa_us / result.us
        result.floor_us = case.bytes / bandwidth * 1e6
        result.fraction_of_floor = result.floor_us / result.us
        torch.cuda.empty_cache()
    return result


def table(results: list[Result]) -> str:
    lines = [
        "| case | us | SDPA us | speed-up | target | floor us | of the floor | error | compile s |",
        "|---" * 9 + "|",
    ]
    show = lambda x, digits=1: "-" if x is None else f"{x:.{digits}f}"  # noqa: E731
    for r in results:
        lines.append(
            f"| {r.name} | {show(r.us)} | {show(r.sdpa_us)} | {show(r.speedup, 2)} | {show(r.target, 2)} | "
            f"{show(r.floor_us)} | {show(r.fraction_of_floor, 2)} | {r.error:.1e} | {show(r.compile_s)} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    args = parser.parse_args(argv)
    cases = [case for case in CASES if args.only in case.name]
    bandwidth = None
    if args.device == "cuda":
        bandwidth = read_bandwidth()
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {bandwidth / 1e12:.2f} TB/s copied\n"
        )
    else:
        print("no GPU: accuracy only, over shorter texts\n")
        cases = [replace(case, batch=min(case.batch, 2), length=2048) for case in cases]
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    head = dict(device=device, torch=torch.__version__, bandwidth=bandwidth)
    results = []
    for case in cases:
        results.append(measure(case, args.device, bandwidth))
        print(table(results[-1:]).splitlines()[-1], flush=True)
        if args.json:
            args.json.write_text(
                json.dumps(head | dict(results=[asdict(r) for r in results]), indent=1) + "\n"
            )
    print("\n" + table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
