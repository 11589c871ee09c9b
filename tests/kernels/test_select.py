"""The index and the choice of pages, compared with fade_ref.select in float64: any shape, any hole."""

import itertools
import random

import pytest
import torch
from torch._dynamo.utils import counters

from fade_fast.kernels import halves, packed, pages, rotated
from fade_fast.kernels import select as kernel
from fade_fast.policies import select as policy
from fade_ref import quantize
from fade_ref import select as spec

from ..marks import slow_but
from .test_decode import poison, table, tier

PAGE = 8


def test_halves_of_every_byte():
    codes = torch.arange(256, dtype=torch.uint8).repeat(16).reshape(-1, 16)
    one, others = halves.split(codes, 1)
    assert one.shape[-1] == 4 and torch.equal(halves.join(one, others), codes)
    exact = 3 * spec.split(rotated.unpack(codes, 4).to(torch.uint8), kept=1)[0]
    assert torch.equal(halves.as_two_bits(one, 1), rotated.pack(exact, 2))
    upper, lower = halves.split(codes)
    assert torch.equal(halves.join(upper, lower), codes) and torch.equal(halves.as_two_bits(upper, 2), upper)
    exact = [rotated.pack(x, 2) for x in spec.split(rotated.unpack(codes, 4).to(torch.uint8))]
    assert torch.equal(upper, exact[0]) and torch.equal(lower, exact[1])


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("uniform", [True, False])
def test_the_upper_part_is_read_at_the_middle_of_each_cell(uniform, kept):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (30, 32), generator=draw, dtype=torch.uint8)
    scale = torch.rand(30, generator=draw).half() + 0.1
    zero = torch.randn(30, generator=draw).half() if uniform else None
    upper = halves.as_two_bits(halves.split(rotated.pack(codes, 4), kept)[0], kept)
    found = rotated.dequantize(
        rotated.Packed(upper, *halves.coarse(scale, zero, torch.float64, kept)), 2, torch.float64
    )
    torch.testing.assert_close(found, spec.index_keys(codes, scale, zero, kept=kept))


def problem(
    seed=0, batch=2, heads=2, group=3, dim=64, new=1, exact=9, length=160, capacity=None, per_mean=64,
    holes=0.1, window=False, by_head=False, dtype=torch.float64, blind=False, kept=2,
):  # fmt: skip
    """Query, dense keys, their mask, the table and a view whose key codes are halves. Holes hold NaN."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
    query, keys = normal(batch, heads * group, new, dim), normal(batch, heads, exact, dim)
    seen = torch.rand(batch, 1, exact, generator=draw) >= holes
    keys = poison(keys, ~seen[:, 0, None, :, None])
    valid = torch.rand(batch, new if window else 1, length, generator=draw) >= holes
    valid[0, :, : length // 3] = False
    if blind:
        valid[0] = False
    valid = torch.nn.functional.pad(valid, (0, (capacity or length) - length))
    view = tier(draw, valid, (4, 4), heads, dim, per_mean)
    matrix = table(dim)
    if by_head:  # matched codes: a matrix for each head, and no zero point
        matrix = torch.stack([matrix, matrix.flip(-1)][:heads])
        keys_ = view.keys._replace(zero=None)
        view = view._replace(keys=keys_)
    upper, lower = halves.split(view.keys.codes, kept)
    return query, keys, seen, matrix, view._replace(keys=view.keys._replace(codes=lower), key_index=upper)


def exact_mass(query, view, matrix, length, page, scaling, softcap=None):
    """The same by the specification, row by row. Also all scores, -inf where nothing is seen."""
    (batch, _, new, dim), heads = query.shape, view.key_index.shape[1]
    codes = quantize.unpack(halves.join(view.key_index, view.keys.codes), 4, dim)
    out = torch.zeros(batch, heads, new, length // page, dtype=torch.float64)
    for b in range(batch):
        zero = None if view.keys.zero is None else view.keys.zero[b, :, :length]
        kept = view.key_index.shape[-1] * 8 // dim
        y = spec.index_keys(codes[b, :, :length], view.keys.scale[b, :, :length], zero, kept=kept)
        mean = view.means[b].double().repeat_interleave(min(view.per_mean, length), 1)[:, :length]
        per_head = matrix if matrix.dim() == 3 else matrix.expand(heads, -1, -1)
        whole = y @ per_head[:, :dim].double() + mean  # [H, n, D]
        for i in range(new):
            row = min(i, view.valid.shape[1] - 1)
            q = query[b, :, i].double().unflatten(0, (heads, -1))
            scores = scaling * torch.einsum("hgd,hnd->hgn", q, whole).flatten(0, 1)
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~view.valid[b, row, :length], -torch.inf)
            out[b, :, i] = spec.page_mass(scores, page, heads)
    return out


SHAPES = {
    "one query": dict(),
    "several queries": dict(new=5, group=2),
    "window": dict(new=3, window=True),
    "matrices of heads": dict(by_head=True),
    "one mean": dict(per_mean=1 << 30),
    "head_dim 128, group 8": dict(dim=128, group=8, heads=1),
    "head_dim 256": dict(dim=256, group=1),
    "a row that sees nothing": dict(blind=True, new=2),
    "more slots than are read": dict(capacity=200),
    "long": dict(length=600),
    "one bit": dict(kept=1, new=2),
    "one bit, matrices of heads": dict(kept=1, by_head=True, dim=128),
}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", SHAPES)
def test_mass_equals_the_specification(name, softcap, monkeypatch):
    monkeypatch.setattr(packed, "EAGER_TILE", 128)
    options = dict(length=160) | SHAPES[name]
    for page in (8, 32):
        query, keys, seen, matrix, view = problem(**options)
        args = query, keys, seen, matrix, view, options["length"] // page * page, page
        if options["length"] % page:
            continue
        found = kernel.page_mass(*args, scaling=0.3, softcap=softcap)
        exact = exact_mass(query, view, matrix, args[5], page, 0.3, softcap)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
        assert name != "a row that sees nothing" or not found[0].any() and found[1].any()


def test_mass_in_float32_and_arguments_that_are_refused():
    query, keys, seen, matrix, view = problem(dtype=torch.float32)
    found = kernel.page_mass(query, keys, seen, matrix, view, 160, PAGE, scaling=0.3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), exact_mass(query, view, matrix, 160, PAGE, 0.3), rtol=1e-4, atol=1e-7
    )
    for num_read in (0, 12, 168):
        with pytest.raises(ValueError, match=f"num_read={num_read}"):
            kernel.page_mass(query, keys, seen, matrix, view, num_read, PAGE, scaling=0.3)
    with pytest.raises(ValueError, match="key_index"):
        kernel.page_mass(query, keys, seen, matrix, view.whole(), 160, PAGE, scaling=0.3)


@pytest.mark.parametrize("options", [dict(), dict(by_head=True, new=2, group=2), dict(kept=1)], ids=str)
def test_the_arithmetic_of_the_compiled_version(options, uncompiled_kernels):
    """Float16 products, run eagerly on the shapes of a GPU: masses within their rounding."""
    for softcap in (None, 4.0):
        query, keys, seen, matrix, view = problem(length=256, capacity=320, dtype=torch.float16, **options)
        found = kernel.page_mass(query, keys, seen, matrix, view, 256, PAGE, scaling=0.2, softcap=softcap)
        exact = exact_mass(query, view, matrix, 256, PAGE, 0.2, softcap)
        assert found.shape == exact.shape and kernel._compiled.graphs
        torch.testing.assert_close(found.double(), exact, rtol=3e-2, atol=2e-4)


@pytest.mark.slow
def test_one_compiled_graph_serves_every_length(traced_kernels, compiled_on):
    compiled_on("cpu")
    query, keys, seen, matrix, view = problem(length=1280, capacity=1408, dtype=torch.float16, heads=1)
    for num_read in (256, 512, 1024, 1280):
        limited = view._replace(valid=view.valid & (torch.arange(1408) < num_read))
        found = kernel.page_mass(query, keys, seen, matrix, limited, num_read, PAGE, scaling=0.2)
        exact = exact_mass(query, limited, matrix, num_read, PAGE, 0.2)
        torch.testing.assert_close(found.double(), exact, rtol=3e-2, atol=2e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


# -- the choice


@pytest.mark.parametrize("seed", slow_but(range(12), 0, 1, 2))
def test_the_choice_equals_the_specification(seed):
    draw, pick = torch.Generator().manual_seed(seed), random.Random(seed)
    pages = pick.randint(1, 40)
    mass = torch.randint(0, pick.choice([2, 6, 1000]), (2, 3, 2, pages), generator=draw).double()  # with ties
    mass = mass / mass.sum(-1, keepdim=True).clamp_min(1)
    budget, share = pick.randint(1, pages), pick.choice([None, 0.31, 0.87])
    index, keep = policy.choose(mass.float(), budget, share)
    for b in range(2):
        for i in range(2):
            exact = spec.choose(mass[b, :, i].float(), budget, share)
            for h in range(3):
                found = index[b, h, i].tolist()
                kept = found if keep is None else [p for p, k in zip(found, keep[b, h, i].tolist()) if k]
                assert kept == exact[h] if share else sorted(kept) == sorted(exact[h])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("pages", [300, 4096, 20000, 120000])  # PyTorch has a kernel for each
def test_a_gpu_chooses_the_older_of_equal_pages(pages):
    draw = torch.Generator().manual_seed(pages)
    mass = torch.randint(0, 9, (2, 8, 1, pages), generator=draw) / 9
    index, keep = policy.choose(mass.cuda(), 256)
    exact = [sorted(spec.choose(mass[b, :, 0], 256)[h]) for b in range(2) for h in range(8)]
    assert keep is None and index.sort().values.flatten(0, 2).tolist() == exact


def test_masses_far_apart_and_zero_masses_are_ranked():
    mass = torch.tensor([[[[0.0, 1e-38, 1.0, 1e-44, 0.0, 0.5]]]])
    for count in range(1, 7):
        heaviest = policy.choose(mass, count)[0].flatten().tolist()
        assert sorted(heaviest) == sorted([2, 5, 1, 0, 3, 4][:count])  # 1e-44 counts as 0


@pytest.fixture(params=["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def version(request, compiled_on):
    """Run kernels eagerly, or compiled for the CPU."""
    if request.param == "compiled":
        compiled_on("cpu")


def test_pages_are_gathered_for_each_head(version):
    draw = torch.Generator().manual_seed(0)
    index = torch.randint(0, 5, (2, 3, 4), generator=draw)
    keep = torch.rand(2, 3, 4, generator=draw) < 0.7
    kinds = dict(codes=((8,), torch.uint8), scale=((), torch.float16), odd=((3,), torch.uint8))
    fields = {
        name: torch.randint(0, 200, (2, 3, 40, *shape), generator=draw).to(dtype)
        for name, (shape, dtype) in kinds.items()
    }
    means, valid = torch.randn(2, 3, 3, 4, generator=draw), torch.rand(2, 40, generator=draw) < 0.8
    for kept in (None, keep):
        found = pages.gather(fields, means, valid, index, kept, page=8, per_mean=16)
        for b, h in itertools.product(range(2), range(3)):
            slots = torch.cat([torch.arange(8 * p, 8 * p + 8) for p in index[b, h].tolist()])
            assert all(torch.equal(found[name][b, h], x[b, h, slots]) for name, x in fields.items())
            assert torch.equal(found["mean"][b, h], means[b, h, index[b, h] * 8 // 16])
            sees = valid[b, slots] if kept is None else valid[b, slots] & kept[b, h].repeat_interleave(8)
            assert torch.equal(found["valid"][b, h], sees)


def test_queries_of_a_step_gather_from_their_row():
    draw = torch.Generator().manual_seed(0)
    index = torch.randint(0, 5, (6, 3, 4), generator=draw)  # three queries of two rows
    x, means = torch.randn(2, 3, 40, generator=draw), torch.randn(2, 3, 1, 4, generator=draw)
    valid = torch.rand(6, 40, generator=draw) < 0.8
    found = pages.gather(dict(x=x), means, valid, index, None, page=8, per_mean=40)
    for n, h in itertools.product(range(6), range(3)):
        slots = torch.cat([torch.arange(8 * p, 8 * p + 8) for p in index[n, h].tolist()])
        assert torch.equal(found["x"][n, h], x[n // 3, h, slots])
        assert torch.equal(found["mean"][n, h], means[n // 3, h].expand(4, -1))
        assert torch.equal(found["valid"][n, h], valid[n, slots])


@pytest.mark.parametrize("dim", [32, 80, 128])
@pytest.mark.parametrize("kept", [1, 2])
def test_parts_of_codes_are_joined_as_they_are_gathered(dim, kept, version):
    """In words where those of a token fill some, as at 128 channels, and also with a lower part that came
    from somewhere else."""
    draw = torch.Generator().manual_seed(dim)
    codes = torch.randint(0, 256, (2, 3, 40, dim // 2), generator=draw, dtype=torch.uint8)
    upper, lower = (x.contiguous() for x in halves.split(codes, kept))
    index = torch.randint(0, 5, (2, 3, 4), generator=draw)
    means, valid = torch.zeros(2, 3, 1, 4), torch.ones(2, 40, dtype=torch.bool)
    options = dict(page=8, per_mean=40, join=("upper", "lower"))
    found = pages.gather(dict(upper=upper, lower=lower), means, valid, index, None, **options)
    parts = dict(upper=upper, lower=lower)
    apart = pages.gather(parts, means, valid, index, None, page=8, per_mean=40)
    apart = {name: apart[name] for name in parts}
    one, both = dict(lower=apart["lower"]), apart
    given = pages.gather(dict(upper=upper), means, valid, index, None, given=one, **options)
    joined = pages.gather({}, means, valid, index, None, given=both, **options)
    for b, h in itertools.product(range(2), range(3)):
        expected = codes[b, h].unflatten(0, (5, 8))[index[b, h]].flatten(0, 1)
        assert all(torch.equal(x["lower"][b, h], expected) for x in (found, given, joined))
    assert not any("upper" in x for x in (found, given, joined))


def test_one_compiled_version_chooses_from_any_number_of_pages(traced_kernels, compiled_on):
    """A growing text has more and more pages, and must not compile for each number of them."""
    draw, found = torch.Generator().manual_seed(0), []
    masses = [torch.rand(2, 3, 1, n, generator=draw) for n in (40, 56, 41, 8)]
    blocks = torch.stack([torch.randperm(9, generator=draw)[:5] for _ in range(6)]).view(2, 3, 1, 5)
    asked = [(x, dict(share=share)) for x in masses for share in (None, 0.1)]
    asked.append((masses[0].clone(), dict(blocks=blocks, per_block=8)))
    for device in ((), ("cpu",)):
        compiled_on(*device)
        found.append([policy.choose(x, 8, **options) for x, options in asked])
    assert counters["stats"]["unique_graphs"] == 3
    for (eager, kept), (chosen, keep) in zip(*found):
        assert torch.equal(chosen, eager) and (keep is kept is None or torch.equal(keep, kept))


@pytest.mark.slow
def test_compiled_residency_equals_eager(compiled_on):
    draw, states = torch.Generator().manual_seed(0), []
    steps = [torch.stack([torch.randperm(20, generator=draw)[:4] for _ in range(6)]) for _ in range(9)]
    keeps = [torch.rand(2, 3, 4, generator=draw) < 0.8 for _ in range(9)]
    for compiled in (False, True):
        if compiled:
            compiled_on("cpu")
        residency = policy.Residency(2, 3, 6, "cpu")
        residency.reserve(20)
        found = [residency.touch(i.reshape(2, 3, 4), k) for i, k in zip(steps, keeps)]
        states.append([x for pair in found for x in pair] + [x[..., :-1] for x in residency.tensors()[:3]])
    assert any(x.any() for x in states[0][1:18:2]) and all(map(torch.equal, *states))
