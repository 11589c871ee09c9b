"""Tiers that beams share: the output is that of rows that each read for themselves."""

import functools
import random

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map

from fade_fast.compile import compiled as compiling
from fade_fast.kernels import decode
from fade_fast.kernels.packed import TierView
from fade_fast.kernels.rotated import Packed

from ..marks import slow_but
from .test_decode import CLOSE, TILES, WIDTHS, distance, naive, no_loops, poisoned, problem  # noqa: F401


def of_beams(x, beams, shared, axis):
    """`x` [B, ...], whose rows of a text hold in the first `shared` slots what its first row holds."""
    if x is None:
        return None
    first = x[::beams].repeat_interleave(beams, dim=0)
    slot = torch.arange(x.shape[axis]).reshape(-1, *[1] * (x.dim() - 1 - axis % x.dim()))
    return torch.where(slot < shared, first, x)


def forked(view: TierView, beams: int, shared: int) -> TierView:
    """The tier of a beam search: the rows of a text are equal in the first `shared` slots."""
    same = functools.partial(of_beams, beams=beams, shared=shared)
    keys = Packed(same(view.keys.codes, axis=2), *(same(x, axis=2) for x in view.keys[1:]))
    values = Packed(same(view.values.codes, axis=3), *(same(x, axis=2) for x in view.values[1:]))
    blocks = shared if view.means.shape[2] == 1 else shared // view.per_mean
    means = of_beams(view.means, beams, max(1, blocks), 2)
    at = None if view.read_at is None else same(view.read_at, axis=2)
    scales = torch.where(view.valid.any(1, keepdim=True), values.scale, 0)
    bound = torch.maximum(view.bound, scales.nan_to_num(0.0, 0.0).float().amax(-1))
    return view._replace(
        keys=keys, values=values, means=means, read_at=at, valid=same(view.valid, axis=2), bound=bound
    )


def halves(view: TierView, beams: int, shared: int) -> list[TierView]:
    """The part of the tier that beams share, with a row for each text, and the rest."""
    slot = torch.arange(view.capacity)
    text = lambda x: None if x is None else x[::beams]  # noqa: E731
    together = view._replace(
        keys=Packed(*map(text, view.keys)), values=Packed(*map(text, view.values)), beams=beams,
        bound=text(view.bound), means=text(view.means), read_at=text(view.read_at),
        valid=text(view.valid) & (slot < shared),
    )  # fmt: skip
    return [together, view._replace(valid=view.valid & (slot >= shared))]


def search(seed, **fixed):
    """Arguments of a step of a beam search, whole and in parts: `(args, options), (args, options)`."""
    pick = random.Random(seed)
    beams, texts, per_mean = pick.choice([2, 3, 4]), pick.randint(1, 3), pick.choice([16, 48])
    shared, own = (pick.randint(1, 6) * per_mean for _ in "so")
    asked = dict(
        batch=texts * beams,
        heads=pick.randint(1, 3),
        group=pick.choice([1, 3, 4, 7]),
        dim=pick.choice([64, 96, 128]),
        new=pick.choice([1, 1, 1, 3]),
        exact=pick.randint(3, 40),
        lengths=[shared + own],
        capacities=[shared + own + pick.choice([0, 1, 70])],
        widths=[pick.choice(WIDTHS)],
        per_mean=per_mean,
        contiguous=pick.random() < 0.3,
        softcap=pick.choice([None, None, 30.0]),
        sinks=pick.random() < 0.3,
        holes=pick.choice([0.0, 0.1, 0.9]),
        dtype=pick.choice(list(CLOSE)),
    )
    args, options = problem(seed, **asked | fixed)
    (view,) = args[5]
    view = forked(view, beams, shared)
    whole = (*args[:5], [view])
    first = shared - per_mean * pick.randint(0, shared // per_mean)  # perhaps slots of both parts
    parts = halves(view, beams, shared)
    parts[1] = parts[1]._replace(first=first)
    read = [shared + pick.randint(0, own), shared + own - first]
    return (whole, options), ((*args[:5], parts), options | dict(bits=options["bits"] * 2, slots_read=read))


@pytest.mark.parametrize("seed", slow_but(range(60), *range(8)))
def test_a_step_reads_shared_slots_once(seed, eager_tile):
    eager_tile(TILES[seed % len(TILES)])
    (args, options), (parts, in_parts) = search(seed)
    expected, _ = naive(*args, **options)
    found = decode.attend(*parts, **in_parts)
    assert found.dtype == args[0].dtype and found.is_contiguous()
    assert distance(found, expected) <= CLOSE[found.dtype]


def test_steps_are_refused_whose_parts_do_not_fit():
    """Each by its reason, before anything is computed."""
    _, (args, options) = search(1, dtype=torch.float64, new=1, widths=[(4, 4)])
    together, own = args[5]
    attend = lambda *tiers, **more: decode.attend(*args[:5], list(tiers), **options | more)  # noqa: E731
    mass = [torch.zeros(*args[1].shape[:2], n) for n in (args[1].shape[2], 1, 1)]
    with pytest.raises(ValueError, match="beams; allowed: a divisor of"):
        attend(together._replace(beams=5), own)
    with pytest.raises(ValueError, match="beams; allowed with mass"):
        attend(together, own, mass=mass)
    with pytest.raises(ValueError, match="beams; allowed with mass"):
        attend(together._replace(first=0), own)
    with pytest.raises(ValueError, match="valid has 2 rows"):
        attend(together._replace(valid=together.valid.expand(-1, 2, -1)), own)
    with pytest.raises(ValueError, match="is read from slot 3 on; allowed: a multiple"):
        attend(together, own._replace(first=3), slots_read=[1, 1])
    with pytest.raises(ValueError, match="slots from slot .* on; allowed: 1 to its capacity"):
        attend(together, own._replace(first=own.per_mean), slots_read=[1, own.capacity])
    with pytest.raises(ValueError, match="keys.codes is"):
        attend(own._replace(beams=together.beams, first=None), own)


@pytest.mark.slow
@pytest.mark.parametrize("group, bits", [(4, (4, 4)), (1, (8, 8))])
def test_one_compiled_graph_serves_every_fork(group, bits, traced_kernels):
    """Traced as on CUDA: wherever rows part, and however far they have come."""
    fixed = dict(
        batch=4, heads=2, group=group, new=1, exact=20, lengths=[2048], capacities=[2048], widths=[bits],
        per_mean=64, contiguous=False, holes=0.1, dtype=torch.float16, softcap=None, sinks=False,
    )  # fmt: skip
    args, options = problem(5, **fixed)
    twin = compiling.Compiled(decode._of_dynamic_size)
    constants = dict(bits=(bits, bits), scaling=options["scaling"], softcap=None, interleaved=False)
    for shared, first, own in ((512, 512, 256), (640, 448, 512), (1024, 960, 768)):
        whole = forked(args[5][0], 2, shared)
        parts, read = halves(whole, 2, shared), [shared + 128, own]
        sizes = [(4, 2 * group), (8, max(2, group))]
        chunks = decode._chunks_of(sizes, read, constants["bits"], [False, False])
        assert chunks == (128, 128)
        numbers = [*(n // 128 for n in read), first // 64]
        tiers = [parts[0], parts[1]._replace(first=0)]
        inputs = (*args[:5], tiers, None, None, [])
        with torch.no_grad():
            dynamic_sizes = [compiling.dynamic_size(n) for n in numbers]
            found = twin(dynamic_sizes, dict, *inputs, chunks=chunks, slots_read=None, **constants)
        slot = torch.arange(2048)
        seen = whole._replace(valid=whole.valid & (slot < first + own))
        expected, _ = naive(*args[:5], [seen], **options | dict(slots_read=[2048]))
        assert distance(found, expected) <= 0.02  # a CPU rounds sums of float16 products
    assert len(twin.graphs) == 1 and counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group, bits", [(4, (4, 4)), (1, (8, 8)), (3, (2, 2))])
def test_compiled_steps_on_a_gpu(group, bits, dtype):
    """One graph serves two forks; each output is that of `naive`."""
    fixed = dict(
        batch=8, heads=2, group=group, dim=128, new=1, exact=40, lengths=[6144], capacities=[6144],
        widths=[bits], per_mean=64, contiguous=False, softcap=None, sinks=False, holes=0.1, dtype=dtype,
    )  # fmt: skip
    args, options = problem(6, **fixed)
    graphs = []
    for shared, first, own in ((4096, 4096, 1024), (3072, 3008, 2048)):
        whole = forked(args[5][0], 4, shared)
        slot = torch.arange(6144)
        seen = whole._replace(valid=whole.valid & (slot < first + own))
        expected, _ = naive(*args[:5], [seen], **options)
        parts = halves(whole, 4, shared)
        parts[1] = parts[1]._replace(first=first)
        on_gpu = lambda x: tree_map(lambda y: y.cuda() if isinstance(y, torch.Tensor) else y, x)  # noqa: E731
        more = dict(bits=[bits] * 2, slots_read=[shared + 512, own])
        found = decode.attend(*on_gpu(args[:5]), on_gpu(parts), **options | more).cpu()
        assert distance(found, expected) <= CLOSE[torch.bfloat16]  # products and parts are in float16
        graphs.append(len(decode._compiled.graphs))
    assert graphs[0] == graphs[1]
