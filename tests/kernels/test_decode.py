"""The operator of a short step against softmax over decoded tokens in float64: any shape, any hole."""

import functools
import itertools
import math
import random

import pytest
import torch
from torch._dynamo.utils import counters

from fade_fast.compile import compiled as compiling
from fade_fast.kernels import decode, decode_loops, packed, rotated
from fade_fast.kernels.packed import TierView
from fade_fast.kernels.rotated import Packed
from parity.tolerances import ATTENTION

from ..marks import slow_but

WIDTHS = [(8, 8), (4, 4), (3, 3), (2, 2), (4, 2)]
ONE = 1 << 30  # slots of a mean where there is one for all
#: Against float64 with the same float32 rotation, so that in float64 only rounding remains.
CLOSE = ATTENTION | {torch.float64: 1e-9}


@functools.cache
def table(dim: int):
    return rotated.with_sum(rotated.rotation(dim)).float()


def poison(x, hole):
    """NaN, Inf and -Inf in turns where there is a hole; `hole` is broadcast to `x`."""
    bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=x.dtype).repeat(x.numel() // 3 + 1)
    return torch.where(hole, bad[: x.numel()].reshape(x.shape), x)


def tier(draw, valid, bits, heads, dim, per_mean=64, contiguous=False) -> TierView:
    """Random codes; every number of a slot that no query sees is poisoned. `valid` [B, 1 or q, capacity]."""
    batch, _, capacity = valid.shape
    hole = ~valid.any(1, keepdim=True)

    def side(b, tokens_last):
        size = (
            (batch, heads, dim * b // 8, capacity) if tokens_last else (batch, heads, capacity, dim * b // 8)
        )
        codes = torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)
        spread = {8: 0.02, 4: 0.3, 3: 1.0, 2: 1.0}[b]
        scale = (0.5 + torch.rand(batch, heads, capacity, generator=draw)) * spread
        zero = -scale * rotated.center(b) + 0.1 * torch.randn(batch, heads, capacity, generator=draw)
        zero = poison(zero.half(), hole) if rotated.is_uniform(b) else None
        return Packed(codes, poison(scale.half(), hole), zero)

    keys, values = side(bits[0], False), side(bits[1], True)
    bound = torch.where(hole, 0, values.scale).float().amax(-1).clamp_min(rotated.SMALLEST_SCALE)
    count = 1 if per_mean == ONE else -(-capacity // per_mean)
    means = (torch.randn(batch, heads, count, dim, generator=draw) * 0.5).half()
    padded = torch.nn.functional.pad(hole, (0, count * min(per_mean, capacity) - capacity), value=True)
    means = poison(means, padded.unflatten(-1, (count, -1)).all(-1).unsqueeze(-1))
    at = None
    if contiguous:
        at = torch.randint(0, 100_000, (batch, 1, capacity), generator=draw, dtype=torch.int32)
    return TierView(keys, values, bound, means, valid, per_mean, at)


def problem(
    seed=0, batch=2, heads=2, group=4, dim=64, new=1, exact=9, lengths=(150,), capacities=None, widths=None,
    per_mean=64, contiguous=False, interleaved=False, softcap=None, sinks=False, window=False, holes=0.1,
    dtype=torch.float64, sharp=1.0,
):  # fmt: skip
    """Arguments and options of `step.attend`, without what is to be found outside the valid slots."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
    query = normal(batch, heads * group, new, dim) * sharp
    keys, values = (normal(batch, heads, exact, dim) for _ in "kv")
    seen = torch.rand(batch, 1, exact, generator=draw) >= holes
    if new > 1:
        seen = seen & torch.ones(new, exact, dtype=torch.bool).tril(exact - new)
    keys, values = (poison(x, ~seen.any(1)[:, None, :, None]) for x in (keys, values))
    widths = widths or [(4, 4)] * len(lengths)
    tiers = []
    for length, capacity, bits in zip(lengths, capacities or lengths, widths):
        valid = torch.rand(batch, 1, length, generator=draw) >= holes
        valid[:, :, : random.Random(seed).randint(0, length // 2)] &= torch.arange(batch)[:, None, None] > 0
        if window:  # each query sees its own
            first = torch.randint(0, length, (batch, new, 1), generator=draw)
            valid = valid & (torch.arange(length) >= first)
        valid = torch.nn.functional.pad(valid, (0, capacity - length))
        tiers.append(tier(draw, valid, bits, heads, dim, per_mean, contiguous))
    options = dict(bits=list(widths), slots_read=list(lengths), scaling=dim**-0.5, softcap=softcap)
    options["s_aux"] = normal(heads * group) if sinks else None
    if contiguous:
        frequencies = 10_000.0 ** (-torch.arange(0, dim // 2, 2) / dim)  # a part of the channels turns
        options |= dict(inv_freq=frequencies, interleaved=interleaved)
    return (query, keys, values, seen, table(dim), tiers), options


#: Slots of a tile of an eager step; short ones too, so that there are several.
TILES = [48, 100, 2048]


def random_problem(seed, tiers=(0, 1, 1, 2)):
    """A `problem` of any shape, dtype and mask. `tiers` are the numbers of tiers to draw from."""
    pick = random.Random(seed)
    new = pick.choice([1, 1, 2, 3, 7, 16])
    lengths = [pick.randint(1, 400) for _ in range(pick.choice(tiers))]
    return problem(
        seed,
        batch=pick.randint(1, 3),
        heads=pick.randint(1, 3),
        group=pick.choice([1, 3, 4, 7, 8]),
        dim=pick.choice([64, 80, 96, 128, 256]),
        new=new,
        exact=new + pick.randint(0, 40),
        lengths=lengths,
        capacities=[n + pick.choice([0, 1, 70]) for n in lengths],
        widths=[pick.choice(WIDTHS) for _ in lengths],
        per_mean=pick.choice([64, 48, ONE]),
        contiguous=pick.random() < 0.4,
        interleaved=pick.random() < 0.5,
        softcap=pick.choice([None, None, 0.5, 30.0]),
        sinks=pick.random() < 0.3,
        window=pick.random() < 0.3,
        holes=pick.choice([0.0, 0.1, 0.9]),
        dtype=pick.choice(list(CLOSE)),
        sharp=pick.choice([1.0, 10.0]),
    )


def turned(x, position, inv_freq, interleaved):
    """RoPE by complex numbers."""
    width = 2 * len(inv_freq)
    part = x[..., :width]
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).mT
    angle = position.double()[..., None] * inv_freq.double()
    pairs = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()).double(), angle)
    )
    part = pairs.flatten(-2) if interleaved else pairs.mT.flatten(-2)
    return torch.cat((part, x[..., width:]), dim=-1)


def naive(
    query, keys, values, seen, matrix, tiers,
    *, bits, slots_read, scaling, softcap=None, s_aux=None, inv_freq=None, interleaved=False,
):  # fmt: skip
    """The output [B, q, Hq, D] and, a tier, the probabilities summed over queries: decode, then softmax."""
    batch, q_heads, new, _ = query.shape
    heads, matrix = keys.shape[1], matrix[:-1].double()
    keys, values, seen = [keys.double()], [values.double()], [seen]
    for slots, (key_bits, value_bits), num_read in zip(tiers, bits, slots_read):
        capacity = slots.valid.shape[-1]
        k = rotated.dequantize(slots.keys, key_bits, torch.float64) @ matrix
        each = torch.arange(capacity) // slots.per_mean % slots.means.shape[2]
        k = k + slots.means.double()[:, :, each]
        if slots.read_at is not None:
            k = turned(k, slots.read_at, inv_freq, interleaved)
        codes = slots.values._replace(codes=slots.values.codes.mT)
        keys.append(k)
        values.append(rotated.dequantize(codes, value_bits, torch.float64) @ matrix)
        seen.append(slots.valid & (torch.arange(capacity) < num_read))
    lengths = [x.shape[2] for x in keys]
    seen = torch.cat([x.expand(-1, new, -1) for x in seen], dim=-1)
    keys, values = torch.cat(keys, dim=2), torch.cat(values, dim=2)
    values = values.masked_fill(~seen.any(1)[:, None, :, None], 0)
    keys, values = (x.repeat_interleave(q_heads // heads, dim=1) for x in (keys, values))
    scores = query.double() @ keys.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    learned = torch.full((q_heads,), -math.inf) if s_aux is None else s_aux
    learned = learned.double()[:, None, None].expand(batch, -1, new, 1)
    share = torch.cat((scores, learned), dim=-1).softmax(-1).nan_to_num(0.0)[..., :-1]
    mass = share.unflatten(1, (heads, -1)).sum((2, 3)).split(lengths, dim=-1)
    return (share @ values).transpose(1, 2), mass


def distance(found, expected) -> float:
    """Norm of the difference over that of what is expected, or alone where that is 0."""
    return float((found.double() - expected).norm() / (expected.norm() or 1.0))


def check(args, options):
    """With scores gathered and without, against `naive`. Returns output and mass."""
    query, keys, tiers = args[0], args[1], args[5]
    expected, expected_mass = naive(*args, **options)
    found = decode.attend(*args, **options)
    assert found.shape == expected.shape and found.dtype == query.dtype and found.is_contiguous()
    assert distance(found, expected) <= CLOSE[query.dtype]
    wide = torch.promote_types(query.dtype, torch.float32)
    lengths = [keys.shape[2], *(slots.valid.shape[-1] for slots in tiers)]
    mass = [torch.full((*keys.shape[:2], n), math.nan, dtype=wide) for n in lengths]
    assert torch.equal(decode.attend(*args, **options, mass=mass), found)
    mass = [x.double() for x in mass]
    assert distance(torch.cat(mass, -1), torch.cat(expected_mass, -1)) <= CLOSE[wide]
    return found, mass


@pytest.fixture(autouse=True)
def no_loops(monkeypatch):
    """Steps over many slots run tile by tile; `test_decode_loops.py` has the other way of a CPU."""
    monkeypatch.setattr(decode_loops, "LEAST", 1 << 30)


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)  # which fills new memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("seed", slow_but(range(80), *range(8)))
def test_random_cases(seed, eager_tile):
    """Any shape, dtype and mask; tiles are short, so that there are several."""
    eager_tile(TILES[seed % len(TILES)])
    check(*random_problem(seed))


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float64))
@pytest.mark.parametrize("bits", WIDTHS)
def test_widths(bits, dtype):
    for dim, group in itertools.product((64, 80, 96, 128, 256), (1, 3, 4, 7)):
        check(*problem(dim + group, 1, 2, group, dim, lengths=(70,), widths=[bits], dtype=dtype))


@pytest.mark.parametrize("new", slow_but(range(1, 17), 1, 2, 16))
def test_query_lengths(new):
    check(*problem(new, new=new, exact=new + 3, lengths=(65, 30), window=bool(new % 2)))


BORDERS = [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 2047, 2048, 2049, 4097]


@pytest.mark.parametrize("length", slow_but(BORDERS, 1, 64, 129, 2049))
@pytest.mark.parametrize("per_mean", slow_but([64, 48, ONE], 64))
def test_lengths_around_borders(length, per_mean):
    """Of means, chunks and tiles; read to the bucket's end, which is poisoned, or to that of the tier."""
    args, options = problem(
        length,
        2,
        1,
        2,
        lengths=(length,),
        capacities=(packed.whole(2, length) + 600,),
        per_mean=per_mean,
        dtype=torch.float32,
    )
    found, _ = check(args, options)
    wider, _ = check(args, options | dict(slots_read=[packed.whole(2, length)]))
    torch.testing.assert_close(found, wider, rtol=1e-5, atol=1e-6)


def test_buckets_are_whole_chunks_and_few():
    """For any number of heads: nothing past the last whole chunk would be read."""
    for heads in (1, 7, 8, 64, 69, 72, 224, 300, 1024):
        lengths = range(1, 20_000, 61)
        for length in lengths:
            num_read = packed.bucket(heads, length)
            assert length <= num_read == packed.bucket(heads, num_read)
            of_pages = packed.bucket(heads, length, paged=True)
            assert length <= of_pages <= num_read
            assert not of_pages % packed.chunk_of(heads, of_pages, 1, paged=True)
            assert all(num_read % packed.chunk_of(heads, num_read, rows) == 0 for rows in (1, 4, 5, 64))
            longest, room = packed.whole(heads, length), packed.roomy(heads, length)
            assert length <= longest <= room <= num_read and room <= max(longest, length * 9 // 8 + 2048)
            assert room % packed.chunk_of(heads, room, 1) == longest % packed.chunk_of(heads, longest, 1) == 0
            assert packed.longest(heads, longest + packed.spare(longest)) == longest
        assert len({packed.bucket(heads, length) for length in lengths}) < 120
    with pytest.raises(ValueError, match="slots read are .*1900.*bucket"):
        decode._chunks_of([(72, 4)], [1900], [(4, 4)], [False])


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(sinks):
    """The output is 0, never NaN, and nothing is counted; other rows are as ever."""
    args, options = problem(3, batch=3, lengths=(90, 20), widths=[(4, 4), (2, 2)], sinks=sinks, holes=0.0)
    query, keys, values, seen, matrix, tiers = args
    blind = torch.tensor([True, False, False])[:, None, None]
    hidden = []
    for slots in tiers:
        hole = blind.expand(-1, 2, slots.valid.shape[-1])
        side = lambda x, hole=hole: x._replace(scale=poison(x.scale, hole), zero=x.zero)  # noqa: E731
        hidden.append(
            slots._replace(keys=side(slots.keys), values=side(slots.values), valid=slots.valid & ~blind)
        )
    keys, values = (poison(x, blind[..., None]) for x in (keys, values))
    args = (query, keys, values, seen & ~blind, matrix, hidden)
    found, mass = check(args, options)
    assert not found[0].any() and found[1].any() and not any(x[0].any() for x in mass)


def test_a_tier_without_a_valid_slot():
    args, options = problem(4, lengths=(70, 40), widths=[(4, 4), (2, 2)])
    draw = torch.Generator().manual_seed(0)
    empty = tier(draw, torch.zeros(2, 1, 70, dtype=torch.bool), (4, 4), 2, 64)
    found, mass = check((*args[:5], [empty, args[5][1]]), options)
    assert not mass[1].any()
    single = {name: x[1:] if name in ("bits", "slots_read") else x for name, x in options.items()}
    torch.testing.assert_close(found, decode.attend(*args[:5], args[5][1:], **single), rtol=1e-12, atol=1e-14)


def test_only_the_tiers_are_seen():
    """No uncompressed key gives a reference to the scores then."""
    args, options = problem(5, sharp=30.0)
    hidden = torch.zeros_like(args[3])
    check((*args[:3], hidden, *args[4:]), options)


def test_mass_sums_to_rows():
    args, options = problem(6, group=3, new=5, lengths=(100, 30), window=True, holes=0.0)
    _, mass = check(args, options)
    total = sum(x.sum(-1) for x in mass)
    torch.testing.assert_close(total, torch.full_like(total, 15.0), rtol=1e-9, atol=0)


def test_strides_do_not_matter():
    args, options = problem(7, new=3, exact=12, lengths=(100,), contiguous=True)
    expected = decode.attend(*args, **options)

    def strided(x):
        """The same numbers among others, axes stored in the reverse order."""
        if x is None:
            return None
        space = torch.zeros([2 * n for n in reversed(x.shape)], dtype=x.dtype)
        view = space.permute(*reversed(range(x.dim())))[tuple(slice(0, None, 2) for _ in x.shape)]
        assert view.copy_(x).stride() != x.stride()
        return view

    (slots,) = args[5]
    slots = decode._from_list([strided(x) for x in decode._to_list(slots)], slots.per_mean)
    found = decode.attend(*map(strided, args[:5]), [slots], **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gathers", slow_but([False, True], True))
def test_opcheck(gathers):
    (*args, tiers), options = problem(
        8, new=2, lengths=(40, 30), widths=[(4, 4), (2, 2)], dtype=torch.float32
    )
    lengths = [args[1].shape[2], 40, 30] if gathers else []
    mass = [torch.zeros(2, 2, n) for n in lengths]
    flat = [x for slots in tiers for x in decode._to_list(slots)]
    torch.library.opcheck(
        torch.ops.fade.attend.default,
        (*args, flat, None, None, mass, [4, 4, 2, 2], options["slots_read"], [64, 64], 0.125, None, False),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    slow_but(
        [
            dict(lengths=(900,)),
            dict(lengths=(900,), new=3, group=1, widths=[(3, 8)], sinks=True, softcap=20.0),
            dict(lengths=(900, 700), widths=[(4, 4), (2, 2)], dim=80),
            dict(lengths=(900,), contiguous=True, group=1, per_mean=ONE),
        ],
        dict(lengths=(900,)),
    ),
)
def test_one_compiled_graph_serves_every_length(shape, traced_kernels):
    """The twin for CUDA, traced by the same code; fewer slots are read than the capacity."""
    bits = shape.get("widths", [(4, 4)])
    capacities = [2048] * len(bits)
    args, options = problem(
        9, exact=20, dtype=torch.float16, **dict(shape, widths=bits, capacities=capacities)
    )
    heads, rows = 4, max(2, shape.get("group", 4) * shape.get("new", 1))
    twin = compiling.Compiled(decode._of_dynamic_size)
    sinks, frequencies = options["s_aux"], options.get("inv_freq")
    constants = {name: options.get(name) for name in ("scaling", "softcap")}
    constants |= dict(bits=tuple(bits), interleaved=False)
    for shorter in (0, 1, 3):
        slots_read = [packed.roomy(heads, n) - 128 * shorter for n in options["slots_read"]]
        chunks = decode._chunks_of([(heads, rows)] * len(bits), slots_read, bits, [False] * len(bits))
        assert chunks == (128,) * len(slots_read)
        mass = [torch.full((2, 2, n), math.nan) for n in (20, *capacities)]
        inputs = (*args, sinks, frequencies)
        dynamic_sizes = [
            compiling.dynamic_size(num_read // chunk) for num_read, chunk in zip(slots_read, chunks)
        ]
        with torch.no_grad():
            found = twin(dynamic_sizes, dict, *inputs, mass, chunks=chunks, slots_read=None, **constants)
            inputs = decode._of_slots_read((*inputs, []), slots_read)
            eager = decode._attend(*inputs, chunks=chunks, **constants)
        expected, counted = naive(*args, **options | dict(slots_read=slots_read))
        assert distance(found, eager) <= 1e-3
        assert distance(found, expected) <= 0.02  # a CPU rounds sums of float16 products
        assert distance(torch.cat(mass, -1), torch.cat(counted, -1)) <= 0.05
    assert len(twin.graphs) == 1 and counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_inductor_compiles_it_for_the_cpu():
    args, options = problem(10, new=2, lengths=(90,), dtype=torch.float32)
    constants = dict(bits=((4, 4),), chunks=None, scaling=options["scaling"], softcap=None, interleaved=False)
    inputs = decode._of_slots_read((*args, None, None, []), options["slots_read"])
    with torch.no_grad():
        found = torch.compile(compiling.bind(decode._attend, constants), fullgraph=True)(*inputs)
    assert distance(found, decode.attend(*args, **options).double()) <= 1e-6


def test_inside_a_larger_graph():
    """One node of it: nothing is looked into, and nothing breaks."""
    args, options = problem(11, dtype=torch.float32)
    mass = [torch.zeros(2, 2, n) for n in (9, 150)]
    whole = lambda query: decode.attend(query * 2, *args[1:], mass=mass, **options) + 1  # noqa: E731
    expected = whole(args[0])
    counted = [x.clone() for x in mass]
    mass = [x.fill_(math.nan) for x in mass]
    found = torch.compile(whole, fullgraph=True, backend="aot_eager")(args[0])
    assert torch.equal(found, expected) and all(torch.equal(x, y) for x, y in zip(mass, counted))


# -- refusals


def of_tier(**fields):
    """A change of the first tier's fields; `keys_scale=...` is the scale of `keys`."""

    def change(args, options):
        (slots,) = args[5]
        for name, make in fields.items():
            side, _, part = name.partition("_") if name.startswith(("keys_", "values_")) else (name, "", "")
            if part:
                packed_ = getattr(slots, side)
                slots = slots._replace(**{side: packed_._replace(**{part: make(getattr(packed_, part))})})
            else:
                slots = slots._replace(**{side: make(getattr(slots, side))})
        return (*args[:5], [slots]), options

    return change


def of_arg(index, make):
    return lambda args, options: ((*args[:index], make(args[index]), *args[index + 1 :]), options)


def of_option(**changes):
    return lambda args, options: (args, options | changes)


def mass_of(*lengths, dtype=torch.float32):
    return [torch.zeros(2, 2, n, dtype=dtype) for n in lengths]


REFUSED = {
    "query and keys are": [of_arg(0, lambda x: x[0]), of_arg(1, lambda x: x[0])],
    "head_dim is 63; allowed: an even number": [of_arg(0, lambda x: x[..., :63])],
    "a multiple of 2 query heads": [of_arg(0, lambda x: x[:, :3]), of_arg(0, lambda x: x[:, :0])],
    "no empty axis": [of_arg(0, lambda x: x[:, :, :0]), of_arg(1, lambda x: x[:, :, :0])],
    "query is torch.int64; allowed: torch.float16": [of_arg(0, lambda x: x.long())],
    "keys is .*allowed: .2, 2, 9, 64.": [of_arg(1, lambda x: x[:1]), of_arg(1, lambda x: x[..., :62])],
    "keys is .*torch.int32": [of_arg(1, lambda x: x.int())],
    "values is .*8, 64.*allowed: .2, 2, 9, 64.": [of_arg(2, lambda x: x[:, :, :8])],
    "values is .*meta": [of_arg(2, lambda x: x.to("meta"))],
    "seen is .*torch.float32.*torch.bool": [of_arg(3, lambda x: x.float())],
    "seen is .*allowed: .2, 1, 9.": [of_arg(3, lambda x: x[0]), of_arg(3, lambda x: x.expand(-1, 2, -1))],
    "matrix is .64, 64.*allowed: .65, 64.": [of_arg(4, lambda x: x[:-1])],
    "matrix is .*torch.float64.*allowed.*torch.float32": [of_arg(4, lambda x: x.double())],
    "1 tiers, 2 pairs of bits, 1 slots_read": [of_option(bits=[(4, 4)] * 2)],
    "1 tiers, 1 pairs of bits, 0 slots_read": [of_option(slots_read=[])],
    "has bits .5, 4. .*8, 4, 3 and 2": [of_option(bits=[(5, 4)])],
    "has bits .4,. ": [of_option(bits=[(4,)])],
    "reads 151 slots; allowed: 1 to its capacity, 150": [of_option(slots_read=[151])],
    "reads 0 slots; allowed": [of_option(slots_read=[0])],
    "reads -1 slots; allowed": [of_option(slots_read=[-1])],
    "keys.codes is .*32.*allowed: .2, 2, 150, 64., torch.uint8": [of_option(bits=[(8, 4)])],
    "keys.codes is .*torch.int8": [of_tier(keys_codes=lambda x: x.to(torch.int8))],
    "values.codes is .*allowed: .2, 2, 32, 150.": [of_tier(values_codes=lambda x: x.mT)],
    "keys.scale is .*allowed: .2, 2, 150.": [of_tier(keys_scale=lambda x: x[..., :149])],
    "values.scale is .*torch.float32": [of_tier(values_scale=lambda x: x.float())],
    "keys.zero is NoneType; allowed: a tensor": [of_tier(keys_zero=lambda x: None)],
    "valid is .*allowed: .2 to 4, 1, 150., torch.bool": [of_tier(valid=lambda x: x.int())],
    "capacity, 0": [of_tier(valid=lambda x: x[0, 0, 0])],
    "bound is .*allowed: .2, 2.": [of_tier(bound=lambda x: x[:, :1])],
    "means is .*allowed: .2, 2, 3, 64.": [of_tier(means=lambda x: x[..., :60])],
    "2 means of 64 slots each; allowed: as many as 150": [of_tier(means=lambda x: x[:, :, :2])],
    "3 means of 0 slots": [of_tier(per_mean=lambda x: 0)],
    "inv_freq is None": [of_tier(read_at=lambda x: torch.zeros(2, 1, 150, dtype=torch.int32))],
    "s_aux is .3.*allowed: .8.": [of_option(s_aux=torch.zeros(3))],
    "mass has 1 tensors; allowed: 2": [of_option(mass=mass_of(9))],
    "mass.1. is .*149.*allowed: .2, 2, 150.": [of_option(mass=mass_of(9, 149))],
    "mass.0. is .*torch.float16": [of_option(mass=mass_of(9, 150, dtype=torch.float16))],
}


@pytest.mark.parametrize("message, change", [(m, change) for m, some in REFUSED.items() for change in some])
def test_what_does_not_fit_is_refused(message, change):
    args, options = change(*problem(12, dtype=torch.float32))
    with pytest.raises(ValueError, match=message):
        decode.attend(*args, **options)


def test_frequencies_are_checked_where_they_are_needed():
    args, options = problem(13, contiguous=True)
    with pytest.raises(ValueError, match="inv_freq is .33.*allowed: .1 to 32."):
        decode.attend(*args, **options | dict(inv_freq=torch.ones(33)))
    args, options = problem(14, widths=[(2, 2)])
    (slots,) = args[5]
    zero = slots._replace(keys=slots.keys._replace(zero=slots.keys.scale))
    with pytest.raises(ValueError, match="keys.zero is Tensor; allowed: None"):
        decode.attend(*args[:5], [zero], **options)
