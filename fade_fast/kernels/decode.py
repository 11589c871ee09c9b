"""Attention of a short step over all tiers of a layer. One graph computes the output from the query.

The compiled version has three kernels, plus four kernels per tier:

1. One product multiplies the query with one table. The table holds the rotation of the codec, the
   uncompressed keys and the key means of the tiers.
2. One kernel computes the row maximum and the row sum of the uncompressed keys.
3. Four kernels per tier compute scores, statistics, sums and join (`packed.py`).
4. One product multiplies the weights with the uncompressed values. It also multiplies the sums of the tiers
   with the inverse rotation.

No kernel concatenates tensors in memory. The first product reads its table from the original tensors, and
the last product reads its operands from the original tensors.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compile.compiled import Compiled, dynamic_size, more_rows, rounded, use_compiled
from ..compile.tiles import Tiles, step_tiles, tier_tiles
from . import decode_loops, packed
from .packed import LOG2E, Decoder, Queries, TierView, force_materialize, wide
from .rotated import Packed, is_uniform

LOWEST = -3.0e38  # stands for -inf where -inf less -inf would be NaN
MOST_ROWS = 64  # the compiled version supports at most this many query rows per KV head


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    matrix: Tensor,
    tiers: list[TierView],
    *,
    bits: list[tuple[int, int]],
    slots_read: list[int],
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    inv_freq: Tensor | None = None,
    interleaved: bool = False,
    mass: list[Tensor] | None = None,
    value_matrix: Tensor | None = None,
) -> Tensor:
    """Compute the attention output [B, q, Hq, D] in the dtype of the query.

    Args:
        query: [B, Hq, q, D]. Hq is a multiple of H.
        keys, values: [B, H, E, D], uncompressed.
        seen: bool [B, 1 or q, E]. True where a query sees an uncompressed token.
        matrix: float32 or fp16 [D + 1, D]. The rotation of the codec, followed by the sum of its rows. Or
            [H, D + 1, D], the matrix of each KV head, which decodes its keys.
        tiers: the buffers of each tier at full capacity, all [B, H, capacity, ...], or pages. A tier that
            beams share has a row for each text, and no `mass` is computed.
        bits: bits per code of keys and values of each tier.
        slots_read: number of slots that the step reads from each tier. It must cover all slots that `valid`
            may allow, and be rounded by `packed.bucket`. One compiled version serves all numbers of slots
            read below the capacity.
        scaling, softcap: applied to the scores.
        s_aux: [Hq], scores of learned attention sinks, or None.
        inv_freq: [d / 2], required if a tier has `read_at`. `interleaved` is the style of the RoPE pairs.
        value_matrix: float32 or fp16 [H, D, D], the matrix of each KV head that decodes its values. None:
            `matrix`.
        mass: output tensors for the counts of the policies, or None. The first tensor is float32 [B, H, E],
            and each tier has a tensor [B, H, capacity]. They receive the attention probabilities, summed over
            query rows. Slots after the slots read receive 0.

    On CUDA, for two-byte dtypes and up to `MOST_ROWS` rows, one compiled graph runs the products in float16.
    The relative error is below 2e-3, without the rounding of bfloat16 output. On a CPU, a step of one token
    over many slots runs in compiled loops (`decode_loops.py`). In all other cases the function runs tile by
    tile in float32, or in float64 if the query is float64.

    Raises `ValueError` if shapes, dtypes, devices or numbers of slots read do not match.
    """
    matrices = matrix, value_matrix
    _check(query, keys, values, seen, matrices, tiers, bits, slots_read, s_aux, inv_freq, mass or [])
    plain = softcap is None and s_aux is None and not mass
    if plain and decode_loops.takes(query, keys, tiers, bits, slots_read):
        return decode_loops.attend(
            query, keys, values, seen, matrix, value_matrix, tiers,
            bits=bits, slots_read=slots_read, scaling=scaling,
        )  # fmt: skip
    new, columns = query.shape[2], rounded(query.shape[2])
    # Add padding queries, and ignore them afterwards. Add none with `mass`, because it would count them.
    beams = max([1, *(view.beams for view in tiers)])
    rows = query.shape[1] // keys.shape[1] * columns * beams
    fits = use_compiled(query) and not mass and rows <= MOST_ROWS
    if fits and new > 1:  # contiguous: one compiled version then serves all strides of the query
        query, seen = more_rows(query, columns).contiguous(), more_rows(seen, columns)
        tiers = [view._replace(valid=more_rows(view.valid, columns)) for view in tiers]
    flat = [x for view in tiers for x in _to_list(view)]
    output = torch.ops.fade.attend(
        query, keys, values, seen, matrix, flat, s_aux, inv_freq, mass or [],
        [b for pair in bits for b in pair], slots_read, [view.per_mean for view in tiers],
        scaling, softcap, interleaved, value_matrix, [view.beams for view in tiers],
        [-1 if view.first is None else view.first for view in tiers],
    )  # fmt: skip
    return output if output.shape[1] == new else output.narrow(1, 0, new).contiguous()


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(query, keys, values, seen, matrices, tiers, bits, slots_read, s_aux, inv_freq, mass) -> None:
    """Refuse arguments that kernels would misread. Reads no tensor data, so the host never waits."""
    if query.dim() != 4 or keys.dim() != 4:
        sizes = f"{list(query.shape)} and {list(keys.shape)}"
        raise ValueError(f"query and keys are {sizes}; allowed: [B, Hq, q, D] and [B, H, E, D]")
    (batch, q_heads, new, dim), (heads, length), on = query.shape, keys.shape[1:3], query.device
    if dim % 2 or not dim:
        raise ValueError(f"head_dim is {dim}; allowed: an even number")
    if min(batch, heads, new, length) < 1 or q_heads < heads or q_heads % heads:
        sizes = f"{list(query.shape)} and keys {list(keys.shape)}"
        raise ValueError(f"query is {sizes}; allowed: no empty axis, and a multiple of {heads} query heads")
    if query.dtype not in FLOATS:
        raise ValueError(f"query is {query.dtype}; allowed: {', '.join(map(str, FLOATS))}")
    for name, x in dict(keys=keys, values=values).items():
        _expect(name, x, (batch, heads, length, dim), FLOATS, on)
    rows = 1 if new == 1 else (1, new)  # the allowed numbers of mask rows
    _expect("seen", seen, (batch, rows, length), (torch.bool,), on)
    for name, x, rows_of in zip(("matrix", "value_matrix"), matrices, (dim + 1, dim)):
        if x is not None:
            each = () if x.dim() == 2 and name == "matrix" else (heads,)
            _expect(name, x, (*each, rows_of, dim), (torch.float16, torch.float32), on)
    if s_aux is not None:
        _expect("s_aux", s_aux, (q_heads,), FLOATS, on)
    if not len(tiers) == len(bits) == len(slots_read):
        counts = f"{len(tiers)} tiers, {len(bits)} pairs of bits, {len(slots_read)} slots_read"
        raise ValueError(f"{counts}; allowed: one of each per tier")
    for i, (view, pair, num_read) in enumerate(zip(tiers, bits, slots_read)):
        # Codes of the rotated codec, which has one matrix, have a zero point at 8 and 4 bits.
        has_zero = matrices[0].dim() == 2
        texts = batch
        if view.beams != 1:
            texts = _check_beams(f"tiers[{i}]", view, batch, bool(mass))
        _check_tier(f"tiers[{i}]", view, pair, num_read, (texts, heads, dim), rows, on, has_zero)
    if len({pair[1] == packed.DENSE for pair in bits}) > 1:
        raise ValueError(f"bits are {bits}; allowed: 16-bit values in all tiers, or in none")
    if any(view.read_at is not None for view in tiers):
        if inv_freq is None:
            raise ValueError("inv_freq is None; allowed with a tier that has `read_at`: a tensor")
        _expect("inv_freq", inv_freq, (tuple(range(1, dim // 2 + 1)),), FLOATS, on)
    if mass and len(mass) != 1 + len(tiers):
        raise ValueError(f"mass has {len(mass)} tensors; allowed: {1 + len(tiers)}, one more than tiers")
    lengths = [length, *(view.capacity for view in tiers)]
    for i, (x, n) in enumerate(zip(mass, lengths)):
        _expect(f"mass[{i}]", x, (batch, heads, n), (torch.float32, torch.float64), on)


def _check_beams(name: str, view: TierView, batch: int, counts: bool) -> int:
    """Check a tier that beams share. Returns the number of texts."""
    if view.beams < 1 or batch % view.beams:
        raise ValueError(f"{name} has {view.beams} beams; allowed: a divisor of {batch} rows")
    if counts or view.block_table is not None or view.key_index is not None or view.first is not None:
        raise ValueError(
            f"{name} has {view.beams} beams; allowed with mass, pages, apart key codes or `first`: 1"
        )
    if view.valid.dim() == 3 and view.valid.shape[1] > 1:
        raise ValueError(f"{name}.valid has {view.valid.shape[1]} rows; allowed where beams share a tier: 1")
    return batch // view.beams


def _check_tier(
    name: str, view: TierView, bits: tuple[int, int], num_read: int, sizes, rows, device, has_zero: bool
) -> None:
    batch, heads, dim = sizes
    widths = ((8, 4, 3, 2), (packed.DENSE, 8, 4, 3, 2))
    if len(bits) != 2 or any(b not in allowed or b * dim % 8 for b, allowed in zip(bits, widths)):
        allowed = "two of 8, 4, 3 and 2, whose codes fill whole bytes; 16 for values"
        raise ValueError(f"{name} has bits {tuple(bits)} at head_dim {dim}; allowed: {allowed}")
    capacity = view.valid.shape[-1] if view.valid.dim() else 0
    first = view.first or 0
    if not 1 <= num_read <= capacity - first:
        where = f" from slot {first} on" if first else ""
        raise ValueError(
            f"{name} reads {num_read} slots{where}; allowed: 1 to its capacity, {capacity - first}"
        )
    if first < 0 or first % max(1, view.per_mean) or first and view.block_table is not None:
        has = f"{name} is read from slot {first} on"
        raise ValueError(f"{has}; allowed: a multiple of {view.per_mean}, and no pages")
    outer, slots = (batch, heads), capacity
    if view.block_table is not None:
        outer, slots = _check_table(name, view, batch, heads, capacity, device)
    for side, packed_, b in zip(("keys", "values"), (view.keys, view.values), bits):
        if b == packed.DENSE:
            _expect(f"{name}.values.codes", packed_.codes, (*outer, dim, slots), FLOATS, device)
            continue
        shape = (slots, b * dim // 8) if side == "keys" else (b * dim // 8, slots)
        _expect(f"{name}.{side}.codes", packed_.codes, (*outer, *shape), (torch.uint8,), device)
        _expect(f"{name}.{side}.scale", packed_.scale, (*outer, slots), (torch.float16,), device)
        if (packed_.zero is not None) != (has_zero and is_uniform(b)):
            allowed = "a tensor" if has_zero and is_uniform(b) else "None"
            raise ValueError(f"{name}.{side}.zero is {type(packed_.zero).__name__}; allowed: {allowed}")
        if packed_.zero is not None:
            _expect(f"{name}.{side}.zero", packed_.zero, (*outer, slots), (torch.float16,), device)
    some = batch, batch * heads  # heads may hold different tokens
    _expect(f"{name}.valid", view.valid, (some, rows, capacity), (torch.bool,), device)
    _expect(f"{name}.bound", view.bound, (batch, heads), FLOATS, device)
    means = view.means.shape[2] if view.means.dim() == 4 else 0
    _expect(f"{name}.means", view.means, (batch, heads, means, dim), FLOATS, device)
    if view.per_mean < 1 or means != 1 and means * view.per_mean < first + num_read:
        has = f"{means} means of {view.per_mean} slots each"
        raise ValueError(
            f"{name} has {has}; allowed: as many as {first + num_read} slots need, or one for all"
        )
    if view.read_at is not None:
        _expect(f"{name}.read_at", view.read_at, (batch, 1, capacity), (torch.int32, torch.int64), device)


def _check_table(name: str, view: TierView, batch: int, heads: int, capacity: int, device):
    """Check the block table. Returns the first two sizes of the pages, and the number of slots per page."""
    codes, table = view.keys.codes, view.block_table
    if codes.dim() != 4 or min(codes.shape[0], codes.shape[2]) < 1:
        has = f"{name}.keys.codes is {list(codes.shape)}"
        raise ValueError(f"{has}; allowed with a block table: [P, {heads}, page, W], at least one page")
    blocks = table.shape[1] if table.dim() == 2 else 0
    _expect(f"{name}.block_table", table, (batch, blocks), (torch.int32, torch.int64), device)
    if blocks * view.page_size < capacity:
        has = f"{name}.block_table has {blocks} pages of {view.page_size} slots a row"
        raise ValueError(f"{has}; allowed: as many as the capacity needs, {capacity}")
    return (codes.shape[0], heads), view.page_size


def _expect(name: str, x: Tensor, shape: tuple, dtypes: tuple, device) -> None:
    """Raise `ValueError` unless `x` has this shape, dtype and device. A tuple in `shape` lists sizes."""
    fits = x.dim() == len(shape) and all(
        n in m if isinstance(m, tuple) else n == m for n, m in zip(x.shape, shape)
    )
    if not fits or x.dtype not in dtypes or x.device != device:
        sizes = [f"{m[0]} to {m[-1]}" if isinstance(m, tuple) else str(m) for m in shape]
        allowed = f"[{', '.join(sizes)}], {' or '.join(map(str, dtypes))}, on {device}"
        raise ValueError(f"{name} is {list(x.shape)}, {x.dtype}, on {x.device}; allowed: {allowed}")


@torch.library.custom_op("fade::attend", mutates_args={"mass"})
def _operator(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    matrix: Tensor,
    tiers: list[Tensor | None],
    s_aux: Tensor | None,
    inv_freq: Tensor | None,
    mass: list[Tensor],
    bits: list[int],
    slots_read: list[int],
    per_mean: list[int],
    scaling: float,
    softcap: float | None,
    interleaved: bool,
    value_matrix: Tensor | None = None,
    beams: list[int] | None = None,
    first: list[int] | None = None,
) -> Tensor:
    """Run `attend` as one operator. A larger compiled graph does not trace into it.

    `beams` and `first` are those of the tiers; a negative `first` is None.
    """
    batch, q_heads, new, dim = query.shape
    rows, heads = max(2, q_heads // keys.shape[1] * new), batch * keys.shape[1]
    pairs = tuple(zip(bits[::2], bits[1::2]))
    options = dict(bits=pairs, scaling=scaling, softcap=softcap, interleaved=interleaved)
    view = [_from_list(tiers[i * FLAT : (i + 1) * FLAT], n) for i, n in enumerate(per_mean)]
    for i, (n, slot) in enumerate(zip(beams or [], first or [])):
        view[i] = view[i]._replace(beams=n, first=None if slot < 0 else slot)
    args = (query, keys, values, seen, matrix, view, s_aux, inv_freq, mass, value_matrix)
    # Heads and query rows of each tier. Where beams share a tier, their queries are rows of one product.
    sizes = [
        (heads, rows) if x.beams == 1 else (heads // x.beams, q_heads // keys.shape[1] * new * x.beams)
        for x in view
    ]
    most = max([rows, *(n for _, n in sizes)])
    if not (use_compiled(query) and query.dtype.itemsize == 2 and most <= MOST_ROWS):
        return _attend(*_of_slots_read(args, slots_read), chunks=None, **options)
    pages = [None if x.block_table is None else x.page_size for x in view]
    chunks = _chunks_of(sizes, slots_read, pairs, [page is not None for page in pages])
    blocks = [num_read // chunk for num_read, chunk in zip(slots_read, chunks)]

    def pinned() -> Tiles:
        out = step_tiles(heads, rows, keys.shape[2], sum(map(num_means, view, slots_read)), dim)
        for size, n, chunk, pair, page in zip(sizes, blocks, chunks, pairs, pages):
            widths = tuple(packed.field_width(b, dim) for b in pair)
            out |= tier_tiles(*size, n, chunk, pair, widths, dim, page)
        return out

    whole = tuple(slots_read) if any(map(_ties, view, blocks, slots_read)) else None
    dynamic_sizes = []
    if whole is None:
        dynamic_sizes = [dynamic_size(n) for n in blocks]
        dynamic_sizes += [dynamic_size(x.first // x.per_mean) for x in view if x.first is not None]
        view[:] = [x if x.first is None else x._replace(first=0) for x in view]
    return _compiled(dynamic_sizes, pinned, *args, chunks=chunks, slots_read=whole, **options)


@_operator.register_fake
def _(query, *args):
    batch, q_heads, new, dim = query.shape
    return query.new_empty(batch, new, q_heads, dim)


def _chunks_of(sizes: list[tuple[int, int]], slots_read: list[int], bits, paged) -> tuple[int, ...]:
    """Return the chunk size of each tier for the compiled version. `sizes` are its heads and query rows.

    Slots after the last whole chunk would be left out, so such numbers of slots read raise `ValueError`.
    """
    each = zip(sizes, slots_read, bits, paged)
    chunks = tuple(packed.chunk_of(heads, n, rows, b[1], by_table) for (heads, rows), n, b, by_table in each)
    if any(n % chunk for n, chunk in zip(slots_read, chunks)):
        allowed = f"as `packed.bucket` rounds, multiples of {chunks}"
        raise ValueError(f"slots read are {slots_read}; allowed: {allowed}")
    return chunks


def _ties(view: TierView, blocks: int, num_read: int) -> bool:
    """Return whether the compiler would specialize on the number of slots read.

    It specializes if there is one chunk, or if the number of slots read equals the size of the buffer. If
    the page size does not divide the chunk, the compiler would also check for each number whether it ends at
    a page boundary.
    """
    tied = blocks == 1 or num_read == view.capacity or view.first == 0
    if view.block_table is None or tied:
        return tied
    chunk, page = num_read // blocks, view.page_size
    return chunk % page != 0 or num_read // page in (1, view.block_table.shape[1])


FLAT = 11  # number of tensors in a `TierView`


def _to_list(view: TierView) -> list[Tensor | None]:
    rest = view.bound, view.means, view.valid, view.read_at, view.block_table
    return [*view.keys, *view.values, *rest]


def _from_list(tensors: list[Tensor | None], per_mean: int) -> TierView:
    keys, values, (bound, means, valid, *rest) = tensors[:3], tensors[3:6], tensors[6:]
    return TierView(Packed(*keys), Packed(*values), bound, means, valid, per_mean, *rest)


def num_means(view: TierView, num_read: int) -> int:
    """Return the number of rows that a tier adds to the table of the first product."""
    return 0 if view.read_at is not None else min(view.means.shape[2], -(-num_read // view.per_mean))


def _of_slots_read(args: tuple, slots_read: list) -> tuple:
    """Return the arguments with tiers cut to the slots read: flat ones, except those that beams share."""
    return *args[:5], [_part(*x) for x in zip(args[5], slots_read)], *args[6:]


def _part(view: TierView, num_read: int) -> TierView:
    if view.beams > 1:
        return _near(view, num_read).beginning(num_read)
    if view.first is not None:
        return view.flat().narrow(view.first, num_read)
    return _near(view, num_read).flat().leading(num_read)


def _near(view: TierView, num_read: int) -> TierView:
    """Return the view with the means of the slots read. If rows share means, `flat` would copy them all."""
    if view.means.shape[2] == 1:
        return view
    return view._replace(means=view.means.narrow(2, 0, -(-num_read // view.per_mean)))


def _of_dynamic_size(dynamic_sizes, *args, chunks, slots_read, **options) -> Tensor:
    """The compiled function.

    Without `slots_read`, the sizes in `dynamic_sizes` give the chunks per tier, and then the first slots of
    the tiers that have one, in units of `per_mean`.
    """
    if slots_read is None:
        numbers = [x.shape[0] - 1 for x in dynamic_sizes]
        slots_read = [n * chunk for n, chunk in zip(numbers, chunks)]
        places = iter(numbers[len(chunks) :])
        tiers = [x if x.first is None else x._replace(first=next(places) * x.per_mean) for x in args[5]]
        args = *args[:5], tiers, *args[6:]
    return _attend(*_of_slots_read(args, slots_read), chunks=chunks, **options)


def _attend(
    query, keys, values, seen, matrix, tiers, s_aux, inv_freq, mass, value_matrix=None,
    *, bits, chunks, scaling, softcap, interleaved,
) -> Tensor:  # fmt: skip
    """Run `attend` over flat tiers: with `chunks` all at once in float16, without `chunks` tile by tile."""
    batch, q_heads, new, dim = query.shape
    heads, length = keys.shape[1:3]
    dtype = torch.float16 if chunks else torch.promote_types(query.dtype, torch.float32)
    real = q_heads // heads * new
    plain = query.to(dtype).reshape(batch * heads, real, dim)
    plain = plain.expand(-1, 2, -1) if real == 1 else plain  # tensor cores need more than one query row
    rows = plain.shape[1]
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    seen = _for_rows(seen, rows).unsqueeze(1).expand(-1, heads, -1, -1).flatten(0, 1).mT  # [N, E, 1 or R]
    tiers = [view._replace(valid=_for_rows(view.valid, rows)) for view in tiers]

    each = lambda x: x.expand(batch, heads, -1, -1).flatten(0, 1) if x.dim() == 3 else x  # noqa: E731
    matrix, value_matrix = each(matrix), None if value_matrix is None else each(value_matrix)
    table = [matrix.expand(batch * heads, -1, -1), keys]
    table += [_means(view) for view in tiers if view.read_at is None]
    table = torch.cat([x.to(dtype) for x in table], dim=1)
    # The product is split into halves. `packed.fields` explains the reason.
    halves = [torch.bmm(t, q.mT).to(wide(dtype)) for t, q in zip(table.chunk(2, -1), plain.chunk(2, -1))]
    found = force_materialize((halves[0] + halves[1]) * scaling)
    plain = plain.to(wide(dtype)) * scaling

    scores = found.narrow(1, dim + 1, length)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(seen, scores, LOWEST)
    top = force_materialize(
        scores.amax(1)
    )  # with few tokens, the compiler would unroll this maximum into the last product
    if s_aux is not None:
        learned = _rows_of(s_aux.to(wide(dtype)), batch, heads, rows)
        top = torch.maximum(top, learned)
    top = torch.where(top > LOWEST / 2, top, 0.0)
    weights = torch.where(seen, torch.exp2((scores - top.unsqueeze(1)) * LOG2E), 0.0)
    total = weights.sum(1)
    if s_aux is not None:
        total = total + torch.exp2((learned - top) * LOG2E)

    rotated = found.narrow(1, 0, dim).mT
    # In float64, the error of a sum rounded to float32 would be visible.
    queries = Queries(plain, rotated, found.select(1, dim) if chunks else rotated.sum(-1), top)
    decoder = None if inv_freq is None else Decoder(matrix.narrow(-2, 0, dim), inv_freq, interleaved)
    partials, kept, start = [], [], dim + 1 + length
    for i, view in enumerate(tiers):
        own, bias, asked = decoder, None, queries
        if view.read_at is None:
            own, bias, means = None, found.narrow(1, start, view.means.shape[-2]).mT, view.means.shape[-2]
            start += means
        if view.beams > 1:
            asked = Queries(*(_together(x, view.beams, heads, real) for x in queries))
            bias = None if bias is None else _together(bias, view.beams, heads, real)
            if own is not None and own.matrix.dim() == 3:  # all rows have the same matrices
                own = own._replace(matrix=own.matrix.narrow(0, 0, asked.plain.shape[0]))
        options = dict(bits=bits[i], softcap=softcap)
        if chunks:
            flat = view.flat() if view.beams > 1 else view
            *partial, scores_of = packed.attend_chunks(
                asked, bias, flat, own, chunk=chunks[i], dtype=dtype, **options
            )
            kept.append(scores_of)
        else:
            attend_tier = packed.attend_texts if view.beams > 1 else packed.attend
            acc, *rest = attend_tier(asked, bias, view, own, **options)
            partial = [acc.mT], *(x.unsqueeze(1) for x in rest)
            kept.append((bias, own))
        if view.beams > 1:
            parts, *rest = partial
            parts = [force_materialize(x) for x in parts]
            parts, rest = ([_apart(x, view.beams, heads, rows) for x in each] for each in (parts, rest))
            partial = parts, *rest
        partials.append(partial)

    # The statistics of the last tier are as wide as its sums, and all other statistics have one row. The
    # kernel of the last join can therefore also compute this part.
    stats = [(top.unsqueeze(1), total.unsqueeze(1))]
    stats += [(t.narrow(1, 0, 1), n.narrow(1, 0, 1)) for _, t, n in partials[:-1]]
    stats += [(t, n) for _, t, n in partials[-1:]]
    best = functools.reduce(torch.maximum, [t for t, _ in stats])
    shrink = [torch.exp2((t - best) * LOG2E) for t, _ in stats]
    whole = sum(n * by for (_, n), by in zip(stats, shrink))
    share = 1 / whole.clamp_min(torch.finfo(whole.dtype).tiny)
    factors = [force_materialize(by * share).narrow(1, 0, 1) for by in shrink[: max(1, len(partials))]]

    # Values that no query sees may be NaN, and 0 * NaN is NaN. Replace them by 0.
    above = torch.where(values.abs() <= torch.finfo(values.dtype).max, values, 0.0).to(dtype)
    weights = weights * factors[0]
    left = F.pad(weights, (0, 0, 0, dim))
    # Sums of codes are rotated back. Sums of 16-bit values are not rotated.
    below = (matrix.narrow(-2, 0, dim) if value_matrix is None else value_matrix).to(dtype)
    if bits and bits[0][1] == packed.DENSE:
        below = torch.eye(dim, dtype=dtype, device=query.device)
    right = F.pad(above, (0, 0, 0, dim)) + F.pad(below, (0, 0, length, 0))
    for i, (parts, _, _) in enumerate(partials):
        before = length
        if i + 1 < len(partials):
            if tiers[i].beams == 1:  # else they are in memory already, in another order
                parts = [force_materialize(part) for part in parts]
            parts = [part * factors[i + 1] for part in parts]
        else:
            parts = [force_materialize(part * shrink[-1] * share) for part in parts]
        for part in packed.channels(parts, bits[i][1]) if chunks else parts:
            left = left + F.pad(part, (0, 0, before, length + dim - before - part.shape[1]))
            before += part.shape[1]
    output = force_materialize(torch.bmm(left.to(dtype).mT, right).to(query.dtype))
    output = output.narrow(1, 0, real).reshape(batch, q_heads, new, dim)
    if mass:
        # The last join writes `level`. Otherwise the logarithm would be computed again for each token.
        level = (
            force_materialize((top.unsqueeze(1) - best) * LOG2E + torch.log2(share))
            .select(1, 0)
            .narrow(1, 0, real)
        )
        mass[0].copy_(weights.narrow(2, 0, real).sum(2).unflatten(0, (batch, heads)))
        for i, (view, counts) in enumerate(zip(tiers, mass[1:])):
            if chunks:
                counted = packed.probabilities(kept[i], level)
            else:
                counted = packed.probabilities_by_tile(
                    queries, kept[i][0], view, kept[i][1], level, bits=bits[i][0], softcap=softcap
                )
            rest = counted.new_zeros(batch * heads, counts.shape[2] - counted.shape[1])
            counts.copy_(torch.cat((counted, rest), dim=1).unflatten(0, (batch, heads)))
    return output.transpose(1, 2).contiguous()


def _means(view: TierView) -> Tensor:
    """Return the means of a tier for all rows and heads, [N, M, D]."""
    if view.beams == 1:
        return view.means
    return view.means.unsqueeze(1).expand(-1, view.beams, -1, -1, -1).flatten(0, 2)


def _together(x: Tensor, beams: int, heads: int, real: int) -> Tensor:
    """Make the query rows of beams, [B * H, R, ...], rows of their text: [B / beams * H, beams * real, ...].

    `real` is the number of query rows that are not repeated.
    """
    x = x.narrow(1, 0, real).unflatten(0, (-1, beams, heads))
    return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _apart(x: Tensor, beams: int, heads: int, rows: int) -> Tensor:
    """Undo `_together` for results [B / beams * H, W, beams * real]: [B * H, W, R]."""
    x = x.unflatten(0, (-1, heads)).unflatten(-1, (beams, -1)).permute(0, 3, 1, 2, 4).flatten(0, 2)
    return x.expand(-1, -1, rows)


def _for_rows(seen: Tensor, rows: int) -> Tensor:
    """Expand a bool mask [B, 1 or q, n] to the query rows of a KV head: [B, 1 or R, n]."""
    batch, new, length = seen.shape
    if new == 1:
        return seen
    return seen.unsqueeze(1).expand(-1, rows // new, -1, -1).reshape(batch, rows, length)


def _rows_of(x: Tensor, batch: int, heads: int, rows: int) -> Tensor:
    """Expand [Hq], one number per query head, to the query rows of each KV head: [N, R]."""
    group = x.shape[0] // heads
    x = x.reshape(1, heads, group, 1).expand(batch, -1, -1, -(-rows // group))
    return x.reshape(batch * heads, -1)


_compiled = Compiled(_of_dynamic_size, remembers=False)
