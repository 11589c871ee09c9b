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
from ..compile.tiles import Tiles, prefill_tiles
from ..kernels import flash
from ..kernels.packed import force_materialize
from ..kernels.rotated import dequantize
from . import batches, single
from .batches import Prefill
from .pages import FIRST, NEAR, newest
from .single import Kind, mean_row


class Entries(NamedTuple):
    """Tokens to be decoded, E of them.

    Attributes:
        page, at: int64 [E], the page of each token, and its slot among the first records.
        second: int64 [E], its slot among the second records of the page.
        twice_key, twice_value: bool [E], whether its second record counts.
        kept: int64 [E], where the second record is if it is not in the page: token `kept` of the step has it
            as its new record, or, for numbers from T on, token `kept` - T found it in its slot. Negative: it
            is in the page.
        mean: int64 [E], rows of the table of means.
    """

    page: Tensor
    at: Tensor
    second: Tensor
    twice_key: Tensor
    twice_value: Tensor
    kept: Tensor
    mean: Tensor


class Span(NamedTuple):
    """N pages of R requests that are decoded at once.

    Attributes:
        request, index: int64 [N], the request of each page, and which page of the request it is.
        keys_from, used, longest, last: see `Part`.
    """

    request: Tensor
    index: Tensor
    keys_from: Tensor
    used: Tensor
    longest: int
    last: bool


class Part(NamedTuple):
    """Tokens that are decoded at once, and what R requests read of them.

    Attributes:
        entries: all tokens of some pages; in the last part, others follow (see `plan`).
        keys_from, used: int32 [R + 1] and [R]; see `flash.ragged`.
        longest: an upper bound of the keys of a request.
        last: whether this is the last part. All queries see the whole of other parts.
    """

    entries: Entries
    keys_from: Tensor
    used: Tensor
    longest: int
    last: bool


class Plan(NamedTuple):
    """What a group reads: its T queries, those of one request after another.

    Attributes:
        parts: the last part is that of the newest tokens.
        queries_from: int32 [R + 1], the first query of each request.
        longest: most queries of a request.
        back: how many keys FlashAttention sees before the last one; None: all.
        tokens: int64 [T], which tokens of the step the queries are.
        rows: int64 [T, w + 1], where each query finds its own token and the w before it, in the result of
            `rows`.
        seen: bool [T, w + 1], which of them it sees.
    """

    parts: list[Part]
    queries_from: Tensor
    longest: int
    back: int | None
    tokens: Tensor
    rows: Tensor
    seen: Tensor


# -- once a step


def plan(group: Prefill, kind: Kind, tokens: int) -> Plan:
    """What a group of requests reads from pages of this kind. The step stored `tokens` tokens, with padding.

    Where queries read tokens before them from both records, the entries of the last part are: its pages; the
    new tokens; and the `NEAR` tokens before the new ones of each request. The result of `rows` ends with the
    new tokens as they came.
    """
    table, page, near, window = group.table, kind.page, kind.near, kind.window
    counts, count = _put(group.counts, table), int(group.counts.sum())
    begin, (spans, back) = group.lengths - counts, spans_of(group, page, window, near)
    parts = [Part(_pages(table, x, kind), *x[2:]) for x in spans]
    *_, (_, index, keys_from, *_) = spans
    last, total = parts.pop(), len(index) * page
    entries = [last.entries]

    starts = np.concatenate(([0], np.cumsum(group.counts)))
    of = _put(np.repeat(np.arange(len(counts)), group.counts), table).unsqueeze(1)
    order = _put(np.arange(count) - np.repeat(starts[:-1], group.counts), table).unsqueeze(1)
    query, position = torch.arange(count, device=table.device).unsqueeze(1), begin[of] + order
    if near:
        entries += _new(group, kind, of, position), _before(group, kind, begin, counts, tokens)
    entries = Entries(*(torch.cat(x) for x in zip(*entries)))
    distance = torch.arange(1, near + 1, device=table.device)
    seen = position >= distance
    if window is not None:
        seen = seen & (distance < window)
    token = (position - distance).clamp_min(0)
    kept, _ = newest(token, page, kind.fine, kind.drafts)
    twice = (token < FIRST) | (distance <= kept - kind.drafts)
    own = len(entries.page) + query
    both = torch.where(order >= distance, query - distance, count + NEAR * (of + 1) + order - distance)
    first = index[keys_from[:-1].long() // page] * page  # the first position in the last part
    once = keys_from[of] + token - first[of]
    rows = torch.where(seen, torch.where(twice, total + both, once), own)
    rows = torch.cat((own, rows), 1)
    seen = torch.cat((torch.ones_like(query, dtype=torch.bool), seen), 1)
    parts.append(last._replace(entries=entries))
    return Plan(parts, *queries(group), back, group.tokens, rows, seen)


def queries(group: Prefill) -> tuple[Tensor, int]:
    """`queries_from` of `flash.ragged`, and the most queries of a request."""
    starts = np.concatenate(([0], np.cumsum(group.counts)))
    return _put(starts.astype(np.int32), group.table), int(group.counts.max())


def spans_of(group: Prefill, page: int, window: int | None, near: int) -> tuple[list[Span], int | None]:
    """The pages of a group, and `back` of `flash.ragged`: queries see tokens up to `near` + 1 before them.

    With a `near` of -1 they see their own.
    """
    table, slots = group.table, group.reach
    begin, spans = group.lengths - _put(group.counts, table), []
    first = torch.zeros_like(begin)
    if window is not None:
        first = (begin - window + 1).clamp_min(0) // page
        slots = np.minimum(slots, group.counts + window + page - 2)
    elif slots.sum() > batches.TOGETHER and len(slots) == 1:
        # Pages that all queries see whole, also where the length on the host is an upper bound.
        whole = max(0, int(slots[0] - group.counts[0] - group.slack - max(near, 0)) // page)
        each = max(1, batches.TOGETHER // page)
        for start in range(0, whole, each):
            size = min(each, whole - start)
            index = _put(np.arange(start, start + size), table)
            ends = _put(np.array([0, size * page], dtype=np.int32), table)
            spans.append(Span(0 * index, index, ends, ends[1:], size * page, False))
        first, slots = first + whole, slots - whole * page
    blocks = np.minimum(-(-slots // page), table.shape[1])
    ends = np.concatenate(([0], np.cumsum(blocks)))
    request = _put(np.repeat(np.arange(len(blocks)), blocks), table)
    index = first[request] + _put(np.arange(ends[-1]) - np.repeat(ends[:-1], blocks), table)
    used, back = group.lengths - 1 - near - first * page, None
    if window is not None:
        back = window - 2 - near
        if back < 0:  # all that a query sees is near it
            used, back = 0 * used, None
    keys_from = _put((ends * page).astype(np.int32), table)
    longest = int(blocks.max()) * page
    spans.append(Span(request, index, keys_from, used.clamp_min(0).int(), longest, True))
    return spans, back


def _put(x: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(like.device, non_blocking=True)


def owner(table: Tensor, request: Tensor, index: Tensor) -> Tensor:
    """Pages `index` of requests, int64 like both."""
    return table[request, index.clamp_max(table.shape[1] - 1)].long()


def _pages(table: Tensor, of: Span, kind: Kind) -> Entries:
    """All tokens of some pages."""
    index = of.index
    at = torch.arange(kind.page, device=table.device).expand(len(index), -1)
    position = index.unsqueeze(1) * kind.page + at
    pages, early = owner(table, of.request, index).unsqueeze(1), position < FIRST
    mean, nowhere = mean_row(position, kind.means), torch.full_like(position, -1)
    found = pages, at, at.clamp_max(FIRST - 1), early, early, nowhere, mean
    return Entries(*(x.expand_as(position).flatten().contiguous() for x in found))


def _new(group: Prefill, kind: Kind, of: Tensor, position: Tensor) -> Entries:
    """The new tokens of a group at `position` [T, 1] of requests `of` [T, 1]."""
    early, at = position < FIRST, position % kind.page
    twice = [early if bits >= 8 else torch.ones_like(early) for bits in kind.bits]
    pages = owner(group.table, of, position // kind.page)
    found = pages, at, 0 * at, *twice, group.tokens.unsqueeze(1), mean_row(position, kind.means)
    return Entries(*(x.flatten() for x in found))


def _before(group: Prefill, kind: Kind, begin: Tensor, counts: Tensor, tokens: int) -> Entries:
    """The `NEAR` tokens right before the new ones of each request."""
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
    by = torch.where(taken, tokens + _put(group.starts, begin).unsqueeze(1) + order, -1)
    row = torch.arange(len(begin), device=begin.device).unsqueeze(1)
    pages = owner(group.table, row, position // page)
    sides = [early if bits >= 8 else twice for bits in kind.bits]
    found = pages, position % page, second, *sides, by, mean_row(position, kind.means)
    return Entries(*(x.expand_as(position).flatten() for x in found))


# -- in each layer


def attend(
    query: Tensor, runs: Tensor, records: Tensor | None, old: Tensor | None, keys: Tensor, values: Tensor,
    of: Plan, means: Tensor, decoders: Tensor, kind: Kind, scaling: float, s_aux: Tensor | None,
    output: Tensor,
) -> None:  # fmt: skip
    """Write the attention of a group to `output` [T, Hq, D].

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
    total, kept = None, () if records is None else (torch.cat((records, old)),)
    for part in of.parts:
        extra = (*kept, of.tokens, keys, values) if part.last else ()
        dynamic = [*part.entries, *extra]
        constants = dict(kind=kind, dtype=query.dtype, kept=bool(part.last and kept))
        held = _run("rows", dynamic, [0] * len(dynamic), runs, means, decoders, **constants)
        found = flash.ragged(
            query, *held.transpose(1, 2), of.queries_from, part.keys_from, part.used,
            (of.longest, part.longest), scaling, part.last, of.back,
        )  # fmt: skip
        total = found if total is None else merged(total, found)
    dynamic = [query, *total, held, of.rows, of.seen, output]
    _run("finish", dynamic, [0, 0, 1, 2, 0, 0, 0], s_aux, scaling=scaling)


def _rows(dynamic_sizes, runs, means, decoders, *, kind: Kind, dtype, kept: bool, inputs=None) -> Tensor:
    """Keys and values of `dtype`, [2, H, E + T, D]: of E entries, and of T tokens as they came.

    `dynamic_sizes` are the fields of `Entries`; with `kept` second records that are not in pages, uint8
    [n, H, record], see `Entries.kept`; and where tokens follow, which ones of the step, int64 [T], and keys
    and values of the step. What is not finite becomes 0.
    """
    of, extra = Entries(*dynamic_sizes[: len(Entries._fields)]), dynamic_sizes[len(Entries._fields) :]
    middle = torch.promote_types(decoders.dtype, torch.float32)
    wide = torch.promote_types(dtype, torch.float32)
    head = torch.arange(runs.shape[1], device=runs.device).unsqueeze(-1)
    page, parts = of.page.clamp(0, len(runs) - 1)[:, None, None], []
    for at, second in ((of.at, False), (of.second, True)):
        parts.append([runs[page, head, x.unsqueeze(1)] for x in single._addresses(at, kind, second)])
    if kept:
        other = extra[0][of.kept.clamp_min(0)].split([size for _, size, _ in kind.fields], -1)
        inside = (of.kept < 0)[:, None, None]
        parts[1] = [torch.where(inside, x, y) for x, y in zip(parts[1], other)]
    turned = []
    for one, more, bits, twice in zip(
        *(single._sides(x, kind) for x in parts), kind.bits, (of.twice_key, of.twice_value)
    ):
        more = torch.where(twice[:, None, None], dequantize(more, bits, middle), 0.0)
        turned.append((dequantize(one, bits, middle) + more).transpose(0, 1))
    turned = torch.stack(turned).to(decoders.dtype)
    size = turned.shape  # [2, H, E, D]
    if decoders.dim() == 2:
        found = turned.reshape(-1, size[-1]) @ decoders
    else:
        found = turned.reshape(2 * size[1], -1, size[-1]) @ decoders.flatten(0, 1)
    found = found.view(size).to(wide).unbind()
    found = torch.stack((found[0] + means[:, of.mean].to(wide), found[1]))
    found = torch.where(found.abs() <= torch.finfo(dtype).max, found, 0.0).to(dtype)
    if not extra:
        return found
    tokens, keys, values = extra[-3:]
    own = torch.stack([x[tokens].transpose(0, 1).to(dtype) for x in (keys, values)])
    return torch.cat((found, own), 2)


def scaled_codes(records: list[Tensor], early: Tensor, kind: Kind, middle: torch.dtype) -> list[Tensor]:
    """Tokens from both records, uint8 [T, H, record] each, as scaled codes [H, T, D] of keys and of values.

    Of codes of 8 bits the second records count for tokens that are `early`, bool [T].
    """
    sizes = [size for _, size, _ in kind.fields]
    first, rest = (single._sides(x.split(sizes, -1), kind) for x in records)
    early, found = early[:, None, None], []
    for one, more, bits in zip(first, rest, kind.bits):
        more = dequantize(more, bits, middle)
        more = more if bits < 8 else torch.where(early, more, 0.0)
        found.append((dequantize(one, bits, middle) + more).transpose(0, 1))
    return found


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both: outputs [T, Hq, D] and log-sum-exp [Hq, T] of each.

    Queries see a key of the first one.
    """
    return _run("merged", [*one, *other], [0, 1, 0, 1])


def _merged(dynamic_sizes, *, inputs=None) -> tuple[Tensor, Tensor]:
    one, first, other, second = dynamic_sizes
    second = torch.where(second == torch.inf, -torch.inf, second)
    lse = torch.logaddexp(first, second)
    share = (second - lse).exp().mT.unsqueeze(-1)
    return one.to(lse.dtype) * (1 - share) + other.to(lse.dtype) * share, lse


def _finish(dynamic_sizes, s_aux, *, scaling, inputs=None) -> None:
    """Write the attention that FlashAttention found, and that over the tokens of `Plan.rows`."""
    query, attended, lse, held, index, seen, output = dynamic_sizes
    count, heads, wide = len(query), held.shape[1], lse.dtype
    each = lambda x: x.unflatten(1, (heads, -1))  # noqa: E731
    keys, values = (x.transpose(0, 1) for x in held)  # [E, H, D]
    asked = each(query).to(wide) * scaling  # [T, H, G, D]
    found = keys[index].transpose(1, 2).to(wide)  # [T, H, w + 1, D]
    if torch.compiler.is_compiling():
        scores = (asked.unsqueeze(2) * found.unsqueeze(3)).sum(-1)
    else:
        scores = found @ asked.mT
    lowest = torch.finfo(wide).min
    scores = torch.where(seen[:, None, :, None], scores, lowest)  # [T, H, w + 1, G]
    far = each(torch.where(lse == torch.inf, lowest, lse).mT)
    parts = [scores, far.unsqueeze(2)]
    if s_aux is not None:
        parts.append(each(s_aux.to(wide).expand(count, -1)).unsqueeze(2))
    scores = force_materialize(torch.cat(parts, 2))
    weights = (scores - scores.amax(2, keepdim=True)).exp()
    weights = force_materialize(weights / weights.sum(2, keepdim=True)).unsqueeze(-1)
    near = index.shape[1]
    result = weights[:, :, near] * each(attended).to(wide)
    for i in range(near):
        result = result + weights[:, :, i] * values[index[:, i]].to(wide).unsqueeze(2)
    output.copy_(result.flatten(1, 2))


def _run(name: str, dynamic: list[Tensor], axes: list[int], *args, **constants):
    """A function of this module, compiled where compiled versions run, once for all sizes of these axes."""
    if not use_compiled(dynamic[0]):
        return globals()[f"_{name}"](dynamic, *args, **constants)
    # Views in all calls: the mark must not stay on tensors of others, and graphs are for views then.
    dynamic = [x.view_as(x) for x in dynamic]

    def pinned() -> Tiles:
        """Called before the function is compiled, and not in later calls: then marks would take time."""
        for x, axis in zip(dynamic, axes):
            torch._dynamo.mark_dynamic(x, axis)
        return _compiled[name].tiles(dynamic)

    # Inputs of another kind need a graph of their own.
    inputs = tuple((x.dtype, *x.shape[:axis], *x.shape[axis + 1 :]) for x, axis in zip(dynamic, axes))
    return _compiled[name](dynamic, pinned, *args, **constants, inputs=inputs)


_compiled = {
    name: Compiled(function, single._FUSED, lambda dynamic: prefill_tiles(dynamic[0].shape[-1]))
    for name, function in (("merged", _merged), ("finish", _finish))
}
_compiled["rows"] = Compiled(_rows, single._FUSED, lambda dynamic: prefill_tiles())
