"""Tiers that are read through a block table: any page size, order and mask, against the gathered tokens."""

import math
import random

import pytest
import torch
from torch._dynamo.utils import counters

from fade_fast.kernels import decode
from fade_fast.kernels.packed import TierView
from fade_fast.kernels.rotated import Packed

from ..marks import slow_but
from .test_decode import (
    ONE,
    TILES,
    WIDTHS,
    check,
    distance,
    naive,
    of_option,
    of_tier,
    problem,
    random_problem,
)

NOWHERE = torch.iinfo(torch.int32).max  # what a table may hold for blocks that nobody sees


def paged(view: TierView, page: int, seed: int = 0, dtype=torch.int32, spare: int = 2) -> TierView:
    """The same in pages of a random order, with `spare` pages of poison and some in every page that has room.

    Blocks without a valid slot have no page, but any number.
    """
    draw = torch.Generator().manual_seed(seed)
    batch, capacity = view.valid.shape[0], view.capacity
    blocks = -(-capacity // page)
    count = batch * blocks + spare
    table = torch.randperm(count, generator=draw)[: batch * blocks].reshape(batch, blocks)
    room = blocks * page - capacity

    def field(x, axis, poison):
        if x is None:
            return None
        pads = [0] * (2 * (x.dim() - 1 - axis)) + [0, room]
        x = torch.nn.functional.pad(x, pads, value=poison)
        x = x.unflatten(axis, (blocks, page)).movedim(axis, 1).flatten(0, 1)  # [B * n, H, ...]
        held = torch.full((count, *x.shape[1:]), poison, dtype=x.dtype)
        held[table.flatten()] = x
        return held

    keys, values = (
        Packed(field(side.codes, axis, 255), field(side.scale, 2, math.nan), field(side.zero, 2, math.nan))
        for side, axis in ((view.keys, 2), (view.values, 3))
    )
    seen = torch.nn.functional.pad(view.valid.any(1), (0, room)).unflatten(-1, (blocks, page)).any(-1)
    nowhere = torch.randint(0, 2, table.shape, generator=draw) * (NOWHERE + 5) - 5  # -5 or the largest
    table = torch.where(seen, table, nowhere).to(dtype)
    return view._replace(keys=keys, values=values, block_table=table)


def in_pages(args, pages, seed=0, **options):
    """The arguments with tiers in pages of these sizes; 0 leaves a tier as it is."""
    tiers = [paged(view, page, seed, **options) if page else view for view, page in zip(args[5], pages)]
    return (*args[:5], tiers)


#: Largest difference between pages and what they hold. Tensors of other strides go to other products of the
#: BLAS library, which sums in another order.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def both(args, options, pages, seed=0):
    """Outputs and probabilities of pages and of their content agree up to rounding; returns the output."""
    expected, counted = check(args, options)
    query, keys = args[0], args[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    lengths = [keys.shape[2], *(view.capacity for view in args[5])]
    mass = [torch.full((*keys.shape[:2], n), math.nan, dtype=wide) for n in lengths]
    moved = in_pages(args, pages, seed)
    found = decode.attend(*moved, **options)
    assert distance(found, expected.double()) <= ROUNDING[query.dtype]
    assert torch.equal(decode.attend(*moved, **options, mass=mass), found)
    assert all(distance(x, y) <= ROUNDING[wide] for x, y in zip(mass, counted))
    return found


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("seed", slow_but(range(60), *range(8)))
def test_random_cases(seed, eager_tile):
    """Any shape, mask and page, beside tiers without a table; tiles are short, and end within pages."""
    eager_tile(TILES[seed % len(TILES)])
    pick = random.Random(seed)
    pages = [pick.choice([1, 5, 16, 64, 128, 1000]), pick.choice([0, 16])]
    both(*random_problem(seed, tiers=(1, 1, 2)), pages, seed)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("page", [16, 64])
def test_widths(bits, page):
    for dtype, group in ((torch.float64, 4), (torch.float32, 1), (torch.float32, 7), (torch.float64, 8)):
        both(*problem(group, 2, 2, group, 64, lengths=(150,), widths=[bits], dtype=dtype), [page])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strides_and_dtypes_of_the_table(dtype):
    """A part of a larger table, value codes with a token's bytes side by side, fields within larger pages."""
    args, options = problem(1, lengths=(150,), dtype=torch.float64)
    expected = decode.attend(*args, **options)
    (view,) = in_pages(args, [16], dtype=dtype)[5]
    wider = torch.full((2, 40), NOWHERE, dtype=dtype)
    wider[:, : view.block_table.shape[1]] = view.block_table
    table = wider[:, : view.block_table.shape[1]]
    codes = view.values.codes.mT.contiguous().mT
    whole = torch.zeros(*view.keys.codes.shape[:3], 80, dtype=torch.uint8)
    whole[..., 7:39] = view.keys.codes
    view = view._replace(
        block_table=table,
        keys=view.keys._replace(codes=whole[..., 7:39]),
        values=view.values._replace(codes=codes),
    )
    found = decode.attend(*args[:5], [view], **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_rows_may_share_pages():
    """A prefix that two rows have in common is stored once."""
    args, options = problem(2, batch=2, lengths=(64,), holes=0.0, dtype=torch.float64)
    (view,) = in_pages(args, [16])[5]
    table = view.block_table.clone()
    table[1, :2] = table[0, :2]
    seen = torch.ones_like(view.valid)
    shared = view._replace(block_table=table, valid=seen)
    (dense,) = args[5]
    keys, values = (Packed(*(x.clone() for x in side)) for side in (dense.keys, dense.values))
    for side, axes in ((keys, (2, 2, 2)), (values, (3, 2, 2))):
        for x, axis in zip(side, axes):
            x.narrow(axis, 0, 32)[1] = x.narrow(axis, 0, 32)[0]
    dense = dense._replace(keys=keys, values=values, valid=seen)
    # The slots that row 0 may not have seen held poison.
    clean = lambda side: side._replace(  # noqa: E731
        scale=side.scale.nan_to_num(0.1, 0.1, 0.1), zero=side.zero.nan_to_num(0.0, 0.0, 0.0)
    )
    dense, shared = (
        x._replace(keys=clean(x.keys), values=clean(x.values), means=x.means.nan_to_num(0, 0, 0))
        for x in (dense, shared)
    )
    bound = torch.full_like(dense.bound, 1.0)
    found = [decode.attend(*args[:5], [x._replace(bound=bound)], **options) for x in (dense, shared)]
    assert distance(found[1], found[0]) <= ROUNDING[torch.float64] and found[0].isfinite().all()


@pytest.mark.parametrize("page", [16, 64, 128, 256, 48])
@pytest.mark.parametrize(
    "shape",
    slow_but(
        [
            dict(),
            dict(group=1, softcap=20.0, widths=[(3, 4)]),
            dict(group=7, widths=[(8, 8)]),
            dict(group=8, new=2, widths=[(2, 2)], window=True, exact=9),
            dict(contiguous=True, per_mean=ONE),
        ],
        dict(),
        dict(group=7, widths=[(8, 8)]),
        dict(contiguous=True, per_mean=ONE),
    ),
)
def test_the_compiled_function_run_eagerly(shape, page):
    """In float16 and chunks, as on CUDA: the bits of the function without a table."""
    args, options = problem(3, lengths=(512,), capacities=(600,), dtype=torch.float16, **shape)
    constants = {name: options.get(name) for name in ("scaling", "softcap")}
    constants |= dict(bits=tuple(options["bits"]), interleaved=False, chunks=(128,))
    found, masses = [], []
    for arguments in (args, in_pages(args, [page])):
        mass = [torch.full((2, 2, n), math.nan) for n in (args[1].shape[2], 600)]
        inputs = (*arguments, options["s_aux"], options.get("inv_freq"), mass)
        found.append(decode._attend(*decode._of_slots_read(inputs, [512]), **constants))
        masses.append(mass)
    assert torch.equal(*found) and all(map(torch.equal, *masses))
    expected, counted = naive(*args, **options)
    assert distance(found[1], expected) <= 0.02
    assert distance(torch.cat(masses[1], -1), torch.cat(counted, -1)) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("page, graphs", [(16, 1), (64, 1), (256, 3)])
def test_one_compiled_graph_serves_every_length(page, graphs, traced_kernels, compiled_on):
    """The twin for CUDA, traced by the same code, without code generation; a length each if pages divide no
    chunk."""
    args, options = problem(4, lengths=(900,), capacities=(2048,), exact=20, dtype=torch.float16)
    args = in_pages(args, [page])
    compiled_on("cpu")
    with torch.no_grad():
        for num_read in (1024, 896, 640):
            found = decode.attend(*args, **options | dict(slots_read=[num_read]))
            inputs = decode._of_slots_read((*args, None, None, []), [num_read])
            constants = dict(bits=((4, 4),), softcap=None, interleaved=False, scaling=options["scaling"])
            eager = decode._attend(*inputs, chunks=(128,), **constants)
            assert distance(found, eager.double()) <= 1e-3
        assert len(decode._compiled.graphs) == graphs == counters["stats"]["unique_graphs"]
        decode.attend(*args, **options | dict(slots_read=[2048]))  # to its end: for this length alone
        assert len(decode._compiled.graphs) == graphs + 1
    assert not counters["graph_break"]


def test_opcheck():
    (*args, tiers), options = problem(5, new=2, lengths=(40,), dtype=torch.float32)
    flat = decode._to_list(paged(tiers[0], 16))
    bits = [4, 4]
    torch.library.opcheck(
        torch.ops.fade.attend.default,
        (*args, flat, None, None, [], bits, options["slots_read"], [64], 0.125, None, False),
    )
    table = torch.tensor([[1, 0], [2, 2]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.fade.pages.default, (torch.rand(3, 4, 5), table))


def of_pages(**fields):
    """A change of a field of the tier in pages."""
    change = of_tier(**fields)
    return lambda args, options: change(in_pages(args, [16]), options)


REFUSED = {
    "block_table is .*torch.int16.*allowed: .2, 10., torch.int32 or torch.int64": [
        of_pages(block_table=lambda x: x.short())
    ],
    "block_table is .*meta": [of_pages(block_table=lambda x: x.to("meta"))],
    "block_table is .1, 10.*allowed: .2, 10.": [of_pages(block_table=lambda x: x[:1])],
    "block_table is .20.*allowed: .2, 0.": [of_pages(block_table=lambda x: x.flatten())],
    "9 pages of 16 slots a row; allowed: as many as the capacity needs, 150": [
        of_pages(block_table=lambda x: x[:, :9])
    ],
    "keys.codes is .22, 16, 32.; allowed with a block table: .P, 2, page, W.": [
        of_pages(keys_codes=lambda x: x[:, 0])
    ],
    "keys.codes is .0, .*at least one page": [of_pages(keys_codes=lambda x: x[:0])],
    "keys.codes is .22, 1, 16, 32.*allowed: .22, 2, 16, 32.": [of_pages(keys_codes=lambda x: x[:, :1])],
    "keys.scale is .*allowed: .22, 2, 16.": [of_pages(keys_scale=lambda x: x[:5])],
    "keys.zero is .*allowed: .22, 2, 16.": [of_pages(keys_zero=lambda x: x[..., :15])],
    "values.codes is .22, 2, 16, 32.*allowed: .22, 2, 32, 16.": [of_pages(values_codes=lambda x: x.mT)],
    "values.scale is .*allowed: .22, 2, 16.": [of_pages(values_scale=lambda x: x[..., :8])],
    "reads 151 slots; allowed: 1 to its capacity, 150": [
        lambda args, options: of_option(slots_read=[151])(in_pages(args, [16]), options)
    ],
}


@pytest.mark.parametrize("message, change", [(m, change) for m, some in REFUSED.items() for change in some])
def test_what_does_not_fit_is_refused(message, change):
    args, options = change(*problem(6, dtype=torch.float32))
    with pytest.raises(ValueError, match=message):
        decode.attend(*args, **options)
