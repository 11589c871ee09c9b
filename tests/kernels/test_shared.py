"""Tiers that beams share: the output is that of rows that each read for themselves."""

import functools
import random

import pytest
import torch

from fade_fast.kernels import decode
from fade_fast.kernels.packed import TierView
from fade_fast.kernels.rotated import Packed

from ..marks import slow_but
from .test_decode import CLOSE, ONE, TILES, WIDTHS, distance, naive, no_loops, poisoned, problem  # noqa: F401


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
