"""Decode attention over packed tiers against SDPA over bfloat16: `fade bench attention`.

It measures one attention layer with random data of the shape of a model. Of S tokens, the sinks and the
recent ones are in bfloat16, and the rest are in tiers. Each case times three things: the whole step
(`step.attend`, from the query to the output in bfloat16), the kernels of its tier alone (targets refer to
this number), and SDPA over all S tokens (`enable_gqa=True`, with the kernel that PyTorch chooses). Times
are medians of CUDA-graph replays in one process. Each case is first checked against float64 with the same
codes. The floor is the time in which a copy would move the bytes that the step must read.

Instead of the cases, `--lengths` times one buffer at growing live lengths, `--encode` compares compressing
a prompt with its prefill, `--paged` reads the tier through a block table and compares that with reading it
without one, and `--processes` compiles a case twice, the second time from the caches of the first. `--json
FILE` writes what is shown. Without a GPU everything shrinks and runs through the same code; its times mean
nothing then.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fade_fast.cache.append_store import AppendStore
from fade_fast.cache.positions import TokenPositions
from fade_fast.cache.store import ONE_MEAN
from fade_fast.compile.compiled import Compiled, dynamic_size
from fade_fast.compile.tiles import tier_tiles
from fade_fast.formats.rotated import RotatedFormat
from fade_fast.kernels import decode, packed, rotated
from fade_fast.kernels.packed import Queries, TierView
from fade_fast.kernels.rope import rotate
from fade_fast.kernels.rotated import Packed
from fade_fast.saved.files import write_json
from fade_ref.config import FadeConfig
from fade_ref.tiers import token_bytes

from .parsers.decode_attention import arguments

BLOCK = 64  # slots that share a mean; tiers with a budget have one mean for all slots
EXACT = 132  # uncompressed tokens: 4 sinks and 128 recent tokens
HOLES = 5  # slots at the end of a tier that hold no token


@dataclass(frozen=True)
class Case:
    """A shape to measure, and the speedup over SDPA that it should reach."""

    model: str
    bits: int
    batch: int
    length: int
    target: float | None = None
    heads: int = 8
    group: int = 4
    head_dim: int = 128
    new: int = 1  # query tokens
    budget: int | None = None  # most tokens of `bits`; further ones have 2 bits, or are evicted
    evicts: bool = False  # keys are then encoded before RoPE, so that they can be renumbered
    scores: bool = False  # also measure a step that gathers attention probabilities

    @property
    def name(self) -> str:
        more = f" q {self.new}" * (self.new > 1)
        if self.budget is not None:
            more += f" of {self.budget}, " + ("contiguous" if self.evicts else "then INT2")
        return f"INT{self.bits} {self.model} B {self.batch} x S {self.length}{more}"

    @property
    def tiers(self) -> list[tuple[int, int]]:
        """Bits and tokens of each tier."""
        rest = self.length - EXACT
        if self.budget is None:
            return [(self.bits, rest)]
        kept = min(self.budget, rest)
        return [(self.bits, kept)] + [(2, rest - kept)] * (not self.evicts and rest > kept)

    @property
    def tier_bytes(self) -> int:
        """Packed bytes of the tiers: keys, values and key means."""
        mean = 2 * self.head_dim
        means = [1 if self.budget is not None else -(-n // BLOCK) for _, n in self.tiers]
        one = sum(2 * token_bytes(b, self.head_dim) * n + mean * m for (b, n), m in zip(self.tiers, means))
        return self.batch * self.heads * one

    @property
    def bytes(self) -> int:
        """Bytes that a step must read: packed bytes, and uncompressed keys and values."""
        return self.tier_bytes + self.batch * self.heads * EXACT * 4 * self.head_dim


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
    Case(LLAMA, 3, 8, 32 * K, 2.2),
    Case(LLAMA, 4, 8, 32 * K, new=4),
    Case(LLAMA, 4, 8, K, budget=400, scores=True),
    Case(LLAMA, 4, 8, K, budget=400, evicts=True),
]
LENGTHS = [n * K for n in (8, 16, 32, 48, 64, 96, 128)]
PAGES = (16, 64)  # slots of a page
PAGED = [CASES[i] for i in (0, 2, 7, 8, 6)]  # INT4, at two sizes of batch, and 8, 3, 2 bits
PAGED_TARGET = 1.15  # most that reading through a table may take, of the time without one
PAGED_ERRORS = dict(step=4e-3, tier=4e-3)  # most that float16 products, and bfloat16 output, may be off
SCORES_TARGET = 5.0  # most percent that gathering probabilities may add
INTERCEPT_TARGET = 25.0  # most microseconds of a step over no tokens
ENCODE_TARGET = 0.10  # most of a prefill that compressing it may take
COMPILE_TARGETS = (60.0, 10.0)  # most seconds, without caches and with


@dataclass
class Result:
    """The measurements of a case. Times are in microseconds unless the name says otherwise."""

    name: str
    target: float | None
    bytes: int
    error: float  # of the step, whose output is bfloat16
    tier_error: float | None = None
    mass_error: float | None = None
    us: float | None = None
    tier_us: float | None = None
    sdpa_us: float | None = None
    scores_us: float | None = None  # the step with probabilities gathered
    speedup: float | None = None
    tier_speedup: float | None = None
    scores_percent: float | None = None  # the extra time of gathering
    floor_us: float | None = None
    fraction_of_floor: float | None = None  # of the step
    tier_fraction: float | None = None  # of the tier's kernels; their floor counts packed bytes only
    compile_s: float | None = None  # the first call; it reads from disk if a process has compiled it before
    tier_compile_s: float | None = None

    def compare(self, case: Case, bandwidth: float) -> None:
        """Compute the fields that follow from the times."""
        self.speedup = self.sdpa_us / self.us
        self.floor_us = case.bytes / bandwidth * 1e6
        self.fraction_of_floor = self.floor_us / self.us
        if self.tier_us is not None:
            self.tier_speedup = self.sdpa_us / self.tier_us
            self.tier_fraction = case.tier_bytes / bandwidth * 1e6 / self.tier_us
        if self.scores_us is not None:
            self.scores_percent = (self.scores_us / self.us - 1) * 100


# -- what is measured


def tier_kernels(dynamic_sizes, queries: Queries, bias: Tensor, slots: TierView, *, chunk, bits, dtype):
    """The kernels of one tier, without the parts of the step before and after them."""
    flat = slots.flat().narrow(0, (dynamic_sizes[0].shape[0] - 1) * chunk)
    bias = bias.narrow(-1, 0, flat.means.shape[1])
    options = dict(chunk=chunk, bits=bits, softcap=None, dtype=dtype)
    return packed.attend_chunks(queries, bias, flat, None, **options)[:3]


compiled_tier = Compiled(tier_kernels)


class Problem:
    """Random tokens of a case, encoded, and a query that attends to them."""

    def __init__(self, case: Case, device: str, seed: int = 0):
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(seed)
        self.draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        b, h, d = case.batch, case.heads, case.head_dim
        self.table = rotated.with_sum(rotated.rotation(d)).float().to(device)
        self.matrix, self.offset = self.table[:d], self.draw(1, h, 1, d)
        self.query = self.draw(b, h * case.group, case.new, d).bfloat16()
        self.keys = (self.draw(b, h, EXACT, d) + self.offset).bfloat16()
        self.values = self.draw(b, h, EXACT, d).bfloat16()
        self.seen = torch.ones(b, 1, EXACT, dtype=torch.bool, device=device)
        if case.new > 1:
            self.seen = self.seen & self.seen.new_ones(case.new, EXACT).tril(EXACT - case.new)
        self.tiers = self.dense = [self._tier(bits, n) for bits, n in case.tiers]
        self.options = dict(
            bits=[(bits, bits) for bits, _ in case.tiers],
            slots_read=[self._slots_read(n, x) for (_, n), x in zip(case.tiers, self.tiers)],
            scaling=d**-0.5,
        )
        if case.evicts:
            self.options["inv_freq"] = 1e4 ** (-torch.arange(0, d, 2, device=device) / d)

    def _tier(self, bits: int, length: int) -> TierView:
        """A tier with room as `StoredTier` has it on CUDA; slots beyond `length` hold tokens nobody sees."""
        b, h, d = self.case.batch, self.case.heads, self.case.head_dim
        size = packed.whole(b * h, length)
        size += packed.spare(size)
        per = BLOCK if self.case.budget is None else ONE_MEAN
        group, rows = min(per, size), []
        for _ in range(b):  # one row at a time, because float32 keys of all rows may not fit
            k, v = (self.draw(1, h, -(-size // group) * group, d) for _ in range(2))
            k = (k + self.offset).unflatten(2, (-1, group))
            mean = k.mean(3, keepdim=True).half()
            keys = rotated.encode(k, mean, self.matrix, bits)
            values = rotated.encode(v, None, self.matrix, bits)
            keys = [x if x is None else x.flatten(2, 3) for x in keys]
            held = [x if x is None else x[:, :, :size] for x in (*keys, *values)]
            rows.append([*held, mean.squeeze(3)])
        joined = [None if x[0] is None else torch.cat(x) for x in zip(*rows)]
        keys, values, means = Packed(*joined[:3]), Packed(*joined[3:6]), joined[6]
        valid = torch.arange(size, device=self.device).expand(b, 1, -1) < length - HOLES
        at = None
        if self.case.evicts:
            at = torch.arange(size, dtype=torch.int32, device=self.device).expand(b, 1, -1).contiguous()
        values = values._replace(codes=values.codes.mT.contiguous())
        return TierView(keys, values, values.scale.float().amax(-1), means, valid, per, at)

    @staticmethod
    def _slots_read(length: int, slots: TierView) -> int:
        """Slots that are read, as `StoredTier` has it on CUDA."""
        heads = slots.bound.numel()
        return min(packed.bucket(heads, length), packed.longest(heads, slots.valid.shape[-1]))

    def attend(self, mass: list[Tensor] | None = None) -> Tensor:
        args = self.query, self.keys, self.values, self.seen, self.table, self.tiers
        return decode.attend(*args, **self.options, mass=mass)

    def move(self, page: int) -> None:
        """From now on the tiers lie in pages of this size, in a random order."""
        self.tiers = [in_pages(slots, page, self.draw) for slots in self.dense]

    def live(self, length: int) -> None:
        """From now on the tier holds `length` tokens."""
        (slots,) = self.tiers
        valid = torch.arange(slots.valid.shape[-1], device=self.device) < length
        self.tiers = [slots._replace(valid=valid.expand_as(slots.valid).contiguous())]
        self.options["slots_read"] = [self._slots_read(length, slots)]

    def mass(self) -> list[Tensor]:
        """Where `attend` can write probabilities."""
        lengths = [EXACT, *(slots.valid.shape[-1] for slots in self.tiers)]
        return [torch.empty(*self.keys.shape[:2], n, device=self.device) for n in lengths]

    def prepared(self) -> tuple[Queries, Tensor]:
        """The query for the first tier, as the step's first kernel leaves it, and its part for the means."""
        (slots, *_), case = self.tiers, self.case
        heads, d = case.batch * case.heads, case.head_dim
        plain = self.query.float().reshape(heads, -1, d)
        plain = plain.expand(-1, max(2, plain.shape[1]), -1).contiguous()
        table = torch.cat((self.table.expand(heads, -1, -1), slots.means.flatten(0, 1).float()), dim=1)
        found = table @ plain.mT * self.options["scaling"]
        bias = found[:, d + 1 :].mT
        queries = Queries(plain * self.options["scaling"], found[:, :d].mT, found[:, d], bias.amax(-1))
        return queries, bias

    def tier(self, queries: Queries, bias: Tensor):
        """The kernels of the first tier alone: compiled on CUDA, in float32 elsewhere."""
        slots, bits, num_read = self.tiers[0], self.options["bits"][0], self.options["slots_read"][0]
        heads, rows, d = queries.plain.shape
        page = None if slots.block_table is None else slots.page_size
        chunk = packed.chunk_of(heads, num_read, rows, bits[1], page is not None)
        dynamic_sizes = [dynamic_size(num_read // chunk)]
        args = dynamic_sizes, queries, bias, slots
        if self.device != "cuda":
            return tier_kernels(*args, chunk=chunk, bits=bits, dtype=torch.float32)
        widths = tuple(packed.field_width(b, d) for b in bits)
        pinned = lambda: tier_tiles(  # noqa: E731
            heads, rows, num_read // chunk, chunk, bits, widths, d, page
        )
        args = dynamic_sizes, pinned, queries, bias, slots
        return compiled_tier(*args, chunk=chunk, bits=bits, dtype=torch.float16)

    # -- against float64

    def decoded(self, i: int, row: int) -> tuple[Tensor, Tensor]:
        """Keys as they are read and values of a tier, of a row of the batch: float64 [H, capacity, D]."""
        slots, (bits, _) = self.dense[i], self.options["bits"][i]
        pick = lambda side: [None if x is None else x[row] for x in side]  # noqa: E731
        matrix, (codes, *rest) = self.matrix.double(), pick(slots.values)
        values = rotated.dequantize(Packed(codes.mT, *rest), bits, torch.float64) @ matrix
        keys = rotated.dequantize(Packed(*pick(slots.keys)), bits, torch.float64) @ matrix
        size = keys.shape[1]
        keys += slots.means[row].double().repeat_interleave(min(slots.per_mean, size), dim=1)[:, :size]
        if slots.read_at is not None:
            keys = rotate(keys[None], slots.read_at[row][None], self.options["inv_freq"], False)[0]
        return keys, values

    def errors(self, tier: bool, scores: bool) -> tuple[float, float | None, float | None]:
        """Relative to float64 attention over the same codes: of the step, its tier and its probabilities."""
        case, mass = self.case, self.mass() if scores else []
        output = self.attend(mass)  # [B, q, Hq, D]
        if tier:
            parts, _, total = self.tier(*self.prepared())
            parts = packed.channels(parts, self.options["bits"][0][1])
            alone = (torch.cat(parts, dim=1) / total[:, :1]).mT.double() @ self.matrix.double()
            alone = alone.narrow(1, 0, case.group * case.new).unflatten(0, (case.batch, case.heads))
        sums = {name: [0.0, 0.0] for name in ("step", "tier", "mass")}

        def compare(name, ours, exact):
            sums[name][0] += float((ours.double() - exact).square().sum())
            sums[name][1] += float(exact.square().sum())

        for row in range(case.batch):
            query = self.query[row].double().unflatten(0, (case.heads, -1)).flatten(1, 2)  # [H, R, D]
            keys, values = [self.keys[row].double()], [self.values[row].double()]
            seen = [self.seen[row].expand(case.new, -1)]
            for i, slots in enumerate(self.tiers):
                for held, x in zip((keys, values), self.decoded(i, row)):
                    held.append(x)
                seen.append(slots.valid[row].expand(case.new, -1))
            scored = [
                (query @ k.mT * self.options["scaling"]).masked_fill(~s.repeat(case.group, 1), -torch.inf)
                for k, s in zip(keys, seen)
            ]
            share = torch.cat(scored, dim=-1).softmax(-1).split([x.shape[-1] for x in scored], dim=-1)
            exact = sum(p @ v for p, v in zip(share, values)).unflatten(1, (case.group, case.new))
            compare("step", output[row], exact.flatten(0, 1).transpose(0, 1))
            if tier:
                compare("tier", alone[row], scored[1].softmax(-1) @ values[1])
            for counts, p in zip(mass, share):
                compare("mass", counts[row], p.sum(1))
        return tuple((part / whole) ** 0.5 if whole else None for part, whole in sums.values())


def measure(case: Case, device: str, bandwidth: float) -> Result:
    """All measurements of a case."""
    problem, alone = Problem(case, device), case.budget is None
    compile_s, tier_compile_s = seconds(problem.attend, device), None
    if alone:
        prepared = problem.prepared()
        tier_compile_s = seconds(lambda: problem.tier(*prepared), device)
    result = Result(case.name, case.target, case.bytes, *problem.errors(alone, case.scores))
    result.compile_s, result.tier_compile_s = compile_s, tier_compile_s
    result.us = microseconds(problem.attend, device)
    if alone:
        result.tier_us = microseconds(lambda: problem.tier(*prepared), device)
    if case.scores:
        mass = problem.mass()
        result.scores_us = microseconds(lambda: problem.attend(mass), device)
    shape = (case.batch, case.heads, case.length, case.head_dim)
    k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    attention = lambda: F.scaled_dot_product_attention(problem.query, k, v, enable_gqa=True)  # noqa: E731
    result.sdpa_us = microseconds(attention, device)
    result.compare(case, bandwidth)
    return result


def in_pages(slots: TierView, page: int, draw: Callable) -> TierView:
    """The same slots in pages, in a random order; slots of the last page of a row that are left are zeros."""
    batch, blocks = slots.valid.shape[0], -(-slots.capacity // page)
    table = draw(batch * blocks).argsort().reshape(batch, blocks)

    def field(x: Tensor | None, axis: int = 2) -> Tensor | None:
        if x is None:
            return None
        x = F.pad(x, [0, 0] * (x.dim() - 1 - axis) + [0, blocks * page - slots.capacity])
        x = x.unflatten(axis, (blocks, page)).movedim(axis, 1).flatten(0, 1)
        return torch.empty_like(x, memory_format=torch.contiguous_format).index_copy_(0, table.flatten(), x)

    (codes, *keys), (value_codes, *values) = slots.keys, slots.values
    return slots._replace(
        keys=Packed(field(codes), *map(field, keys)),
        values=Packed(field(value_codes, 3), *map(field, values)),
        block_table=table.int(),
    )


def check_pages(problem: Problem) -> tuple[float, float]:
    """Errors of the step and of its tier, once it is sure that the table is what finds the tokens."""
    (slots,) = problem.tiers
    table = slots.block_table
    in_order = torch.arange(table.numel(), device=table.device).reshape(table.shape)
    assert not (table == in_order).all(), "the pages lie in the order in which they are read"
    error, tier_error, _ = problem.errors(tier=True, scores=False)
    assert error < PAGED_ERRORS["step"] and tier_error < PAGED_ERRORS["tier"], (error, tier_error)
    found = problem.attend()
    problem.tiers = [slots._replace(block_table=table.roll(1, 1))]
    wrong = float((problem.attend() - found).double().norm() / found.double().norm())
    problem.tiers = [slots]
    assert wrong > 10 * error, f"another table changes the output by {wrong:.1e} only"
    return error, tier_error


def by_page(device: str, cases: list[Case]) -> dict:
    """Times of a step and its tier through a block table, beside those without one."""
    rows = []
    for case in cases:
        problem = Problem(case, device)
        prepared = problem.prepared()
        problem.errors(tier=True, scores=False)
        times = {}
        for page in (None, *PAGES):
            found = {}
            if page is not None:
                problem.move(page)
                found["compile_s"] = seconds(problem.attend, device)
                found["error"], found["tier_error"] = check_pages(problem)
            times[page] = us = [
                microseconds(problem.attend, device),
                microseconds(lambda: problem.tier(*prepared), device),  # noqa: B023
            ]
            if page is not None:
                before = times[None]
                found |= dict(case=case.name, page=page, step_us=before[0], paged_step_us=us[0])
                found |= dict(tier_us=before[1], paged_tier_us=us[1], target=PAGED_TARGET)
                found |= dict(step_ratio=us[0] / before[0], tier_ratio=us[1] / before[1])
                rows.append(found)
                print(page_row(found), flush=True)
    print(flush=True)
    return dict(rows=rows)


PAGE_HEAD = (
    "case", "page", "tier us", "paged", "ratio", "step us", "paged", "ratio", "target", "tier error", "error",
    "compile s",
)  # fmt: skip


def page_row(r: dict) -> str:
    cells = [
        r["case"], str(r["page"]), *(f"{r[name]:.1f}" for name in ("tier_us", "paged_tier_us")),
        f"{r['tier_ratio']:.3f}", *(f"{r[name]:.1f}" for name in ("step_us", "paged_step_us")),
        f"{r['step_ratio']:.3f}", f"{r['target']:.2f}", f"{r['tier_error']:.1e}", f"{r['error']:.1e}",
        f"{r['compile_s']:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def by_length(device: str, lengths: list[int]) -> dict:
    """Times of a step as its text grows, over buffers made for the longest of `lengths`."""
    problem = Problem(Case(LLAMA, 4, 1, max(lengths) + EXACT), device)
    before, us = set(decode._compiled.graphs), []
    for length in lengths:
        problem.live(length)
        us.append(microseconds(problem.attend, device))
    graphs = len(set(decode._compiled.graphs) - before)
    compiled = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    capacity = problem.tiers[0].valid.shape[-1]
    return line(lengths, us) | dict(capacity=capacity, graphs=graphs, compiled=compiled)


def line(lengths: list[int], us: list[float]) -> dict:
    """The least-squares line through times by length, and the largest distance of a time from it."""
    slope, intercept = statistics.linear_regression(lengths, us)
    off = max(abs(t / (intercept + slope * n) - 1) for n, t in zip(lengths, us))
    return dict(lengths=lengths, us=us, us_per_k=slope * K, intercept_us=intercept, farthest=off)


def encoding(device: str, length: int, hidden: int = 4096, inner: int = 14336, layers: int = 32) -> dict:
    """Milliseconds to demote the tokens of a prompt, and an estimate of its prefill, for a model of the 8B
    shape.

    The estimate counts only FlashAttention and the products with the weights of the layers, so the share is
    an upper bound.
    """
    config, token_positions, heads, d = FadeConfig.safe(), TokenPositions(), 8, 128
    token_positions.extend(0, None, 1, length, device)
    table = rotated.with_sum(rotated.rotation(d)).float().to(device)
    format = RotatedFormat([(4, 4)], lambda dim, device: table)
    format.allocate(d, torch.bfloat16, device)
    middle = AppendStore(config, format, token_positions, None, 1, heads)
    middle.reserve(length)
    random = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    query, keys, values = (random(1, n, length, d) for n in (4 * heads, heads, heads))
    first, step_ = config.n_sink, config.block_size
    last = first + (length - EXACT) // step_ * step_

    def demote():
        middle.tiers[0].records.count = middle.means.count = 0  # reuse the allocated memory
        middle.demote(keys[:, :, first:last], values[:, :, first:last], first, last, {})

    def attention():
        F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)

    x, wide = random(length, hidden), random(length, inner)
    sizes = [heads * 4 * d, heads * d, heads * d, inner, inner]
    weights = [random(n, hidden) for n in sizes]
    out = [(random(length, heads * 4 * d), random(hidden, heads * 4 * d)), (wide, random(hidden, inner))]

    def linear():
        for weight in weights:
            F.linear(x, weight)
        for inputs, weight in out:
            F.linear(inputs, weight)

    times = {}
    for name, function in dict(encode=demote, attention=attention, linear=linear).items():
        function()
        times[f"{name}_ms"] = statistics.median(seconds(function, device) for _ in range(5)) * 1e3 * layers
    share = times["encode_ms"] / (times["attention_ms"] + times["linear_ms"])
    return dict(tokens=length, layers=layers) | times | dict(share=share, target=ENCODE_TARGET)


def processes(device: str) -> dict:
    """Seconds of the first call of a case in a fresh process, without caches and with those of the first
    process.
    """
    case, found = CASES[3], {}
    with tempfile.TemporaryDirectory() as folder:
        places = dict(TORCHINDUCTOR_CACHE_DIR=folder, TRITON_CACHE_DIR=f"{folder}/triton")
        for name, target in zip(("cold", "warm"), COMPILE_TARGETS):
            file = Path(folder, f"{name}.json")
            arguments = ["--only", case.name, "--device", device, "--json", str(file)]
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "fade_fast.measure.decode_attention", *arguments],
                env=os.environ | places, cwd=Path(__file__).parents[2], check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            (result,) = json.loads(file.read_text())["results"]
            found[f"{name}_s"], found[f"{name}_tier_s"] = result["compile_s"], result["tier_compile_s"]
            found |= {f"{name}_process_s": time.perf_counter() - started, f"{name}_target_s": target}
    return dict(case=case.name) | found


# -- clocks


def seconds(function: Callable, device: str) -> float:
    """Time of one call, including its work on the device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def microseconds(function: Callable, device: str = "cuda", repeats: int = 20, inner: int = 10) -> float:
    """Median time of a call, from replays of a CUDA graph of `inner` calls."""
    if device != "cuda":
        return statistics.median(seconds(function, device) for _ in range(3)) * 1e6
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


def read_bandwidth(device: str = "cuda") -> float:
    """Bytes per second that a large elementwise copy reads and writes."""
    x = torch.rand(2**28 if device == "cuda" else 2**20, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (microseconds(lambda: torch.add(x, 1, out=y), device, inner=3) * 1e-6)


# -- what is shown


def table(results: list[Result]) -> str:
    head = (
        "case", "step us", "tier us", "SDPA us", "speed-up", "of the tier", "target", "floor us",
        "step of floor", "tier of floor", "scores %", "error", "tier error", "mass error", "MB", "compile s",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    show = lambda x, form=".1f": "-" if x is None else f"{x:{form}}"  # noqa: E731
    for r in results:
        cells = [
            r.name, show(r.us), show(r.tier_us), show(r.sdpa_us), show(r.speedup, ".2f"),
            show(r.tier_speedup, ".2f"), show(r.target, ".2f"), show(r.floor_us),
            show(r.fraction_of_floor, ".2f"), show(r.tier_fraction, ".2f"), show(r.scores_percent),
            show(r.error, ".1e"), show(r.tier_error, ".1e"), show(r.mass_error, ".1e"), show(r.bytes / 1e6),
            show(r.compile_s),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(name: str, found: dict) -> str:
    """A few lines about the results of one of the other measurements."""
    if name == "lengths":
        rows = [f"| {n} | {t:.1f} |" for n, t in zip(found["lengths"], found["us"])]
        return "\n".join(
            ["| live tokens | us |", "|---|---|", *rows, ""]
            + [
                f"{found['us_per_k']:.3f} us a K tokens + {found['intercept_us']:.1f} us (target below "
                f"{INTERCEPT_TARGET}), farthest {found['farthest']:.0%} off; capacity {found['capacity']}, "
                f"{found['graphs']} graphs, {found['compiled']} compilations"
            ]
        )
    if name == "paged":
        head = ["| " + " | ".join(PAGE_HEAD) + " |", "|---" * len(PAGE_HEAD) + "|"]
        return "\n".join(head + [page_row(r) for r in found["rows"]])
    if name == "encode":
        return (
            f"{found['tokens']} tokens, {found['layers']} layers: compressed in {found['encode_ms']:.0f} ms, "
            f"attention {found['attention_ms']:.0f} ms + products {found['linear_ms']:.0f} ms: "
            f"{found['share']:.1%} (target {found['target']:.0%})"
        )
    return f"{found['case']}: first call, compilation included\n" + "\n".join(
        f"{kind}: step {found[f'{kind}_s']:.1f} s, tier alone {found[f'{kind}_tier_s']:.1f} s (target "
        f"{found[f'{kind}_target_s']:.0f} s), process {found[f'{kind}_process_s']:.1f} s"
        for kind in ("cold", "warm")
    )


def small(case: Case) -> Case:
    """The case for a machine without a GPU."""
    return replace(case, batch=min(case.batch, 2), heads=min(case.heads, 4), length=min(case.length, K))


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    cuda = args.device == "cuda"
    others = {
        "lengths": lambda: by_length(args.device, LENGTHS if cuda else [128, 256, 512]),
        "encode": lambda: encoding(args.device, 32 * K) if cuda else encoding(args.device, 512, 64, 128, 2),
        "paged": lambda: by_page(
            args.device, [case if cuda else small(case) for case in PAGED if args.only in case.name]
        ),
        "processes": lambda: processes(args.device),
    }
    chosen = [name for name in others if getattr(args, name)]
    bandwidth = read_bandwidth(args.device)
    device = torch.cuda.get_device_name() if cuda else "cpu"
    head = dict(device=device, torch=torch.__version__, bandwidth=bandwidth)
    note = "" if cuda else "; everything shrinks, and times of a CPU mean nothing"
    print(f"{device}, torch {torch.__version__}: {bandwidth / 1e12:.2f} TB/s copied{note}\n", flush=True)
    results = []

    def write(**found):
        if args.json:
            write_json(args.json, head | found, indent=1)

    with torch.no_grad():
        for name in chosen:
            head[name] = others[name]()
            print(describe(name, head[name]) + "\n", flush=True)
            write()
        for case in [] if chosen else [case for case in CASES if args.only in case.name]:
            results.append(measure(case if cuda else small(case), args.device, bandwidth))
            print(table(results[-1:]).splitlines()[-1], flush=True)
            write(results=[asdict(r) for r in results])
            if cuda:
                torch.cuda.empty_cache()
    if results:
        print("\n" + table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
