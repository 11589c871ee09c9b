"""The life of tokens: every step of a cache in fixed and random traces, and the logits of one layer."""

import contextlib
from dataclasses import replace

import torch

import fade_fast
from fade_fast.cache import reads
from fade_fast.hf.models import CACHE_NAME
from fade_fast.kernels import packed, rotated
from fade_fast.policies import plan
from fade_ref.attention import Terms
from fade_ref.config import INDEXES, PRESETS, RESIDENT_POLICIES, FadeConfig
from fade_ref.tiers import INTEGER_TIERS

from .. import cases as measure
from ..case import Case, Draw, Found
from ..tolerances import ATTENTION, strain
from .logits import logits

SMALL = dict(recent_window=8, block_size=4)
CONFIGS = {
    "int4": FadeConfig(**SMALL),
    "evict": FadeConfig(**SMALL, int4_budget=10),
    "evict, original positions": FadeConfig(**SMALL, int4_budget=10, positions="original"),
    "int4, int2, evict": FadeConfig(**SMALL, int4_budget=10, int2_budget=6),
    "int4, int2": FadeConfig(**SMALL, int4_budget=10, int2_budget=None),
    "before RoPE": FadeConfig(**SMALL, positions="contiguous"),
    "no sinks": FadeConfig(**SMALL, n_sink=0, int4_budget=7),
    "no recent window": FadeConfig(n_sink=2, recent_window=0, block_size=3, int4_budget=9),
    "budget 0": FadeConfig(**SMALL, int4_budget=0),
    "off": FadeConfig(recent_window=None),
}
WIDTHS = {
    f"k{k}v{v}": FadeConfig(**SMALL, middle_k_bits=k, middle_v_bits=v)
    for k in INTEGER_TIERS
    for v in INTEGER_TIERS
}
WIDTHS |= {
    f"k{k}v16{name}": FadeConfig(**SMALL, middle_k_bits=k, middle_v_bits=16, **more)
    for k in INTEGER_TIERS
    for name, more in {"": {}, ", evict": dict(int4_budget=8, int2_budget=5)}.items()
}
WIDTHS["a layer with widths of its own"] = FadeConfig(**SMALL, layer_bits={0: (3, 8)})
WIDTHS["a layer that is not compressed"] = FadeConfig(**SMALL, int4_budget=8, layer_bits={0: (16, 16)})
#: Matrices of the matched codec come from `cases.calibrated`.
MATCHED = {
    "matched": FadeConfig(**SMALL, quant_backend="matched"),
    "matched, k2v3": FadeConfig(**SMALL, quant_backend="matched", middle_k_bits=2, middle_v_bits=3),
    "matched, keys alone": FadeConfig(**SMALL, quant_backend="matched", middle_k_bits=8, middle_v_bits=16),
    "matched, evict": FadeConfig(**SMALL, quant_backend="matched", int4_budget=10),
    "matched, int4, int2": FadeConfig(**SMALL, quant_backend="matched", int4_budget=10, int2_budget=None),
    "matched, original positions": FadeConfig(
        **SMALL, quant_backend="matched", int4_budget=10, int2_budget=6, positions="original"
    ),
}
CHOOSING = dict(recent_window=8, block_size=8, select=8)
#: Every token is kept, and a query reads some pages.
CHOSEN = {
    "a page": FadeConfig(**CHOOSING),
    "three pages": FadeConfig(**CHOOSING | dict(select=24)),
    "a share": FadeConfig(**CHOOSING | dict(select=0.7, select_max=24)),
    "a small share": FadeConfig(**CHOOSING | dict(select=0.2)),
    "pages of 16": FadeConfig(**CHOOSING | dict(select=16, select_page=16, block_size=16)),
    "values of 2 bits": FadeConfig(**CHOOSING, middle_v_bits=2),
    "values of 16 bits": FadeConfig(**CHOOSING, middle_v_bits=16),
    "no sinks, no recent window": FadeConfig(n_sink=0, recent_window=0, block_size=8, select=16),
    "matched": FadeConfig(**CHOOSING, quant_backend="matched"),
    "host": FadeConfig(**CHOOSING | dict(select=16, cold="host", resident=24)),
    "matched, a share": FadeConfig(**CHOOSING | dict(select=0.5), quant_backend="matched"),
}
CHOSEN |= {
    f"index {index}": FadeConfig(**CHOOSING, index=index, **more)
    for index, more in {
        "k1": dict(cold="host"),
        "bounds": {},
        "deviation": dict(cold="host"),
        "bounds+k2": {},
        "deviation+k2": dict(cold="host"),
    }.items()
}
CHOSEN |= {
    "index k1, matched": FadeConfig(**CHOOSING, index="k1", quant_backend="matched"),
    "index deviation, matched, a share": FadeConfig(
        **CHOOSING | dict(select=0.6), index="deviation", quant_backend="matched"
    ),
}
#: Configurations whose live tokens have gaps between them.
GAPS = {
    "key norm": FadeConfig(**SMALL, int4_budget=10, eviction_policy="knorm"),
    "key norm, original positions": FadeConfig(
        **SMALL, int4_budget=10, eviction_policy="knorm", positions="original"
    ),
    "attention": FadeConfig(**SMALL, int4_budget=7, int2_budget=6, eviction_policy="h2o"),
}
STEPS = [14] + [1] * 13 + [20, 5, ("crop", 3), 1, 1, ("reorder", [1, 0]), 6, 1, ("crop", 2), 1, 1]
ROWS = [
    20,
    1,
    ("repeat", 2),
    1,
    1,
    ("select", [3, 0, 2]),
    1,
    18,
    1,
    4,
    ("select", [1]),
    1,
    1,
    ("repeat", 3),
    1,
    1,
]
TERMS = {
    "softcap": dict(softcap=3.0),
    "window": dict(window=13),
    "learned sinks": dict(s_aux=torch.linspace(-1, 2, 6, dtype=torch.float64)),
    "all": dict(softcap=5.0, window=17, s_aux=torch.linspace(-1, 2, 6, dtype=torch.float64)),
}
#: Steps of several blocks, over tiers that are read in several parts.
LONG = {
    "whole": {},
    "padding": dict(padding=(0, 7)),
    "padding in a long step": dict(padding=(0, 0)),
    "padding, bfloat16": dict(padding=(0, 7), shape=dict(dtype=torch.bfloat16)),
    "window": dict(terms=TERMS["window"]),
    "learned sinks": dict(terms=TERMS["learned sinks"]),
    "softcap": dict(terms=TERMS["softcap"]),
    "all terms, padding": dict(terms=TERMS["all"], padding=(0, 7)),
    "float32": dict(shape=dict(dtype=torch.float32)),
    "window, padding, float32": dict(terms=TERMS["window"], padding=(0, 7), shape=dict(dtype=torch.float32)),
    "bfloat16": dict(shape=dict(dtype=torch.bfloat16)),
}
RANDOM, CHOSEN_RANDOM = 24, 12  # random traces
#: The cases that run compiled on a GPU by default.
COMPILED = ("int4", "evict, padding (0, 11)", "D128 G7 float16", "D80 G4 bfloat16", "logits int4, bfloat16")


def collect() -> list[Case]:
    found = []
    tokens = (
        "tier FP16",
        "tier EVICTED",
        "plan scope sequence",
        "positions original",
        "positions contiguous",
    )
    for name, config in CONFIGS.items():
        for padding in ((), (0, 11), (3, 6)):
            title = f"{name}, padding {padding}" if padding else name
            marked = title in COMPILED
            found.append(
                Case("life", "of tokens", title, _trace(config, padding=padding), tokens, compiled=marked)
            )
    for name, config in WIDTHS.items():
        tiers = {INTEGER_TIERS[b] for b in (config.middle_k_bits, config.middle_v_bits) if b in INTEGER_TIERS}
        covers = tuple(f"tier {tier.name}" for tier in tiers)
        found.append(Case("life", "widths", name, _trace(config, [30, 1, 1, 18, 3, 1, 1]), covers))
    for name, config in MATCHED.items():
        for padding in ((), (0, 7)):
            where = f"{name}, padded" if padding else name
            found.append(Case("life", "matched", where, _trace(config, padding=padding), ("codec matched",)))
    found += _choosing()
    for name, terms in TERMS.items():
        for config in ("int4", "evict", "int4, int2, evict", "off"):
            run = _trace(CONFIGS[config], terms=terms)
            found.append(Case("life", "what models ask", f"{name}, {config}", run))
    for name, config in GAPS.items():  # the content of a window depends on the way distances are counted
        for terms in ("window", "all"):
            run = _trace(config, terms=TERMS[terms], padding=(0, 3))
            found.append(Case("life", "what models ask", f"{terms}, survivors by {name}", run))
    for config in ("int4", "off"):
        run = _trace(CONFIGS[config], [9] + [1] * 8 + [5, 1, 20, 1], terms=TERMS["window"])
        found.append(Case("life", "what models ask", f"window, {config}, a text that outgrows it", run))
    for name in ("int4", "int4, int2", "evict", "before RoPE", "off"):
        for title, options in LONG.items():
            dtype = options.get("shape", {}).get("dtype", torch.float64)
            run = _in_tiles(_trace(CONFIGS[name], [24, 1, 33, 1, 40, 3, 1], **options))
            found.append(Case("life", "long steps", f"{name}, {title}", run, dtype=dtype))
    for dtype in ATTENTION:
        for dim, group in ((80, 4), (128, 7), (256, 1)):
            shape = dict(head_dim=dim, group=group, heads=1, dtype=dtype)
            run = _trace(CONFIGS["int4, int2, evict"], [30, 1, 1, 1, 1, 18, 3, 1], shape=shape)
            title = f"D{dim} G{group} {dtype}".replace("torch.", "")
            found.append(
                Case("life", "shapes and dtypes", title, run, dtype=dtype, compiled=title in COMPILED)
            )
    for name in PRESETS:
        config = FadeConfig.preset(name)
        prompt = 700 if config.select else 150  # more than a query reads
        run = _trace(config, [prompt, 1, 90, ("crop", 1), 1], shape=dict(heads=1, group=2))
        found.append(Case("life", "presets", name, run, (f"preset {name}",)))
    for policy in plan.SUPPORTED:
        for budgets in (
            dict(int4_budget=10),
            dict(int4_budget=7, int2_budget=6),
            dict(int2_budget=9, int4_budget=0),
        ):
            run = _trace(FadeConfig(**SMALL, **budgets, eviction_policy=policy))
            title = f"{policy}, " + ", ".join(f"{k} {v}" for k, v in budgets.items())
            found.append(Case("life", "policies", title, run, (f"policy {policy}",)))
        config = FadeConfig(**SMALL, int4_budget=7, int2_budget=6, eviction_policy=policy)
        run = _trace(config, ROWS, padding=(0, 7))
        found.append(Case("life", "rows that come and go", policy, run, (f"policy {policy}",)))
    shared = FadeConfig(**SMALL, int4_budget=20, int2_budget=9, plan_scope="layer")
    run = _trace(shared, padding=(0, 11))
    found.append(Case("life", "policies", "one plan for a layer", run, ("plan scope layer",)))
    for i in range(RANDOM):
        found.append(Case("life", "random traces", f"{i}", _random))
    for name in ("int4", "evict", "off"):
        for dtype in ATTENTION:
            title = f"{name}, {dtype}".replace("torch.", "")
            run = _logits(CONFIGS[name], dtype)
            found.append(
                Case("life", "logits", title, run, dtype=dtype, compiled=f"logits {title}" in COMPILED)
            )
    found.append(Case("life", "crop", "beyond the recent region", _crop_refused(FadeConfig(**SMALL))))
    found.append(Case("life", "crop", "nothing is left of the middle", _crop_refused(CONFIGS["budget 0"])))
    run = _trace(FadeConfig(**SMALL, n_sink=0), [30, ("crop", 10), 20])
    found.append(Case("life", "crop", "all that is uncompressed, then a long step", run))
    return found


def _choosing() -> list[Case]:
    """Cases in which queries choose what they read."""
    found = []

    def case(name, config, steps=STEPS, covers=(), **options):
        found.append(Case("life", "choosing", name, _trace(config, steps, **options), covers))

    for name, config in CHOSEN.items():
        for padding in ((), (0, 11)):
            codec = (f"codec {config.quant_backend}",)
            case(f"{name}, padding {padding}" if padding else name, config, covers=codec, padding=padding)
    for name, terms in TERMS.items():
        case(name, CHOSEN["a page"], terms=terms)
    for index in ("bounds+k2", "deviation+k2"):  # a shortlist of two blocks of several pages
        config = FadeConfig(recent_window=8, block_size=16, select=8, index=index)
        case(f"blocks, index {index}", config, [110, 1, 1, 5, 1, 18, 1], padding=(0, 30))
    case("rows that come and go", CHOSEN["three pages"], [28, *ROWS[1:]], padding=(0, 7))
    for dim, group in ((80, 4), (128, 8), (256, 1)):
        for dtype in ATTENTION:
            shape = dict(head_dim=dim, group=group, heads=2, dtype=dtype)
            name = f"D{dim} G{group} {dtype}".replace("torch.", "")
            case(name, CHOSEN["a page"], [40, 1, 1, 5, 1, 18, 1], shape=shape)
    found += [Case("life", "choosing", f"random trace {i}", _random_choices) for i in range(CHOSEN_RANDOM)]
    found.append(
        Case("life", "choosing", "in tiles", _in_tiles(_trace(CHOSEN["three pages"], [60, 1, 33, 1, 3])))
    )
    return found


def _trace(config, steps=STEPS, *, padding=(), terms=None, shape=None):
    def run(found: Found, seed: int):
        sizes = measure.Shape(**(shape or {}), device=found.device)
        asked = Terms(sizes.head_dim**-0.5, **terms) if terms else None
        holes = {2: 1, 14: 4} if padding else {}
        walk(found, config, sizes, steps, padding=padding, holes=holes, terms=asked, seed=seed)

    return run


def _in_tiles(run):
    def inside(found: Found, seed: int):
        with tiles(7, 9, 12, 10):
            run(found, seed)

    return inside


def walk(found: Found, config, shape, steps, **options) -> None:
    """Run a trace, and check the results of each step."""
    # The product of the norms of queries and keys. Keys have an offset of up to 4 in each channel.
    score = (shape.head_dim * (1 + 4**2 / 3)) ** 0.5
    extra, fewer = strain(shape.dtype, score, fused=True) if found.fused else 0.0, 0
    lowest = 2 if config.int2_budget != 0 else min(config.bits(0, 1))
    searches = config.quant_backend == "matched" and lowest < 4
    stored = "stored, searched" if searches else "stored"
    for i, step in enumerate(measure.trace(config, shape, steps, **options)):
        where = f"step {i}: {steps[i]}"
        found.near("attention", step.output_error, where, dtype=shape.dtype, strain=extra)
        if step.chosen:
            ours, exact, every = step.chosen
            found.holds("tokens read", ours == exact, f"{where}: {ours} instead of {exact}")
            found.bits("tokens read", ours)
            fewer += ours < every
        found.near("received", step.score_error, where)
        found.near(stored, step.stored_error, where)
        found.holds("tokens", step.same_tokens, where)
        found.bits("tokens", step.state)
        found.holds("moved records", step.same_records, where)
        found.holds("lengths", step.same_lengths, where)
    if config.select is not None:
        found.holds("tokens read", fewer > 0, "no query read fewer tokens than there were")


@contextlib.contextmanager
def tiles(tile: int, rows: int, eager: int, encoded: int):
    """Use short tiles, so that small inputs need several tiles."""
    places = ((reads, "TILE"), (reads, "ROWS"), (packed, "EAGER_TILE"), (rotated, "TILE"))
    places += ((reads, "FLASH_TILE"), (reads, "FLASH_ROWS"), (reads, "MASKED_TILE"), (reads, "MASKED_ROWS"))
    before = [getattr(module, name) for module, name in places]
    try:
        for (module, name), value in zip(places, (tile, rows, eager, encoded, tile, rows, tile, rows)):
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in zip(places, before):
            setattr(module, name, value)


def _random_choices(found: Found, seed: int):
    """A random trace in which queries choose what they read."""
    draw = Draw(seed)
    budget = draw.pick([8, 16, 40, 0.3, 0.9])
    fields = dict(middle_v_bits=draw.pick([16, *INTEGER_TIERS]), block_size=draw.pick([8, 16]), select=budget)
    fields["index"] = draw.pick(INDEXES)
    if draw.chance(0.7, 1).item():
        fields["cold"] = "host"
        if "+" not in fields["index"]:
            fields["eviction_policy"] = draw.pick(RESIDENT_POLICIES)
    if isinstance(budget, float):
        fields["select_max"] = draw.pick([16, 48])
    _random(found, seed, chosen=fields)


def _random(found: Found, seed: int, chosen: dict | None = None):
    """A random configuration and random steps: lengths near boundaries, crops, reordered rows, padding."""
    draw = Draw(seed)
    moves = draw.chance(0.7, 1).item()
    int4 = draw.pick([0, 1, 6, 15, 40]) if moves else None
    config = FadeConfig(
        n_sink=draw.one(0, 6),
        recent_window=draw.pick([0, 1, 7, 16]),
        block_size=draw.pick([1, 3, 8, 16]),
        int4_budget=int4,
        int2_budget=draw.pick([0, 0, 5, 20, None]) if moves else 0,
        middle_k_bits=draw.pick(INTEGER_TIERS),
        middle_v_bits=draw.pick(INTEGER_TIERS),
        positions=draw.pick([None, "original", "contiguous"]),
    )
    shape = measure.Shape(
        batch=draw.one(1, 4), heads=draw.one(1, 3), group=draw.pick([1, 2, 3, 5]), device=found.device
    )
    if chosen:
        recent = draw.pick([0, 7, 16])
        config = FadeConfig(n_sink=config.n_sink, recent_window=recent, **chosen)
        shape = replace(shape, dtype=torch.float64)
    # Enough tokens that queries choose.
    steps, rows = [draw.one(100, 140) if chosen else draw.one(1, 50)], shape.batch
    for _ in range(12):
        kinds = ["decode", "decode", "draft", "long", "crop", "reorder", "select"]
        kind = draw.pick([*kinds, "decode", "copy", "file"] if chosen else kinds)
        steps += {
            "decode": [1] * draw.one(1, 4),
            "draft": [draw.one(2, 17)],
            "long": [draw.one(17, 45)],
            # Without sinks, a crop may leave only the middle. A separate case tests this.
            "crop": [("crop", draw.one(1, 9))] if config.n_sink or not config.compresses else [1],
            "reorder": [("reorder", draw.integers(0, rows, rows).tolist())],
            "select": [("select", draw.integers(0, rows, draw.one(1, rows + 2)).tolist())],
            "copy": [("copy",)],
            "file": [("file",)],
        }[kind]
        rows = len(steps[-1][1]) if kind == "select" else rows
    steps += [1] if chosen else []
    padded = draw.chance(0.6, 1).item()
    padding = tuple(draw.integers(0, steps[0], shape.batch).tolist()) if padded else ()
    holes = {}
    for i, n in enumerate(steps):
        if padded and i and isinstance(n, int) and draw.chance(0.2, 1).item():
            holes[i] = draw.one(0, n + 1)
    found.bits("lengths", (config, shape.batch, steps, padding, holes))
    with tiles(draw.pick([7, 16, 2048]), draw.pick([5, 512]), draw.pick([12, 2048]), draw.pick([10, 2048])):
        walk(found, config, shape, steps, padding=padding, holes=holes, seed=seed % 2**31)


def _crop_refused(config):
    """Tokens that have left the recent region cannot be cropped. Their tier does not matter."""

    def run(found: Found, seed: int):
        shape = measure.Shape(heads=1, group=1, device=found.device)
        model = measure._model(shape).to(found.device)
        cache = fade_fast.create_cache(model, config, verify=False)
        ids = Draw(seed).integers(0, 16, 2, 40).to(found.device)
        model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True)
        recent = cache.tiered[0].recent
        found.refused(lambda: cache.crop(-recent - 1), f"crop(-{recent + 1})", f"newest {recent}")
        found.holds("lengths", cache.get_seq_length() == 40, "unchanged by what was refused")

    return run


def _logits(config, dtype):
    def run(found: Found, seed: int):
        for where, error in logits(config, dtype, found.device, seed):
            found.near("logits", error, where, dtype=dtype)

    return run
