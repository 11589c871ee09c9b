"""A decode step of `model.generate()` with each cache: `fade bench generate`.

Models have the shape of a named model and random bfloat16 weights. Each method prefills random tokens and
then decodes in plain `model.generate(..., cache=cache)`. The time of a step is the median after compilation
and capture. A logits processor marks the steps with CUDA events, so the host never waits. `--list` shows
cases and methods. `--json FILE` writes the numbers of the tables after every measurement. `--show FILE...`
prints the tables of several such files together, so that a long list can be run in parts. Without a GPU a
tiny model runs through the same code, and its times mean nothing.
"""

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.generation.candidate_generator import CandidateGenerator

import fade_fast
from fade_fast.hf.attach import attach
from fade_fast.hf.cache import TieredKVCache
from fade_fast.hf.models import CACHE_NAME, attention_modules, split_keys
from fade_fast.saved.files import write_json

from . import methods
from .decode_attention import read_bandwidth
from .models import GEMMA, LLAMA, QWEN, TINY, K, build, step_weights
from .names import QUANTIZED
from .parsers.generate import BASELINES, H2O, METHODS, OURS, SHOWN, arguments
from .steps import Reorderings, Slow, Spread, Watch

WARM_UP = 40  # most steps that compilation and capture may take
CHUNK = 2048  # tokens of each row in a chunk of a chunked prefill
ONCE = 64 * K  # most tokens prefilled in one go, and twice: the second time is warm
DRAFT = 4  # tokens that are drafted for each step of assisted decoding
#: Options of `generate()`. "padded" also pads rows on the left, up to a quarter of their tokens. "drafted"
#: is assisted decoding. Its drafts are random and hardly ever right, so a step checks DRAFT + 1 tokens and
#: crops most of them.
MODES = {
    "greedy": {},
    "padded": {},
    "sampled": dict(do_sample=True, temperature=0.8, top_p=0.9),
    "beams": dict(num_beams=4),
    "drafted": dict(prompt_lookup_num_tokens=DRAFT),
}


@dataclass(frozen=True)
class Case:
    """A model, a context to decode after, and the methods to compare."""

    model: str
    batch: int
    length: int
    methods: tuple[str, ...] = (*BASELINES, "fp16", "safe")
    mode: str = "greedy"

    @property
    def name(self) -> str:
        mode = "" if self.mode == "greedy" else f" {self.mode}"
        return f"{self.model} B {self.batch} x S {self.length}{mode}"

    @property
    def beams(self) -> int:
        """Rows of the cache for each text."""
        return MODES[self.mode].get("num_beams", 1)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, over the rows of the cache."""
        return self.batch * self.beams * self.length


CASES = [
    Case(LLAMA, 1, 2 * K),
    Case(LLAMA, 1, 32 * K),
    Case(LLAMA, 8, 2 * K, (*BASELINES, "safe", "balanced", H2O)),
    Case(LLAMA, 8, 32 * K, (*BASELINES, "fp16", *SHOWN, "int2")),
    Case(LLAMA, 8, 8 * K),
    Case(LLAMA, 1, 128 * K, ("dynamic", "fp16", "safe")),
    Case(QWEN, 8, 16 * K, ("dynamic", "fp16", "safe")),
    Case(GEMMA, 1, 32 * K, ("dynamic", "fp16", "safe")),
    Case(LLAMA, 8, 2 * K, ("static", "safe"), "padded"),
    Case(LLAMA, 8, 2 * K, ("static", "safe"), "sampled"),
    Case(LLAMA, 2, 2 * K, ("dynamic", "safe"), "beams"),
    Case(LLAMA, 2, 32 * K, ("dynamic", "safe"), "beams"),
    Case(LLAMA, 1, 2 * K, ("dynamic", "fp16", "safe", "balanced"), "drafted"),
]
TINY_CASES = [Case(TINY, 2, 192, (*BASELINES, "fp16", "safe", "balanced"))]
TINY_CASES += [Case(TINY, 1, 192, ("dynamic", "safe"), mode) for mode in list(MODES)[1:]]


@dataclass
class Result:
    """The measurements of a method in a case. None: not measured, or it needs a GPU."""

    case: str
    method: str
    batch: int
    length: int
    new: int
    fill: str
    failed: str | None = None
    ms: float | None = None  # median of the steps after warm-up, as are the next two
    mean_ms: float | None = None
    worst_ms: float | None = None
    mean_over: float | None = None  # over the median of the steps after the first 32, as are the next two
    p99_over: float | None = None
    worst_over: float | None = None
    first_ms: list[float] = field(default_factory=list)  # each of the first 64 steps
    slow: list[dict] = field(default_factory=list)  # steps above two medians, see `steps.Slow`
    reorder_ms: float | None = None  # median of the later reorderings of a beam search
    tokens_per_s: float | None = None
    cold_s: float | None = None  # to the first token of the first prefill, with the compilation of kernels
    first_token_s: float | None = None  # the same for a second prefill
    captured: int | None = None  # our steps that replayed a CUDA graph
    compile_s: float | None = None  # extra time of the warm-up steps over later ones
    prefill_gb: float | None = None
    decode_gb: float | None = None
    cache_bytes: int | None = None
    packed_bytes: int | None = None
    tokens: dict[str, float] = field(default_factory=dict)  # by tier, from `cache.memory()`
    live: float | None = None
    floor_ms: float | None = None  # weights and packed bytes divided by the bandwidth of a copy
    over_floor: float | None = None


# -- targets


@dataclass(frozen=True)
class Target:
    """A bound on a quantity of a method, relative to the best of some other methods or on its own.

    `quantity` is a field of `Result`. For "ms" the ratio says how many times faster the method is, and for
    "batch" how many times larger its batch is. These ratios must reach the bound. Every other ratio must
    stay below it.
    """

    case: str
    method: str
    quantity: str
    against: tuple[str, ...]
    bound: float
    at: str | None = None  # case of the other methods, if it differs

    @property
    def higher(self) -> bool:
        return self.quantity in ("ms", "batch")

    def text(self) -> str:
        names = dict(ms="speed-up", over_floor="step over floor", reorder_ms="time of a reordering")
        what = names.get(self.quantity, self.quantity)
        others = " / ".join(self.against) and f" against {' / '.join(self.against)}"
        return f"{self.method}: {what}{others}" + (f" at {self.at}" if self.at else "")


def largest_case(model: str, length: int) -> str:
    """The name under which `--largest-batch` reports."""
    return f"{model} largest batch x S {length}"


LONG, WIDE = (Case(LLAMA, batch, 32 * K).name for batch in (1, 8))
SHORT, ALONE = (Case(LLAMA, batch, 2 * K).name for batch in (8, 1))
BEAMS, LONG_BEAMS = (Case(LLAMA, 2, n * K, mode="beams").name for n in (2, 32))
TARGETS = [
    Target(WIDE, "safe", "ms", BASELINES, 4.0),
    Target(LONG, "safe", "ms", BASELINES, 2.5),
    Target(Case(LLAMA, 8, 8 * K).name, "safe", "ms", BASELINES, 2.0),
    Target(ALONE, "safe", "ms", BASELINES, 1.0),
    Target(WIDE, "safe", "ms", ("fp16",), 1.5),
    Target(Case(LLAMA, 1, 128 * K).name, "safe", "ms", ("fp16",), 1.4),
    Target(LONG, "safe", "ms", ("fp16",), 1.15),
    Target(WIDE, "lossless", "ms", ("fp16",), 1.3),
    Target(WIDE, "balanced", "ms", BASELINES, 1.0, at=SHORT),
    Target(WIDE, "aggressive", "ms", BASELINES, 1.0, at=SHORT),
    Target(WIDE, "balanced", "ms", ("balanced",), 1 / 1.05, at=SHORT),
    Target(WIDE, "balanced", "ms", ("safe",), 1.0, at=SHORT),
    Target(WIDE, "aggressive", "ms", ("safe",), 1.0, at=SHORT),
    Target(SHORT, H2O, "ms", ("balanced",), 1 / 1.05),
    Target(f"{SHORT} padded", "safe", "ms", ("safe",), 1 / 1.05, at=SHORT),
    Target(f"{SHORT} sampled", "safe", "ms", ("safe",), 1 / 1.05, at=SHORT),
    Target(LONG_BEAMS, "safe", "reorder_ms", ("safe",), 1.1, at=BEAMS),
    Target(LONG_BEAMS, "safe", "ms", ("safe",), 1 / 1.1, at=BEAMS),
    Target(BEAMS, "safe", "ms", ("safe",), 1 / 1.15, at=SHORT),
    Target(LONG_BEAMS, "safe", "ms", ("safe",), 1 / 1.15, at=WIDE),
    Target(f"{ALONE} drafted", "safe", "ms", ("safe",), 1 / 1.05, at=ALONE),
    Target(LONG, "safe", "over_floor", (), 1.4),
    Target(LONG, "safe", "first_token_s", ("dynamic",), 1.1),
    Target(LONG, "safe", "prefill_gb", ("dynamic",), 1.1),
    Target(largest_case(LLAMA, 32 * K), "safe", "batch", ("dynamic",), 3.0),
]


def measured(target: Target, results: Iterable[Result]) -> float | None:
    """The ratio that a target bounds. None if one of its sides is missing."""
    found = {(r.case, r.method): getattr(r, target.quantity) for r in results if not r.failed}
    mine = found.get((target.case, target.method))
    others = [found.get((target.at or target.case, name)) for name in target.against]
    others = [x for x in others if x]
    if not mine or (target.against and not others):
        return None
    if not target.against:
        return mine
    best = max(others) if target.quantity == "batch" else min(others)
    return best / mine if target.quantity == "ms" else mine / best


def met(target: Target, value: float) -> bool:
    return value >= target.bound if target.higher else value <= target.bound


def steady(steps: list[float]) -> tuple[list[float], float]:
    """The steps after the warm-up, and the extra time of the warm-up steps over the median of the others."""
    first = min(WARM_UP, len(steps) // 2)
    settled = steps[first:]
    usual = statistics.median(settled)
    return settled, sum(max(0.0, step - usual) for step in steps[:first])


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` that fits, to within a sixteenth; 0 if none fits."""
    low, high = 0, most + 1
    while high - low > max(1, low // 16):
        middle = low + (high - low) * 3 // 4
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# -- caches


def make_cache(model, method: str, room: int | None, length: int):
    """An empty cache. Ours attach themselves to the model; with other caches the model uses its own
    attention.

    `room` is the largest number of tokens that our cache will see; None lets it grow. A static cache is
    made for `length`.
    """
    fade_fast.detach(model)
    if method == "dynamic":
        return DynamicCache(config=model.config)
    if method == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    if method in QUANTIZED:
        return methods.method(method)(model, length)
    return fade_fast.create_cache(model, OURS[method], max_length=room)


def weigh(cache, batch: int) -> tuple[int, int, dict[str, float]]:
    """Bytes that a cache has allocated, bytes of its live tokens, and the number of those tokens by tier."""
    if isinstance(cache, TieredKVCache):
        memory = cache.memory()
        return memory.allocated, memory.packed, memory.tokens
    held = methods.allocated(cache)
    return held, held, {"FP16": batch * int(cache.get_seq_length())}


def free(model, method: str) -> None:
    """Free everything of the last measurement except our compiled code: one step serves all our caches."""
    fade_fast.detach(model)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if method in OURS:
        return
    model.__dict__.pop("_compiled_call", None)
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- one measurement


class Clock(LogitsProcessor):
    """Marks the start, and every step when its logits exist. It also records the peaks of memory.

    A step calls it `tokens` times, once for each of its tokens. `watch` reads the counters of `cache`, and
    `reorderings` times how its rows move. `ids` is the text in the end, int64 [B, n].
    """

    ids: torch.Tensor

    def __init__(self, device: str, tokens: int = 1, cache=None):
        self.cuda, self.stamps, self.prefill_peak = device == "cuda", [], None
        self.tokens, self.asked, self.watch = tokens, 0, Watch(cache)
        self.reorderings = Reorderings(cache, self.cuda)

    def start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._stamp()

    def __call__(self, input_ids, scores):
        self.asked += 1
        if self.asked % self.tokens:
            return scores
        self._stamp()
        self.watch.read()
        if self.cuda and len(self.stamps) == 2:
            self.prefill_peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return scores

    def _stamp(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.stamps.append(event if self.cuda else time.perf_counter())

    def seconds(self) -> list[float]:
        """Time to the first token, then of every step. Waits for the device."""
        pairs = list(itertools.pairwise(self.stamps))
        if not self.cuda:
            return [stop - start for start, stop in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]


def choose_fill(case: Case, method: str) -> str:
    """How to prefill so that it fits: the choice of `--fill auto`.

    A static cache masks every slot for every query, so a long prompt must come in chunks. With many long
    rows the activations of the MLPs do not fit, so the MLPs then take one row at a time.
    """
    if method == "static":
        return "chunk" if case.length > CHUNK else "once"
    return "rows" if case.batch * case.beams > 1 and case.tokens > ONCE else "once"


def prefill(model, cache, ids, fill: str) -> None:
    """Feed all tokens but the last, which `generate()` then feeds. "once" leaves all tokens to
    `generate()`.
    """
    before = ids[:, :-1]
    if fill == "rows":
        with mlp_by_row(model):
            model(before, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    elif fill == "chunk":
        for part in before.split(CHUNK, dim=1):
            model(part, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    elif fill == "random":
        random_fill(model, cache, *before.shape)


@contextlib.contextmanager
def mlp_by_row(model):
    """Make every MLP take one row of the batch at a time: the same numbers from smaller activations."""
    mlps = [layer.mlp for layer in model.model.layers]
    for mlp in mlps:
        mlp.forward = lambda x, whole=mlp.forward: torch.cat([whole(row) for row in x.split(1)])
    try:
        yield
    finally:
        for mlp in mlps:
            del mlp.forward


def random_fill(model, cache, batch: int, length: int) -> None:
    """Fill a cache with random keys and values. No model runs, so only the cache needs memory."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    split = split_keys(next(iter(attention_modules(model).values()), None))
    heads = config.num_key_value_heads if split is None else len(split) // head_dim
    size = (batch, heads, length, head_dim)
    fade_fast.detach(model)  # our layers then store what they are given, without a query
    for layer in cache.layers if isinstance(cache, TieredKVCache) else ():
        layer.shows_survivors = True
    for i in range(config.num_hidden_layers):
        x = torch.randn(size, dtype=model.dtype, device=model.device)
        cache.update(x, x, i)
        del x  # free it before the next one
    if isinstance(cache, TieredKVCache):
        attach(model)


@torch.no_grad()
def run(model, cache, ids, new: int, fill: str, mode: str = "greedy") -> Clock:
    """Prefill and generate `new` tokens, as a user would."""
    clock = Clock(model.device.type, DRAFT + 1 if mode == "drafted" else 1, cache)
    mask = torch.ones_like(ids)
    if mode == "padded":
        padding = torch.linspace(0, ids.shape[1] // 4, len(ids), device=ids.device).ceil()
        mask = (torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]).to(ids.dtype)
    clock.start()
    beams = MODES[mode].get("num_beams", 1)
    prefill(model, cache, ids.repeat_interleave(beams, dim=0), fill)
    asked = dict(do_sample=False, max_new_tokens=new, logits_processor=LogitsProcessorList([clock]))
    made = lambda own, *args, **kwargs: Guesses(own.config.vocab_size)  # noqa: E731
    guessing = mock.patch.object(type(model), "_get_candidate_generator", made)
    watching = clock.watch.watching(), clock.reorderings.watching()
    with guessing if mode == "drafted" else contextlib.nullcontext(), watching[0], watching[1]:
        clock.ids = model.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, **asked | MODES[mode])
    return clock


class Guesses(CandidateGenerator):
    """Drafts random tokens."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def get_candidates(self, ids, **kwargs):
        drafted = torch.randint(self.vocabulary, (1, DRAFT), device=ids.device)
        return torch.cat((ids, drafted), dim=1), None

    def update_candidate_strategy(self, *args, **kwargs) -> None:
        """Learn nothing from refused drafts."""


def measure(
    model,
    case: Case,
    method: str,
    new: int,
    fill: str,
    bandwidth: float | None = None,
    grow: bool = False,
) -> Result:
    """One method in one case. Raises the errors of the model, including exhausted memory."""
    result = Result(case.name, method, case.batch, case.length, new, fill)
    if case.mode not in ("greedy", "beams") and fill != "once":
        raise ValueError(f"{case.mode} is prefilled by generate() itself, not by {fill!r}")
    room = -(-(case.length + new) // 128) * 128
    generator = torch.Generator(model.device).manual_seed(1)
    size = (case.batch, case.length)
    ids = torch.randint(model.config.vocab_size, size, generator=generator, device=model.device)
    make = lambda: make_cache(model, method, None if grow else room, room)  # noqa: E731
    again = case.tokens <= ONCE and fill != "random"
    if again:
        result.cold_s = run(model, make(), ids, 1, fill, case.mode).seconds()[0]
        gc.collect()
    cache = make()
    clock = run(model, cache, ids, new, fill, case.mode)
    first, *steps = clock.seconds()
    if again:
        result.first_token_s = first
    elif fill != "random":
        result.cold_s = first
    if clock.cuda and isinstance(cache, TieredKVCache):
        result.captured = (
            cache.decode_graph.replays if cache.decode_graph.captures else cache.decode_graph.steps
        )
        if result.captured < len(steps) / 2:
            result.failed = f"not captured: {result.captured} of {len(steps)} steps"
            result.failed += f", {why}" if (why := cache.decode_graph.uncaptured) else ""
            return result
    settled, extra = steady(steps)
    result.ms, result.mean_ms = (f(settled) * 1e3 for f in (statistics.median, statistics.mean))
    result.worst_ms, result.compile_s = max(settled) * 1e3, extra
    spread = Spread.of(steps)
    result.mean_over, result.p99_over, result.worst_over = spread.mean, spread.p99, spread.worst
    result.reorder_ms = clock.reorderings.median()
    result.first_ms, result.slow = spread.first_ms, [asdict(x) for x in clock.watch.slow(steps)]
    result.tokens_per_s = case.batch / result.ms * 1e3
    if clock.cuda:
        result.prefill_gb = clock.prefill_peak / 1e9
        result.decode_gb = torch.cuda.max_memory_allocated() / 1e9
    result.cache_bytes, result.packed_bytes, result.tokens = weigh(cache, case.batch)
    result.live = sum(n for name, n in result.tokens.items() if name != "EVICTED")
    if bandwidth:
        result.floor_ms = (step_weights(model) + result.packed_bytes) / bandwidth * 1e3
        result.over_floor = result.ms / result.floor_ms
    return result


def exhausted(error: BaseException) -> bool:
    """Whether an error means that memory ran out. A compiled call may wrap that error."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def attempt(model, case: Case, method: str, new: int, fill: str = "auto", **options) -> Result:
    """`measure`, which returns a failure as a result and frees the memory after either."""
    fill = choose_fill(case, method) if fill == "auto" else fill
    try:
        return measure(model, case, method, new, fill, **options)
    except Exception as error:
        failed = "out of memory" if exhausted(error) else f"{type(error).__name__}: {error}"[:300]
        if not exhausted(error):
            traceback.print_exc()
        return Result(case.name, method, case.batch, case.length, new, fill, failed)
    finally:
        free(model, method)


def largest_batch(model, case: Case, method: str, **options) -> Result:
    """The result at the largest batch that decodes beside a cache of random keys and values."""
    name, new = largest_case(case.model, case.length), 16
    options["fill"] = "random"
    one = attempt(model, replace(case, batch=1), method, new, **options)
    best = replace(one, case=name, batch=0)
    if one.failed:
        return best
    total = torch.cuda.mem_get_info()[1] if model.device.type == "cuda" else 4 * one.cache_bytes

    def fits(batch: int) -> bool:
        nonlocal best
        tried = attempt(model, replace(case, batch=batch), method, new, **options)
        print(f"  {method}, batch {batch}: {tried.failed or 'fits'}", flush=True)
        if not tried.failed:
            best = replace(tried, case=name)
        return not tried.failed

    weights = sum(p.nbytes for p in model.parameters()) if model.device.type == "cuda" else 0
    largest(fits, int((total - weights) / one.cache_bytes))
    return best


# -- what is shown

#: Columns of `table`: the first three over the median of the steps after the first 32.
SPREAD = ("mean / median", "p99 / median", "worst / median", "first 64 steps s")


def table(results: list[Result]) -> str:
    """One row a result. Columns that no result fills are left out: spreads of older ones, reorderings."""
    spreads = any(r.mean_over is not None for r in results)
    reorders = any(r.reorder_ms is not None for r in results)
    head = (
        "case", "method", "fill", "ms a step", "mean", "worst", "tokens/s", "floor ms", "step / floor",
        "first token s", "cold s", "compile s", "prefill GB", "decode GB", "cache GB", "live tokens",
        *(SPREAD if spreads else ()), *(("reordering ms",) if reorders else ()),
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    show = lambda x, digits=1: "-" if x is None else f"{x:.{digits}f}"  # noqa: E731
    for r in results:
        if r.failed:
            lines.append(f"| {r.case} | {r.method} | {r.fill} | {r.failed} |" + " |" * (len(head) - 4))
            continue
        case = r.case + (f" = {r.batch}" if "largest" in r.case else "")
        cells = [
            case, r.method, r.fill, show(r.ms, 2), show(r.mean_ms, 2), show(r.worst_ms), show(r.tokens_per_s),
            show(r.floor_ms, 2), show(r.over_floor, 2), show(r.first_token_s, 2), show(r.cold_s, 2),
            show(r.compile_s), show(r.prefill_gb), show(r.decode_gb),
            "-" if r.cache_bytes is None else show(r.cache_bytes / 1e9, 3), show(r.live, 0),
        ]  # fmt: skip
        if spreads:
            cells += [show(x, 2) for x in (r.mean_over, r.p99_over, r.worst_over)]
            cells.append(show(sum(r.first_ms) / 1e3, 2) if r.first_ms else "-")
        if reorders:
            cells.append(show(r.reorder_ms, 2))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def slow_steps(result: Result) -> str:
    """One line for each slow step, with what happened at it."""
    return "\n".join(f"  {Slow(**x).text()}" for x in result.slow)


def reached(results: list[Result]) -> list[dict]:
    """The targets whose ratio was measured: the quantity, the ratio, and whether it meets the bound."""
    pairs = [(target, measured(target, results)) for target in TARGETS]
    return [asdict(t) | dict(text=t.text(), measured=x, met=met(t, x)) for t, x in pairs if x is not None]


def targets_table(rows: list[dict]) -> str:
    lines = ["| case | target | measured | bound | met |", "|---" * 5 + "|"]
    for row in rows:
        sign = ">=" if row["quantity"] in ("ms", "batch") else "<="
        yes = "yes" if row["met"] else "**no**"
        lines.append(
            f"| {row['case']} | {row['text']} | {row['measured']:.2f} | {sign} {row['bound']} | {yes} |"
        )
    return "\n".join(lines)


def report(head: dict, results: list[Result]) -> dict:
    """The content of a JSON file."""
    return head | dict(results=[asdict(r) for r in results], targets=reached(results))


def merged(files: Iterable[Path]) -> tuple[dict, list[Result]]:
    """Head and results of several files. If a method was measured twice in a case, the last one counts."""
    head, results = {}, {}
    for file in files:
        data = json.loads(file.read_text())
        found = [Result(**r) for r in data.pop("results")]
        data.pop("targets", None)
        if head and (head["device"], head["torch"]) != (data["device"], data["torch"]):
            raise SystemExit(f"{file}: of another device or torch than the files before it")
        head, results = data, results | {(r.case, r.method): r for r in found}
    return head, list(results.values())


def tables(results: list[Result]) -> str:
    rows = reached(results)
    return table(results) + ("\n\n" + targets_table(rows) if rows else "")


def selected(args: argparse.Namespace) -> list[Case]:
    """The cases to run, each with its methods."""
    cases = [case for case in (TINY_CASES if args.tiny else CASES) if args.only in case.name]
    if args.largest_batch:
        cases = TINY_CASES if args.tiny else [Case(LLAMA, 1, 32 * K)]
        cases = [replace(case, methods=("dynamic", "safe")) for case in cases]
    return [replace(case, methods=args.methods or case.methods) for case in cases]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.show:
        head, results = merged(args.show)
        print(f"{head['device']}, torch {head['torch']}\n\n{tables(results)}")
        if args.json:
            write_json(args.json, report(head, results), indent=1)
        return 0
    cases = selected(args)
    if args.list:
        for case in cases:
            print(f"{case.name}: {', '.join(case.methods)}")
        print(f"methods: {', '.join(METHODS)}")
        return 0
    cuda = args.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else "cpu"
    head = dict(device=device, torch=torch.__version__, transformers=transformers.__version__)
    head["bandwidth"] = read_bandwidth() if cuda else None
    torch.cuda.empty_cache()
    copied = f", {head['bandwidth'] / 1e12:.2f} TB/s copied" if cuda else ": times of a CPU mean nothing here"
    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}{copied}\n")
    results = []
    options = dict(fill=args.fill, bandwidth=head["bandwidth"], grow=args.grow)
    for name, group in itertools.groupby(cases, key=lambda case: case.model):
        started = time.perf_counter()
        model = build(name, args.device)
        print(f"{name}: {step_weights(model) / 1e9:.2f} GB of weights a step, ", end="")
        print(f"built in {time.perf_counter() - started:.0f} s", flush=True)
        for case in group:
            for method in case.methods:
                started = time.perf_counter()
                if args.largest_batch:
                    results.append(largest_batch(model, case, method, **options))
                else:
                    results.append(attempt(model, case, method, args.new, **options))
                print(
                    table(results[-1:]).splitlines()[-1], f"{time.perf_counter() - started:.0f} s", flush=True
                )
                if results[-1].slow:
                    print(slow_steps(results[-1]), flush=True)
                if args.json:
                    write_json(args.json, report(head, results), indent=1)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print("\n" + tables(results))
    return int(any(r.failed and r.failed != "out of memory" for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
