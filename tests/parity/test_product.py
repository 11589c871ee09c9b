"""The PQ kernel against the specification: codes, and attention by tables and histograms."""

import pytest
import torch

from fade_fast.kernels import product as kernel
from fade_ref import product
from parity import cases
from parity.cases import Shape
from parity.tolerances import CODES_DIFFERING, PRODUCT, TIE

from ..marks import slow_but


def sample(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", slow_but([torch.float64, torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize(
    "dim, width",
    slow_but([(64, 4), (80, 4), (80, 5), (96, 6), (128, 2), (256, 8), (64, 64)], (64, 4), (80, 5)),
)
@pytest.mark.parametrize("per_head", [False, True])
def test_codes(dim, width, dtype, per_head):
    """Of vectors with a channel offset, and a codebook of such vectors."""
    offset = torch.linspace(-9, 9, dim, dtype=torch.float64)
    x = (sample(2, 3, 60, dim, seed=dim + width) + offset).to(dtype)
    own = sample(3, 64, dim, seed=1) + offset
    book = own.unflatten(-1, (-1, width)).transpose(1, 2).half()
    found = cases.product_codes(x, book if per_head else book[0])
    assert found.differing <= max(1, CODES_DIFFERING * found.total) and found.excess <= TIE


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_codes_at_ties(scale):
    """Inputs halfway between two centroids, to a rounding: either code, but no third."""
    book = (sample(16, 64, 4, seed=2) * scale).half()
    pair = torch.randint(0, 64, (2, 500, 16), generator=torch.Generator().manual_seed(3))
    ends = product.decode(pair, book.double())
    found = cases.product_codes(ends.mean(0)[None, None].float(), book)
    assert found.excess <= TIE


def test_codes_of_a_trained_codebook():
    x = sample(1500, 32, seed=4)
    found = cases.product_codes(x[None, None].float(), product.train(x, 4, 32))
    assert found.differing <= CODES_DIFFERING * found.total and found.excess <= TIE


def test_decoding_is_equal():
    book = sample(16, 32, 4, seed=5).half()
    codes = torch.randint(0, 32, (2, 3, 7, 16), generator=torch.Generator().manual_seed(6)).byte()
    assert torch.equal(kernel.decode(codes, book, torch.float64), product.decode(codes, book.double()))


SHAPES = [
    dict(shape=Shape(group=1), length=1),
    dict(shape=Shape(group=3), length=77, queries=5, centroids=(16, 16)),
    dict(shape=Shape(heads=1, group=7, head_dim=80), length=50, widths=(5, 2), centroids=(64, 256)),
    dict(shape=Shape(heads=3, group=2, head_dim=96), length=130, widths=(4, 6), softcap=0.5, per_head=True),
    dict(shape=Shape(heads=2, group=4, head_dim=128), length=300, softcap=20.0),
    dict(shape=Shape(batch=1, heads=2, group=8, head_dim=256), length=90, queries=8, centroids=(32, 16)),
    dict(shape=Shape(batch=1, heads=1, group=4), length=3000, widths=(2, 32), per_head=True),
]


@pytest.mark.parametrize(
    "case", slow_but(SHAPES, *SHAPES[1:4]), ids=lambda c: f"G{c['shape'].group} D{c['shape'].head_dim}"
)
@pytest.mark.parametrize("dtype", slow_but([torch.float64, torch.float32], torch.float32))
@pytest.mark.parametrize("elements", [1, kernel.ELEMENTS], ids=["short tiles", "tiles"])
def test_attention(case, dtype, elements, product_elements):
    product_elements(elements)
    shape = Shape(**{**vars(case["shape"]), "dtype": dtype})
    found = cases.product_attention(**{**case, "shape": shape}, seed=case["length"])
    assert max(found.values()) <= PRODUCT[dtype], found
