"""Numbers of pages and their masses, compared with fade_ref.summaries row by row: any shape, any hole."""

import pytest
import torch
from torch._dynamo.utils import counters

from fade_fast.cache.summaries import Summaries
from fade_fast.kernels import summaries as kernel
from fade_ref import select as spec
from fade_ref import summaries
from fade_ref.attention import Terms

from ..marks import slow_but
from .test_decode import poison

SHAPES = {
    "plain": {},
    "several queries": dict(new=3),
    "a window": dict(new=2, window=True),
    "head_dim 128, group 8": dict(dim=128, group=8, heads=1),
    "pages of 32": dict(page=32),
    "nothing is seen": dict(blind=True, new=2),
}


@pytest.mark.parametrize("kind", ["bounds", "deviation"])
@pytest.mark.parametrize("name", slow_but(SHAPES, "plain", "a window", "nothing is seen"))
def test_mass_equals_the_specification(kind, name):
    mass_is_exact(kind, **SHAPES[name])


def mass_is_exact(
    kind, batch=2, heads=2, group=3, dim=64, new=1, page=8, length=96, window=False, blind=False
):
    draw = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64)  # noqa: E731
    query, keys = normal(batch, heads * group, new, dim), 2 * normal(batch, heads, length, dim) + 1
    real = torch.rand(batch, 1, length, generator=draw) < 0.9
    real[0, :, : length // 3] = False
    valid = real & (torch.rand(batch, new if window else 1, length, generator=draw) < 0.9)
    if blind:
        valid[0] = False
    keys = poison(keys, ~real.unsqueeze(-1))
    first, second = kernel.summarize(kind, keys, real, page)
    exact = [summaries.summarize(kind, keys[b], real[b, 0], page) for b in range(batch)]
    assert torch.equal(torch.stack((first, second), dim=3).double(), torch.stack(exact))
    first, second = (
        poison(x, ~real.unflatten(-1, (-1, page)).any(-1).unsqueeze(-1)) for x in (first, second)
    )
    for softcap in (None, 3.0):
        options = dict(scaling=0.3, softcap=softcap)
        found = kernel.page_mass(kind, query, first, second, valid, length // page, page, **options)
        single = kernel.page_mass(kind, query.float(), first, second, valid, length // page, page, **options)
        for b in range(batch):
            for i in range(new):
                seen, terms = valid[b, i if window else 0], Terms(0.3, softcap)
                log_mass = summaries.log_mass(kind, query[b, :, i : i + 1], exact[b], seen, page, terms)
                mass = spec.mass_of(log_mass, heads)
                torch.testing.assert_close(found[b, :, i], mass, rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(single[b, :, i].double(), mass, rtol=1e-4, atol=1e-6)
    assert single.dtype == torch.float32 and (not blind or not found[0].any())


def test_a_number_of_pages_that_there_is_not_is_refused():
    first, query = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 1, 8)
    for count, slots in ((0, 32), (5, 48), (4, 31)):
        valid = torch.ones(1, 1, slots, dtype=torch.bool)
        with pytest.raises(ValueError, match=f"count={count}: 1 to {min(4, slots // 8)} pages"):
            kernel.page_mass("bounds", query, first, first, valid, count, 8, scaling=0.3)


GROWING = [("bounds", 1, None), ("deviation", 3, 4.0)]


@pytest.mark.parametrize("kind, new, softcap", slow_but(GROWING, GROWING[0]))
def test_one_compiled_graph_serves_every_number_of_pages(kind, new, softcap, traced_kernels, compiled_on):
    """A growing text has more and more pages, and must not compile for each number of them."""
    compiled_on("cpu")
    draw, page, capacity = torch.Generator().manual_seed(0), 8, 1032
    query = torch.randn(2, 6, new, 64, generator=draw).half()
    keys = torch.randn(2, 2, capacity, 64, generator=draw)
    real = torch.rand(2, 1, capacity, generator=draw) < 0.9
    sees = real & (torch.rand(2, new, capacity, generator=draw) < 0.9)
    pages = Summaries(kind, page, 2, 2, 64, "cpu")
    pages.pages.reserve(capacity // page)
    pages.append(keys, real)
    for slots in (256, 384, 512, 768, 1024):
        valid = sees & (torch.arange(capacity) < slots)
        options = dict(scaling=0.3, softcap=softcap)
        found = pages.mass(query, valid, slots, **options)
        exact = pages.mass(query.double(), valid, slots, **options)
        assert found.shape == (2, 2, new, slots // page)
        torch.testing.assert_close(found.double(), exact, rtol=3e-2, atol=2e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
