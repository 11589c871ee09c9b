"""Attention of the vLLM plugin over packed pages against bfloat16: `fade bench paged`. vLLM is not needed.

It makes layers, pages and batches as the backend of the plugin makes them (`fade_fast.vllm`), for one layer
with random data of the shape of a model: pages in a random order, `--page` tokens in each. A decode step adds
one token to each request. What is timed is what a layer does in such a step: `attend`, from the queries to
the output in bfloat16, and `forward`, which stores the new tokens before. `split` and what layers share are
done once a step and timed apart.

A third time is that of a whole step in one CUDA graph, as vLLM captures it with `full_graphs`: what a step
does once, and storing and attention of all layers, from lengths, tables and slots on the device. A captured
step must serve all lengths. So it is timed for the longest length of the case, and for the longest context
of the shape, at the lengths of the case: how much more it takes is the price of one graph for all lengths.

The baselines are kernels of PyTorch over contiguous keys and values in bfloat16, all requests of equal
length. That is easier than pages, so it is a fair and strong baseline. Several kernels run, and the fastest
counts. Requests of the `ragged` cases have lengths between half and one and a half times the length in the
name, and together as many tokens as the baseline.

On CUDA, times are medians, of CUDA-graph replays and of calls without a graph. Calls go around several
layers with pages of their own, so that no layer finds its pages in the cache of the device. Each case is
first checked against float64 attention over what the pages hold. `--quick` shrinks everything, for a CPU,
whose times mean nothing.
"""

import contextlib
import copy
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fade_fast.compile.compiled import use_compiled
from fade_fast.kernels.matched import Matrices
from fade_fast.saved.files import write_json
from fade_fast.vllm.batches import Step, split, uniform
from fade_fast.vllm.layer import CompressedLayer, DenseLayer, mean_rows
from fade_fast.vllm.pages import FIRST, NEAR, PREFERRED, SPAN
from fade_ref import matched as spec

from .decode_attention import encoding, microseconds, read_bandwidth, seconds
from .parsers.paged_attention import CODECS, STORED, arguments

K = 1024
#: Most relative error of an output in bfloat16 that kernels in float16 compute.
TOLERANCE = 1e-2
#: Bytes that the layers of a case hold at least, so that no layer stays in the cache of a GPU.
FRESH = 256 * 2**20
LAYERS = 32  # of the model, for what a step does once


@dataclass(frozen=True)
class Shape:
    """Heads of a layer, pages, and the longest context that a request may have."""

    heads: int = 8
    group: int = 4
    head_dim: int = 128
    page: int = PREFERRED
    most: int = 40 * K


@dataclass(frozen=True)
class Case:
    """Requests to decode for, and the speedup over bfloat16 that they should reach."""

    requests: int
    length: int
    bits: int
    codec: str = CODECS[0]
    ragged: bool = False
    target: float | None = None

    @property
    def name(self) -> str:
        kind = f"INT{self.bits} {self.codec}" + ", ragged" * self.ragged
        return f"{self.requests} x {self.length}, {kind}"

    def lengths(self) -> list[int]:
        """Tokens of each request, its newest one included."""
        if not self.ragged:
            return [self.length] * self.requests
        draws = torch.Generator().manual_seed(self.length)
        half = self.length // 2
        off = torch.randint(-half, half + 1, (self.requests // 2,), generator=draws).tolist()
        return [self.length + x for one in off for x in (one, -one)] + [self.length] * (self.requests % 2)


CASES = [
    Case(64, 8 * K, 4, target=1.3),
    Case(64, 8 * K, 8),
    Case(8, 32 * K, 4, target=1.8),
    Case(8, 32 * K, 8),
    Case(1, 32 * K, 4),
    Case(1, 32 * K, 8),
    Case(64, 8 * K, 4, ragged=True),
    Case(64, 8 * K, 4, "matched"),
    Case(8, 32 * K, 4, "matched"),
    Case(1, 32 * K, 4, "matched"),
]
CHUNK = 8 * K  # tokens of a chunk of prefill
APPENDS = 64  # requests that add a token each
QUICK = [replace(case, requests=min(case.requests, 3), length=min(case.length, 600)) for case in CASES]
SMALL = Shape(heads=2, head_dim=64, page=32, most=1024)


@dataclass
class Result:
    """A decode case. Times are microseconds a layer, of a CUDA graph unless the name says otherwise."""

    name: str
    target: float | None
    error: float  # relative, against float64 over what the pages hold
    tokens: int
    read_bytes: int  # packed records of all tokens
    dense_bytes: int  # the same tokens in bfloat16
    layers: int  # that the calls go around
    us: float  # of attention
    eager_us: float  # without a graph: the larger of the times of host and device
    forward_us: float  # of storing and attention
    forward_eager_us: float
    graph_us: float | None  # of a whole step in a graph, by the number of layers
    most_us: float | None  # the same where contexts may be as long as the shape allows
    launches: int | None  # kernels of attention, and with storing; None without a GPU
    forward_launches: int | None
    dense_us: float
    dense_eager_us: float
    dense_kernel: str
    kernels: dict[str, float]  # microseconds of each baseline
    step_us: float  # what a step does once for all layers, on host and device
    compile_s: float  # of the first call
    speedup: float
    eager_speedup: float
    gb_per_s: float
    dense_gb_per_s: float


def tables(shape: Shape, codec: str, seed: int = 0) -> tuple[Tensor, list[Matrices] | None]:
    """Key means by position, fp16 [H, M, D], and for `matched` the matrices of random moments."""
    draws = torch.Generator().manual_seed(seed)
    h, d = shape.heads, shape.head_dim
    means = torch.randn(h, mean_rows(shape.most), d, generator=draws).half()
    if codec == "rotated":
        return means, None
    sides = []
    for _ in range(2):
        moments = (torch.randn(h, d, 2 * d, generator=draws, dtype=torch.float64) for _ in range(2))
        found = spec.matched(*(x @ x.mT / (2 * d) for x in moments))
        back = found.decode.mT
        whole = torch.cat((back, back.sum(1, keepdim=True)), dim=1)
        sides.append(Matrices(*(x.half().contiguous() for x in (found.encode, whole, found.feedback))))
    return means, sides


def make_layer(shape: Shape, bits: int, codec: str, device: torch.device) -> CompressedLayer:
    means, matrices = tables(shape, codec)
    return CompressedLayer(
        (bits, bits), shape.head_dim, torch.bfloat16, device, means, matrices,
        heads=shape.heads, scaling=shape.head_dim**-0.5,
    )  # fmt: skip


@contextlib.contextmanager
def without_attention(layer: CompressedLayer):
    """Meanwhile `forward` of the layer only stores. Gives the list of what `attend` is called with."""
    seen = []
    layer.attend = lambda *args: seen.append(args)
    try:
        yield seen
    finally:
        del layer.attend


class Pool:
    """Requests whose tokens lie in pages of one layer, as vLLM allocates them.

    Attributes:
        table: int32 [R, n], pages of each request, in a random order; as wide as the longest context needs.
        cache: uint8 [P, H, N, C].
    """

    def __init__(self, shape: Shape, layer: CompressedLayer, lengths: list[int], device: str, seed: int = 0):
        self.shape, self.layer, self.lengths, self.device = shape, layer, lengths, device
        self.generator = torch.Generator(device).manual_seed(seed)
        blocks = [-(-n // shape.page) for n in lengths]
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(seed))
        ids = (1 + order).int()  # page 0 belongs to nobody
        table = torch.zeros(len(lengths), -(-max(shape.most, *lengths) // shape.page), dtype=torch.int32)
        for row, part in enumerate(ids.split(blocks)):
            table[row, : len(part)] = part
        self.table = table.to(device)
        size = (sum(blocks) + 1, shape.heads, shape.page, layer.layout.cell(shape.page))
        self.cache = torch.full(size, 255, dtype=torch.uint8, device=device)  # bits of NaN

    def draw(self, tokens: int, heads: int | None = None) -> Tensor:
        """Random vectors [tokens, heads, D] in bfloat16, of KV heads unless `heads` is given."""
        size = (tokens, heads or self.shape.heads, self.shape.head_dim)
        return torch.randn(size, generator=self.generator, device=self.device).bfloat16()

    def keys(self, positions: Tensor) -> Tensor:
        """Random keys [n, H, D] in bfloat16, around the mean of their position."""
        mean = self.layer.means[:, (positions // SPAN).clamp_max(self.layer.means.shape[1] - 1)]
        return (self.draw(len(positions)) + mean.transpose(0, 1)).bfloat16()

    def slots(self, row: int, start: int, stop: int) -> Tensor:
        """Slots of the tokens of a request, int64."""
        position = torch.arange(start, stop, device=self.device)
        page = self.shape.page
        return self.table[row, position // page].long() * page + position % page

    def step(self, counts: list[int], lengths: list[int], most: int = 1) -> Step:
        """The step that brought `counts` new tokens, and with them the requests to `lengths`.

        `most` is that of `split`.
        """
        reach = np.array(lengths, dtype=np.int64)
        starts = np.concatenate(([0], np.cumsum(counts)))
        on_device = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        return split(starts, reach, on_device, self.table, rounded=use_compiled(self.table), most=most)

    def fill(self, counts: list[int] | None = None) -> None:
        """Store the first `counts` tokens of each request, all but the last one if None, in chunks."""
        with without_attention(self.layer):
            for row, count in enumerate(counts or [n - 1 for n in self.lengths]):
                for start in range(0, count, CHUNK):
                    stop = min(start + CHUNK, count)
                    new, lengths = ([0] * len(self.lengths) for _ in range(2))
                    new[row], lengths[row] = stop - start, stop
                    step = self.step(new, lengths)
                    keys, values = self.keys(step.positions), self.draw(stop - start)
                    self.layer.forward(
                        self.cache, None, keys, values, self.slots(row, start, stop), step, None
                    )

    def decode(self) -> tuple:
        """The last tokens of all requests: the arguments of `forward` behind the cache."""
        count = len(self.lengths)
        query = self.draw(count, self.shape.heads * self.shape.group)
        slots = torch.cat([self.slots(row, n - 1, n) for row, n in enumerate(self.lengths)])
        step = self.step([1] * count, self.lengths)
        keys, values = self.keys(step.positions), self.draw(count)
        return query, keys, values, slots, step, torch.full_like(query, torch.nan)

    @property
    def checked(self) -> list[int]:
        """Requests that are compared with float64."""
        return sorted({0, len(self.lengths) // 2, len(self.lengths) - 1})

    def stored(self, row: int, query: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values before position `query` of a request, as a query there reads them.

        None: the query is at the last token of the request. Returns float64 [H, n, D] each.
        """
        layer, page = self.layer, self.shape.page
        query = self.lengths[row] - 1 if query is None else query
        position = torch.arange(query, device=self.device)
        owner = self.table[row, position // page].long()
        views, second = layer.views(self.cache)
        read = layer.layout.read(views, owner[None], (position % page)[None])
        mean = layer._means_at(position[None])
        both = [
            layer.tier.decode_keys(read, mean, torch.float64),
            layer.tier.decode_values(read, torch.float64),
        ]
        kept, slot = layer.layout.newest(position, page)
        newest = (query - position <= kept.clamp_max(NEAR)) & (position >= FIRST)
        for chosen, at in ((position < FIRST, position), (newest, slot)):
            if chosen.any():
                read = layer.layout.read(second, owner[chosen][None], at[chosen][None])
                for x, more in zip(both, layer._decode(read, None, torch.float64)):
                    x[:, :, chosen] += more
        return both[0][0], both[1][0]

    def exact(self, query: Tensor, keys: Tensor, values: Tensor) -> dict[int, Tensor]:
        """Outputs [Hq, D] of a decode step that is not stored yet, float64, of the requests `checked`."""
        found = {}
        for row in self.checked:
            held = (
                torch.cat((x, y[row].double()[:, None]), dim=1)
                for x, y in zip(self.stored(row), (keys, values))
            )
            keys_of, values_of = held
            rows = query[row].double().unflatten(0, (self.shape.heads, -1)) * self.layer.scaling
            found[row] = ((rows @ keys_of.mT).softmax(-1) @ values_of).flatten(0, 1)
        return found


def error_of(output: Tensor, exact: dict[int, Tensor]) -> float:
    """Relative error of the output [R, Hq, D] of a step."""
    off = sum(float((output[row].double() - x).square().sum()) for row, x in exact.items())
    return (off / sum(float(x.square().sum()) for x in exact.values())) ** 0.5


# -- the baselines


def baselines(shape: Shape, requests: int, length: int, device: str) -> dict[str, Callable]:
    """Kernels of PyTorch that attend to `length` tokens of each request in bfloat16.

    Each call takes the next of some copies of keys and values; see `FRESH`.
    """
    h, g, d = shape.heads, shape.group, shape.head_dim
    one = 4 * requests * length * h * d
    copies = max(1, -(-FRESH // one)) if device == "cuda" else 1
    random = lambda *size: torch.randn(size, device=device, dtype=torch.bfloat16)  # noqa: E731
    query = random(requests, h * g, 1, d)
    held = [(random(requests, h, length, d), random(requests, h, length, d)) for _ in range(copies)]
    turn = itertools.cycle(held)
    packed = query.view(requests, h, g, d)

    def grouped():
        return F.scaled_dot_product_attention(query, *next(turn), enable_gqa=True)

    def as_rows():  # the queries of a KV head as rows of one head: the same result without GQA
        return F.scaled_dot_product_attention(packed, *next(turn))

    def by(backend, function):
        def call():
            with sdpa_kernel(backend):
                return function()

        return call

    found = {"SDPA, gqa": grouped, "SDPA, rows": as_rows}
    if device != "cuda":
        return found
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        short = backend.name.split("_")[0].lower()
        found[f"{short}, gqa"], found[f"{short}, rows"] = by(backend, grouped), by(backend, as_rows)
    if copies == 1:
        flat = [x.transpose(1, 2).flatten(0, 1) for x in held[0]]
        starts = torch.arange(requests + 1, device=device, dtype=torch.int32)

        def varlen():
            from torch.nn.attention.varlen import varlen_attn

            return varlen_attn(query.squeeze(2), *flat, starts, starts * length, 1, length)

        found["varlen"] = varlen
    return found


def fastest(kernels: dict[str, Callable], device: str) -> tuple[str, dict[str, float], float]:
    """The fastest baseline, the microseconds of each that runs, and those of the fastest without a graph."""
    times = {}
    for name, call in kernels.items():
        try:
            times[name] = microseconds(call, device)
        except Exception as error:  # a kernel that this build or device does not have
            print(f"  {name} does not run: {str(error).splitlines()[0][:100]}", file=sys.stderr, flush=True)
    best = min(times, key=times.get)
    return best, times, eager(kernels[best], device)


# -- clocks


def eager(function: Callable, device: str, inner: int = 10, repeats: int = 20) -> float:
    """Median microseconds of a call without a CUDA graph, in a stream of calls."""
    if device != "cuda":
        return microseconds(function, device)
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(inner):
            function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / inner)
    return statistics.median(times)


def graphed(function: Callable, device: str) -> float | None:
    """Microseconds of a call by replays of a CUDA graph; None where a graph cannot hold it."""
    try:
        return microseconds(function, device)
    except Exception as error:
        print(f"  no CUDA graph: {str(error).splitlines()[0][:100]}", file=sys.stderr, flush=True)
        torch.cuda.synchronize()
        return None


def graph_of(function: Callable) -> Callable:
    """A CUDA graph of a call that ran before. Calling it replays the graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def launches(function: Callable, device: str) -> int | None:
    """Kernels and copies that a call launches. None where they cannot be counted."""
    if device != "cuda":
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            function()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return sum(x.count for x in found.key_averages() if x.device_type == on_device) or None
    except RuntimeError as error:
        print(f"  launches are not counted: {str(error).splitlines()[0][:100]}", file=sys.stderr, flush=True)
        return None


# -- what is measured


def measure(case: Case, shape: Shape, device: str) -> Result:
    """All measurements of a decode case."""
    layer, lengths = make_layer(shape, case.bits, case.codec, torch.device(device)), case.lengths()
    pool = Pool(shape, layer, lengths, device)
    pool.fill()
    args = pool.decode()
    exact, output, fresh = pool.exact(*args[:3]), args[-1], pool.cache.clone()
    compile_s = seconds(lambda: layer.forward(pool.cache, *args), device)
    error = error_of(output, exact)
    assert error <= TOLERANCE, f"{case.name}: the output is off by {error:.1e}"
    wrong = _moved(pool, *args[:4])
    assert wrong > 10 * error, f"{case.name}: other pages change the output by {wrong:.1e} only"
    with without_attention(layer) as seen:
        layer.forward(pool.cache, *args)
    ((_, *rest),) = seen

    copies = max(1, -(-FRESH // pool.cache.nbytes)) if device == "cuda" else 1
    layers = [(layer, pool.cache)]
    for _ in range(copies - 1):
        layers.append((copy.copy(layer), pool.cache.clone()))
    turn = itertools.cycle(layers)

    def attend():
        one, cache = next(turn)
        one.attend(cache, *rest)

    def forward():
        one, cache = next(turn)
        one.forward(cache, *args)

    def once():
        step = pool.step([1] * len(lengths), lengths)
        layer.forward(pool.cache, *args[:4], step, output)

    on_device = torch.tensor(lengths, dtype=torch.int32, device=device)

    def whole(longest: int):
        step = uniform(on_device, pool.table, longest, use_compiled(pool.table))
        for one, cache in layers:
            one.forward(cache, *args[:4], step, output)

    def captured(longest: int) -> float | None:
        """Microseconds of a layer of a captured step, whose last output is compared with float64."""

        def once():
            output.fill_(torch.nan)
            layers[-1][1].copy_(fresh)  # what a token overwrote is read only before
            return whole(longest)

        once()
        found = graphed(lambda: whole(longest), device)
        replay = graph_of(once) if found is not None and device == "cuda" else once
        replay()
        off = error_of(output, exact)
        assert off <= TOLERANCE, f"{case.name}: a captured step is off by {off:.1e}"
        return found and found / len(layers)

    for _ in layers:
        forward()  # every layer finds the views of its pages
    us, eager_us = graphed(attend, device), eager(attend, device)
    forward_us, forward_eager_us = graphed(forward, device), eager(forward, device)
    graph_us, most_us = captured(max(lengths)), captured(max(shape.most, *lengths))
    counts = launches(attend, device), launches(forward, device)
    wall = lambda call: statistics.median(seconds(call, device) for _ in range(9)) * 1e6  # noqa: E731
    step_us = wall(once) - wall(forward)
    dense_kernel, kernels, dense_eager_us = fastest(
        baselines(shape, case.requests, case.length, device), device
    )
    tokens, dense_us = sum(lengths), kernels[dense_kernel]
    read = tokens * shape.heads * layer.layout.record
    dense = tokens * shape.heads * 4 * shape.head_dim
    best = us or eager_us
    return Result(
        name=case.name, target=case.target, error=error, tokens=tokens, read_bytes=read, dense_bytes=dense,
        layers=len(layers), us=us, eager_us=eager_us, dense_us=dense_us, dense_eager_us=dense_eager_us,
        dense_kernel=dense_kernel, kernels=kernels, forward_us=forward_us, forward_eager_us=forward_eager_us,
        graph_us=graph_us, most_us=most_us, launches=counts[0], forward_launches=counts[1],
        step_us=step_us, compile_s=compile_s, speedup=dense_us / best,
        eager_speedup=dense_eager_us / eager_us, gb_per_s=read / best / 1e3,
        dense_gb_per_s=dense / dense_us / 1e3,
    )  # fmt: skip


def _moved(pool: Pool, query: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> float:
    """How far outputs move when requests read the first half of their pages twice. All of these are full."""
    outputs = []
    for twice in (False, True):
        held = pool.table
        if twice:
            pool.table = held[:, torch.arange(held.shape[1], device=held.device) // 2]
        step = pool.step([1] * len(pool.lengths), pool.lengths)
        pool.table = held
        outputs.append(torch.empty_like(query))
        pool.layer.forward(pool.cache, query, keys, values, slots, step, outputs[-1])
    return float((outputs[1] - outputs[0]).double().norm() / outputs[0].double().norm())


def storing(shape: Shape, bits: int, codec: str, device: str, chunk: int, appends: int) -> dict:
    """Times of a chunk of prefill of one request, and of storing a token of each of many requests.

    Without `appends`, the latter are left out.
    """
    layer = make_layer(shape, bits, codec, torch.device(device))
    pool = Pool(shape, layer, [chunk] + [shape.page] * appends, device)
    step = pool.step([chunk] + [0] * appends, [chunk] + [0] * appends)
    query = pool.draw(chunk, shape.heads * shape.group)
    prompt = (
        query, pool.keys(step.positions), pool.draw(chunk), pool.slots(0, 0, chunk), step,
        torch.empty_like(query),
    )  # fmt: skip
    steps = dict(prefill=prompt)
    if appends:
        at = torch.cat([pool.slots(1 + row, 7, 8) for row in range(appends)])
        step = pool.step([0] + [1] * appends, [chunk] + [8] * appends)
        steps["decode"] = None, pool.keys(step.positions), pool.draw(appends), at, step, None
    found = dict(bits=bits, codec=codec, tokens=chunk, requests=appends)
    with without_attention(layer) as seen:
        for name, args in steps.items():
            call = lambda: layer.forward(pool.cache, *args)  # noqa: B023, E731
            found[f"{name}_compile_s"] = seconds(call, device)
            found[f"{name}_us"], found[f"{name}_eager_us"] = graphed(call, device), eager(call, device)
            if name == "prefill":
                rest = seen[-1][1:]
    plain = DenseLayer(heads=shape.heads, scaling=1.0)
    size = (*pool.cache.shape[:3], 2 * shape.head_dim)
    cache = torch.zeros(size, dtype=torch.bfloat16, device=device)
    store = lambda: plain.append(cache, *prompt[1:4], prompt[4].positions)  # noqa: E731
    found["dense_prefill_us"] = graphed(store, device) or eager(store, device)
    # Attention of the chunk as the plugin computes it, with the tokens read back from their codes. In a
    # stream of calls, this is the larger of the times of host and device.
    call = lambda: layer.attend(pool.cache, *rest)  # noqa: E731
    call()
    found["attention_us"] = eager(call, device)
    return found


def prefill(shape: Shape, stored: list[dict], device: str, chunk: int, quick: bool) -> dict:
    """How much longer the prefill of one chunk takes than in bfloat16, for all layers of the model.

    The prefill in bfloat16 is FlashAttention and the products with the weights; see `encoding`.
    """
    found = encoding(device, chunk, 64, 128, 2) if quick else encoding(device, chunk)
    layers, dense = found["layers"], found["attention_ms"] + found["linear_ms"]
    rows = []
    for x in stored:
        write = x["prefill_us"] or x["prefill_eager_us"]
        ours = layers * (write + x["attention_us"]) / 1e3 + found["linear_ms"]
        rows.append(dict(bits=x["bits"], codec=x["codec"], ms=ours, percent=(ours / dense - 1) * 100))
    times = {f"{name}_ms": found[f"{name}_ms"] for name in ("attention", "linear")}
    return dict(tokens=chunk, layers=layers, dense_ms=dense, target=10.0, rows=rows) | times


def capacity(shape: Shape, pages: tuple[int, ...]) -> list[dict]:
    """Tokens in the memory of one token in bfloat16 pages of vLLM, by width and size of a page."""
    rows = []
    for bits, codec in STORED:
        layer = make_layer(shape, bits, codec, torch.device("cpu"))
        cells = {page: layer.layout.cell(page) for page in pages}
        held = {
            page: torch.empty(2, shape.heads, page, cell, dtype=torch.uint8)[0].nbytes / page / shape.heads
            for page, cell in cells.items()
        }
        ratios = {page: 4 * shape.head_dim / size for page, size in held.items()}
        target = {4: 3.6, 8: 1.85}[bits]
        rows.append(
            dict(
                bits=bits, codec=codec, record=layer.layout.record, cells=cells, ratios=ratios, target=target
            )
        )
    return rows


# -- what is shown

HEAD = (
    "case", "layer us", "bf16 us", "speed-up", "target", "no graph us", "bf16", "speed-up", "with storing us",
    "no graph", "step in a graph us", "for all lengths us", "launches", "with storing",
    "step us", "GB/s", "bf16 GB/s", "bf16 kernel", "error", "compile s",
)  # fmt: skip


def show(x: float | None, form: str = ".1f") -> str:
    return "-" if x is None else f"{x:{form}}"


def row(r: Result) -> str:
    cells = [
        r.name, show(r.us), show(r.dense_us), show(r.speedup, ".2f"), show(r.target, ".2f"),
        show(r.eager_us), show(r.dense_eager_us), show(r.eager_speedup, ".2f"), show(r.forward_us),
        show(r.forward_eager_us), show(r.graph_us), show(r.most_us), show(r.launches, "d"),
        show(r.forward_launches, "d"), show(r.step_us), show(r.gb_per_s, ".0f"),
        show(r.dense_gb_per_s, ".0f"), r.dense_kernel, show(r.error, ".1e"), show(r.compile_s),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def header(names: tuple[str, ...]) -> str:
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def of_storing(x: dict) -> str:
    times = [x[f"{name}{kind}_us"] for name in ("prefill", "decode") for kind in ("", "_eager")]
    cells = [f"INT{x['bits']} {x['codec']}", *map(show, times), show(x["dense_prefill_us"])]
    cells += [show(x["attention_us"]), show(x["prefill_compile_s"]), show(x["decode_compile_s"])]
    return "| " + " | ".join(cells) + " |"


STORING = (
    "format", "chunk us", "no graph", "one token each us", "no graph",
    "chunk in bf16 us", "attention of the chunk us", "compile s", "compile s",
)  # fmt: skip


class Attempts:
    """Measurements that may fail without an end of the others. The rest of a rented hour is then not lost.

    Args:
        found: the content of the JSON file. Errors go into its `failed`.
        file: of JSON; None: nothing is written.
    """

    def __init__(self, found: dict, file: Path | None, device: str):
        self.found, self.file, self.device = found, file, device

    def save(self) -> None:
        if self.file:
            write_json(self.file, self.found, indent=1)

    def __call__(self, what: str, function: Callable):
        """The result of `function`; None if it failed."""
        started = time.perf_counter()
        try:
            return function()
        except Exception as error:
            self.found["failed"][what] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
            print(f"FAILED after {time.perf_counter() - started:.0f} s: {what}", flush=True)
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self.save()


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    cuda, quick = args.device == "cuda", args.quick or args.device != "cuda"
    shape, cases = (SMALL, QUICK) if quick else (Shape(), CASES)
    chunk, appends = (300, 5) if quick else (CHUNK, APPENDS)
    if args.page:
        shape = replace(shape, page=args.page)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    found = dict(device=name, torch=torch.__version__, quick=quick, shape=asdict(shape))
    found["bandwidth"] = read_bandwidth(args.device)
    print(f"{name}, torch {torch.__version__}: {found['bandwidth'] / 1e12:.2f} TB/s copied", flush=True)
    if quick:
        print("Shapes are small, and times mean nothing.")
    found |= dict(capacity=capacity(shape, (32, 64, 128)), results=[], storing=[], failed={})

    attempt = Attempts(found, args.json, args.device)
    print("\ncapacity, as a multiple of bfloat16:")
    for x in found["capacity"]:
        ratios = ", ".join(f"pages of {page}: {ratio:.2f}" for page, ratio in x["ratios"].items())
        print(f"INT{x['bits']} {x['codec']}: {ratios} (target {x['target']})")
    with torch.no_grad():
        if not args.skip_decode:
            print("\n" + header(HEAD), flush=True)
            exactly = [case for case in cases if case.name == args.only]
            for case in exactly or [case for case in cases if args.only in case.name]:
                result = attempt(case.name, lambda case=case: measure(case, shape, args.device))
                if result is not None:
                    found["results"].append(asdict(result))
                    print(row(result), flush=True)
                    attempt.save()
        if not args.skip_encode:
            print("\n" + header(STORING), flush=True)
            for bits, codec in STORED:
                what = f"storing INT{bits} {codec}"
                made = attempt(
                    what,
                    lambda bits=bits, codec=codec: storing(shape, bits, codec, args.device, chunk, appends),
                )
                if made is not None:
                    found["storing"].append(made)
                    print(of_storing(made), flush=True)
            made = attempt("prefill", lambda: prefill(shape, found["storing"], args.device, chunk, quick))
            if made is not None:
                found["prefill"] = made
                print(f"\nprefill of {made['tokens']} tokens in bf16: {made['dense_ms']:.1f} ms (attention "
                      f"{made['attention_ms']:.1f}, products {made['linear_ms']:.1f})")  # fmt: skip
                for x in made["rows"]:
                    print(
                        f"INT{x['bits']} {x['codec']}: {x['ms']:.1f} ms, {x['percent']:+.0f} % (target +10)"
                    )
    attempt.save()
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
