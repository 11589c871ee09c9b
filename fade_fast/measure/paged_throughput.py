"""Tokens a second where memory limits the batch of the vLLM plugin: `fade bench throughput`. vLLM is not
needed.

A model has the shape of Llama-3.1-8B. Each request has a prompt of 2048 tokens and an answer of 1024. All
caches get the memory that `--gpu-gb` leaves beside the weights of the whole model and `--reserve-gb`, which
is for what a step computes with. A row whose step needs more than the reserve is an error.

How many requests fit: each is counted with the pages of its whole length, 3072 tokens. This is the cautious
count: vLLM hands out pages as a text grows, and then preempts requests. How many would fit at their mean
length is shown beside it, and not measured.

What is timed: requests are at all ages, so their contexts are spread evenly between the prompt and the whole
length, and attention reads 2560 tokens of each in the mean. A decode step is

    layers x (attention with storing + all other operations of a layer) + what a step does once + output head

Each term is a median. One layer is allocated, with the pages of all requests. Its step is that of the
plugin's default: the layer's own CUDA graphs, one call after another, so the time of the host counts where it
is longer. "Once" is the time in which a step is cut into batches and copied to where the graphs read, as if
nothing else ran meanwhile. Other operations, in bfloat16 with random weights, run uncompiled and compiled by
Inductor, in CUDA graphs, and the faster one counts, for each batch.

Kernels are compiled for powers of two of requests. So each format is measured with the most requests that
fit, and with the largest power of two among them (`--max-num-seqs` of vLLM). The baseline
is the better of both with bfloat16 pages: the fastest attention kernel of PyTorch over contiguous keys and
values, all requests at the mean length, which is easier than pages.

"With prefill" adds the prompt, which each request computes once and alone: 1024 tokens take the time of one
prompt and of 1024 steps divided by the batch. The prompt in bfloat16 is FlashAttention and the products of
the weights; with packed pages, attention and storing are those of the plugin (see `paged_attention.prefill`).
Sampling other than an argmax, the scheduler and the host are left out, for all rows.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fade_fast.compile.compiled import use_compiled
from fade_fast.vllm.batches import Step
from fade_fast.vllm.graphs import Graphs, Held

from .choose import weights
from .decode_attention import microseconds, read_bandwidth, seconds
from .models import LLAMA, MODELS, TINY, build
from .paged_attention import (
    TOLERANCE,
    Attempts,
    Pool,
    Shape,
    baselines,
    eager,
    error_of,
    fastest,
    header,
    make_layer,
    prefill,
    show,
    storing,
)
from .parsers.paged_throughput import arguments, name_of

TARGET = 1.5  # of packed pages over bfloat16
DENSE_PAGE = 16  # tokens in a page of vLLM in bfloat16
GOLDEN = (5**0.5 - 1) / 2
BF16 = "bf16"
EPS = 1e-5  # of norms


@dataclass(frozen=True)
class Workload:
    """A model, its requests, and the memory they share.

    Attributes:
        name: of the model in `MODELS`.
        prompt, answer: tokens of a request.
        page: tokens in a packed page.
        gpu, reserve: bytes of the GPU, and those of them that neither weights nor pages get.
    """

    name: str
    prompt: int
    answer: int
    page: int
    gpu: int
    reserve: int

    @property
    def whole(self) -> int:
        """Tokens of a request at its end."""
        return self.prompt + self.answer

    @property
    def mean(self) -> int:
        """Tokens of a request, on average over its steps."""
        return self.prompt + self.answer // 2

    @property
    def model(self) -> dict:
        """Numbers of the shape of the model."""
        return MODELS[self.name][2]

    @property
    def shape(self) -> Shape:
        m = self.model
        heads = m["num_key_value_heads"]
        group = m["num_attention_heads"] // heads
        return Shape(heads, group, m["head_dim"], self.page, self.whole)

    def lengths(self, requests: int) -> list[int]:
        """Contexts of requests at all ages: those of any number of first requests are spread evenly."""
        return [self.prompt + 1 + int((i + 0.5) * GOLDEN % 1 * self.answer) for i in range(requests)]

    def bytes_of(self, length: int, cell: int | None) -> int:
        """Bytes of the pages of a request in all layers. `cell`: bytes of a token of a head; None: bf16."""
        page, size = (DENSE_PAGE, 4 * self.model["head_dim"]) if cell is None else (self.page, cell)
        heads, layers = self.model["num_key_value_heads"], self.model["num_hidden_layers"]
        return -(-length // page) * page * size * heads * layers

    def fits(self, length: int, cell: int | None) -> int:
        """How many requests of this length fit beside the weights. Raises `ValueError` if none does."""
        left = self.gpu - self.reserve - model_bytes(self.name)
        count = left // self.bytes_of(length, cell)
        if count < 1:
            raise ValueError(f"no request of {length} tokens fits: weights and reserve leave {left / 1e9} GB")
        return count


@dataclass
class Row:
    """A batch with one kind of pages. Times are microseconds of a CUDA graph, of one layer unless stated.

    Attributes:
        format: "bf16", or the width and the codec.
        requests: of the batch.
        fits, fits_mean: requests that fit at their whole length, and at their mean length.
        tokens: that attention reads.
        slots: that its kernels compute, padding included.
        request_bytes: pages of a request of the whole length, all layers.
        error: of attention, relative, against float64 over what the pages hold; None: PyTorch's own kernel.
        attention_us: with storing.
        once_us: what a step does once.
        rest_us, head_us: all other operations of a layer, and the output head.
        kernels: attention in bf16, and the other operations, by kernel.
        needed_bytes: most that attention, or the others, allocate beside weights and pages.
        compile_s: of first calls.
        step_ms: of all layers and the head.
        prefill_ms: of the prompt of a request, all layers; None: it was not measured.
        prefilled_per_s: tokens a second, with the time of prompts.
        ratio, prefilled_ratio: to the best batch in bf16.
    """

    format: str
    requests: int
    fits: int
    fits_mean: int
    tokens: int
    slots: int
    request_bytes: int
    error: float | None
    attention_us: float
    once_us: float
    rest_us: float
    head_us: float
    kernels: dict[str, dict[str, float]]
    needed_bytes: int | None
    compile_s: float
    step_ms: float
    tokens_per_s: float
    prefill_ms: float | None = None
    prefilled_per_s: float | None = None
    ratio: float | None = None
    prefilled_ratio: float | None = None
    target: float | None = None


@functools.cache
def model_bytes(name: str) -> int:
    """Bytes of the weights of a whole model."""
    return weights(build(name, "meta"))


# -- what a step does beside attention


def others(
    x: Tensor, attended: Tensor, cos: Tensor, sin: Tensor, norms: list[Tensor], matrices: list[Tensor]
) -> tuple[Tensor, ...]:
    """All operations of a layer but attention, for one token of each request.

    Args:
        x: [B, hidden], what enters the layer.
        attended: [B, Hq * D], the output of attention.
        cos, sin: [B, 1, D].
        norms: weights of both norms, [hidden].
        matrices: of queries, keys and values together, of the output, of gate and up together, and of down.

    Returns what leaves the layer, [B, hidden], queries [B, Hq, D], keys and values [B, H, D].
    """
    into, out, wide, down = matrices
    hidden, head_dim = x.shape[1:], cos.shape[-1]
    heads = attended.shape[1] // head_dim
    found = F.linear(F.rms_norm(x, hidden, norms[0], EPS), into).unflatten(-1, (-1, head_dim))
    rest = (found.shape[1] - heads) // 2
    query, keys, values = found.split((heads, rest, rest), dim=1)
    query, keys = (turned(y, cos, sin) for y in (query, keys))
    x = x + F.linear(attended, out)
    gate, up = F.linear(F.rms_norm(x, hidden, norms[1], EPS), wide).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down), query, keys, values


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of `x` [B, heads, D]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Rest:
    """What a decode step computes beside attention, with random weights of the shape of a model."""

    def __init__(self, model: dict, device: str):
        self.model, self.device = model, device
        self.generator = torch.Generator(device).manual_seed(0)
        hidden, inner, d = model["hidden_size"], model["intermediate_size"], model["head_dim"]
        heads, kv_heads = model["num_attention_heads"], model["num_key_value_heads"]
        sizes = [
            (d * (heads + 2 * kv_heads), hidden), (hidden, heads * d), (2 * inner, hidden), (hidden, inner)
        ]  # fmt: skip
        self.matrices = [self.draw(*size) * size[1] ** -0.5 for size in sizes]
        self.norms = [self.draw(hidden) for _ in range(2)]
        self.head = self.draw(model["vocab_size"], hidden) * hidden**-0.5
        self.compiled = torch.compile(others, fullgraph=True) if device == "cuda" else None

    def draw(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device, dtype=torch.bfloat16)

    def calls(self, requests: int) -> tuple[dict[str, Callable], Callable]:
        """Calls of a layer by kernel, and of the output head with the choice of a token."""
        m = self.model
        x, attended, cos, sin = tokens = [
            self.draw(requests, *size)
            for size in (
                (m["hidden_size"],), (m["num_attention_heads"] * m["head_dim"],), *[(1, m["head_dim"])] * 2
            )
        ]  # fmt: skip
        for y in tokens:
            torch._dynamo.maybe_mark_dynamic(y, 0)  # one compiled version serves all batches
        args = x, attended, cos, sin, self.norms, self.matrices
        found = {"uncompiled": lambda: others(*args)}
        if self.compiled is not None:
            found["compiled"] = lambda: self.compiled(*args)
        return found, lambda: F.linear(F.rms_norm(x, x.shape[1:], self.norms[0], EPS), self.head).argmax(-1)


def needed(call: Callable, device: str) -> int | None:
    """Most bytes that a call, which ran before, allocates. None without a GPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def first_calls(calls: dict[str, Callable], device: str) -> tuple[float, dict[str, Callable]]:
    """Seconds of the first call of each kernel, which compiles, and the kernels that ran."""
    started, ran = time.perf_counter(), {}
    for name, call in calls.items():
        try:
            seconds(call, device)
            ran[name] = call
        except Exception as error:  # the other one counts; if none runs, `fastest` has no result
            print(f"  {name} does not run: {str(error).splitlines()[0][:200]}", flush=True)
    return time.perf_counter() - started, ran


# -- a batch


def attention(pool: Pool, requests: int, fresh: Tensor) -> dict:
    """Attention with storing of the first requests of a pool, in packed pages: fields of `Row`.

    `fresh` is what the pages held before any step.
    """
    device = pool.device
    part = copy.copy(pool)
    part.lengths, part.table = pool.lengths[:requests], pool.table[:requests]
    part.cache.copy_(fresh)
    query, keys, values, slots, _, output = part.decode()
    exact = part.exact(query, keys, values)
    graphs = Graphs(requests, part.shape.heads)
    cut = lambda: part.step([1] * requests, part.lengths)  # noqa: E731

    def run(held: Held | None, step: Step | None = None) -> None:
        args = part.cache, query, keys, values
        if held is None:  # without a GPU
            part.layer.forward(*args, slots, step or cut(), output)
        else:
            held.forward(part.layer, *args, output)

    made = lambda: graphs.hold(cut(), slots)  # noqa: E731
    compile_s = seconds(lambda: run(made()), device)
    off = error_of(output, exact)
    assert off <= TOLERANCE, f"the output is off by {off:.1e}"
    for _ in range(3):  # calls are captured, and then replayed
        output.fill_(torch.nan)
        part.cache.copy_(fresh)  # what a token overwrote is read only before
        run(made())
        off = max(off, error_of(output, exact))
    assert off <= TOLERANCE, f"the output of a replay is off by {off:.1e}"
    assert output.isfinite().all(), "some outputs are not finite"
    step, held = cut(), made()
    at_once = needed(lambda: run(None, cut()), device)
    forward = eager(lambda: run(held, step), device)
    once = eager(made, device)
    batches = step.short if held is None else [x.batch for x in held.rows]
    read = sum(len(x.at) * part.layer._capacity(x, part.shape.page, use_compiled(query))[0] for x in batches)
    return dict(
        tokens=sum(part.lengths), slots=read, error=off, attention_us=forward, once_us=once,
        needed_bytes=at_once, compile_s=compile_s,
    )  # fmt: skip


def dense_attention(work: Workload, requests: int, device: str) -> tuple[dict, dict[str, float]]:
    """The same in bfloat16, from the fastest kernel of PyTorch, and the microseconds of each kernel."""
    shape, tokens = work.shape, requests * work.mean
    calls = baselines(shape, requests, work.mean, device)
    name, kernels, _ = fastest(calls, device)
    at_once = needed(calls[name], device)
    size = requests, shape.heads, shape.head_dim
    new = [torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2)]
    held = [x.new_zeros(requests * DENSE_PAGE, *size[1:]) for x in new]
    slots = torch.arange(requests, device=device) * DENSE_PAGE
    store = microseconds(lambda: [x.index_copy_(0, slots, y) for x, y in zip(held, new)], device)
    found = dict(
        tokens=tokens, slots=tokens, error=None, attention_us=kernels[name] + store, once_us=0.0,
        needed_bytes=at_once, compile_s=0.0,
    )  # fmt: skip
    return found, kernels | {"storing": store}


def finished(work: Workload, rest: Rest, format: str, cell: int | None, requests: int, found: dict, kernels):
    """The row of a batch whose attention was measured."""
    calls, head = rest.calls(requests)
    compile_s, ran = first_calls(calls, rest.device)
    seconds(head, rest.device)
    name, times, _ = fastest(ran, rest.device)
    most = [found["needed_bytes"], needed(ran[name], rest.device), needed(head, rest.device)]
    most = None if None in most else max(most)
    if most is not None and most > work.reserve:
        raise ValueError(
            f"a step of {requests} requests needs {most / 1e9:.2f} GB beside weights and pages; use a larger "
            "--reserve-gb"
        )
    head_us = microseconds(head, rest.device)
    layers = work.model["num_hidden_layers"]
    us = layers * (found["attention_us"] + times[name]) + found["once_us"] + head_us
    found = found | dict(needed_bytes=most, compile_s=found["compile_s"] + compile_s)
    return Row(
        format=format, requests=requests, fits=work.fits(work.whole, cell),
        fits_mean=work.fits(work.mean, cell), request_bytes=work.bytes_of(work.whole, cell),
        rest_us=times[name], head_us=head_us, kernels=dict(attention=kernels, rest=times), step_ms=us / 1e3,
        tokens_per_s=requests / us * 1e6, target=None if cell is None else TARGET, **found,
    )  # fmt: skip


def batches(most: int) -> list[int]:
    """The batches that are measured if `most` requests fit: as many, and the power of two below."""
    return sorted({most, 1 << most.bit_length() - 1}, reverse=True)


def compare(work: Workload, rows: list[Row], prompts: dict | None) -> None:
    """Write the time of prompts, and ratios to the best batch in bf16, into the rows."""
    times = {}
    if prompts:
        times = {f"INT{x['bits']} {x['codec']}": x["ms"] for x in prompts["rows"]}
        times[BF16] = prompts["dense_ms"]
    for row in rows:
        row.prefill_ms = times.get(row.format)
        if row.prefill_ms is not None:
            each = row.prefill_ms + work.answer * row.step_ms / row.requests
            row.prefilled_per_s = work.answer / each * 1e3
    for name, ratio in (("tokens_per_s", "ratio"), ("prefilled_per_s", "prefilled_ratio")):
        base = [getattr(row, name) for row in rows if row.format == BF16 and getattr(row, name)]
        for row in rows:
            if base and getattr(row, name):
                setattr(row, ratio, getattr(row, name) / max(base))


# -- what is shown

HEAD = (
    "pages", "batch", "fit at mean length", "step ms", "attention us", "other us", "head us", "once us",
    "slots / tokens", "decode tokens/s", "ratio", "prefill ms", "tokens/s with prefill", "ratio", "target",
    "GB needed", "error", "compile s",
)  # fmt: skip


def shown(r: Row) -> str:
    size = None if r.needed_bytes is None else r.needed_bytes / 1e9
    cells = [
        r.format, str(r.requests), str(r.fits_mean), show(r.step_ms, ".2f"), show(r.attention_us),
        show(r.rest_us), show(r.head_us), show(r.once_us), show(r.slots / r.tokens, ".2f"),
        show(r.tokens_per_s, ".0f"), show(r.ratio, ".2f"), show(r.prefill_ms), show(r.prefilled_per_s, ".0f"),
        show(r.prefilled_ratio, ".2f"), show(r.target), show(size, ".2f"), show(r.error, ".1e"),
        show(r.compile_s),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def of_prompts(x: dict) -> list[str]:
    """Times of a prompt in words."""
    lines = [f"A prompt of {x['tokens']} tokens in bf16: {x['dense_ms']:.1f} ms, attention "
             f"{x['attention_ms']:.1f} of it."]  # fmt: skip
    for r, stored in zip(x["rows"], x["storing"]):
        percent = x["layers"] / 10 / x["dense_ms"]  # of the prompt in bf16, for a microsecond of a layer
        write = percent * (stored["prefill_us"] or stored["prefill_eager_us"])
        attend = percent * stored["attention_us"]
        lines.append(
            f"{name_of(r['bits'], r['codec'])}: {r['ms']:.1f} ms, {r['percent']:+.0f} % (target "
            f"+{x['target']:.0f}). Storing is {write:.0f} % of bf16, attention {attend:.0f} %."
        )
    return lines


def measured(work: Workload, args: argparse.Namespace, found: dict, attempt: Attempts) -> list[Row]:
    """Rows of all batches. `found` gets them as far as they are measured, and the time of prompts."""
    rows: list[Row] = []
    rest, device = Rest(work.model, args.device), args.device

    def keep(row: Row | None) -> None:
        if row is not None:
            rows.append(row)
            compare(work, rows, None)
            found["rows"] = [asdict(x) for x in rows]
            print(shown(row), flush=True)
            attempt.save()

    def dense(requests: int) -> Row:
        return finished(work, rest, BF16, None, requests, *dense_attention(work, requests, device))

    def packed(name: str, bits: int, codec: str) -> None:
        layer = make_layer(work.shape, bits, codec, torch.device(device))
        cell = layer.layout.cell(work.page)
        counts = batches(work.fits(work.whole, cell))
        pool = Pool(work.shape, layer, work.lengths(counts[0]), device)
        started = time.perf_counter()
        pool.fill()
        found["stored_s"][name] = time.perf_counter() - started
        print(f"  {name}: {counts[0]} requests stored in {found['stored_s'][name]:.0f} s", flush=True)
        fresh = pool.cache.clone()
        for count in counts:
            measure = lambda count=count: finished(  # noqa: E731
                work, rest, name, cell, count, attention(pool, count, fresh), {}
            )
            keep(attempt(f"{name}, {count} requests", measure))

    print("\n" + header(HEAD), flush=True)
    for count in batches(work.fits(work.whole, None)):
        keep(attempt(f"{BF16}, {count} requests", lambda count=count: dense(count)))
    for bits, codec in sorted(args.formats, key=lambda x: x[0]):  # those that hold most come first
        name = name_of(bits, codec)
        attempt(name, lambda name=name, x=(bits, codec): packed(name, *x))
    if not args.skip_prefill:
        found["prefill"] = attempt("prefill", lambda: prompts(work, args))
        compare(work, rows, found["prefill"])
        found["rows"] = [asdict(x) for x in rows]
        attempt.save()
    return rows


def prompts(work: Workload, args: argparse.Namespace) -> dict:
    """`paged_attention.prefill` for the prompt of a request."""
    device = args.device
    stored = [storing(work.shape, *x, device, work.prompt, appends=0) for x in args.formats]
    return prefill(work.shape, stored, device, work.prompt, args.quick) | dict(storing=stored)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    gpu, reserve = (int(x * 1e9) for x in (args.gpu_gb, args.reserve_gb))
    work = Workload(LLAMA, 2048, 1024, args.page, gpu, reserve)
    if args.quick:
        work = replace(work, name=TINY, prompt=300, answer=60)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    found = dict(
        kind="throughput", device=device, torch=torch.__version__, quick=args.quick, work=asdict(work),
        weights=model_bytes(work.name), bandwidth=read_bandwidth(args.device),
        pages="counted for the whole length of a request; attention over contexts spread evenly",
        rows=[], stored_s={}, prefill=None, failed={},
    )  # fmt: skip
    print(f"{device}, torch {torch.__version__}: {found['bandwidth'] / 1e12:.2f} TB/s copied")
    print(f"{work.name}: weights {found['weights'] / 1e9:.4g} GB of {args.gpu_gb} GB, {args.reserve_gb} GB in"
          f" reserve; prompts of {work.prompt} tokens, answers of {work.answer}")  # fmt: skip
    if args.quick:
        print("The model is tiny, and times mean nothing.")
    attempt, started = Attempts(found, args.json, args.device), time.perf_counter()
    with torch.no_grad():
        rows = measured(work, args, found, attempt)
    print("\n" + header(HEAD) + "\n" + "\n".join(map(shown, rows)))
    if found["prefill"]:
        print("\n" + "\n".join(of_prompts(found["prefill"])))
    found["total_s"] = time.perf_counter() - started
    print(f"\n{found['total_s']:.0f} s in total")
    attempt.save()
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
