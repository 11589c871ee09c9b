"""Scores of pages from a few numbers of each page. `fade_ref.summaries` explains them."""

import functools
import math

import torch
from torch import Tensor

from ..compile.compiled import Compiled, dynamic_size, more_rows, rounded, use_compiled
from ..compile.tiles import summary_tiles
from .decode import LOWEST, MOST_ROWS
from .merge import of_rows
from .packed import force_materialize

DEVIATIONS = 2.0  # standard deviations from the mean at which "deviation" scores a page
WIDEST = 65504.0  # of float16
LARGEST_DEVIATION = 255.0  # whose square is a float16
UNIT = 16  # pages: a known divisor of the length of a row, so that kernels load several numbers at once


def summarize(kind: str, keys: Tensor, real: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Two numbers of each channel of each page, float16 [B, H, P, D] each; 0 for a page without a token.

    Args:
        kind: "bounds": minimum and maximum. "deviation": mean and standard deviation.
        keys: [B, H, n, D], decoded; n a multiple of `page`. Slots without a token may hold anything.
        real: bool [B, 1 or H, n], which slots hold a token.
    """
    keys, real = keys.unflatten(2, (-1, page)), real.unflatten(2, (-1, page)).unsqueeze(-1)
    count = real.sum(3)  # [B, 1 or H, P, 1]
    if kind == "bounds":
        first = torch.where(real, keys, torch.inf).amin(3)
        second = torch.where(real, keys, -torch.inf).amax(3)
    else:
        own, most = torch.where(real, keys, 0.0), count.clamp_min(1)
        first = own.sum(3) / most
        apart = torch.where(real, own - first.unsqueeze(3), 0.0)
        second = (apart.square().sum(3) / most).sqrt()
    return tuple(
        torch.where(count > 0, x, 0.0).clamp(-WIDEST, WIDEST).to(torch.float16) for x in (first, second)
    )


def page_mass(
    kind: str,
    query: Tensor,
    first: Tensor,
    second: Tensor,
    valid: Tensor,
    count: int,
    page: int,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Probability mass of each page for each query and KV head, float32 or float64 [B, H, q, count].

    Args:
        kind: "bounds" or "deviation".
        query: [B, Hq, q, D].
        first, second: [B, H, P, D], from `summarize`, at full capacity. Pages without a token may hold
            anything.
        valid: bool [B, 1 or q, S], which tokens each query sees, at full capacity.
        count: pages that are read, the first ones: at most P and S / page.
        page: tokens of a page.
        scaling, softcap: of scores.

    On CUDA, for two-byte dtypes and up to `MOST_ROWS` query rows, one compiled graph serves all counts that
    are multiples of `UNIT`. Other counts share a graph if they share their largest power of two. In all
    other cases the function runs in float32, or in float64 if the query is float64.

    Raises `ValueError` if there are not so many pages.
    """
    most = min(first.shape[2], valid.shape[-1] // page)
    if not 0 < count <= most:
        raise ValueError(f"count={count}: 1 to {most} pages are allowed")
    heads, new = first.shape[1], query.shape[2]
    rows = max(2, query.shape[1] // heads * rounded(new))
    options = dict(kind=kind, page=page, softcap=softcap)
    if not (use_compiled(query) and query.dtype.itemsize == 2 and rows <= MOST_ROWS):
        dtype = torch.promote_types(query.dtype, torch.float32)
        asked = of_rows(query.to(dtype) * scaling, heads)
        first, second, valid = _beginning(first, second, valid, count, page)
        return _of_pages(*_moments(kind, asked, first.to(dtype), second.to(dtype)), valid, new, **options)
    if new > 1:
        query, valid = more_rows(query, rounded(new)), more_rows(valid, rounded(new))
    unit = math.gcd(count, UNIT)
    # The compiler would make constants of such counts, so they have graphs of their own.
    tied = count == unit or count == first.shape[2] or count * page == valid.shape[-1]
    sizes = [] if tied else [dynamic_size(count // unit)]
    options |= dict(scaling=scaling, unit=unit, units=count // unit if tied else None)
    pinned = functools.partial(summary_tiles, rows, query.shape[-1])
    return _compiled(sizes, pinned, query.contiguous(), first, second, valid, **options).narrow(2, 0, new)


def _beginning(first: Tensor, second: Tensor, valid: Tensor, count: int, page: int) -> list[Tensor]:
    """The numbers and the masks of the first `count` pages."""
    return [first.narrow(2, 0, count), second.narrow(2, 0, count), valid.narrow(-1, 0, count * page)]


def _moments(kind: str, rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
    """Two parts of the scores [B, H, R, P] of queries [B, H, R, D] that are scaled already."""
    if kind == "bounds":
        return rows.clamp_min(0) @ second.mT, rows.clamp_max(0) @ first.mT
    return rows @ first.mT, rows.square() @ second.square().mT


def _compiled_mass(
    dynamic_sizes, query, first, second, valid, *, kind, page, unit, units, scaling, softcap
) -> Tensor:
    """The same in one graph: products in float16, everything else in float32."""
    units = units or dynamic_sizes[0].shape[0] - 1
    first, second, valid = _beginning(first, second, valid, units * unit, page)
    (batch, heads, _, dim), new = first.shape, query.shape[2]
    rows = (query.float() * scaling).to(torch.float16).reshape(batch * heads, -1, dim)
    real = rows.shape[1]
    rows = rows.expand(-1, 2, -1) if real == 1 else rows  # tensor cores need more than one query row
    first, second = first.flatten(0, 1), second.flatten(0, 1)
    if kind == "deviation":
        second = second.clamp_max(LARGEST_DEVIATION)
    parts = _moments(kind, rows, first, second)
    parts = [force_materialize(x.float()).narrow(1, 0, real).unflatten(0, (batch, heads)) for x in parts]
    return _of_pages(*parts, valid, new, kind=kind, page=page, softcap=softcap)


def _of_pages(one: Tensor, other: Tensor, valid: Tensor, new: int, *, kind, page, softcap) -> Tensor:
    """Mass [B, H, q, P] from the two parts of the scores."""
    found = one + other if kind == "bounds" else one + DEVIATIONS * other.sqrt()
    if softcap is not None:
        found = softcap * torch.tanh(found / softcap)
    count = _counts(valid, page).unsqueeze(1)  # [B, 1, 1 or q, P]
    if count.shape[2] > 1:
        count = count.repeat(1, 1, found.shape[2] // new, 1)
    found = torch.where(count > 0, found + count.to(found.dtype).log(), -torch.inf)
    if torch.compiler.is_compiling():  # read by the maximum, by the sum and by the weights
        found = force_materialize(found)
    weight = torch.exp(found - found.amax(-1, keepdim=True).clamp_min(LOWEST))
    mass = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
    return mass.unflatten(2, (-1, new)).mean(2)


def _counts(valid: Tensor, page: int) -> Tensor:
    """How many tokens of each page a query sees, int32 [B, 1 or q, P].

    When compiled, a kernel of its own counts. Otherwise each query head would count again, and each pass.
    """
    tokens = valid.unflatten(-1, (-1, page)).to(torch.int32)
    if not torch.compiler.is_compiling():
        return tokens.sum(-1, dtype=torch.int32)
    few = page < 32  # a generated reduction of so few numbers is slow
    return force_materialize(
        functools.reduce(torch.add, tokens.unbind(-1)) if few else tokens.sum(-1, dtype=torch.int32)
    )


_compiled = Compiled(_compiled_mass, remembers=False)
