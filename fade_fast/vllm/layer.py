"""An attention layer over vLLM's pages: it stores tokens, and attends for the batches of a step.

These classes do not know vLLM. They take vLLM's cache tensor, slots and tables, and run the formats and
kernels that the cache of `generate()` runs.
"""

import functools
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from ..compile.compiled import rounded, use_compiled
from ..compile.page_gather import pages_of
from ..formats.matched import MatchedFormat
from ..formats.rotated import RotatedFormat
from ..kernels import dense, packed, rotated
from ..kernels.matched import Matrices
from ..kernels.merge import Partial, combine, empty, merge, of_heads, of_rows, sinks
from .batches import Batch, FirstTokens, Step, sees
from .pages import FIRST, SPAN, PageLayout

KEYS = 1024  # keys that long rows attend at a time
ELEMENTS = 1 << 24  # most scores that long rows hold at a time
#: Last tokens of a context that short rows read as vectors, decoded from their codes, beside the first ones.
#: The float16 kernels need a score near the largest one, and these tokens are often attended most.
LAST = 12
#: By how many tokens kernels may round a context up, at most.
ROUNDED_UP = 1 << 13


class PagedLayer(ABC):
    """What both kinds of layers do.

    Attributes:
        skipped: first tokens of a context that long rows read as vectors.
        itself: whether a query reads its own token from the pages.

    Args:
        heads: KV heads.
        scaling, softcap: of the scores.
        window: a query sees this many tokens, up to itself; None: all tokens up to itself.
        s_aux: [Hq], scores of learned attention sinks, or None.
    """

    skipped, itself = 0, True

    def __init__(
        self,
        heads: int,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
    ):
        self.heads, self.scaling, self.window = heads, scaling, window
        self.softcap, self.s_aux = softcap, s_aux

    @abstractmethod
    def append(self, cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store the tokens of a step.

        Args:
            cache: [P, H, N, C], vLLM's cache of this layer.
            keys, values: [T, H, D]. Tokens behind the length of `slots` are padding.
            slots: int [n]. Slot s is slot s % N of page s // N. Negative: padding, which is not stored.
            positions: int64 [n], of the tokens in their requests.
        """

    def append_first(  # noqa: B027 - a layer without room does nothing
        self, cache: Tensor, keys: Tensor, values: Tensor, first: FirstTokens
    ) -> None:
        """Store the first tokens of requests a second time, where the format has room for it.

        They are among the step's tokens `keys` and `values` [T, H, D], and `append` stored them.
        """

    def attend(
        self, cache: Tensor, query: Tensor, keys: Tensor, values: Tensor, step: Step, output: Tensor
    ) -> None:
        """Attention of a step whose tokens are stored. Writes `output` [T, Hq, D].

        `query` [T, Hq, D], `keys` and `values` [T, H, D] are those of the step.
        """
        for batch in step.short:
            batch.store(self._attend_short(cache, query, keys, values, batch), output)
        if step.long is not None:
            step.long.store(self._attend_long(cache, query, keys, values, step.long), output)

    def _attend_short(self, cache: Tensor, query, keys, values, batch: Batch) -> Tensor:
        """Attention of a batch of short rows, [B, q, Hq, D]."""
        return self._attend_long(cache, query, keys, values, batch)

    def _attend_long(self, cache: Tensor, query, keys, values, batch: Batch) -> Tensor:
        """Attention of a batch, key chunk by key chunk, [B, q, Hq, D]."""
        query, *own = map(batch.rows, (query, keys, values))
        wide = torch.promote_types(query.dtype, torch.float32)
        table, first, slots = batch.pages(self.window, cache.shape[2])
        step = max(1, ELEMENTS // (query.shape[1] * query.shape[2] * KEYS))
        parts = []
        for start in range(0, len(query), step):
            of = slice(start, start + step)
            rows = of_rows(query[of].to(wide) * self.scaling, self.heads)
            total = self._begin(cache, rows, [x[of].to(wide) for x in own], batch.at[of], batch.table[of])
            total = self._walk(cache, rows, batch.at[of], table[of], first[of], slots[of], total)
            if self.s_aux is not None:
                total = combine(total, sinks(rows, self.s_aux))
            parts.append(of_heads(merge([total]), query[of].shape))
        return torch.cat(parts)

    def _begin(self, cache: Tensor, rows: Tensor, own: list[Tensor], at: Tensor, table: Tensor) -> Partial:
        """Partial attention over tokens that `_walk` leaves out.

        `own` are the keys and values of the queries' own tokens, [B, H, q, D].
        """
        return empty(rows)

    def _walk(self, cache, rows: Tensor, at: Tensor, table, first: Tensor, slots: np.ndarray, total: Partial):
        """Add to `total` the attention of `rows` [B, H, R, D] over their keys in pages.

        The first `skipped` are left out, and a query's own unless `itself`. `slots` falls from row to row.
        """
        page, group = cache.shape[2], rows.shape[2] // at.shape[1]
        step = max(1, KEYS // page) * page
        for start in range(0, int(slots[0]), step):
            count = int((slots > start).sum())
            stop = min(start + step, int(slots[0]))
            position = first[:count, None] + torch.arange(start, stop, device=first.device)
            visible = sees(at[:count], position, self.window, self.itself)
            visible &= (position >= self.skipped)[:, None]
            visible = visible.repeat(1, group, 1)
            pages = table[:count, start // page : -(-stop // page)]
            part = self._partial(cache, rows[:count], pages, visible, first[:count], start)
            for x, new in zip(total, combine(Partial(*(x[:count] for x in total)), part)):
                x[:count] = new
        return total

    @abstractmethod
    def _partial(
        self, cache: Tensor, rows: Tensor, table: Tensor, visible: Tensor, first: Tensor, start: int
    ) -> Partial:
        """Partial attention of `rows` [B, H, R, D], scaled, over slots of `table`: `visible` [B, R, S].

        The first slot of row b is at position `first[b]` + `start`.
        """


class DenseLayer(PagedLayer):
    """A layer that is not compressed. Its cache is that of vLLM: [P, H, N, 2 D], keys before values."""

    def append(self, cache, keys, values, slots, positions):
        count, page = len(slots), cache.shape[2]
        slots = slots.clamp_min(0).long()  # page 0 belongs to no request
        tokens = torch.cat((keys[:count], values[:count]), dim=-1).to(cache.dtype)
        cache[slots // page, :, slots % page] = tokens

    def _partial(self, cache, rows, table, visible, first, start):
        held = pages_of(cache, table.clamp(0, len(cache) - 1).long())  # [B, n, H, N, 2 D]
        held = held.transpose(1, 2).flatten(2, 3)[:, :, : visible.shape[-1]]
        keys, values = held.chunk(2, dim=-1)
        values = torch.where(values.isfinite(), values, 0.0)  # free slots may hold anything
        return dense.attend(rows, keys, values, visible.unsqueeze(1), self.softcap)


class CompressedLayer(PagedLayer):
    """A layer whose cache holds records of the `rotated` or the `matched` format.

    A query reads its own key and value as they came, and all others from the pages. So what it reads does not
    depend on which other tokens are in its step.

    Args:
        bits: of keys and values.
        head_dim, dtype, device: of the keys.
        means: fp16 [H, M, D], what is subtracted from keys: row m at the positions m * `SPAN` to
            (m + 1) * `SPAN` - 1. A table of `mean_rows` rows, or one row for all positions. None: nothing is
            subtracted.
        matrices: those of keys and of values of the `matched` format; None: the format is `rotated`.
        options: see `PagedLayer`.

    Raises `ValueError` if heads of `head_dim` channels cannot be stored at these widths.
    """

    skipped, itself = FIRST, False

    def __init__(
        self,
        bits: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        means: Tensor | None = None,
        matrices: tuple[Matrices, Matrices] | None = None,
        **options,
    ):
        super().__init__(**options)
        if means is None:
            means = torch.zeros(self.heads, 1, head_dim, dtype=torch.float16)
        self.means = means.to(device).contiguous()
        if matrices is None:
            self.format = RotatedFormat([bits], _tables)
        else:
            sides = [Matrices(*(x.to(device) for x in side)) for side in matrices]
            self.format = MatchedFormat([bits], lambda device: (means, *sides), None)
        self.format.check(head_dim, None)
        self.format.allocate(head_dim, dtype, device)
        (self.tier,) = self.format.tiers
        self.layout = PageLayout(self.tier)
        # A power of two at least as large as every value scale that was ever stored. It only grows, and a
        # power of two changes no digit of a result.
        self.bound = torch.full((self.heads,), rotated.SMALLEST_SCALE, device=device)
        self._viewed: tuple[Tensor | None, tuple] = None, ({}, {})

    def views(self, cache: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The fields of the records and of the second records in the cache; see `PageLayout.views`."""
        if self._viewed[0] is not cache:
            self._viewed = cache, self.layout.views(cache)
        return self._viewed[1]

    def _means_at(self, position: Tensor) -> Tensor:
        """The mean of each key at `position` [B, n]: [B, H, n, D]; [1, H, 1, D] if all are equal."""
        rows = self.means.shape[1]
        if rows == 1:
            return self.means[None]
        return self.means[:, (position // SPAN).clamp(0, rows - 1)].transpose(0, 1)

    @property
    def _early_mean(self) -> Tensor:
        """The mean of the first tokens of a request, [1, H, 1, D]: they share one, as `FIRST` <= `SPAN`."""
        return self.means[None, :, :1]

    def append(self, cache, keys, values, slots, positions):
        count, page = len(slots), cache.shape[2]
        mean = self._means_at(positions[None])
        real = (slots >= 0)[:, None, None]  # padding may hold anything: its scale would spoil the bound
        sides = [torch.where(real, x[:count], 0).transpose(0, 1)[None] for x in (keys, values)]
        if use_compiled(keys) and count <= rotated.SMALL:
            pad = lambda x: torch.nn.functional.pad(x, (0, 0, 0, rounded(count) - count))  # noqa: E731
            sides, mean = [pad(x) for x in sides], mean if self.means.shape[1] == 1 else pad(mean)
        records = self.tier.encode(*sides, mean, recurs=True)
        if sides[0].shape[2] > count:
            cut = {name: -1 if field.axis == -1 else 2 for name, field in self.layout.fields.items()}
            records = {name: x.narrow(cut[name], 0, count) for name, x in records.items()}
        _, exponent = torch.frexp(self.tier.value_bound(records)[0].float())
        torch.maximum(self.bound, torch.ldexp(torch.ones_like(self.bound), exponent), out=self.bound)
        slots = slots.clamp_min(0).long()  # page 0 belongs to no request
        self.layout.write(self.views(cache)[0], records, slots // page, slots % page)

    def append_first(self, cache, keys, values, first):
        views, second = self.views(cache)
        stored = self.layout.read(views, first.page[None], first.at[None])
        sides = [x[first.tokens].transpose(0, 1)[None].float() for x in (keys, values)]
        sides[0] = sides[0] - self.tier.decode_keys(stored, self._early_mean, torch.float32)
        sides[1] = sides[1] - self.tier.decode_values(stored, torch.float32)
        if self.tier.bits[1] == packed.DENSE:
            sides[1] = torch.zeros_like(sides[1], dtype=values.dtype)  # they are stored as they are
        records = self.tier.encode(*sides, torch.zeros_like(self._early_mean), recurs=False)
        self.layout.write(second, records, first.page, first.at)

    def _first(self, cache: Tensor, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens of some rows, from both of their records: [B, H, FIRST, D]."""
        page = table[:, :1].long().clamp(0, len(cache) - 1).expand(-1, FIRST)
        at = torch.arange(FIRST, device=page.device).expand_as(page)
        views, second = self.views(cache)
        read = self.layout.read(views, page, at)
        keys = self.tier.decode_keys(read, self._early_mean, dtype)
        values = self.tier.decode_values(read, dtype)
        read = self.layout.read(second, page, at)
        return keys + self.tier.decode_keys(read, None, dtype), values + self.tier.decode_values(read, dtype)

    def _begin(self, cache, rows, own, at, table):
        group = rows.shape[2] // at.shape[1]
        keys, values = self._first(cache, table, rows.dtype)
        position = torch.arange(FIRST, device=rows.device).expand(len(rows), -1)
        visible = sees(at, position, self.window, self.itself).repeat(1, group, 1)
        values = torch.where(values.isfinite(), values, 0.0)  # of pages that are no longer the row's
        first = dense.attend(rows, keys, values, visible.unsqueeze(1), self.softcap)
        keys, values = (x.repeat(1, 1, group, 1) for x in own)
        score = (rows * keys).sum(-1)
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        return combine(first, Partial(values, score, torch.ones_like(score)))

    def view(
        self, cache: Tensor, table: Tensor, valid: Tensor, first: Tensor, start: int = 0
    ) -> packed.TierView:
        """The pages of some rows as kernels read them: `table` [B, n], `valid` bool [B, 1 or R, S].

        The first slot of row b is at position `first[b]` + `start`, a multiple of `SPAN`.
        """
        rows, begin, count = (len(table), -1), start // SPAN, -(-valid.shape[-1] // SPAN)
        if self.means.shape[1] == 1 or self.window is None:  # all rows begin at position 0: nothing is copied
            means = self.means if self.means.shape[1] == 1 else self.means[:, begin : begin + count]
            means = means.expand(*rows, -1, -1)
        else:
            each = torch.arange(begin, begin + count, device=first.device)
            means = self._means_at(first[:, None] + SPAN * each)
        fields, bound = self.views(cache)[0], self.bound.expand(rows)
        return self.tier.view(fields, bound, means, valid, SPAN, None)._replace(block_table=table)

    def _partial(self, cache, rows, table, visible, first, start):
        view = self.view(cache, table, visible, first, start)
        reference = rows.new_zeros(rows.shape[:3])
        return self.format.attend_tier(
            self.tier, rows, view, visible.shape[-1], reference, None, self.softcap
        )

    def _attend_short(self, cache, query, keys, values, batch):
        query, *own = map(batch.rows, (query, keys, values))
        key = cache.shape[2], self.window, self.heads
        if key not in batch.shared:
            batch.shared[key] = _short_inputs(batch, *key, use_compiled(query))
        table, first, valid, num_read, last, page, at, seen = batch.shared[key]
        wide = torch.promote_types(query.dtype, torch.float32)
        late = self.layout.read(self.views(cache)[0], page.clamp_max(len(cache) - 1), at)
        late = (
            self.tier.decode_keys(late, self._means_at(last), wide), self.tier.decode_values(late, wide)
        )  # fmt: skip
        early = self._first(cache, batch.table, wide)
        keys, values = (torch.cat((*x[:2], x[2].to(wide)), 2) for x in zip(early, late, own))
        view = self.view(cache, table, valid, first)
        return self.format.attend(
            query, keys, values, seen, [self.tier], [view], [num_read], rope=None,
            scaling=self.scaling, softcap=self.softcap, s_aux=self.s_aux,
        )  # fmt: skip


def _short_inputs(batch: Batch, page: int, window: int | None, heads: int, compiled: bool):
    """What the short rows of a batch read, the same in all layers with this window.

    Returns the table of the tier, the position of its first slot, its validity and the number of slots read,
    of the `LAST` last tokens the positions, the pages and the slots in them, and which queries see the
    `FIRST` first, the last ones and the rows' own.
    """
    table, first, slots = batch.pages(window, page)
    num_read = capacity = int(slots.max())
    if compiled:  # a constant capacity: one compiled version then serves all lengths
        most = batch.table.shape[1] * page
        if window is not None:
            most = min(most, batch.at.shape[1] + window + page - 2)
        num_read, capacity = (packed.bucket(len(table) * heads, n) for n in (num_read, most))
        capacity += packed.spare(capacity)
        table = torch.nn.functional.pad(table, (0, -(-capacity // page) - table.shape[1]))
    position = first[:, None] + torch.arange(num_read, device=first.device)
    last = batch.at.amax(1, keepdim=True)
    apart = (position >= FIRST) & (position <= last - LAST)
    valid = sees(batch.at, position, window, False) & apart[:, None]
    if capacity > num_read:
        valid = torch.nn.functional.pad(valid, (0, capacity - num_read))
    early = torch.arange(FIRST, device=last.device).expand(len(last), -1)
    late = last - torch.arange(LAST - 1, -1, -1, device=last.device)
    late = late.masked_fill(late < FIRST, -1)  # counted among the first
    seen = sees(batch.at, torch.cat((early, late), dim=1), window, False)
    width = batch.at.shape[1]
    own = torch.eye(width, dtype=torch.bool, device=last.device) & (batch.at >= 0).unsqueeze(2)
    seen = torch.cat((seen, own), dim=2)
    late = late.clamp_min(0)
    pages = batch.table.gather(1, (late // page).clamp_max(batch.table.shape[1] - 1)).long().clamp_min(0)
    return table, first, valid, num_read, late, pages, late % page, seen


def mean_rows(length: int) -> int:
    """Rows of the table of means for contexts of up to `length` tokens.

    Kernels read slots beyond a context. The last row is never read, so that the compiler tells the number of
    rows read from the size of the table.
    """
    return -(-(length + ROUNDED_UP) // SPAN) + 1


@functools.cache
def _tables(head_dim: int, device: torch.device) -> Tensor:
    """The rotation of the codec and the sum of its rows: all layers share them."""
    return rotated.with_sum(rotated.rotation(head_dim)).float().to(device)
