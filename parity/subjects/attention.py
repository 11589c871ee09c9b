"""Attention over tiers: the operator of a short step, one tier, and the arithmetic of the compiled version.

Codes are random bytes, the same for both packages. Empty slots contain NaN and infinities.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fade_fast.kernels import decode, dense, merge, packed, rotated
from fade_fast.kernels.packed import TierView
from fade_ref import attention as spec
from fade_ref.rope import Rope, rotate
from fade_ref.rotation import Record, RotatedCodec, qr_rotation
from fade_ref.tiers import INTEGER_TIERS

from ..case import Case, Draw, Found, relative_error
from ..tolerances import ATTENTION, floor, strain

DIMS, GROUPS, QUERIES = (64, 80, 96, 128, 256), (1, 3, 4, 8), (1, 5, 16)
ONE = 1 << 30  # slots per mean if all slots share one mean
SPARE = 64  # slots after the last slot that the compiled version reads, as in the cache
SPREAD = {8: 0.02, 4: 0.3, 3: 1.0, 2: 1.0}  # factor of scales: decoded numbers then have the same size


@dataclass(frozen=True)
class Problem:
    """The shapes and options of one call of `decode.attend`.

    `lengths` and `bits` have one entry per tier. After each tier there are `spare` slots. The kernel reads
    `beyond` of them.
    """

    dim: int = 64
    group: int = 4
    new: int = 1
    bits: tuple[tuple[int, int], ...] = ((4, 4),)
    lengths: tuple[int, ...] = (37,)
    dense: int = 5
    batch: int = 2
    heads: int = 2
    dtype: torch.dtype = torch.float32
    per_mean: int = 16
    holes: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    rope: str | None = None  # "halves" or "pairs", if keys were encoded before RoPE
    blind: bool = False  # the first query of row 0 sees no key
    alone: bool = False  # no query sees an uncompressed token
    spare: int = 0
    beyond: int = 0
    fused: bool = False  # for compiled versions, which read complete chunks of a larger buffer
    mass: bool = False
    stress: str | None = None


#: Features that a mask or a model may need.
FEATURES = {
    "plain": {},
    "holes": dict(holes=0.3, spare=9, beyond=4, mass=True),
    "window": dict(window=11, holes=0.1),
    "softcap": dict(softcap=2.0),
    "learned sinks": dict(sinks=True),
    "blind rows": dict(blind=True, holes=0.1),
    "tiers alone": dict(alone=True, lengths=(37, 20), holes=0.1),
    "before RoPE": dict(rope="halves", per_mean=ONE, holes=0.1),
    "before RoPE, pairs": dict(rope="pairs", per_mean=ONE, window=11),
    "two tiers": dict(lengths=(37, 20), holes=0.2, mass=True),
    "everything": dict(lengths=(37, 20), holes=0.2, window=19, softcap=5.0, sinks=True, mass=True),
}
#: Features that run compiled for all bits, by dtype. Features with the same kernel as "plain" cost little.
COMPILED = {
    "float16": ("plain", "holes", "window", "blind rows", "before RoPE", "everything"),
    "bfloat16": ("everything",),
}
#: (head_dim, query heads per KV head, query length) of two-byte dtypes, with other options of the kernel.
COMPILED_SHAPES = {
    (64, 1, 1): dict(holes=0.2, lengths=(300,)),
    (80, 3, 5): dict(holes=0.2, softcap=5.0, mass=True),
    (96, 8, 4): dict(window=11, sinks=True),
    (128, 2, 16): dict(rope="pairs", per_mean=ONE, holes=0.1),
    (256, 4, 16): dict(holes=0.2, mass=True),
}
STRESS = ("large offset", "hot channel", "denormals", "fp16 extremes", "ties everywhere", "one token")
BORDERS = (1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 2047, 2048, 2049)


def collect() -> list[Case]:
    cases = []

    def case(group, name, problems, covers=(), dtype=torch.float32, run=_attend, compiled=False):
        def all_of_them(f: Found, seed: int):
            for where, problem in problems:
                run(f, replace(problem, dtype=dtype), seed, where)

        cases.append(Case("attention", group, name, all_of_them, covers, dtype, compiled=compiled))

    shapes = list(itertools.product(GROUPS, QUERIES))
    for bits, tier in INTEGER_TIERS.items():
        covers = (f"tier {tier.name}",)
        for (name, options), dim in itertools.product(FEATURES.items(), DIMS):
            each = [
                (f"G{g} q{q}", Problem(dim, g, q, **{"lengths": (37,), **options}, dense=q + 4))
                for g, q in shapes
            ]
            each = [(w, replace(p, bits=((bits, bits), (2, 2))[: len(p.lengths)])) for w, p in each]
            case(f"step, {bits} bits", f"D{dim} {name}", each, covers)
        for dtype in ATTENTION:
            if dtype != torch.float32:
                for name, options in FEATURES.items():
                    p = Problem(128, 4, **{"lengths": (37,), **options}, dense=12, dtype=dtype)
                    p = replace(p, bits=((bits, bits), (2, 2))[: len(p.lengths)])
                    short = str(dtype).removeprefix("torch.")
                    marked = (bits, short) == (4, "float16") or name in COMPILED.get(short, ())
                    case(f"step, {short}", f"{bits} bits {name}", [("", p)], covers, dtype, compiled=marked)
        for i, (shape, options) in enumerate(COMPILED_SHAPES.items()):
            dim, group, new = shape
            p = Problem(dim, group, new, **{"lengths": (37,), **options}, dense=new + 4)
            p = replace(p, bits=((bits, bits), (2, 2))[: len(p.lengths)])
            marked = (i + bits) % 2 == 0 or bits == 4
            title = f"{bits} bits D{dim} G{group} q{new}"
            case("step, shapes in float16", title, [("", p)], covers, torch.float16, compiled=marked)
        for name in STRESS:
            p = Problem(stress=name, bits=((bits, bits),), lengths=(70,), new=3, dense=7)
            each = [("", p), ("before RoPE", replace(p, rope="halves", per_mean=ONE))]
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                short = str(dtype).removeprefix("torch.")
                title, marked = f"{bits} bits {name} {short}", short == "float16"
                case("step, hostile", title, each, covers, dtype, compiled=marked)
        each = [
            (f"n{n}", Problem(heads=1, group=2, bits=((bits, bits),), lengths=(n,), spare=n % 3, batch=1))
            for n in BORDERS
        ]
        case("step, lengths around borders", f"{bits} bits", each, covers)
        p = Problem(bits=((bits, bits),), lengths=(256,), holes=0.2, per_mean=64)
        for chunk in (32, 64, 256):
            each = [
                (w, q)
                for w, q in {
                    "": p,
                    "one mean": replace(p, per_mean=ONE),
                    "means of 48": replace(p, per_mean=48),
                    "RoPE": replace(p, rope="pairs", per_mean=ONE),
                    "softcap": replace(p, softcap=3.0, dim=80),
                }.items()
            ]
            for dtype in (torch.float32, torch.float64):
                run = _chunks(chunk)
                case(
                    "chunks",
                    f"{bits} bits, chunks of {chunk}, {dtype}".replace("torch.", ""),
                    each,
                    covers,
                    dtype,
                    run,
                )
        tiles = [
            ("", replace(p, lengths=(n,), dim=d)) for n, d in ((150, 64), (97, 80), (48, 128), (49, 256))
        ]
        tiles += [("RoPE", replace(p, rope="halves", per_mean=ONE, lengths=(150,)))]
        case("tiles", f"{bits} bits", tiles, covers, run=_tiles)
        # Sums of three-bit values overflow float16. A compiled kernel keeps them in float32.
        widths = (bits, 4 if bits == 3 else bits)
        p = Problem(bits=(widths,), lengths=(256,), dim=64, per_mean=64, mass=True, holes=0.1)
        wide = replace(p, dim=128, softcap=8.0, new=3, dense=9, sinks=True)
        each = [("", p), ("G1", replace(p, group=1)), ("wide", wide)]
        each += [("RoPE", replace(p, rope="halves", per_mean=ONE))]
        case("twin, run eagerly", f"{bits} bits", each, covers, torch.float16, _twin)
    for key, value in itertools.permutations(INTEGER_TIERS, 2):
        covers = (f"tier {INTEGER_TIERS[key].name}", f"tier {INTEGER_TIERS[value].name}")
        each = [(f"D{d}", Problem(d, bits=((key, value),), holes=0.1, mass=True)) for d in DIMS]
        case("step, keys and values of two widths", f"{key} and {value} bits", each, covers)
        title, marked = f"{key} and {value} bits, float16", key == 2 * value
        case("step, keys and values of two widths", title, each[:1], covers, torch.float16, compiled=marked)
    each = [(f"q{q}", Problem(bits=(), lengths=(), new=q, dense=q + 9, mass=True)) for q in range(1, 17)]
    case("step, no tier", "q1 to q16", each)
    for (dim, group), dtype in itertools.product(((64, 3), (80, 1), (128, 4)), ATTENTION):
        short = str(dtype).removeprefix("torch.")
        marked = dim == 128 and dtype.itemsize == 2
        run = _long(dim, group, dtype)
        title = f"D{dim} G{group} {short}"
        cases.append(Case("attention", "many uncompressed", title, run, (), dtype, compiled=marked))
    for name in ("partials", "of no keys", "far apart", "any grouping"):
        cases.append(Case("attention", "merge", name, _merge(name)))
    return cases


# -- one problem for both packages


@dataclass
class Posed:
    """Arguments of `decode.attend`, and the result of the specification."""

    args: tuple
    options: dict
    output: Tensor  # [B, q, Hq, D]
    mass: list[Tensor]  # [B, H, n] for the uncompressed tokens and for each tier
    strain: float
    parts: list[list[spec.Partial]]  # one per batch row and tier


def pose(p: Problem, seed: int, device: str = "cpu") -> Posed:
    """Draw random numbers for a problem, and compute the result of the specification."""
    slots_read = [n + min(p.beyond, p.spare) for n in p.lengths]
    if p.fused:
        slots_read = [packed.whole(p.batch * p.heads, n) for n in p.lengths]
    spare = [(num_read - n + SPARE) if p.fused else p.spare for n, num_read in zip(p.lengths, slots_read)]
    draw, total = Draw(seed), sum(p.lengths) + p.dense
    first = 50_000 if p.rope else 0  # large angles
    order = torch.stack([torch.randperm(sum(p.lengths), generator=draw.generator) for _ in range(p.batch)])
    newest = torch.arange(sum(p.lengths), total).expand(p.batch, -1)
    position = torch.cat((order, newest), dim=1) + first
    padded = draw.chance(p.holes, p.batch, total)
    padded[:, -p.new :] = False
    position = position.masked_fill(padded, -1)
    at = position[:, total - p.new :].clone()
    if p.blind:
        at[0, 0] = -1
    if p.alone:
        position[:, sum(p.lengths) :] = -1
    terms = spec.Terms(p.dim**-0.5, p.softcap, p.window)
    query = draw.normal(p.batch, p.heads * p.group, p.new, p.dim)
    keys, values = (draw.normal(p.batch, p.heads, p.dense, p.dim) for _ in "kv")
    if p.stress == "hot channel":
        query[..., 5] *= 10
        keys[..., 5] = 20
    if p.stress == "denormals":
        keys, values = keys * 2.0**-140, values * 2.0**-20
    if p.stress == "fp16 extremes":
        values = values.sign() * (65280.0 if p.dtype == torch.bfloat16 else 65504.0)  # both fit in fp16
    if p.stress == "ties everywhere":
        keys = keys[:, :, :1].expand_as(keys).clone()
    query, keys, values = (x.to(p.dtype) for x in (query, keys, values))
    s_aux = (draw.normal(p.heads * p.group) * 2).to(p.dtype) if p.sinks else None
    terms = terms._replace(s_aux=None if s_aux is None else s_aux.double())
    seen = torch.stack([spec.visible(*x, p.window) for x in zip(at, position)])  # [B, q, total]
    frequencies = 10_000.0 ** (-torch.arange(0, p.dim // 2, 2, dtype=torch.float32) / p.dim)
    rope = Rope(frequencies.double(), interleaved=p.rope == "pairs")
    matrix = qr_rotation(p.dim)

    decoded = [[], []]  # keys, values of each tier
    parts, tiers, start = [[] for _ in range(p.batch)], [], 0
    for length, widths, free in zip(p.lengths, p.bits, spare):
        tier_slots = slice(start, start + length)
        codec = tuple(RotatedCodec(b, p.dim, matrix) for b in widths)
        sides = [_side(draw, p, b, length) for b in widths]
        count = 1 if p.per_mean == ONE else -(-(length + free) // p.per_mean)
        means = (draw.normal(p.batch, p.heads, count, p.dim) * 0.5).half()
        if p.stress == "large offset":
            means = means + 40
        if p.stress == "ties everywhere":
            means = means[:, :, :1].expand_as(means).clone()
        mean = means.double()[:, :, torch.arange(length) // p.per_mean]
        k = codec[0].decode(sides[0], mean)
        v = codec[1].decode(sides[1])
        if p.rope:
            k = rotate(k, position[:, None, tier_slots].expand(-1, p.heads, -1), rope)
        for b in range(p.batch):
            records = [Record(*(None if x is None else x[b] for x in side)) for side in sides]
            if p.rope:
                part = spec.over_tensors(query[b].double(), k[b], v[b], at[b], position[b, tier_slots], terms)
            else:
                part = spec.over_codes(
                    query[b].double(), *records, mean[b], codec, at[b], position[b, tier_slots], terms
                )
            parts[b].append(part)
        decoded[0].append(k)
        decoded[1].append(v)
        tiers.append(_slots(p, sides, means, position[:, tier_slots], seen[:, :, tier_slots], free))
        start += length
    exact_slots = slice(start, total)
    output, mass, size = [], [], 0.0
    all_keys, all_values = (torch.cat((*d, x.double()), dim=2) for d, x in zip(decoded, (keys, values)))
    size = float(query.double().norm(dim=-1).max() * all_keys.norm(dim=-1).max() * terms.scaling)
    for b in range(p.batch):
        q = query[b].double()
        part = spec.over_tensors(
            q, keys[b].double(), values[b].double(), at[b], position[b, exact_slots], terms
        )
        sink = [] if s_aux is None else [spec.sink(terms.s_aux, q.shape)]
        output.append(spec.merge([part, *parts[b], *sink]))
        if p.mass:
            one = torch.eye(total, dtype=torch.float64).expand(p.heads, -1, -1)
            each = spec.over_tensors(q, all_keys[b], one, at[b], position[b], terms)
            sink = [] if s_aux is None else [spec.sink(terms.s_aux, each.acc.shape)]
            mass.append(spec.merge([each, *sink]).unflatten(0, (p.heads, -1)).sum((1, 2)))
    mass = [torch.stack(mass).split([*p.lengths, p.dense], dim=-1)] if mass else [[]]
    mass = [mass[0][-1], *mass[0][:-1]] if mass[0] else []

    seen_exact = seen[:, :, exact_slots]
    blind = ~seen_exact.any(1)[:, None, :, None]
    keys, values = keys.masked_fill(blind, torch.nan), values.masked_fill(blind, torch.inf)
    there = lambda x: None if x is None else x.to(device)  # noqa: E731
    table = rotated.with_sum(rotated.rotation(p.dim)).float()
    tiers = [decode._from_list([there(x) for x in decode._to_list(slots)], slots.per_mean) for slots in tiers]
    args = (*map(there, (query, keys, values, seen_exact, table)), tiers)
    options = dict(bits=list(p.bits), slots_read=slots_read)
    options |= dict(scaling=terms.scaling, softcap=p.softcap, s_aux=there(s_aux))
    if p.rope:
        options |= dict(inv_freq=there(frequencies), interleaved=rope.interleaved)
    output = torch.stack(output).transpose(1, 2)
    limit = strain(p.dtype, size, fused=p.fused)
    limit += floor(torch.float16 if p.fused else p.dtype, output)
    return Posed(args, options, output, mass, limit, parts)


def _side(draw: Draw, p: Problem, bits: int, length: int) -> Record:
    """Random codes of keys or values, with scales and zero points that fp16 can represent."""
    codes = draw.integers(0, 256, p.batch, p.heads, length, p.dim * bits // 8).to(torch.uint8)
    scale = (0.5 + draw.uniform(p.batch, p.heads, length)) * SPREAD[bits]
    zero = -scale * rotated.center(bits) + 0.1 * draw.normal(p.batch, p.heads, length)
    if p.stress == "denormals":
        scale, zero = scale * 2.0**-20, zero * 2.0**-20
    if p.stress == "fp16 extremes":
        scale[..., ::2] *= 30.0
        zero[..., ::2] *= 30.0
    if p.stress == "ties everywhere":
        codes, scale, zero = (x[:, :, :1].expand_as(x).clone() for x in (codes, scale, zero))
    zero = zero.half().double() if rotated.is_uniform(bits) else None
    return Record(codes, scale.half().double(), zero)


def _slots(
    p: Problem, sides: list[Record], means: Tensor, position: Tensor, seen: Tensor, free: int
) -> TierView:
    """The records in buffers of fade_fast. A slot that no query sees contains NaN and infinities."""
    pad = lambda x, value: torch.nn.functional.pad(x, (0, free), value=value)  # noqa: E731
    valid = pad(seen, False)
    unseen = ~valid.any(1, keepdim=True)
    out = []
    for side, tokens_last in zip(sides, (False, True)):
        codes = pad(side.codes.mT, 255)
        scale = pad(side.scale, 0.0).masked_fill(unseen, torch.nan).half()
        zero = None if side.zero is None else pad(side.zero, 0.0).masked_fill(unseen, torch.inf).half()
        out.append(rotated.Packed((codes if tokens_last else codes.mT).contiguous(), scale, zero))
    bound = pad(sides[1].scale, 0.0).amax(-1).float().clamp_min(rotated.SMALLEST_SCALE)
    read_at = pad(position, -1)[:, None].to(torch.int32) if p.rope else None
    return TierView(*out, bound, means, valid, p.per_mean, read_at)


# -- comparisons


def _attend(found: Found, p: Problem, seed: int, where: str) -> None:
    # The same condition as in `decode.attend`.
    p = replace(p, fused=found.fused and p.dtype.itemsize == 2 and p.group * p.new <= decode.MOST_ROWS)
    posed = pose(p, seed, found.device)
    lengths = [p.dense, *(slots.valid.shape[-1] for slots in posed.args[5])]
    wide = torch.promote_types(p.dtype, torch.float32)
    mass = [torch.full((p.batch, p.heads, n), torch.nan, dtype=wide, device=found.device) for n in lengths]
    mass = mass if p.mass else []
    out = decode.attend(*posed.args, **posed.options, mass=mass)
    found.near("attention", relative_error(out, posed.output), where, dtype=p.dtype, strain=posed.strain)
    if p.blind and not p.sinks:
        found.same("empty rows", out[0, 0], torch.zeros_like(out[0, 0]), where)
    if mass:
        ours = torch.cat(mass, -1).double().cpu()
        dtype = p.dtype if p.fused else wide
        known = [torch.nn.functional.pad(x, (0, n - x.shape[-1])) for x, n in zip(posed.mass, lengths)]
        error = relative_error(ours, torch.cat(known, -1))
        found.near("mass", error, where, dtype=dtype, strain=posed.strain)


def _queries(posed: Posed, p: Problem) -> packed.Queries:
    query, matrix = posed.args[0], posed.args[4][:-1]
    wide = torch.promote_types(query.dtype, torch.float32)
    plain = query.to(wide).reshape(p.batch * p.heads, p.group * p.new, p.dim) * p.dim**-0.5
    rotated_queries = plain @ matrix.to(wide).mT
    return packed.Queries(plain, rotated_queries, rotated_queries.sum(-1), plain[..., 0] * 0 + 0.25)


def _bias_and_decoder(posed: Posed, queries: packed.Queries, slots: TierView):
    if slots.read_at is None:
        return queries.plain @ slots.means.to(queries.plain.dtype).mT, None
    options, matrix = posed.options, posed.args[4][:-1]
    return None, packed.Decoder(matrix, options["inv_freq"], options["interleaved"])


def _compare(found: Found, posed: Posed, p: Problem, ours: merge.Partial, where: str) -> None:
    """Compare the partial of one tier: its normalized output and its log-sum-exp."""
    exact = [torch.stack(x) for x in zip(*(part[0] for part in posed.parts))]
    acc = ours.acc.double() @ posed.args[4][:-1].double()
    mine = [x.double().cpu().reshape(y.shape) for x, y in zip((acc, ours.row_max, ours.row_sum), exact)]
    for x, claim_of in ((0, "output"), (1, "log-sum-exp")):
        if x:
            a, b = (t[1] + t[2].log() for t in (mine, exact))
            a, b = a[exact[2] > 0], b[exact[2] > 0]
        else:
            a, b = (t[0] / t[2].clamp_min(1e-300)[..., None] for t in (mine, exact))
        error, name = relative_error(a, b), f"{where} {claim_of}".strip()
        found.near("partials", error, name, dtype=p.dtype, strain=posed.strain)


def _chunks(chunk: int):
    def run(found: Found, p: Problem, seed: int, where: str) -> None:
        posed = pose(p, seed, found.device)
        slots, queries = posed.args[5][0].flat(), _queries(posed, p)
        bias, decoder = _bias_and_decoder(posed, queries, slots)
        parts, top, total, _ = packed.attend_chunks(
            queries, bias, slots, decoder,
            bits=p.bits[0], chunk=chunk, softcap=p.softcap, dtype=queries.plain.dtype,
        )  # fmt: skip
        acc = torch.cat(packed.channels(parts, p.bits[0][1]), dim=1).mT
        ours = merge.Partial(acc, top[:, 0], total[:, 0])
        _compare(found, posed, p, ours, where)

    return run


def _tiles(found: Found, p: Problem, seed: int, where: str) -> None:
    """`packed.attend` with several short tiles."""
    posed, before = pose(p, seed, found.device), packed.EAGER_TILE
    slots, queries = posed.args[5][0].flat(), _queries(posed, p)
    bias, decoder = _bias_and_decoder(posed, queries, slots)
    for tile in (1, 48, 64, 100, 2048):
        packed.EAGER_TILE = tile
        try:
            ours = packed.attend(queries, bias, slots, decoder, p.bits[0], p.softcap)
        finally:
            packed.EAGER_TILE = before
        _compare(found, posed, p, ours, f"{where} tiles of {tile}".strip())


def _twin(found: Found, p: Problem, seed: int, where: str) -> None:
    """The arithmetic of the compiled version on a GPU, run without a compiler."""
    posed = pose(p, seed, found.device)
    o, lengths = posed.options, [p.dense, *p.lengths]
    mass = [torch.full((p.batch, p.heads, n), torch.nan, device=found.device) for n in lengths]
    args = decode._of_slots_read((*posed.args, o["s_aux"], o.get("inv_freq"), mass), o["slots_read"])
    options = dict(bits=tuple(p.bits), scaling=o["scaling"], softcap=p.softcap)
    options["interleaved"] = o.get("interleaved", False)
    out = decode._attend(*args, chunks=(128,) * len(p.lengths), **options)
    found.near("twin", relative_error(out, posed.output), where)
    error = relative_error(torch.cat(mass, -1), torch.cat(posed.mass, -1))
    found.near("twin", error, f"{where} mass".strip())


def _long(dim: int, group: int, dtype: torch.dtype):
    """One query over many uncompressed tokens. All tokens of the prefix are visible. The tail has padding."""

    def run(found: Found, seed: int) -> None:
        batch, heads, flash_prefix, capacity = 2, 2, 256, 600
        for live in (257, 300, 600):
            draw = Draw(seed + live)
            query = draw.normal(batch, heads * group, 1, dim).to(dtype)
            keys, values = (draw.normal(batch, heads, capacity, dim).to(dtype) for _ in "kv")
            seen = draw.chance(0.8, batch, 1, capacity)
            seen[..., :flash_prefix], seen[..., live:] = True, False
            seen[..., live - 1] = True
            size = float(query.norm(dim=-1).max() * keys.norm(dim=-1).max() * dim**-0.5)
            position = torch.arange(capacity).masked_fill(~seen[:, 0], -1)
            at, terms = torch.tensor([capacity]), spec.Terms(dim**-0.5)
            sides = [[x[b].double() for x in (query, keys, values)] for b in range(batch)]
            parts = [spec.over_tensors(*side, at, position[b], terms) for b, side in enumerate(sides)]
            output = torch.stack([spec.merge([part]) for part in parts]).transpose(1, 2)
            unseen = ~seen[:, :, :, None]
            keys, values = keys.masked_fill(unseen, torch.nan), values.masked_fill(unseen, torch.inf)
            there = [x.to(found.device) for x in (query, keys, values, seen)]
            ours = dense.attend_long(*there, flash_prefix, dim**-0.5)
            limit = strain(dtype, size)
            found.near(
                "attention", relative_error(ours, output), f"{live} columns", dtype=dtype, strain=limit
            )

    return run


def _merge(name: str):
    def run(found: Found, seed: int):
        draw = Draw(seed)
        apart = 300.0 if name == "far apart" else 3.0
        exact = []
        for i in range(5):
            acc, top = draw.normal(2, 3, 8, 16), draw.normal(2, 3, 8) * apart
            total = 1 + draw.uniform(2, 3, 8) * 9
            gone = draw.chance(0.4, 2, 3, 8) | (torch.tensor(i == 2) & torch.tensor(name == "of no keys"))
            gone[0, 0, 0] = name == "of no keys"
            exact.append(
                spec.Partial(
                    acc.masked_fill(gone[..., None], 0.0),
                    top.masked_fill(gone, -torch.inf),
                    total.masked_fill(gone, 0.0),
                )
            )
        expected = torch.stack(
            [spec.merge([spec.Partial(*(x[b] for x in e)) for e in exact]) for b in (0, 1)]
        )
        for dtype in (torch.float64, torch.float32):
            # The row maxima are rounded. The rounding of a row maximum of 900 is the error of a weight.
            room = strain(dtype, apart * 4) * 4
            low = torch.finfo(dtype).min
            ours = [merge.Partial(*(x.clamp_min(low).to(dtype).to(found.device) for x in e)) for e in exact]
            found.near("merge", relative_error(merge.merge(ours), expected), dtype=dtype, strain=room)
            if name == "of no keys":
                zero = merge.merge(ours)[0, 0, 0]
                found.same("empty rows", zero, torch.zeros_like(zero))
            one = merge.empty(ours[0].acc)
            for i in (3, 1, 4, 0, 2):
                one = merge.combine(one, ours[i])
            found.near("merge", relative_error(merge.merge([one]), expected), dtype=dtype, strain=room)
            two = merge.combine(merge.combine(ours[1], ours[2]), merge.combine(ours[0], ours[4]))
            both = relative_error(merge.merge([two, ours[3]]), expected)
            found.near("merge", both, dtype=dtype, strain=room)

    return run
