"""Many new tokens of a request: what a layer does in a prefill step, in few kernels.

The step is stored already (`single.store`). Then, for a group of requests (`batches.Prefill`):

- `plan` tells what is read, once a step for all layers with pages of one kind.
- `rows` decodes the pages of the group to keys and values in the dtype of the model: once for all queries.
- FlashAttention attends to them (`flash.ragged`). A query sees a token there as its first record has it, and
  the first tokens as both records have them. The `Kind.near` tokens before the query, and its own, are left
  out, by the causal rule alone: the keys of a request end that much earlier than its queries.
- `finish` adds these few tokens, each as the query must read it, and learned sinks.

So what a query reads depends on no other query, and the large products are those of a library. A context
longer than `batches.TOGETHER` tokens is decoded part by part, and the parts are merged by log-sum-exp.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..compile.compiled import Compiled, use_compiled
from ..kernels import flash
from ..kernels.packed import force_materialize
from ..kernels.rotated import dequantize
from . import batches, single
from .batches import Prefill
from .pages import FIRST, NEAR, newest
from .single import Kind, mean_row


class Part(NamedTuple):
    """Pages that are decoded at once, N of them, and what R requests read of them.

    Attributes:
        pages: int64 [N]. index: int64 [N], which page of its request each is.
        keys_from, used: int32 [R + 1] and [R]; see `flash.ragged`.
        longest: an upper bound of the keys of a request.
        causal: whether this is the last part. All queries see the whole of other parts.
    """

    pages: Tensor
    index: Tensor
    keys_from: Tensor
    used: Tensor
    longest: int
    causal: bool


class Others(NamedTuple):
    """Tokens that are decoded beside pages: the T new ones, and K right before the new ones of each request.

    Attributes:
        tokens: int64 [T], which tokens of the step. mean: int64 [T], rows of the table of means.
        page, at, second: int64 [K], the page of each token before, and its slots among both records.
        twice: bool [K] of keys and of values, whether the second record counts.
        early: bool [T], whether both records of a new token count on both sides.
        taken: bool [K], whether a new token took the slot of the second record: token `by` of the step,
            int64 [K].
        before: int64 [K], rows of the table of means.
    """

    tokens: Tensor
    mean: Tensor
    page: Tensor
    at: Tensor
    second: Tensor
    twice_key: Tensor
    twice_value: Tensor
    early: Tensor
    taken: Tensor
    by: Tensor
    before: Tensor


class Plan(NamedTuple):
    """What a group reads: its T queries, those of one request after another.

    Attributes:
        parts: the pages; the last part is that of the newest tokens.
        others: tokens that are decoded with the last part.
        queries_from: int32 [R + 1], the first query of each request.
        longest: most queries of a request.
        back: how many keys FlashAttention sees before the last one; None: all.
        rows: int64 [T, w + 1], where each query finds its own token and the w before it: rows of the result
            of `rows`.
        seen: bool [T, w + 1], which of them it sees.
    """

    parts: list[Part]
    others: Others
    queries_from: Tensor
    longest: int
    back: int | None
    rows: Tensor
    seen: Tensor


# -- once a step


def plan(group: Prefill, kind: Kind) -> Plan:
    """What a group of requests reads from pages of this kind."""
    table, page, near, window = group.table, kind.page, kind.near, kind.window
    put = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(table.device, non_blocking=True)  # noqa: E731
    counts, count = put(group.counts), int(group.counts.sum())
    begin = group.lengths - counts
    parts, first, slots = [], torch.zeros_like(begin), group.reach
    if window is not None:
        first = (begin - window + 1).clamp_min(0) // page
        slots = np.minimum(slots, group.counts + window + page - 2)
    elif slots.sum() > batches.TOGETHER and len(slots) == 1:
        # Pages that all queries see whole, also where the length on the host is an upper bound.
        whole = max(0, int(slots[0] - group.counts[0] - group.slack - near) // page)
        each = max(1, batches.TOGETHER // page)
        for start in range(0, whole, each):
            size = min(each, whole - start)
            index = put(np.arange(start, start + size))
            ends = put(np.array([0, size * page], dtype=np.int32))
            parts.append(Part(*_pages(table, 0 * index, index), ends, ends[1:], size * page, False))
        first, slots = first + whole, slots - whole * page
    blocks = np.minimum(-(-slots // page), table.shape[1])
    ends = np.concatenate(([0], np.cumsum(blocks)))
    request = put(np.repeat(np.arange(len(blocks)), blocks))
    index = first[request] + put(np.arange(ends[-1]) - np.repeat(ends[:-1], blocks))
    pages, index = _pages(table, request, index)
    used, back = group.lengths - 1 - near - first * page, None
    if window is not None:
        back = window - 2 - near
        if back < 0:  # all that a query sees is near it
            used, back = 0 * used, None
    keys_from, used = put((ends * page).astype(np.int32)), used.clamp_min(0).int()
    parts.append(Part(pages, index, keys_from, used, int(blocks.max()) * page, True))

    starts = np.concatenate(([0], np.cumsum(group.counts)))
    of = put(np.repeat(np.arange(len(blocks)), group.counts))  # the request of each query
    order = put(np.arange(count) - np.repeat(starts[:-1], group.counts)).unsqueeze(1)
    position, query = begin[of].unsqueeze(1) + order, torch.arange(count, device=table.device).unsqueeze(1)
    distance = torch.arange(1, near + 1, device=table.device)
    of, seen = of.unsqueeze(1), position >= distance
    if window is not None:
        seen = seen & (distance < window)
    token = (position - distance).clamp_min(0)
    kept, _ = newest(token, page, kind.fine, kind.drafts)
    twice = (token < FIRST) | (distance <= kept - kind.drafts)
    total = len(pages) * page
    behind = total + (count + NEAR * len(blocks) if near else 0)  # rows before those of own tokens
    both = torch.where(order >= distance, query - distance, count + NEAR * (of + 1) + order - distance)
    once = keys_from[of] + token - first[of] * page
    rows = torch.where(seen, torch.where(twice, total + both, once), behind + query)
    rows = torch.cat((behind + query, rows), 1)
    seen = torch.cat((torch.ones_like(query, dtype=torch.bool), seen), 1)
    position = position.squeeze(1)
    others = Others(
        group.tokens, mean_row(position, kind.means), *_before(group, kind, begin, counts, put),
    )._replace(early=position < FIRST)  # fmt: skip
    return Plan(
        parts, others, put(starts.astype(np.int32)), int(group.counts.max()), back, rows, seen
    )  # fmt: skip


def _pages(table: Tensor, request: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Pages `index` of requests, both int64 [n]. At least two, as compilers make constants of 1."""
    pages = table[request, index.clamp_max(table.shape[1] - 1)].long()
    if len(pages) == 1:
        pages, index = (torch.nn.functional.pad(x, (0, 1), value=v) for x, v in ((pages, 0), (index, -1)))
    return pages, index


def _before(group: Prefill, kind: Kind, begin: Tensor, counts: Tensor, put) -> list[Tensor]:
    """`Others` of the `NEAR` tokens right before the new ones of each request."""
    page, back = kind.page, torch.arange(NEAR, 0, -1, device=begin.device)
    begin, counts = begin.unsqueeze(1), counts.unsqueeze(1)
    position = (begin - back).clamp_min(0)
    kept, slot = newest(position, page, kind.fine, kind.drafts)
    early = position < FIRST
    second = torch.where(early, position, slot)
    twice = early | (back <= kept - kind.drafts)
    # In the page in which the new tokens begin, which no other request has, they took slots of tokens that
    # the first of them still read. All other pages have what is needed now.
    order = kept - back  # of the first new token with the same slot
    taken = (order >= 0) & (order < counts) & ~early
    taken = taken & ((position + kept) // page == position // page) & (position // page == begin // page)
    by = put(group.starts).unsqueeze(1) + torch.where(taken, order, 0)
    owner = group.table.gather(1, (position // page).clamp_max(group.table.shape[1] - 1)).long()
    sides = [early | twice if bits < 8 else early for bits in kind.bits]
    found = owner, position % page, second, *sides, early, taken, by, mean_row(position, kind.means)
    return [x.expand_as(position).flatten() for x in found]


# -- in each layer


def attend(
    query: Tensor, runs: Tensor, records: Tensor, old: Tensor | None, keys: Tensor, values: Tensor, of: Plan,
    means: Tensor, decoders: Tensor, kind: Kind, scaling: float, s_aux: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of a group, [T, Hq, D].

    Args:
        query: [T, Hq, D], those of the group.
        runs: uint8 [P, H, L], the pages, in which the step is stored.
        records, old: from `single.store`, of all tokens of the step.
        keys, values: [n, H, D], those of the step as they came.
        of: from `plan`.
        means, decoders: see `single.vectors`.
        scaling: of the scores.
        s_aux: [Hq], scores of learned sinks, or None.
    """
    total = None
    for part in of.parts:
        extra = (*of.others, records, old, keys, values) if part.causal else ()
        held = rows(runs, part.pages, part.index, extra, means, decoders, kind, query.dtype)
        found = flash.ragged(
            query, *held.transpose(1, 2), of.queries_from, part.keys_from, part.used,
            (of.longest, part.longest), scaling, part.causal, of.back,
        )  # fmt: skip
        total = found if total is None else _run("merged", [*total, *found], [0, 1, 0, 1])
    dynamic = [query, *total, held, of.rows, of.seen]
    return _run("finish", dynamic, [0, 0, 1, 2, 0, 0], s_aux, scaling=scaling)


def rows(
    runs: Tensor, pages: Tensor, index: Tensor, extra: tuple, means: Tensor, decoders: Tensor, kind: Kind,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Keys and values of `dtype`, [2, H, E, D]: all tokens of `pages`, and then those of `extra`.

    `extra` are the fields of `Others`, and records, old, keys and values of `attend`: then follow the new
    tokens and those before them, both from both records, and the new tokens as they came. Layers that have no
    second records of newest tokens get the latter alone. What is not finite becomes 0.
    """
    dynamic = [x for x in (pages, index, *extra) if x is not None]
    return _run("rows", dynamic, [0] * len(dynamic), runs, means, decoders, kind=kind, dtype=dtype)


def _rows(dynamic_sizes, runs, means, decoders, *, kind: Kind, dtype, inputs=None) -> Tensor:
    pages, index, *extra = dynamic_sizes
    middle = torch.promote_types(decoders.dtype, torch.float32)
    wide = torch.promote_types(dtype, torch.float32)
    span = index.unsqueeze(1) * kind.page + torch.arange(kind.page, device=runs.device)
    pieces, mean = [_whole(runs, pages, index == 0, kind, middle)], [mean_row(span, kind.means).flatten()]
    if extra:
        *of, keys, values = extra
        others = Others(*of[: len(Others._fields)])
        if not kind.fine:
            records, old = of[len(Others._fields) :]
            pieces.append(scaled_codes(records[others.tokens], others.early, kind, middle))
            pieces.append(_old(runs, old, others, kind, middle))
            mean += others.mean, others.before
    turned = [torch.cat([piece[side] for piece in pieces], 1) for side in range(2)]
    turned = torch.stack(turned).to(decoders.dtype)
    size = turned.shape  # [2, H, E, D]
    if decoders.dim() == 2:
        found = turned.reshape(-1, size[-1]) @ decoders
    else:
        found = turned.reshape(2 * size[1], -1, size[-1]) @ decoders.flatten(0, 1)
    found = found.view(size).to(wide).unbind()
    found = torch.stack((found[0] + means[:, torch.cat(mean)].to(wide), found[1]))
    found = torch.where(found.abs() <= torch.finfo(dtype).max, found, 0.0).to(dtype)
    if not extra:
        return found
    own = torch.stack([x[others.tokens].transpose(0, 1).to(dtype) for x in (keys, values)])
    return torch.cat((found, own), 2)


def _whole(runs, pages, begins, kind: Kind, middle) -> list[Tensor]:
    """All tokens of pages, as scaled codes [H, N * page, D] of keys and of values.

    Where a page `begins` a request, bool [N], its first tokens have their second records added.
    """
    held = runs[pages.clamp(0, len(runs) - 1)]  # [N, H, L]
    token = torch.arange(kind.page, device=runs.device)
    parts, start = [[], []], [0, kind.second]
    for _, size, last in kind.fields:
        for i, slots in enumerate((kind.page, kind.room)):
            x = held[..., start[i] : start[i] + size * slots]
            x = x.unflatten(-1, (size, slots)).mT if last else x.unflatten(-1, (slots, size))
            parts[i].append(x[:, :, token.clamp_max(FIRST - 1)] if i else x)
            start[i] += size * slots
    first, rest = (single._sides(x, kind) for x in parts)
    early = (begins.unsqueeze(1) & (token < FIRST))[:, None, :, None]
    found = []
    for one, more, bits in zip(first, rest, kind.bits):
        x = dequantize(one, bits, middle) + torch.where(early, dequantize(more, bits, middle), 0.0)
        found.append(x.transpose(0, 1).flatten(1, 2))
    return found


def scaled_codes(records: Tensor, early: Tensor, kind: Kind, middle: torch.dtype) -> list[Tensor]:
    """Tokens of a step from both `records` [T, H, 2 * record], as `_whole` gives them: [H, T, D].

    Of codes of 8 bits the second records count for tokens that are `early`, bool [T].
    """
    sizes = [size for _, size, _ in kind.fields]
    first, rest = (single._sides(x.split(sizes, -1), kind) for x in records.split(kind.record, -1))
    early, found = early[:, None, None], []
    for one, more, bits in zip(first, rest, kind.bits):
        more = dequantize(more, bits, middle)
        more = more if bits < 8 else torch.where(early, more, 0.0)
        found.append((dequantize(one, bits, middle) + more).transpose(0, 1))
    return found


def _old(runs, old, of: Others, kind: Kind, middle) -> list[Tensor]:
    """The tokens before new ones, from both records, as `_whole` gives them: [H, K, D]."""
    first, rest = (
        single._read(runs, of.page, at, kind, second) for at, second in ((of.at, False), (of.second, True))
    )
    before = single._sides(old[of.by].split([size for _, size, _ in kind.fields], -1), kind)
    found, taken = [], of.taken[:, None, None]
    for i, (bits, twice) in enumerate(zip(kind.bits, (of.twice_key, of.twice_value))):
        more = torch.where(taken, dequantize(before[i], bits, middle), dequantize(rest[i], bits, middle))
        more = torch.where(twice[:, None, None], more, 0.0)
        found.append((dequantize(first[i], bits, middle) + more).transpose(0, 1))
    return found


def _merged(dynamic_sizes, *, inputs=None) -> tuple[Tensor, Tensor]:
    """Attention over the keys of two parts: outputs [T, Hq, D] and log-sum-exp [Hq, T] of each."""
    one, first, other, second = dynamic_sizes
    second = torch.where(second == torch.inf, -torch.inf, second)  # a query sees all of the first part
    lse = torch.logaddexp(first, second)
    share = (second - lse).exp().mT.unsqueeze(-1)
    return one.to(lse.dtype) * (1 - share) + other.to(lse.dtype) * share, lse


def _finish(dynamic_sizes, s_aux, *, scaling, inputs=None) -> Tensor:
    """The attention that FlashAttention found, and that over the tokens of `Plan.rows`."""
    query, output, lse, held, index, seen = dynamic_sizes
    (count, _, dim), heads, wide = query.shape, held.shape[1], lse.dtype
    each = lambda x: x.unflatten(1, (heads, -1))  # noqa: E731
    keys, values = (x.transpose(0, 1) for x in held)  # [E, H, D]
    asked, found = each(query).to(wide) * scaling, keys[index].to(wide)  # [T, w + 1, H, D]
    if torch.compiler.is_compiling():
        scores = (asked.unsqueeze(1) * found.unsqueeze(3)).sum(-1)
    else:
        scores = (asked @ found.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    lowest = torch.finfo(wide).min
    scores = torch.where(seen[:, :, None, None], scores, lowest)  # [T, w + 1, H, G]
    far = each(torch.where(lse == torch.inf, lowest, lse).mT)
    parts = [scores, far.unsqueeze(1)]
    if s_aux is not None:
        parts.append(each(s_aux.to(wide).expand(count, -1)).unsqueeze(1))
    scores = force_materialize(torch.cat(parts, 1))
    weights = (scores - scores.amax(1, keepdim=True)).exp()
    weights = force_materialize(weights / weights.sum(1, keepdim=True)).unsqueeze(-1)
    near = index.shape[1]
    result = weights[:, near] * each(output).to(wide)
    for i in range(near):
        result = result + weights[:, i] * values[index[:, i]].to(wide).unsqueeze(2)
    return result.flatten(1, 2).to(query.dtype)


def _run(name: str, dynamic: list[Tensor], axes: list[int], *args, **constants):
    """A function of this module, compiled where compiled versions run, once for all sizes of these axes."""
    if not use_compiled(dynamic[0]):
        return globals()[f"_{name}"](dynamic, *args, **constants)
    dynamic = [x.view_as(x) for x in dynamic]  # the mark must not stay on tensors of others
    inputs = []  # of another kind need a graph of their own
    for x, axis in zip(dynamic, axes):
        torch._dynamo.mark_dynamic(x, axis)
        inputs.append((x.dtype, *x.shape[:axis], *x.shape[axis + 1 :]))
    return _compiled[name](dynamic, dict, *args, **constants, inputs=tuple(inputs))


_compiled = {
    name: Compiled(function, options=single._FUSED)
    for name, function in (("rows", _rows), ("merged", _merged), ("finish", _finish))
}
