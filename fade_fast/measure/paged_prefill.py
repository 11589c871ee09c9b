"""Prefill of the vLLM plugin over packed pages against bfloat16: `fade bench prefill`. vLLM is not needed.

Layers, pages and batches are those of the plugin, as in `fade bench paged`: one layer with random data of the
shape of a model. A step adds `chunk` tokens to each of some requests, and may add one token to each of
others, as chunked prefill of vLLM does. What is timed is `forward` of a layer, which stores the tokens of the
step and attends, and both parts apart. What a step does once for all layers is timed apart, too.

The baseline is the fastest attention kernel of PyTorch over contiguous keys and values in bfloat16, and a
copy of the new tokens into pages. Requests that decode add the fastest kernel of `fade bench paged`. Both
then get the time of all other operations of a layer with so many tokens (`fade bench throughput`): this gives
the time of a prefill, and by how many percent it grows.

Times of parts are medians of CUDA-graph replays, which are those of the device. vLLM runs prefill without a
graph. So layers with all their operations also run one after another without a graph, ours and those of the
baseline: the host then starts kernels while the device works, and caches of the device hold what the other
operations left there. What a step does once is added to ours, and nothing to the baseline. Queries at the
beginning of pages are compared with float64 over what the pages hold. The tests of the plugin compare all
queries.
`--quick` shrinks everything, for a CPU.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from fade_fast.vllm.layer import DenseLayer

from .decode_attention import seconds
from .models import LLAMA, MODELS, TINY
from .paged_attention import (
    SMALL,
    TOLERANCE,
    Attempts,
    K,
    Pool,
    Shape,
    baselines,
    eager,
    fastest,
    graphed,
    header,
    launches,
    make_layer,
    show,
    without_attention,
)
from .paged_throughput import Rest, first_calls
from .parsers.paged_prefill import arguments

LAYERS = 16  # layers that run one after another without a graph
TARGET = 10.0  # percent by which a prefill may grow


@dataclass(frozen=True)
class Case:
    """A step: `requests` of `chunk` new tokens behind `past` others, `decodes` of one behind `context`."""

    requests: int
    chunk: int
    past: int = 0
    decodes: int = 0
    context: int = 2 * K
    bits: int = 4
    codec: str = "rotated"

    @property
    def name(self) -> str:
        after = f" after {self.past}" * bool(self.past)
        beside = f" beside {self.decodes} x 1" * bool(self.decodes)
        return f"{self.requests} x {self.chunk}{after}{beside}, INT{self.bits} {self.codec}"

    @property
    def tokens(self) -> int:
        """New tokens."""
        return self.requests * self.chunk + self.decodes


CASES = [
    Case(1, 2 * K),
    Case(4, 2 * K),
    Case(1, 8 * K),
    Case(1, 2 * K, past=6 * K),
    Case(1, 2 * K, past=30 * K),
    Case(1, 2 * K - 64, decodes=64),
    Case(1, 2 * K, bits=8),
    Case(1, 2 * K, codec="matched"),
]


@dataclass
class Result:
    """A case. Times are microseconds of a layer, of a CUDA graph unless the name says otherwise."""

    name: str
    tokens: int
    error: float  # relative, of some queries, against float64 over what the pages hold
    us: float | None  # of storing and attention
    eager_us: float  # without a graph: the larger of the times of host and device
    stream_us: float  # of a layer with all its operations among others, without a graph
    dense_stream_us: float  # the same of the baseline
    store_us: float | None
    attend_us: float | None
    launches: int | None  # kernels of storing and attention; None without a GPU
    store_launches: int | None
    step_us: float  # what a step does once for all layers, on host and device
    dense_us: float
    dense_kernels: dict[str, float]  # microseconds of each baseline
    dense_store_us: float
    rest_us: float  # all other operations of a layer
    layers: int
    prefill_ms: float
    dense_prefill_ms: float
    percent: float  # how much longer the prefill takes
    stream_percent: float  # the same by the times without a graph, with what a step does once
    target: float
    compile_s: float


class Step:
    """A step of a case: requests in pages, and the arguments of `forward` behind the cache.

    Attributes:
        starts: the first token of each request in the step, and its position.
    """

    def __init__(self, case: Case, shape: Shape, device: str):
        self.layer = make_layer(shape, case.bits, case.codec, torch.device(device))
        self.counts = [case.chunk] * case.requests + [1] * case.decodes
        past = [case.past] * case.requests + [case.context] * case.decodes
        self.lengths = [n + more for n, more in zip(past, self.counts)]
        self.pool = Pool(shape, self.layer, self.lengths, device)
        self.pool.fill(past)
        firsts = [sum(self.counts[:i]) for i in range(len(self.counts))]
        self.starts = list(zip(firsts, past))
        query = self.pool.draw(case.tokens, shape.heads * shape.group)
        slots = [self.pool.slots(row, n, end) for row, (n, end) in enumerate(zip(past, self.lengths))]
        step = self.cut()
        keys, values = self.pool.keys(step.positions), self.pool.draw(case.tokens)
        self.args = query, keys, values, torch.cat(slots), step, torch.full_like(query, torch.nan)

    def cut(self):
        """The step, cut into batches."""
        return self.pool.step(self.counts, self.lengths, most=1)

    def error(self) -> float:
        """Relative error of queries at the beginning of pages: the pages hold all that these read."""
        query, keys, values, *_, output = self.args
        page, off, whole = self.pool.shape.page, 0.0, 0.0
        for row, ((start, past), count) in enumerate(zip(self.starts, self.counts)):
            at = [p for p in range(-(-past // page) * page, past + count, page) if p]
            for position in {at[i] for i in (0, len(at) // 2, -1)} if at else ():
                token = start + position - past
                held = self.pool.stored(row, position)
                mine = (torch.cat((x, y[token].double()[:, None]), 1) for x, y in zip(held, (keys, values)))
                keys_of, values_of = mine
                rows = query[token].double().unflatten(0, (keys.shape[1], -1)) * self.layer.scaling
                exact = ((rows @ keys_of.mT).softmax(-1) @ values_of).flatten(0, 1)
                off += float((output[token].double() - exact).square().sum())
                whole += float(exact.square().sum())
        return (off / whole) ** 0.5


def dense(case: Case, shape: Shape, device: str) -> dict[str, Callable]:
    """Kernels of PyTorch for the chunks of a case, in bfloat16."""
    heads, d, length = shape.heads, shape.head_dim, case.past + case.chunk
    random = lambda *size: torch.randn(size, device=device, dtype=torch.bfloat16)  # noqa: E731
    query = random(case.requests, heads * shape.group, case.chunk, d)
    keys, values = (random(case.requests, heads, length, d) for _ in range(2))
    rule = dict(is_causal=True)
    if case.past:
        rule = dict(attn_mask=causal_lower_right(case.chunk, length))
    call = lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True, **rule)  # noqa: E731

    def by(backend):
        def limited():
            with sdpa_kernel(backend):
                return call()

        return limited

    found = {"SDPA": call}
    if device != "cuda":
        return found
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        found[backend.name.split("_")[0].lower()] = by(backend)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, keys, values)]
    steps = torch.arange(case.requests + 1, device=device, dtype=torch.int32)
    ends = steps * case.chunk, steps * length

    def ragged():
        return torch.ops.aten._flash_attention_forward(
            *flat, *ends, case.chunk, length, 0.0, True, False, scale=d**-0.5
        )

    return found | {"FlashAttention, ragged": ragged}


def measure(case: Case, shape: Shape, model: str, device: str) -> Result:
    """All measurements of a case."""
    made = Step(case, shape, device)
    layer, cache, args = made.layer, made.pool.cache, made.args
    forward = lambda: layer.forward(cache, *args)  # noqa: E731
    compile_s = seconds(forward, device)
    error = made.error()
    assert error <= TOLERANCE, f"{case.name}: the output is off by {error:.1e}"
    assert args[-1].isfinite().all(), f"{case.name}: some outputs are not finite"
    store_us = store_launches = None
    with without_attention(layer) as seen:
        forward()
        store_us, store_launches = graphed(forward, device), launches(forward, device)
    rest = seen[0][1:]
    attend = lambda: layer.attend(cache, *rest)  # noqa: E731
    attend()
    attend_us = graphed(attend, device)
    us, eager_us, count = graphed(forward, device), eager(forward, device), launches(forward, device)
    wall = lambda call: statistics.median(seconds(call, device) for _ in range(7)) * 1e6  # noqa: E731
    step_us = wall(lambda: layer.forward(cache, *args[:4], made.cut(), args[5])) - wall(forward)

    calls = dense(case, shape, device)
    best, kernels, _ = fastest(calls, device)
    dense_us, plain_calls = kernels[best], [calls[best]]
    if case.decodes:
        calls = baselines(shape, case.decodes, case.context, device)
        name, more, _ = fastest(calls, device)
        kernels |= {f"decode: {key}": x for key, x in more.items()}
        dense_us += more[name]
        plain_calls.append(calls[name])
    plain = DenseLayer(heads=shape.heads, scaling=1.0)
    held = cache.new_zeros((*cache.shape[:3], 2 * shape.head_dim), dtype=torch.bfloat16)
    store = lambda: plain.append(held, *args[1:4], args[4].positions)  # noqa: E731
    dense_store_us = graphed(store, device) or eager(store, device)

    others = Rest(MODELS[model][2], device)
    _, ran = first_calls(others.calls(case.tokens)[0], device)
    name, times, _ = fastest(ran, device)
    rest_us, layers = times[name], MODELS[model][2]["num_hidden_layers"]
    base = dense_us + dense_store_us + rest_us
    ours = (us or eager_us) + rest_us
    in_stream = lambda *calls: eager(lambda: [call() for call in calls], device, LAYERS)  # noqa: E731
    stream_us, dense_stream_us = in_stream(ran[name], forward), in_stream(ran[name], store, *plain_calls)
    slow = stream_us + step_us / layers
    return Result(
        name=case.name, tokens=case.tokens, error=error, us=us, eager_us=eager_us, stream_us=stream_us,
        dense_stream_us=dense_stream_us, store_us=store_us, attend_us=attend_us, launches=count,
        store_launches=store_launches, step_us=step_us,
        dense_us=dense_us, dense_kernels=kernels, dense_store_us=dense_store_us, rest_us=rest_us,
        layers=layers, prefill_ms=layers * ours / 1e3, dense_prefill_ms=layers * base / 1e3,
        percent=(ours / base - 1) * 100, stream_percent=(slow / dense_stream_us - 1) * 100, target=TARGET,
        compile_s=compile_s,
    )  # fmt: skip


HEAD = (
    "case", "layer us", "storing", "attention", "no graph", "launches", "of storing", "bf16 attention us",
    "copy us", "other us", "prefill ms", "bf16 ms", "percent", "layer us, no graph", "bf16 us, no graph",
    "percent, no graph", "target", "step us", "error", "compile s",
)  # fmt: skip


def shown(r: Result) -> str:
    cells = [
        r.name, show(r.us), show(r.store_us), show(r.attend_us), show(r.eager_us), show(r.launches, "d"),
        show(r.store_launches, "d"), show(r.dense_us), show(r.dense_store_us), show(r.rest_us),
        show(r.prefill_ms, ".2f"), show(r.dense_prefill_ms, ".2f"), show(r.percent, "+.1f"),
        show(r.stream_us), show(r.dense_stream_us), show(r.stream_percent, "+.1f"), show(r.target, "+.0f"),
        show(r.step_us), show(r.error, ".1e"), show(r.compile_s),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def small(case: Case) -> Case:
    return replace(
        case, chunk=min(case.chunk, 150), past=min(case.past, 90), decodes=min(case.decodes, 3), context=70
    )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    quick = args.quick or args.device != "cuda"
    shape, model = (SMALL, TINY) if quick else (Shape(), LLAMA)
    shape = replace(shape, page=args.page or shape.page)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    found = dict(
        kind="prefill", device=name, torch=torch.__version__, quick=quick, shape=asdict(shape), model=model,
        results=[], failed={},
    )  # fmt: skip
    print(f"{name}, torch {torch.__version__}" + "; shapes are small, and times mean nothing" * quick)
    print("\n" + header(HEAD), flush=True)
    attempt = Attempts(found, args.json, args.device)
    with torch.no_grad():
        for case in [small(x) for x in CASES] if quick else CASES:
            if args.only not in case.name:
                continue
            result = attempt(case.name, lambda case=case: measure(case, shape, model, args.device))
            if result is not None:
                found["results"].append(asdict(result))
                print(shown(result), flush=True)
                attempt.save()
    attempt.save()
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
