"""What choosing costs and gains, with and without host memory: `fade bench choose`.

Models have a named shape, random weights and `--layers` layers. Caches are filled with random keys and values
by `KVLayer.append`, without the model. Then `generate()` decodes, one cache after the other in turns, and the
time of a step is the median over turns of the median of the later steps. One process measures all, so that
rows compare. Parts, of which `--parts` selects:

- **steps**: a decode step of `int4` and of each index, with the payload on the GPU and in host memory.
- **hits**: the same with forced shares of chosen pages that are on the GPU (`Window`), beside the time in
  which a copy from host memory would move the bytes of the others. The bandwidth of the fetch is that of the
  step: bytes fetched, over what the step takes longer than a step that fetches nothing.
- **prefill**: one prompt of `--length` tokens, read by the model, with each cache.
- **batch**: the most rows of `--length` tokens beside the weights of the whole model, in `--gpu-gb`. If there
  are fewer layers, their share of the memory that weights leave is all that caches get.
- **curve**: a step by length. One cache for the longest length is filled further and further.

"ms, all layers" is scaled: the step times the number of layers, with the bytes of the whole output head at
the bandwidth of a copy. `--vocabulary` makes the measured head small. Counts of tokens read, of hits and of
misses are those that the device has counted. A cache that reads all of its tokens, although it has more than
it may read, is an error and not a row. Without a GPU a tiny model runs through the same code, and its times
mean nothing.
"""

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from fade_fast.cache import host
from fade_fast.cache.select_store import HITS, MISSES, QUERIES, READ, Choice, SelectStore
from fade_fast.errors import InputError
from fade_fast.hf.cache import TieredKVCache
from fade_fast.saved.files import write_json

from . import generate
from .decode_attention import read_bandwidth, seconds
from .methods import Method, made_for, method
from .models import LLAMA, MODELS, TINY, K, build
from .parsers.choose import PARTS, arguments
from .streams import NothingCompressed

FILL = 64 * K  # most tokens of all rows that are filled at once
FEW = 8  # rows of the batch from which the largest one is estimated
TRIES = 4  # batches that are tried, each a sixteenth smaller than the one before
ALIAS_BYTES = 1 << 28  # of the copy that shows the bandwidth of host memory
POSITIONS = 1024 * K  # of the model: more than any text has


@dataclass
class Row:
    """A measurement. None: not measured, or it has no meaning there.

    Attributes:
        part, method, batch, length: what was measured; the length when the first turn began.
        layers: of the model that ran.
        forced: share of hits that was forced.
        failed: the reason for missing numbers.
        ms, all_ms: of a step; and scaled to all layers.
        tokens_per_s: of all layers.
        captured: steps of the last turn that replayed a CUDA graph; None without one.
        held, read: tokens of the middle of a row, and those of them that a query and KV head read.
        hits, misses: chosen pages of a step that were on the GPU, and that were fetched, in all rows, heads
            and layers.
        fetched_bytes: of the latter.
        bound_ms: time of a copy of these bytes from host memory.
        fetch_gb_s: bandwidth inside the step, see above.
        gpu_bytes, host_bytes, dense_bytes: of the cache, and of an uncompressed one.
        tables_bytes: of tables that all caches of a model share, which `gpu_bytes` leaves out.
        cold_s, first_token_s: of a first prefill, which compiles, and of later ones, median.
        refused: larger batches that did not fit.
    """

    part: str
    method: str
    batch: int
    length: int
    layers: int
    forced: float | None = None
    failed: str | None = None
    ms: float | None = None
    all_ms: float | None = None
    tokens_per_s: float | None = None
    captured: int | None = None
    held: float | None = None
    read: float | None = None
    hits: float | None = None
    misses: float | None = None
    fetched_bytes: float | None = None
    bound_ms: float | None = None
    fetch_gb_s: float | None = None
    gpu_bytes: int | None = None
    tables_bytes: int | None = None
    host_bytes: int | None = None
    dense_bytes: int | None = None
    cold_s: float | None = None
    first_token_s: float | None = None
    refused: list[int] | None = None


class Bench:
    """A model, and how it is measured.

    Args:
        name: in `models.MODELS`.
        device: "cuda" or "cpu".
        layers, vocabulary: of the model; None: those of the name.
        turns, new: turns that count, and tokens that each of them writes.

    Attributes:
        keep: called when rows have their numbers.
    """

    def __init__(
        self, name: str, device: str, layers: int | None, vocabulary: int | None, turns: int, new: int
    ):
        changed = dict(num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=POSITIONS)
        self.model = build(name, device, **{key: n for key, n in changed.items() if n is not None})
        self.name, self.device, self.turns, self.new = name, device, turns, new
        self.layers = self.model.config.num_hidden_layers
        self.all_layers = MODELS[name][2]["num_hidden_layers"]
        self.bandwidth = read_bandwidth(device)
        self.alias_bandwidth = alias_bandwidth(device)
        self.rows: list[Row] = []
        self.keep: Callable[[], None] = lambda: None

    @property
    def scale(self) -> float:
        """Layers of the whole model for each one that runs."""
        return self.all_layers / self.layers

    def scaled(self, ms: float) -> float:
        """Milliseconds of a step of all layers."""
        head = self.model.get_output_embeddings().weight
        own = head.nbytes / self.bandwidth * 1e3
        whole = own / head.shape[0] * MODELS[self.name][2]["vocab_size"]
        return (ms - own) * self.scale + whole

    def text(self, m: Method, batch: int, room: int) -> "Text":
        return Text(self, m, batch, room)

    def row(self, part: str, m: Method, batch: int, length: int, **values) -> Row:
        """A new row, which is kept."""
        self.rows.append(Row(part, m.name, batch, length, self.layers, **values))
        return self.rows[-1]

    def free(self) -> None:
        """Give back what dropped caches held."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


class Text:
    """A cache of random keys and values, and ids that stand for them.

    `ids` int64 [B, n] has one token more than the cache: the next step feeds it.
    """

    def __init__(self, bench: Bench, m: Method, batch: int, room: int):
        self.bench, self.method, self.batch = bench, m, batch
        self.cache: TieredKVCache = made_for(bench.model, m, room)
        self.random = torch.Generator(bench.device).manual_seed(1)
        self.ids = torch.zeros(batch, 0, dtype=torch.int64, device=bench.device)
        self.captured: int | None = None

    @torch.no_grad()
    def fill(self, length: int, most: int = FILL) -> "Text":
        """Store random tokens until the text has `length` of them, at most `most` of all rows at once."""
        model, cache = self.bench.model, self.cache
        size = max(64, most // self.batch // 64 * 64)
        heads, dim = model.config.num_key_value_heads, model.config.head_dim
        while (start := cache.get_seq_length()) < length - 1:
            new = min(size, length - 1 - start)
            for layer in cache.tiered:
                shape = (self.batch, heads, new, dim)
                keys, values = (
                    torch.randn(shape, generator=self.random, dtype=model.dtype, device=model.device)
                    for _ in range(2)
                )
                layer.compact()
                layer.token_positions.extend(start, None, self.batch, new, model.device)
                layer.append(keys, values, attended=True)
                del keys, values
        more = (self.batch, length - self.ids.shape[1])
        drawn = torch.randint(model.config.vocab_size, more, generator=self.random, device=self.ids.device)
        self.ids = torch.cat((self.ids, drawn), dim=1)
        return self

    @property
    def stores(self) -> list[SelectStore]:
        """The stores of which queries choose."""
        return [layer.middle for layer in self.cache.tiered if isinstance(layer.middle, SelectStore)]

    @property
    def held(self) -> int:
        """Tokens of the middle of a row."""
        return self.cache.tiered[0].middle.count

    def counted(self) -> list[int]:
        """`SelectStore.counted` of all layers. Waits for the device."""
        if not self.stores:
            return [0] * 4
        return torch.stack([store.counted for store in self.stores]).sum(0).tolist()

    def turn(self) -> float:
        """Write the next tokens. Returns milliseconds of a later step, median."""
        clock = generate.run(self.bench.model, self.cache, self.ids, self.bench.new, "once")
        self.ids, (_, *steps) = clock.ids, clock.seconds()
        if clock.cuda:
            graph = self.cache.decode_graph
            self.captured = graph.replays if graph.captures else graph.steps
            if self.captured < len(steps) / 2:
                raise RuntimeError(f"not captured: {self.captured} of {len(steps)} steps")
        return statistics.median(generate.steady(steps)[0]) * 1e3

    def page_bytes(self) -> int:
        """Bytes of the payload of a page of one KV head."""
        store = self.stores[0]
        fields = (store.tiers[0].records.tensors[name] for name in store.payload)
        return sum(x[0, 0, : store.page].nbytes for x in fields)


class Window:
    """Forces which share of the pages that a step reads is on the GPU already.

    It takes the place of `choose` of a store. The store still chooses, by its index and at its cost, but then
    reads other pages: a window that slides over all pages, in an order of its own for each row and KV head.
    The pages that enter the window were not read for long, so they have been replaced on the GPU, and the
    step fetches them. All others were read in the step before. Everything after the choice is the store's
    own. The window takes three small kernels in each layer.

    Raises `InputError` if there are too few pages for them to be replaced before they come again.
    """

    def __init__(self, store: SelectStore):
        pages, self.size = store.count // store.page, store.most
        if pages < self.size + store.residency.slots:
            raise InputError(
                f"hits cannot be forced among {pages} pages: {self.size} are read and "
                f"{store.residency.slots} are on the GPU; use a longer text"
            )
        rows, device = store.residency.slot_of_page.shape[:2], store.tallies[0].device
        order = torch.rand(*rows, pages, generator=torch.Generator(device).manual_seed(2), device=device)
        self.order = order.argsort(dim=-1)
        self.at = torch.arange(self.size, device=device)
        self.shift = torch.zeros(1, dtype=torch.int64, device=device)
        self.choose: Callable[..., Choice] = store.choose
        store.choose = self

    def force(self, hits: float) -> float:
        """Let this share of the pages be hits from now on. Returns the share that whole pages give."""
        new = round((1 - hits) * self.size)
        self.shift.fill_(new)
        return 1 - new / self.size

    def __call__(self, *args, **kwargs) -> Choice:
        choice = self.choose(*args, **kwargs)
        self.at.add_(self.shift).remainder_(self.order.shape[-1])
        return choice._replace(pages=self.order.index_select(-1, self.at).unsqueeze(2))


def alias_bandwidth(device: str) -> float:
    """Bytes per second of a copy from host memory, as kernels see it, to the device."""
    size = ALIAS_BYTES if device == "cuda" else 1 << 20
    far = host.zeros((size,), torch.uint8, device)
    near = torch.empty_like(far, device=device)
    return size / statistics.median(seconds(lambda: near.copy_(far), device) for _ in range(7))


# -- measurements by turns


def by_turns(texts: Iterable[Text], rows: Iterable[Row], turns: int) -> None:
    """Decode `turns` times with each text, one after the other, and write times and counts into its row.

    A first turn, which compiles and captures, does not count.
    """
    pairs = [(text, row, []) for text, row in zip(texts, rows)]
    before: list[list[int]] = []
    for turn in range(turns + 1):
        if turn == 1:
            before = [text.counted() for text, _, _ in pairs]
        for text, _, times in pairs:
            times.append(text.turn())
    for (text, row, times), first in zip(pairs, before):
        record(text, row, times[1:], [b - a for a, b in zip(first, text.counted())])
        text.bench.keep()


def record(text: Text, row: Row, times: list[float], counted: list[int]) -> None:
    """Write the times of turns, and what the device counted in them, into a row."""
    bench, memory = text.bench, text.cache.memory()
    row.ms = statistics.median(times)
    row.all_ms = bench.scaled(row.ms)
    row.tokens_per_s, row.captured = text.batch / row.all_ms * 1e3, text.captured
    row.gpu_bytes, row.host_bytes = memory.allocated - memory.tables, memory.host
    row.tables_bytes, row.dense_bytes = memory.tables, memory.dense
    row.held = row.read = text.held
    if not text.stores or not text.stores[0].chooses:
        return
    row.read = counted[READ] / counted[QUERIES] if counted[QUERIES] else text.held
    if not row.read < row.held:
        raise NothingCompressed(f"{row.method}: a query read all {row.held} tokens of the middle")
    if text.method.config.cold:
        heads = bench.model.config.num_key_value_heads
        steps = counted[QUERIES] / (text.batch * heads * len(text.stores))
        row.hits, row.misses = counted[HITS] / steps, counted[MISSES] / steps
        row.fetched_bytes = row.misses * text.page_bytes()
        row.bound_ms = row.fetched_bytes / bench.alias_bandwidth * 1e3


def room_for(bench: Bench, length: int, turns: int) -> int:
    """Tokens of a cache that starts with `length` tokens."""
    return -(-(length + bench.new * turns) // 128) * 128


def failure(error: Exception) -> str:
    """What a row says of an error of memory; other errors are raised."""
    if not (generate.exhausted(error) or isinstance(error, host.HostMemoryError)):
        raise error
    return "out of memory" if generate.exhausted(error) else str(error)


def steps(bench: Bench, methods: list[Method], cases: list[tuple[int, int]]) -> None:
    """A decode step of each method in each case (batch, length)."""
    for batch, length in cases:
        held = []
        for m in methods:
            row = bench.row("steps", m, batch, length)
            try:
                text = bench.text(m, batch, room_for(bench, length, bench.turns + 2))
                held.append((text.fill(length), row))
            except Exception as error:
                row.failed = failure(error)
        if held:
            by_turns(*zip(*held), bench.turns)
        del held
        bench.free()


def hits(bench: Bench, methods: list[Method], cases: list[tuple[int, int]], shares: list[float]) -> None:
    """A step with forced hits, for methods with host memory; see `Window`."""
    for (batch, length), m in itertools.product(cases, methods):
        if m.config.cold is None:
            continue
        turns = (bench.turns + 1) * (len(shares) + 1)
        text = bench.text(m, batch, room_for(bench, length, turns)).fill(length)
        windows = [Window(store) for store in text.stores]
        real = sorted({windows[0].force(share) for share in (1.0, *shares)}, reverse=True)
        found: dict[float, tuple[list[float], list[int]]] = {x: ([], [0] * 4) for x in real}
        for turn, share in itertools.product(range(bench.turns + 1), real):
            for window in windows:
                window.force(share)
            before, ms = text.counted(), text.turn()
            if turn:
                times, counted = found[share]
                times.append(ms)
                counted[:] = [n + b - a for n, a, b in zip(counted, before, text.counted())]
        rows = [bench.row("hits", m, batch, length, forced=share) for share in real]
        for row, share in zip(rows, real):
            record(text, row, *found[share])
            if row.fetched_bytes and row.ms > rows[0].ms:
                row.fetch_gb_s = row.fetched_bytes / (row.ms - rows[0].ms) * 1e3 / 1e9
        del text, windows
        bench.free()


def prefill(bench: Bench, methods: list[Method], length: int) -> None:
    """The first token of a prompt of `length` random tokens, one row, with each method by turns."""
    ids = torch.randint(bench.model.config.vocab_size, (1, length), device=bench.device)
    times: dict[str, list[float]] = {m.name: [] for m in methods}
    for _, m in itertools.product(range(bench.turns + 1), methods):
        cache = made_for(bench.model, m, length + 128)
        times[m.name].append(generate.run(bench.model, cache, ids, 1, "once").seconds()[0])
        del cache
        gc.collect()
    for m in methods:
        cold, *later = times[m.name]
        bench.row("prefill", m, 1, length, cold_s=cold, first_token_s=statistics.median(later))


@contextlib.contextmanager
def at_most(size: float, device: str) -> Iterator[None]:
    """Inside this context, tensors get at most so many bytes of the GPU."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.mem_get_info()[1]))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def weights(model) -> int:
    """Bytes of all parameters."""
    return sum(p.nbytes for p in model.parameters())


def largest_batch(bench: Bench, methods: list[Method], length: int, size: float) -> None:
    """The most rows of `length` tokens that decode in `size` bytes of GPU memory, weights included.

    Weights are those of the whole model. What a step needs besides the cache is measured, and not scaled: all
    layers use the same memory for it. On a CPU there is room for four rows.
    """
    cuda, whole = bench.device == "cuda", weights(build(bench.name, "meta"))
    room = room_for(bench, length, 3)
    fill = 4 * K  # encoding what is filled at once must need little beside the caches of a few layers
    for m in methods:
        row = bench.row("batch", m, 0, length, refused=[])
        text = bench.text(m, FEW if cuda else 1, room).fill(length, fill)
        if cuda:
            text.turn()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            text.turn()
            step = (torch.cuda.max_memory_allocated() - before) / text.batch
        else:
            step = 0.0
        memory = text.cache.memory()
        each = (memory.allocated - memory.tables) / text.batch * bench.scale + step
        del text
        bench.free()
        left = size - whole if cuda else 4.5 * each
        row.batch = int(left / each)
        for _ in range(TRIES):
            if row.batch < 1:
                row.failed = "no row fits"
                break
            needed = (left - row.batch * step) / bench.scale + row.batch * step
            base = torch.cuda.memory_allocated() if cuda else 0
            try:
                with at_most(base + needed, bench.device):
                    text = bench.text(m, row.batch, room).fill(length, fill)
                    by_turns([text], [row], 1)
                row.failed = None
                break
            except Exception as error:
                row.failed = failure(error)
                row.refused.append(row.batch)
                row.batch -= max(1, row.batch // 16)
            finally:
                text = None
                bench.free()


def curve(bench: Bench, methods: list[Method], batches: list[int], lengths: list[int]) -> None:
    """A step of each method at growing lengths."""
    lengths = sorted(lengths)
    room = room_for(bench, lengths[-1], (bench.turns + 1) * len(lengths))
    for batch in batches:
        texts = [bench.text(m, batch, room) for m in methods]
        for length in lengths:
            by_turns(
                [text.fill(max(length, text.ids.shape[1] + 1)) for text in texts],
                [bench.row("curve", m, batch, length) for m in methods],
                bench.turns,
            )
        del texts
        bench.free()


# -- what is shown

SHOWN = {
    "steps": ("ms", "all_ms", "read", "held", "hits", "misses", "bound_ms", "ratio", "host_gb"),
    "hits": ("forced", "ms", "all_ms", "read", "held", "hits", "misses", "fetched", "bound_ms", "fetch_gb_s"),
    "prefill": ("cold_s", "first_token_s", "over"),
    "batch": ("ms", "all_ms", "tokens_per_s", "read", "held", "ratio", "gpu_gb", "host_gb", "refused"),
    "curve": ("ms", "all_ms", "read", "held"),
}
HEADS = dict(
    ms="ms a step", all_ms="ms, all layers", read="tokens read", held="of", bound_ms="copy, ms",
    fetch_gb_s="fetch GB/s", ratio="bf16 / GPU bytes", host_gb="host GB", gpu_gb="GPU GB",
    fetched="MB fetched", forced="hits forced, %", cold_s="cold, s", first_token_s="first token, s",
    over="over dynamic", tokens_per_s="tokens/s, all layers", refused="refused",
)  # fmt: skip


def cell(row: Row, name: str, rows: list[Row]) -> str:
    """What a table shows of a row."""
    if name == "over":
        value = next((row.first_token_s / r.first_token_s for r in rows if r.method == "dynamic"), None)
    elif name == "ratio":
        value = row.dense_bytes / row.gpu_bytes if row.gpu_bytes else None
    elif name == "fetched":
        value = None if row.fetched_bytes is None else row.fetched_bytes / 1e6
    elif name == "forced":
        return f"{100 * row.forced:.1f}"
    elif name == "refused":
        return ", ".join(map(str, row.refused)) or "-"
    elif name in ("host_gb", "gpu_gb"):
        size = getattr(row, f"{name[:-3]}_bytes")
        value = None if size is None else size / 1e9
    else:
        value = getattr(row, name)
    if value is None:
        return "-"
    whole = name in ("read", "held", "hits", "misses", "tokens_per_s")
    return f"{value:.0f}" if whole else f"{value:.3f}"


def table(rows: list[Row]) -> str:
    """Markdown of the rows of one part."""
    names = SHOWN[rows[0].part]
    head = ("case", "cache", *(HEADS.get(name, name) for name in names))
    lines = [f"**{rows[0].part}**", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        alike = [r for r in rows if (r.batch, r.length) == (row.batch, row.length)]
        cells = [row.failed, *[""] * (len(names) - 1)] if row.failed else [cell(row, n, alike) for n in names]
        lines.append(f"| {row.batch} x {row.length} | {row.method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth(rows: list[Row]) -> list[str]:
    """How much the step grows with the length, against that of the first method: from the shortest length at
    which a query chooses to the longest one.
    """
    lines, first = [], rows[0].method
    times = {(r.batch, r.method, r.length): r.ms for r in rows}
    for batch, name in dict.fromkeys((r.batch, r.method) for r in rows):
        own = [r for r in rows if (r.batch, r.method) == (batch, name)]
        chosen = sorted(r.length for r in own if r.read < r.held)
        if len(chosen) > 1:
            ends = chosen[0], chosen[-1]
            grown, base = (times[batch, m, ends[1]] - times[batch, m, ends[0]] for m in (name, first))
            lines.append(
                f"B {batch}, from {ends[0]} to {ends[1]} tokens: a step with {name} takes {grown:.3f} ms "
                f"more, with {first} {base:.3f} ms more."
            )
    return lines


def shown(report: dict) -> str:
    """The tables of a report, and its circumstances."""
    rows = [Row(**r) for r in report["rows"]]
    head = (
        "{model}, {layers} of {all_layers} layers, vocabulary of {vocabulary}, random weights, {device}, "
        "torch {torch}, transformers {transformers}; a copy moves {bandwidth:.0f} GB/s on the device, "
        "{alias_bandwidth:.1f} GB/s from host memory; {turns} turns of {new} tokens"
    ).format(**report)
    parts = [[r for r in rows if r.part == part] for part in PARTS]
    lines = growth(parts[-1]) if parts[-1] else []
    return "\n\n".join([head, *(table(found) for found in parts if found), *lines])


def report(bench: Bench) -> dict:
    """The content of a JSON file."""
    cuda = bench.device == "cuda"
    return dict(
        kind="choose",
        device=torch.cuda.get_device_name() if cuda else "CPU",
        torch=torch.__version__,
        transformers=transformers.__version__,
        model=bench.name,
        layers=bench.layers,
        all_layers=bench.all_layers,
        vocabulary=bench.model.config.vocab_size,
        bandwidth=bench.bandwidth / 1e9,
        alias_bandwidth=bench.alias_bandwidth / 1e9,
        turns=bench.turns,
        new=bench.new,
        filled="random keys and values, by KVLayer.append in chunks; prefill: by the model",
        rows=[asdict(row) for row in bench.rows],
    )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    found = json.loads(args.show.read_text(encoding="utf-8")) if args.show else measured(args)
    print("\n" + shown(found))
    return int(any(r["failed"] and r["failed"] != "out of memory" for r in found["rows"]))


def measured(args: argparse.Namespace) -> dict:
    """Run the parts that were asked for. The file is written after each part, and after each case."""
    tiny = args.device == "cpu"
    vocabulary = None if tiny else args.vocabulary
    bench = Bench(TINY if tiny else LLAMA, args.device, args.layers, vocabulary, args.turns, args.new)
    near, far = ([method(name) for name in names] for names in (args.near, args.far))
    whole, chosen = method("int4"), [*near, *far]

    def keep() -> None:
        if args.json:
            write_json(Path(args.json), report(bench), indent=1)

    bench.keep = keep
    run = dict(
        steps=lambda: steps(bench, [whole, *chosen], args.cases),
        hits=lambda: hits(bench, far, args.cases, args.hits),
        prefill=lambda: prefill(bench, [method("dynamic"), whole, *chosen], args.length),
        batch=lambda: largest_batch(bench, [whole, *(far or near)], args.length, args.gpu_gb * 1e9),
        curve=lambda: curve(bench, [whole, *near], args.batches, args.lengths),
    )
    for part in args.parts:
        started = time.perf_counter()
        run[part]()
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
        keep()
    return report(bench)


if __name__ == "__main__":
    raise SystemExit(main())
