"""Many new tokens of a request: what a layer does in a prefill step, in few kernels.

The step is stored already (`single.store`). Then, for a group of requests (`batches.Prefill`):

- `plan` tells what is read, once a step for all layers with pages of one kind.
- `rows` decodes the pages of the group to keys and values in the dtype of the model: once for all queries.
  Whole pages are decoded as they lie. Only a few tokens of each request are looked up one by one.
- FlashAttention attends to them (`flash.ragged`). A query sees a token there as its first record has it, and
  the first tokens as both records have them. The `Kind.near` tokens before the query, and its own, are left
  out, by the causal rule alone: the keys of a request end that much earlier than its queries.
- `finish` adds these few tokens, each as the query must read it, and learned sinks.

So what a query reads depends on no other query, and the large products are those of a library. A context
longer than `batches.TOGETHER` tokens is decoded part by part, and the parts are merged by log-sum-exp.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..compile.compiled import Compiled, use_compiled
from ..compile.tiles import Tiles, prefill_tiles
from ..kernels import flash
from ..kernels.packed import force_materialize
from ..kernels.rotated import dequantize
from . import batches, single
from .batches import Prefill
from .pages import FIRST, NEAR, newest
from .single import Kind, mean_row

ALIGNED = 16  # elements: a multiple of 16 bytes in every dtype


class Entries(NamedTuple):
    """Tokens that are read from both of their records, E of them.

    Attributes:
        page, at: int64 [E], the page of each token, and its slot among the first records.
        second: int64 [E], its slot among the second records of the page.
        twice_key, twice_value: bool [E], whether its second record counts.
        kept: int64 [E], the token of the step that found the second record in its slot; negative: it is still
            in the page.
    """

    page: Tensor
    at: Tensor
    second: Tensor
    twice_key: Tensor
    twice_value: Tensor
    kept: Tensor


class Span(NamedTuple):
    """N pages of R requests that are decoded at once.

    Attributes:
        request: int64 [N], the request of each page.
        index: int64 [N], which page of the request each is.
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
        pages: int64 [N], pages whose tokens are decoded from their first records. At least two, because the
            compiler would make a constant of 1: behind a single page follows another one, which nobody reads.
        entries: the `FIRST` first tokens of each request; in the last part, others follow (see `plan`).
        early: int64 [R * FIRST], where these first tokens go: to their slots of `pages`, if these have them.
        mean: int64 [S], rows of the table of means, of all that is decoded.
        keys_from, used: int32 [R + 1] and [R]; see `flash.ragged`.
        longest: an upper bound of the keys of a request.
        last: whether this is the last part. All queries see the whole of other parts.
    """

    pages: Tensor
    entries: Entries
    early: Tensor
    mean: Tensor
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
        rows: int64 [T, w], where each query finds the w tokens before it, in the result of `rows`.
        seen: bool [T, w], which of them it sees.
    """

    parts: list[Part]
    queries_from: Tensor
    longest: int
    back: int | None
    tokens: Tensor
    rows: Tensor
    seen: Tensor


# -- once a step


def plan(group: Prefill, kind: Kind) -> Plan:
    """What a group of requests reads from pages of this kind.

    What is small is computed where the lengths are, and then moved to the device. Until then `Part.pages` and
    `Entries.page` say where in the table a page is named, and not which page it is.

    Where queries read tokens before them from both records, what is decoded in the last part is: its pages;
    the first tokens of each request; the `NEAR` tokens before the new ones of each request; and the new
    tokens.
    """
    page, near, window, lengths = kind.page, kind.near, kind.window, group.lengths
    counts, count = _put(group.counts, lengths), int(group.counts.sum())
    begin, (spans, back) = lengths - counts, spans_of(group, page, window, near)
    parts = [_part(group, x, kind) for x in spans]
    last, index = parts.pop(), spans[-1].index
    total, early = len(last.pages) * page, last.early

    starts = np.concatenate(([0], np.cumsum(group.counts)))
    of = _put(np.repeat(np.arange(len(counts)), group.counts), lengths)
    order = _put(np.arange(count) - np.repeat(starts[:-1], group.counts), lengths)
    position = begin[of] + order
    if near:
        before, mean = _before(group, kind, begin, counts)
        entries = Entries(*(torch.cat(x) for x in zip(last.entries, before)))
        mean = torch.cat((last.mean, mean, mean_row(position, kind.means)))
        last = last._replace(entries=entries, mean=mean)
    first = index[last.keys_from[:-1].long() // page] * page  # the first position in the last part
    once = (last.keys_from[:-1] - first)[of] + position
    older = total + len(early) + NEAR * (of + 1) + order
    parts.append(last)
    found = parts, queries(group), _put(group.index, lengths), (order, position, once, older)
    parts, asked, tokens, each = moved(found, group.table)
    rows, seen = _rows_before(*each, total + len(early) + NEAR * len(counts), kind)
    return Plan(_with_pages(parts, group.table), *asked, back, tokens, rows, seen)


def _rows_before(
    order: Tensor, position: Tensor, once: Tensor, older: Tensor, new: int, kind: Kind
) -> tuple[Tensor, Tensor]:
    """`Plan.rows` and `Plan.seen`, on the device: their sizes are a multiple of all others.

    Args:
        order, position: int64 [T], of each query among the new tokens of its request, and in the request.
        once, older: int64 [T], the place that its own token would have in the result of `rows` as a token of
            a page, and as one of those before the new tokens.
        new: the place of the first new token.
    """
    order, position, once, older = (x.unsqueeze(1) for x in (order, position, once, older))
    distance = torch.arange(1, kind.near + 1, device=order.device)
    seen = position >= distance
    if kind.window is not None:
        seen = seen & (distance < kind.window)
    kept, _ = newest((position - distance).clamp_min(0), kind.page, kind.fine, kind.drafts)
    twice = (position < FIRST + distance) | (distance <= kept - kind.drafts)
    query = new + torch.arange(len(order), device=order.device).unsqueeze(1)
    both = torch.where(order >= distance, query, older) - distance
    return torch.where(seen, torch.where(twice, both, once - distance), 0), seen


def queries(group: Prefill) -> tuple[Tensor, int]:
    """`queries_from` of `flash.ragged`, and the most queries of a request."""
    starts = np.concatenate(([0], np.cumsum(group.counts)))
    return _put(starts.astype(np.int32), group.lengths), int(group.counts.max())


def spans_of(group: Prefill, page: int, window: int | None, near: int) -> tuple[list[Span], int | None]:
    """The pages of a group, and `back` of `flash.ragged`: queries see tokens up to `near` + 1 before them.

    With a `near` of -1 they see their own. The result is where the lengths of the group are.
    """
    lengths, slots = group.lengths, group.reach
    begin, spans = lengths - _put(group.counts, lengths), []
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
            index = _put(np.arange(start, start + size), lengths)
            ends = _put(np.array([0, size * page], dtype=np.int32), lengths)
            spans.append(Span(0 * index, index, ends, ends[1:], size * page, False))
        first, slots = first + whole, slots - whole * page
    blocks = np.minimum(-(-slots // page), group.table.shape[1])
    ends = np.concatenate(([0], np.cumsum(blocks)))
    request = _put(np.repeat(np.arange(len(blocks)), blocks), lengths)
    index = first[request] + _put(np.arange(ends[-1]) - np.repeat(ends[:-1], blocks), lengths)
    used, back = lengths - 1 - near - first * page, None
    if window is not None:
        back = window - 2 - near
        if back < 0:  # all that a query sees is near it
            used, back = 0 * used, None
    keys_from = _put((ends * page).astype(np.int32), lengths)
    longest = int(blocks.max()) * page
    spans.append(Span(request, index, keys_from, used.clamp_min(0).int(), longest, True))
    return spans, back


def _put(x: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(like.device, non_blocking=True)


def place(table: Tensor, request: Tensor, index: Tensor) -> Tensor:
    """Where the flat table [R, n] names pages `index` of requests, int64 like both."""
    return request * table.shape[1] + index.clamp_max(table.shape[1] - 1)


def pages_at(place: Tensor, table: Tensor) -> Tensor:
    """The pages that `table` [R, n] names at places, int64."""
    return table.flatten()[place].long()


def _with_pages(parts: list[Part], table: Tensor) -> list[Part]:
    """Parts with pages in place of where the table names them."""
    found = []
    for part in parts:
        entries = part.entries._replace(page=pages_at(part.entries.page, table))
        found.append(part._replace(pages=pages_at(part.pages, table), entries=entries))
    return found


def moved(of, like: Tensor):
    """The tensors in `of`, lists and tuples of tensors and others, on the device of `like`."""
    leaves, structure = tree_flatten(of)
    which = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.device != like.device]
    copy = lambda x: x.to(like.device, non_blocking=True)  # noqa: E731
    copies = copied_together([leaves[i] for i in which], copy, pinned=like.is_cuda)
    for i, x in zip(which, copies):
        leaves[i] = x
    return tree_unflatten(leaves, structure)


def copied_together(
    tensors: list[Tensor], copy: Callable[[Tensor], Tensor], pinned: bool = False
) -> list[Tensor]:
    """Copies of tensors on the host by `copy`, which is called once for each dtype, from `pinned` memory.

    Each copy begins at a multiple of 16 bytes: a compiled function would copy other inputs again.
    """
    found = list(tensors)
    for dtype in {x.dtype for x in tensors}:
        which = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        sizes = [-(-tensors[i].numel() // ALIGNED) * ALIGNED for i in which]
        # From other memory, a copy of more than 64 KiB waits for what the device is doing.
        held = torch.zeros(sum(sizes), dtype=dtype, pin_memory=pinned)
        for i, x in zip(which, held.split(sizes)):
            x[: tensors[i].numel()] = tensors[i].flatten()
        for i, x in zip(which, copy(held).split(sizes)):
            found[i] = x[: tensors[i].numel()].view(tensors[i].shape)
    return found


def _part(group: Prefill, of: Span, kind: Kind) -> Part:
    """The pages of a span, and the first tokens of all requests."""
    count, page, index, on = len(group.table), kind.page, of.index, of.index.device
    at = torch.arange(FIRST, device=on).expand(count, -1)
    first_page = (group.table.shape[1] * torch.arange(count, device=on)).unsqueeze(1).expand_as(at)
    yes, nowhere = torch.ones_like(at, dtype=torch.bool), torch.full_like(at, -1)
    entries = Entries(*(x.flatten() for x in (first_page, at, at, yes, yes, nowhere)))
    pages = place(group.table, of.request, index)
    if len(pages) == 1:
        pages = torch.nn.functional.pad(pages, (0, 1))
    total, start = len(pages) * page, of.keys_from[:-1].long()
    # Requests of other spans have none of their pages here.
    begins = torch.zeros(count, dtype=torch.bool, device=on)
    places = torch.zeros(count, dtype=torch.int64, device=on)
    rows = of.request[start // page]
    begins[rows], places[rows] = index[start // page] == 0, start
    own = total + FIRST * torch.arange(count, device=on)
    early = (torch.where(begins, places, own).unsqueeze(1) + at).flatten()
    position = (index.unsqueeze(1) * page + torch.arange(page, device=on)).flatten()
    position = torch.nn.functional.pad(position, (0, total - len(position)))
    mean = mean_row(torch.cat((position, at.flatten())), kind.means)
    return Part(pages, entries, early, mean, *of[2:])


def _before(group: Prefill, kind: Kind, begin: Tensor, counts: Tensor) -> tuple[Entries, Tensor]:
    """The `NEAR` tokens right before the new ones of each request, and their rows of the table of means."""
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
    by = torch.where(taken, _put(group.starts, begin).unsqueeze(1) + order, -1)
    row = torch.arange(len(begin), device=begin.device).unsqueeze(1)
    pages = place(group.table, row, position // page)
    sides = [early if bits >= 8 else twice for bits in kind.bits]
    found = pages, position % page, second, *sides, by
    entries = Entries(*(x.expand_as(position).flatten() for x in found))
    return entries, mean_row(position, kind.means).flatten()


# -- in each layer


def attend(
    query: Tensor, runs: Tensor, whole: Tensor | None, old: Tensor | None, keys: Tensor, values: Tensor,
    of: Plan, means: Tensor, decoders: Tensor, kind: Kind, scaling: float, s_aux: Tensor | None,
    output: Tensor,
) -> None:  # fmt: skip
    """Write the attention of a group to `output` [T, Hq, D].

    Args:
        query: [T, Hq, D], those of the group.
        runs: uint8 [P, H, L], the pages, in which the step is stored.
        whole, old: from `single.store`, of all tokens of the step.
        keys, values: [n, H, D], those of the step as they came.
        of: from `plan`.
        means, decoders: see `single.vectors`.
        scaling: of the scores.
        s_aux: [Hq], scores of learned sinks, or None.
    """
    total = None
    for part in of.parts:
        dynamic = [part.pages, part.early, part.mean, *part.entries]
        axes = [0] * len(dynamic)
        if part.last and kind.near:
            dynamic, axes = [*dynamic, old, of.tokens, whole], [*axes, 0, 0, 2]
        held = _run("rows", dynamic, axes, runs, means, decoders, kind=kind, dtype=query.dtype)
        found = flash.ragged(
            query, *(x.transpose(0, 1) for x in held), of.queries_from, part.keys_from, part.used,
            (of.longest, part.longest), scaling, part.last, of.back,
        )  # fmt: skip
        total = found if total is None else merged(total, found)
    dynamic = [query, *total, *held, of.tokens, keys, values, of.rows, of.seen, output]
    _run("finish", dynamic, [0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0], s_aux, scaling=scaling)


def _rows(dynamic_sizes, runs, means, decoders, *, kind: Kind, dtype, inputs=None) -> tuple[Tensor, Tensor]:
    """Keys and values of `dtype`, [H, S, D] each: of the pages, the entries and the new tokens of a part.

    `dynamic_sizes` are `pages`, `early`, `mean` and the fields of `entries` of a `Part`; and if the part has
    new tokens, `old` from `single.store`, which tokens of the step these are, int64 [T], and `whole`. What is
    not finite becomes 0.
    """
    pages, early, mean, *rest = dynamic_sizes
    of, new = Entries(*rest[: len(Entries._fields)]), rest[len(Entries._fields) :]
    middle = torch.promote_types(decoders.dtype, torch.float32)
    wide = torch.promote_types(dtype, torch.float32)
    few = _of_entries(of, runs, new[0] if new else None, kind, middle, decoders.dtype)
    found, held = [], _of_pages(runs[pages.clamp(0, len(runs) - 1)], kind, middle)
    for side, (once, twice) in enumerate(zip(held, few)):
        turned = twice.new_empty((len(once), len(mean), twice.shape[-1]))
        end, stop = once.shape[1], once.shape[1] + twice.shape[1]
        turned[:, :end], turned[:, end:stop] = once, twice
        if new:
            turned[:, stop:] = new[2][side][:, new[1]]
        turned[:, early] = twice[:, : len(early)]
        if decoders.dim() == 2:
            x = (turned.flatten(0, 1) @ decoders).view(turned.shape)
        else:
            x = turned @ decoders[side]
        x = x.to(wide) if side else x.to(wide) + means[:, mean].to(wide)
        found.append(torch.where(x.abs() <= torch.finfo(dtype).max, x, 0.0).to(dtype))
    return tuple(found)


def _of_pages(runs: Tensor, kind: Kind, dtype: torch.dtype) -> list[Tensor]:
    """Scaled codes of the first records of whole pages [N, H, L], of keys and of values: [H, N * page, D]."""
    parts, start = [], 0
    for _, size, last in kind.fields:
        part = runs[..., start : start + kind.page * size]
        sizes = (size, kind.page) if last else (kind.page, size)
        part = part.unflatten(-1, sizes)
        parts.append(part.mT if last else part)
        start += kind.page * size
    sides = zip(single._sides(parts, kind), kind.bits)
    return [dequantize(x, bits, dtype).transpose(0, 1).flatten(1, 2) for x, bits in sides]


def _of_entries(of: Entries, runs: Tensor, old: Tensor | None, kind: Kind, middle, dtype) -> Tensor:
    """Scaled codes of both records of tokens, [2, H, E, D] of keys and values.

    `old`, uint8 [n, H, record], has second records that are not in pages any more.
    """
    head = torch.arange(runs.shape[1], device=runs.device).unsqueeze(-1)
    page, parts = of.page.clamp(0, len(runs) - 1)[:, None, None], []
    for at, second in ((of.at, False), (of.second, True)):
        parts.append([runs[page, head, x.unsqueeze(1)] for x in single._addresses(at, kind, second)])
    if old is not None:
        other = old[of.kept.clamp_min(0)].split([size for _, size, _ in kind.fields], -1)
        inside = (of.kept < 0)[:, None, None]
        parts[1] = [torch.where(inside, x, y) for x, y in zip(parts[1], other)]
    found = []
    for one, more, bits, twice in zip(
        *(single._sides(x, kind) for x in parts), kind.bits, (of.twice_key, of.twice_value)
    ):
        more = torch.where(twice[:, None, None], dequantize(more, bits, middle), 0.0)
        found.append((dequantize(one, bits, middle) + more).transpose(0, 1).to(dtype))
    return force_materialize(torch.stack(found))


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
    """Write the attention that FlashAttention found, that over the tokens of `Plan.rows`, and to the own one.

    A compiled kernel reads a key once for all queries of its KV head, and a query once for all its keys.
    """
    query, attended, lse, *held, tokens, keys, values, index, seen, output = dynamic_sizes
    count, heads, wide, near = len(query), keys.shape[1], lse.dtype, index.shape[1]
    each = lambda x: x.unflatten(1, (heads, -1))  # noqa: E731
    found = [
        [side.transpose(0, 1)[index[:, i]] for i in range(near)] + [own[tokens]]
        for side, own in zip(held, (keys, values))
    ]
    asked = (each(query).to(wide) * scaling).unbind(2)  # G times [T, H, D]
    scores = torch.stack([(q * x.to(wide)).sum(-1) for x in found[0] for q in asked], -1)
    scores = scores.unflatten(-1, (near + 1, -1))  # [T, H, w + 1, G]
    lowest = torch.finfo(wide).min
    visible = torch.nn.functional.pad(seen, (0, 1), value=True)  # the own token, too
    scores = torch.where(visible[:, None, :, None], scores, lowest)
    far = each(torch.where(lse == torch.inf, lowest, lse).mT)
    parts = [scores, far.unsqueeze(2)]
    if s_aux is not None:
        parts.append(each(s_aux.to(wide).expand(count, -1)).unsqueeze(2))
    scores = force_materialize(torch.cat(parts, 2))
    weights = (scores - scores.amax(2, keepdim=True)).exp()
    weights = force_materialize(weights / weights.sum(2, keepdim=True)).unsqueeze(-1)
    result = weights[:, :, near + 1] * each(attended).to(wide)
    for i, x in enumerate(found[1]):
        result = result + weights[:, :, i] * x.to(wide).unsqueeze(2)
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

    # Inputs of another kind need a graph of their own. As text, because a file of a compiled function cannot
    # hold a dtype that the function does not use.
    inputs = tuple((str(x.dtype), *x.shape[:axis], *x.shape[axis + 1 :]) for x, axis in zip(dynamic, axes))
    return _compiled[name](dynamic, pinned, *args, **constants, inputs=inputs)


# One kernel has the sums of all pairs of queries and keys, and writes them to one tensor.
_options = single._FUSED | {"max_fusion_size": 1024}
_compiled = {
    name: Compiled(function, _options, lambda dynamic: prefill_tiles(dynamic[0].shape[-1]))
    for name, function in (("merged", _merged), ("finish", _finish))
}
_compiled["rows"] = Compiled(_rows, single._FUSED, lambda dynamic: prefill_tiles())
