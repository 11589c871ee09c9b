"""How much of a query's attention each page of a tier would get, as the upper bits of its keys tell.

The upper bits of a 4-bit key are a 2-bit code with a scale and zero point of its own (`halves.coarse`). So
the scores are those of a 2-bit tier, by the same functions (`packed.scores`). A single upper bit is read as
one of two 2-bit codes. A page is a run of slots. Its mass is the sum of the probabilities of its tokens.
"""

import functools

import torch
from torch import Tensor

from ..compile.compiled import Compiled, dynamic_size, more_rows, rounded, use_compiled
from ..compile.tiles import long_element_tiles, step_tiles, tier_tiles
from . import halves, packed
from .decode import LOWEST, MOST_ROWS, num_means
from .merge import of_rows
from .packed import Queries, TierView, force_materialize, wide

INDEX_BITS = 2  # of a code as which the index is read


def page_mass(
    query: Tensor,
    keys: Tensor,
    seen: Tensor,
    matrix: Tensor,
    view: TierView,
    num_read: int,
    page: int,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Probability mass of each page for each query and KV head, float32 or float64 [B, H, q, P].

    Each query head has its own softmax over the pages, and the heads of a group are averaged. A query that
    sees no token of the tier gives no mass.

    Args:
        query: [B, Hq, q, D].
        keys, seen: uncompressed keys [B, H, E, D], and bool [B, 1 or q, E], which of them each query sees.
            They give a score near the largest one, which float16 scores are measured from.
        matrix: float32 or fp16 [D + 1, D] or [H, D + 1, D], as in `decode.attend`.
        view: the tier at full capacity, with `key_index`, and without a block table.
        num_read: slots that are read, a multiple of `page`; P = num_read / page. It covers every valid slot.
        scaling, softcap: of scores.

    On CUDA, for two-byte dtypes and up to `MOST_ROWS` query rows, one compiled graph runs in float16. In all
    other cases the function runs tile by tile in float32, or in float64 if the query is float64.

    Raises `ValueError` if the view has no index, or if `num_read` is no multiple of `page`.
    """
    if view.key_index is None or view.block_table is not None:
        raise ValueError("a view with key_index and without a block table is needed")
    if num_read < page or num_read % page or num_read > view.capacity:
        raise ValueError(f"num_read={num_read}: a multiple of page={page} up to {view.capacity} is allowed")
    new, heads = query.shape[2], keys.shape[0] * keys.shape[1]
    rows, columns = max(2, query.shape[1] // keys.shape[1] * rounded(new)), rounded(new)
    index = [view.key_index, view.keys.scale, view.keys.zero, view.means, view.valid]
    options = dict(per_mean=view.per_mean, page=page, scaling=scaling, softcap=softcap)
    if not (use_compiled(query) and query.dtype.itemsize == 2 and rows <= MOST_ROWS):
        return _by_tile(query, view, index, matrix, num_read, **options)
    if new > 1:  # see `decode.attend`
        query, seen = more_rows(query, columns).contiguous(), more_rows(seen, columns)
        index[-1] = more_rows(view.valid, columns)
    chunk = packed.chunk_of(heads, num_read, rows)
    if num_read % chunk or chunk % page:
        raise ValueError(f"num_read={num_read}: as `packed.bucket` rounds, a multiple of {chunk} is allowed")
    width = packed.field_width(INDEX_BITS, query.shape[-1])

    def pinned():
        bits, n = (INDEX_BITS, INDEX_BITS), num_read // chunk
        tiles = tier_tiles(heads, rows, n, chunk, bits, (width, width), query.shape[-1])
        tiles |= step_tiles(heads, rows, keys.shape[2], num_means(view, num_read), query.shape[-1])
        tiles |= long_element_tiles()
        real = query.shape[1] // keys.shape[1] * columns
        # A program of the pass over all scores reads as many as one of the statistics of a tier.
        return tiles | {(heads * real * n, chunk // page): tiles[heads * n * rows, chunk]}

    tied = num_read // chunk == 1 or num_read == view.capacity  # the compiler would make constants of these
    sizes = [] if tied else [dynamic_size(num_read // chunk)]
    whole = num_read // chunk if tied else None
    found = _compiled(sizes, pinned, query, keys, seen, matrix, *index, chunk=chunk, blocks=whole, **options)
    return found.narrow(2, 0, new)


def _view(index: list[Tensor | None], per_mean: int, dtype: torch.dtype) -> TierView:
    """The index as a flat 2-bit tier without values."""
    codes, scale, zero, means, valid = index
    kept = codes.shape[-1] * 8 // means.shape[-1]
    scale, zero = halves.coarse(scale, zero, dtype, kept)
    flat = lambda x: None if x is None else x.flatten(0, 1)  # noqa: E731
    keys = packed.Packed(flat(halves.as_two_bits(codes, kept)), flat(scale), flat(zero))
    return TierView(keys, packed.Packed(None, None, None), None, means.flatten(0, 1), valid, per_mean)


def _queries(rows: Tensor, matrix: Tensor, reference: Tensor, batch: int) -> Queries:
    """Rows [N, R, D], scaled, in the forms that scores need."""
    matrix = matrix.narrow(-2, 0, matrix.shape[-1]).to(rows.dtype)
    if matrix.dim() == 3:
        matrix = matrix.expand(batch, -1, -1, -1).flatten(0, 1)
    rotated = rows @ matrix.mT
    return Queries(rows, rotated, rotated.sum(-1), reference)


def _by_tile(query, view: TierView, index, matrix, num_read, *, per_mean, page, scaling, softcap) -> Tensor:
    """The same tile by tile, in float32 or float64. Scores are kept, codes are not."""
    dtype, (batch, heads) = torch.promote_types(query.dtype, torch.float32), view.key_index.shape[:2]
    new = query.shape[2]
    rows = of_rows(query.to(dtype) * scaling, heads).flatten(0, 1)
    queries = _queries(rows, matrix, rows.new_zeros(rows.shape[:2]), batch)
    tier = _view(index, per_mean, dtype)
    tier = tier._replace(valid=_for_rows(tier.valid, rows.shape[1]))
    bias, found = rows @ tier.means.to(dtype).mT, []
    for start, length in packed.tiles(tier._replace(valid=tier.valid.narrow(-1, 0, num_read))):
        options = dict(bits=INDEX_BITS, chunk=length, softcap=softcap, dtype=dtype)
        part = _cut(tier, start, length)
        found.append(packed.scores(queries, packed._near(bias, start, part), part, None, **options))
    return _mass(torch.cat(found, dim=-1), page, (batch, heads, new))


def _cut(tier: TierView, start: int, length: int) -> TierView:
    """Slots of a flat tier without values."""
    codes, *rest = tier.keys
    keys = packed.Packed(codes.narrow(1, start, length), *(_narrow(x, start, length) for x in rest))
    return tier._cut(start, length)._replace(keys=keys)


def _narrow(x: Tensor | None, start: int, length: int) -> Tensor | None:
    return None if x is None else x.narrow(-1, start, length)


def _for_rows(valid: Tensor, rows: int) -> Tensor:
    """A mask [B, 1 or q, S] for the rows of each KV head: [B, 1 or R, S]."""
    return valid if valid.shape[1] == 1 else valid.repeat(1, rows // valid.shape[1], 1)


def _mass(scores: Tensor, page: int, shape: tuple[int, int, int], run: int | None = None) -> Tensor:
    """Mass [B, H, q, P] from base-2 scores [N, R, S], R = G * q.

    When compiled, one kernel reads all scores, each program those of `run` pages of a row, and the others
    read two numbers of each page. One program for a whole row would leave most of a GPU idle. Sums over the
    few tokens of a page are written out, because a generated reduction of so few numbers is slow.
    """
    batch, heads, new = shape
    tokens = scores.unflatten(-1, (-1, page)).unbind(-1)
    tops = functools.reduce(torch.maximum, tokens).clamp_min(LOWEST)
    sums = functools.reduce(torch.add, [torch.exp2(x - tops) for x in tokens])  # [N, R, P]
    if torch.compiler.is_compiling():
        tops, sums = force_materialize(tops), force_materialize(sums)
    both = tops, sums
    if run is not None:
        both = _joined(*(x.unflatten(-1, (-1, run)) for x in both))
    top, total = (x.unsqueeze(-1) for x in _joined(*both))
    mass = sums * torch.exp2(tops - top) / total.clamp_min(torch.finfo(sums.dtype).tiny)
    return mass.unflatten(0, (batch, heads)).unflatten(2, (-1, new)).mean(2)


def _joined(tops: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score, and the sum of weights, over the last axis."""
    top = tops.amax(-1)
    total = (sums * torch.exp2(tops - top.unsqueeze(-1))).sum(-1)
    return (
        (force_materialize(top), force_materialize(total)) if torch.compiler.is_compiling() else (top, total)
    )


def _compiled_mass(
    dynamic_sizes, query, keys, seen, matrix, *index, per_mean, page, chunk, blocks, scaling, softcap
) -> Tensor:
    """All chunks at once in float16. The sums of pages are float32."""
    batch, q_heads, new, dim = query.shape
    heads, dtype = keys.shape[1], torch.float16
    blocks = blocks or dynamic_sizes[0].shape[0] - 1
    real = q_heads // heads * new
    rows = query.to(dtype).reshape(batch * heads, real, dim)
    rows = rows.expand(-1, 2, -1) if real == 1 else rows  # tensor cores need more than one query row
    count = rows.shape[1]
    tier = _view(list(index), per_mean, torch.float32)
    tier = _cut(tier._replace(valid=_for_rows(tier.valid, count)), 0, blocks * chunk)
    every = matrix.expand(batch, heads, -1, -1).flatten(0, 1) if matrix.dim() == 3 else matrix
    every = every.expand(batch * heads, -1, -1)
    table = torch.cat([x.to(dtype) for x in (every, keys.flatten(0, 1), tier.means)], dim=1)
    parts = [torch.bmm(t, q.mT).to(wide(dtype)) for t, q in zip(table.chunk(2, -1), rows.chunk(2, -1))]
    found = force_materialize((parts[0] + parts[1]) * scaling)
    near, length = found.narrow(1, dim + 1, keys.shape[2]), keys.shape[2]
    if softcap is not None:
        near = softcap * torch.tanh(near / softcap)
    sees = _for_rows(seen, count).unsqueeze(1).expand(-1, heads, -1, -1).flatten(0, 1).mT
    top = force_materialize(torch.where(sees, near, LOWEST).amax(1))
    top = torch.where(top > LOWEST / 2, top, 0.0)
    queries = Queries(rows.to(wide(dtype)) * scaling, found.narrow(1, 0, dim).mT, found.select(1, dim), top)
    bias = found.narrow(1, dim + 1 + length, tier.means.shape[1]).mT
    options = dict(bits=INDEX_BITS, chunk=chunk, softcap=softcap, dtype=dtype)
    scores = packed.scores(queries, bias, tier, None, **options)  # [blocks * N, R, chunk]
    scores = scores.unflatten(0, (blocks, batch * heads)).movedim(0, 2).flatten(2).to(wide(dtype))
    scores = scores.narrow(1, 0, real)
    return _mass(scores, page, (batch, heads, new), chunk // page)


_compiled = Compiled(_compiled_mass, remembers=False)
