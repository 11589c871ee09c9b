"""Product quantization: codes, decoding, and attention with tables."""

import itertools

import torch

from fade_fast.kernels import product as kernel
from fade_ref import product as spec
from fade_ref.tiers import Tier

from .. import cases as measure
from ..case import Case, Draw, Found
from ..tolerances import PRODUCT

COVERS = (f"tier {Tier.PQ.name}",)
BOOKS = [(64, 4), (80, 4), (80, 5), (96, 6), (128, 2), (256, 8), (64, 64)]  # head_dim, width
SHAPES = {
    "one token": dict(shape=dict(group=1), length=1),
    "q5, few centroids": dict(shape=dict(group=3), length=77, queries=5, centroids=(16, 16)),
    "two widths": dict(
        shape=dict(heads=1, group=7, head_dim=80), length=50, widths=(5, 2), centroids=(64, 256)
    ),
    "softcap, books of heads": dict(
        shape=dict(heads=3, group=2, head_dim=96), length=130, widths=(4, 6), softcap=0.5, per_head=True
    ),
    "D128": dict(shape=dict(heads=2, group=4, head_dim=128), length=300, softcap=20.0),
    "D256, q8": dict(
        shape=dict(batch=1, heads=2, group=8, head_dim=256), length=90, queries=8, centroids=(32, 16)
    ),
    "long": dict(shape=dict(batch=1, heads=1, group=4), length=3000, widths=(2, 32), per_head=True),
}


def collect() -> list[Case]:
    cases = []
    for (dim, width), dtype in itertools.product(BOOKS, (torch.float64, torch.float32, torch.bfloat16)):
        name = f"D{dim}, {width} elements a code, {dtype}".replace("torch.", "")
        cases.append(Case("product", "encode", name, _encode(dim, width, dtype), COVERS, dtype))
    for scale in (2.0**-10, 1.0, 2.0**10):
        cases.append(Case("product", "encode", f"ties everywhere, scale {scale:g}", _ties(scale), COVERS))
    cases.append(Case("product", "decode", "books of heads and of all", _decode, COVERS))
    for name, dtype in itertools.product(SHAPES, PRODUCT):
        title = f"{name}, {dtype}".replace("torch.", "")
        cases.append(Case("product", "attention", title, _attend(SHAPES[name], dtype), COVERS, dtype))
    return cases


def _encode(dim, width, dtype):
    def run(found: Found, seed: int):
        draw, offset = Draw(seed), torch.linspace(-9, 9, dim, dtype=torch.float64)
        x = (draw.normal(2, 3, 60, dim) + offset).to(dtype)
        book = (draw.normal(3, 64, dim) + offset).unflatten(-1, (-1, width)).transpose(1, 2).half()
        for books in (book, book[0]):
            result = measure.product_codes(x, books, device=found.device)
            share = max(0, result.differing - 1) / result.total
            found.near("product codes differing", share)
            found.near("product codes", result.excess)

    return run


def _ties(scale):
    """Inputs halfway between two centroids, within a rounding. Both codes are allowed, but no third code."""

    def run(found: Found, seed: int):
        draw = Draw(seed)
        book = (draw.normal(16, 64, 4) * scale).half()
        ends = spec.decode(draw.integers(0, 64, 2, 500, 16), book.double())
        result = measure.product_codes(ends.mean(0)[None, None].float(), book, device=found.device)
        found.near("product codes", result.excess)

    return run


def _decode(found: Found, seed: int):
    draw = Draw(seed)
    books = draw.normal(3, 16, 32, 4).half()
    codes = draw.integers(0, 32, 2, 3, 7, 16).to(torch.uint8)
    there = codes.to(found.device)
    exact = spec.decode(codes, books[0].double())
    found.same("centroids", kernel.decode(there, books[0].to(found.device), torch.float64), exact)
    exact = torch.stack([spec.decode(codes[:, h], books[h].double()) for h in range(3)], dim=1)
    found.same("centroids", kernel.decode(there, books.to(found.device), torch.float64), exact)


def _attend(options, dtype):
    def run(found: Found, seed: int):
        shape = measure.Shape(**options["shape"], dtype=dtype, device=found.device)
        before = kernel.ELEMENTS
        for elements in (1, before):  # short and long tiles of tokens
            kernel.ELEMENTS = elements
            try:
                errors = measure.product_attention(**{**options, "shape": shape}, seed=seed % 2**31)
            finally:
                kernel.ELEMENTS = before
            for name, error in errors.items():
                found.near("product attention", error, name, dtype=dtype)

    return run
