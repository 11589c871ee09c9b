"""An attention layer over vLLM's pages: it stores tokens, and attends for the batches of a step.

These classes do not know vLLM. They take vLLM's cache tensor, slots and tables, and run the formats and
kernels that the cache of `generate()` runs.
"""

import functools
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..compile.compiled import rounded, use_compiled
from ..compile.page_gather import pages_of
from ..formats.matched import MatchedFormat
from ..formats.rotated import RotatedFormat
from ..kernels import dense, flash, packed, rotated
from ..kernels.matched import Matrices
from ..kernels.merge import Partial, combine, empty, merge, of_heads, of_rows, sinks
from . import prefill, single
from .batches import NOWHERE, Batch, Prefill, Step, sees
from .pages import FIRST, NEAR, SPAN, PageLayout

KEYS = 1024  # keys that long rows attend at a time
ELEMENTS = 1 << 24  # most scores that long rows hold at a time
#: By how many tokens kernels may round a context up, at most.
ROUNDED_UP = 1 << 13


class New(NamedTuple):
    """What a layer knows of the new tokens of a step without reading pages.

    Attributes:
        own: their keys and values as they came, [T, H, D] each.
        both: their keys and values as both records have them, [T, H, D] each. None: they have one at most.
        held: second records of the tokens before each row of the batch at hand, as they were before the step.
        single: whether `single.py` and `prefill.py` serve the step.
        old: what was in the slots of their second records, uint8 [T, H, record]; None: no query reads it.
        whole: scaled codes of both records, [2, H, T, D] of keys and values; None: no query reads them from
            here.
    """

    own: tuple[Tensor, Tensor]
    both: list[Tensor] | None = None
    held: dict[str, Tensor] | None = None
    single: bool = False
    old: Tensor | None = None
    whole: Tensor | None = None


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

    def forward(
        self,
        cache: Tensor,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        step: Step,
        output: Tensor,
    ) -> None:
        """Store the tokens of a step, and write the attention of the step to `output` [T, Hq, D].

        `query` [T, Hq, D], `keys` and `values` [T, H, D] are those of the step; `cache` and `slots` are as in
        `append`. What is behind the tokens of `step` is padding.
        """
        count = len(step.positions)
        self.append(cache, keys, values, slots[:count], step.positions)
        self.attend(cache, query, New((keys, values), single=self._takes_prefill(keys)), step, output)

    def _takes_prefill(self, like: Tensor) -> bool:
        """Whether `_attend_prefill` serves steps of tensors like these. FlashAttention knows no softcap."""
        return self.softcap is None and flash.takes_ragged(like)

    def attend(
        self, cache: Tensor, query: Tensor, new: New, step: Step, output: Tensor, held: list | None = None
    ) -> None:
        """Attention of a step whose tokens are stored. Writes `output` [T, Hq, D].

        `query` [T, Hq, D] is that of the step, and `held` has `New.held` of each of its batches.
        """
        batches, short = step.short if new.single else step.batches, len(step.short)
        for i, (batch, before) in enumerate(zip(batches, held or [None] * len(batches))):
            kind = self._attend_short if i < short else self._attend_long
            batch.store(kind(cache, query, new._replace(held=before), batch), output)
        for group in step.prefill if new.single else ():
            of = group.of(output)
            self._attend_prefill(cache, group.of(query), new, group, of)
            group.store(of, output)

    @abstractmethod
    def _attend_prefill(self, cache: Tensor, query: Tensor, new: New, group: Prefill, output: Tensor) -> None:
        """Write attention of a group of requests with many new tokens to `output` [T, Hq, D]."""

    def _attend_short(self, cache: Tensor, query: Tensor, new: New, batch: Batch) -> Tensor:
        """Attention of a batch of short rows, [B, q, Hq, D]."""
        return self._attend_long(cache, query, new, batch)

    def _attend_long(self, cache: Tensor, query: Tensor, new: New, batch: Batch) -> Tensor:
        """Attention of a batch, key chunk by key chunk, [B, q, Hq, D]."""
        query = batch.rows(query)
        wide = torch.promote_types(query.dtype, torch.float32)
        table, first, slots = batch.pages(self.window, cache.shape[2])
        step = max(1, ELEMENTS // (query.shape[1] * query.shape[2] * KEYS))
        parts = []
        for start in range(0, len(query), step):
            of = slice(start, start + step)
            rows = of_rows(query[of].to(wide) * self.scaling, self.heads)
            total = self._begin(cache, rows, new, batch, of)
            total = self._walk(cache, rows, batch.at[of], table[of], first[of], slots[of], total)
            if self.s_aux is not None:
                total = combine(total, sinks(rows, self.s_aux))
            parts.append(of_heads(merge([total]), query[of].shape))
        return torch.cat(parts)

    def _begin(self, cache: Tensor, rows: Tensor, new: New, batch: Batch, of: slice) -> Partial:
        """Partial attention of `rows` [B, H, R, D], those `of` a batch, over what `_walk` leaves out."""
        return empty(rows)

    def _left_out(self, at: Tensor, position: Tensor, page: int) -> Tensor | None:
        """Which tokens at `position` [B, n] `_begin` attends for queries at `at` [B, q], bool [B, q, n].

        None: none beside the first ones and a query's own.
        """
        return None

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
            if (elsewhere := self._left_out(at[:count], position, page)) is not None:
                visible &= ~elsewhere
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

    def _attend_prefill(self, cache, query, new, group, output):
        page = cache.shape[2]
        key = "dense", page, self.window
        if key not in group.shared:
            of = prefill.spans_of(group, page, self.window, near=-1), prefill.queries(group)
            (spans, back), (queries_from, longest) = prefill.moved(of, group.table)
            places = [prefill.place(group.table, x.request, x.index) for x in spans]
            pages = [prefill.pages_at(x, group.table) for x in places]
            group.shared[key] = list(zip(pages, spans)), queries_from, longest, back
        parts, queries_from, longest, back = group.shared[key]
        total = None
        for pages, of in parts:
            held = cache[pages.clamp(0, len(cache) - 1)].transpose(1, 2).flatten(0, 1)  # [E, H, 2 D]
            found = flash.ragged(
                query, *held.chunk(2, dim=-1), queries_from, of.keys_from, of.used, (longest, of.longest),
                self.scaling, of.last, back,
            )  # fmt: skip
            total = found if total is None else prefill.merged(total, found)
        result, lse = total
        if self.s_aux is not None:  # the sinks take a share, and have values of 0
            result = result * (lse.mT - self.s_aux.to(lse.dtype)).sigmoid().unsqueeze(-1)
        output.copy_(result)

    def _partial(self, cache, rows, table, visible, first, start):
        held = pages_of(cache, table.clamp(0, len(cache) - 1).long())  # [B, n, H, N, 2 D]
        held = held.transpose(1, 2).flatten(2, 3)[:, :, : visible.shape[-1]]
        keys, values = held.chunk(2, dim=-1)
        values = torch.where(values.isfinite(), values, 0.0)  # free slots may hold anything
        return dense.attend(rows, keys, values, visible.unsqueeze(1), self.softcap)


class CompressedLayer(PagedLayer):
    """A layer whose cache holds records of the `rotated` or the `matched` format.

    A query reads its own key and value as they came, tokens right before it from both of their records, and
    all others from the pages. What it reads does not depend on which other tokens are in its step: a token of
    the step, too, is read as its records have it.

    Args:
        bits: of keys and values.
        head_dim, dtype, device: of the keys.
        means: fp16 [H, M, D], what is subtracted from keys: row m at the positions m * `SPAN` to
            (m + 1) * `SPAN` - 1. A table of `mean_rows` rows, or one row for all positions. None: nothing is
            subtracted.
        matrices: those of keys and of values of the `matched` format; None: the format is `rotated`.
        drafts: most tokens of a request in a step that may be withdrawn. They take room of their own.
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
        drafts: int = 0,
        **options,
    ):
        super().__init__(**options)
        self.drafts = -(-drafts // FIRST) * FIRST
        # Codes of 8 bits miss nothing that counts, and what they miss would depend on how a product rounds.
        self.misses = [b < 8 for b in bits]
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
        self.layout = PageLayout(self.tier, drafts)
        # A power of two at least as large as every value scale that was ever stored. It only grows, and a
        # power of two changes no digit of a result.
        self.bound = torch.full((self.heads,), rotated.SMALLEST_SCALE, device=device)
        self._kinds: dict[int, single.Kind] = {}
        self._viewed: tuple[Tensor | None, tuple] = None, ({}, {})
        #: Whether `single.py` stores steps: it knows bytes of codes, and no values as they are.
        self.takes_single = packed.DENSE not in bits
        if self.takes_single:
            self._single_tables(dtype, device, matrices)

    def _single_tables(self, dtype: torch.dtype, device: torch.device, matrices) -> None:
        """The matrices of `single.py`."""
        self.encoders, self.feedback = self.tier.key_matrix.double(), None
        decoders = self.tier.key_matrix
        if matrices is not None:
            sides = self.tier.matrices
            self.encoders = torch.stack([side.encode.double() for side in sides])
            decoders = torch.stack([side.decode for side in sides])
            self.feedback = torch.stack([side.feedback.float() for side in sides])
        # The compiled kernels compute in float16 for two-byte dtypes, and read these vectors in float16.
        half = dtype.itemsize == 2 and use_compiled(self.means)
        self.decoders = decoders.to(torch.float16 if half else torch.promote_types(dtype, torch.float32))

    def kind(self, page: int) -> single.Kind:
        """What `single.py` knows of pages of `page` tokens."""
        if page not in self._kinds:
            fields = tuple((name, x.bytes, x.axis == -1) for name, x in self.layout.fields.items())
            self._kinds[page] = single.Kind(
                fields, self.tier.bits, page, self.layout.fine, self.drafts, self.means.shape[1], self.window
            )
        return self._kinds[page]

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
        return self.means[:, single.mean_row(position, rows)].transpose(0, 1)

    @property
    def _early_mean(self) -> Tensor:
        """The mean of the first tokens of a request, [1, H, 1, D]: they share one, as `FIRST` <= `SPAN`."""
        return self.means[None, :, :1]

    def forward(self, cache, query, keys, values, slots, step, output):
        count = len(step.positions)
        slots, keys, values = slots[:count], keys[:count], values[:count]
        if not self.takes_single:
            self.append(cache, keys, values, slots, step.positions)
            both = held = None
            if not self.layout.fine:
                both, held = self._keep_newest(cache, keys, values, slots, step)
            elif step.first is not None:
                tokens = step.first.tokens
                early = [x[tokens] for x in (keys, values, slots, step.positions)]
                records = self._encode(*self._missed(cache, *early)[1], torch.zeros_like(self._early_mean))
                self.layout.write(self.views(cache)[1], records, step.first.page, step.first.at)
            self.attend(cache, query, New((keys, values), both), step, output, held)
            return
        serves = step.single and (not step.prefill or self._takes_prefill(keys))
        both = held = None
        if not (serves or self.layout.fine):  # before the step overwrites them
            held = [self._second(cache, batch) for batch in step.batches]
        keep = not self.layout.fine and (not serves or bool(step.prefill))
        old, whole = self.store(cache, keys, values, slots, step, keep)
        if held is not None:
            both = self._both_of(whole[:, :, :count], step.positions, keys.dtype)
        self.attend(cache, query, New((keys, values), both, None, serves, old, whole), step, output, held)

    def writes(self, page: int, slots: Tensor, step: Step, like: Tensor) -> list[single.Writes]:
        """Where the tokens of a step go, part by part, in all layers with pages of this `kind`.

        Args:
            page: tokens in a page.
            slots: int [T], see `append`.
            like: a tensor such as the keys.
        """
        tokens, kind = (step.positions, slots, step.after), self.kind(page)
        parts = single.parts(len(slots), use_compiled(like))
        return [single.writes(*(x[of] for x in tokens), rows, kind) for of, rows in parts]

    def store(
        self, cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor, step: Step, keep: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Store a step by `single.py`. Returns `New.old`, and `New.whole` with `keep`. See `append`."""
        self.views(cache)  # refuses other caches
        page = cache.shape[2]
        kind, parts = self.kind(page), single.parts(len(slots), use_compiled(keys))
        if kind not in step.shared:
            step.shared[kind] = self.writes(page, slots, step, keys)
        found = [
            single.store(
                keys[of], values[of], self.means, self.encoders, self.layout.runs(cache), self.bound, to,
                kind, self.feedback, self.decoders.dtype if keep else None,
            )
            for (of, _), to in zip(parts, step.shared[kind])
        ]  # fmt: skip
        if len(found) == 1:
            return found[0]
        old, whole = zip(*found)
        return None if old[0] is None else torch.cat(old), torch.cat(whole, 2) if keep else None

    def _both_of(self, whole: Tensor, positions: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """`New.both` of the tokens of a step, from `New.whole`."""
        wide = torch.promote_types(dtype, torch.float32)
        sides = self.decoders if self.decoders.dim() == 4 else self.decoders.expand(2, 1, -1, -1)
        keys, values = (x @ y for x, y in zip(whole, sides))  # [H, T, D]
        keys = keys + self._means_at(positions[None])[0]
        return [self._flat(x[None]).to(wide) for x in (keys, values)]

    def _keep_newest(self, cache, keys, values, slots, step: Step):
        """Store the second records of a step. Returns `New.both`, and `New.held` of each batch."""
        page, second = cache.shape[2], self.views(cache)[1]
        once, missed = self._missed(cache, keys, values, slots, step.positions)
        records = self._encode(*missed, torch.zeros_like(self._early_mean))
        if step.first is not None:
            self.layout.write(second, self._take(records, step.first.tokens), step.first.page, step.first.at)
        # Before attention, because another request may read a page in the step that fills it. But queries
        # also read second records that are overwritten here: those are kept apart.
        held = [self._second(cache, batch) for batch in step.batches]
        kept, slot = self.layout.newest(step.positions, page)
        # Of the tokens that have the same slot the last one is stored.
        last = (step.after < kept) | (step.positions % page + kept >= page)
        owner = (slots.long() // page).masked_fill(~last | (slots < 0), 0)  # page 0 belongs to no request
        self.layout.write(second, records, owner, slot)
        return self._both(once, [self._flat(x) for x in self._decode(records, None, once[0].dtype)]), held

    def append(self, cache, keys, values, slots, positions):
        count, page = len(slots), cache.shape[2]
        real = (slots >= 0)[:, None, None]  # padding may hold anything: its scale would spoil the bound
        sides = [torch.where(real, x[:count], 0).transpose(0, 1)[None] for x in (keys, values)]
        records = self._encode(*sides, self._means_at(positions[None]))
        _, exponent = torch.frexp(self.tier.value_bound(records)[0].float())
        torch.maximum(self.bound, torch.ldexp(torch.ones_like(self.bound), exponent), out=self.bound)
        slots = slots.clamp_min(0).long()  # page 0 belongs to no request
        self.layout.write(self.views(cache)[0], records, slots // page, slots % page)

    def _encode(self, keys: Tensor, values: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """Records of `keys` and `values` [1, H, T, D] less `mean` [1, H, T or 1, D]."""
        count = keys.shape[2]
        more = rounded(count) - count if use_compiled(keys) and count <= rotated.SMALL else 0
        if more:
            pad = lambda x: torch.nn.functional.pad(x, (0, 0, 0, more))  # noqa: E731
            keys, values = pad(keys), pad(values)
            mean = mean if self.means.shape[1] == 1 or mean.shape[2] < count else pad(mean)
        records = self.tier.encode(keys, values, mean, recurs=True)
        return self._take(records, slice(count)) if more else records

    def _take(self, records: dict[str, Tensor], tokens: Tensor | slice) -> dict[str, Tensor]:
        """The records of some tokens."""
        last = {name: field.axis == -1 for name, field in self.layout.fields.items()}
        return {name: x[..., tokens] if last[name] else x[:, :, tokens] for name, x in records.items()}

    def _decode(self, records: dict[str, Tensor], mean: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values of records, [B, H, n, D]."""
        return [self.tier.decode_keys(records, mean, dtype), self.tier.decode_values(records, dtype)]

    @staticmethod
    def _flat(x: Tensor) -> Tensor:
        """Tokens [1, H, T, D] as those of a step, [T, H, D]."""
        return x[0].transpose(0, 1)

    def _missed(self, cache, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor):
        """Keys and values of tokens as `append` stored them, [T, H, D], and what these miss.

        The latter is float32 [1, H, T, D], to be encoded.
        """
        wide, page = torch.promote_types(keys.dtype, torch.float32), cache.shape[2]
        slots = slots.clamp_min(0).long()
        stored = self.layout.read(self.views(cache)[0], slots[None] // page, slots[None] % page)
        # In float64, or the rounding of this product, which depends on the number of tokens, would be seen in
        # what is missed.
        once = self._decode(stored, self._means_at(positions[None]), torch.float64)
        missed = [(x.transpose(0, 1)[None] - y).float() for x, y in zip((keys, values), once)]
        if self.tier.bits[1] == packed.DENSE:
            missed[1] = torch.zeros_like(missed[1], dtype=values.dtype)  # they are stored as they are
        return [self._flat(x).to(wide) for x in once], missed

    def _both(self, once, rest) -> list[Tensor]:
        """Keys and values of tokens near a query, from what their first and their second records have."""
        return [x + y if misses else x for x, y, misses in zip(once, rest, self.misses)]

    def _pages_at(self, cache: Tensor, batch: Batch, of: slice, position: Tensor) -> Tensor:
        """The pages of tokens at `position` [B, n] of the requests of rows, int64 [B, n]."""
        table = batch.table[of]
        owner = table.gather(1, (position // cache.shape[2]).clamp_max(table.shape[1] - 1))
        return owner.long().clamp(0, len(cache) - 1)

    def _old(self, cache: Tensor, batch: Batch, of: slice) -> tuple[Tensor, Tensor]:
        """Positions of the `NEAR` tokens before each row's first query, and their pages: int64 [B, NEAR]."""
        position = near_positions(batch.at[of, :1])[:, :NEAR].clamp_min(0)
        return position, self._pages_at(cache, batch, of, position)

    def _second(self, cache: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The second records of the tokens of `_old`, as they are now, behind `FIRST` without a meaning."""
        position, owner = self._old(cache, batch, slice(None))
        slot = self.layout.newest(position, cache.shape[2])[1]
        pad = lambda x: torch.nn.functional.pad(x, (FIRST, 0))  # noqa: E731
        return self.layout.read(self.views(cache)[1], pad(owner), pad(slot))

    def _apart(self, cache: Tensor, new: New, batch: Batch, of: slice, dtype: torch.dtype, more: Tensor):
        """Tokens that rows read as vectors: `FIRST` first ones, `NEAR` before the first query, and queries.

        Returns keys and values [B, H, n, D] of three kinds: of the first tokens, from both of their records;
        of those before the first query and then at `more` [B, k], from the first record; and of those before
        and at the row's queries, from both records, in layers that have them.
        """
        page, tokens, count = cache.shape[2], batch.tokens[of], FIRST + NEAR
        early = torch.arange(FIRST, device=tokens.device).expand(len(tokens), -1)
        old = self._old(cache, batch, of)[0]
        position = torch.cat((early, old, more.clamp_min(0)), 1)
        owner = self._pages_at(cache, batch, of, position)
        views, second = self.views(cache)
        once = self._decode(self.layout.read(views, owner, position % page), self._means_at(position), dtype)
        stop = FIRST if self.layout.fine else count
        slot = torch.cat((early, self.layout.newest(old, page)[1]), 1)
        rest = self.layout.read(second, owner[:, :stop], slot[:, :stop])
        if new.held is not None:
            # In the page in which a request's new tokens begin, which no other request has, they took the
            # slots of tokens that the first of them still read. All other pages have what is needed now.
            begin = batch.at[of, :1] - batch.before[of, None]
            mine = torch.nn.functional.pad(old // page == begin // page, (FIRST, 0))
            rest = self.layout.choose(mine, {name: x[of] for name, x in new.held.items()}, rest)
        rest = self._decode(rest, None, dtype)
        kinds = [[x[:, :, :FIRST] + y[:, :, :FIRST] for x, y in zip(once, rest)]]
        kinds.append([x[:, :, FIRST:] for x in once])
        if new.both is None:
            return kinds
        back = torch.arange(NEAR, 0, -1, device=tokens.device)
        inside = (back <= batch.before[of, None])[:, None, :, None]  # tokens of this step
        own = (tokens[:, :1] - back).clamp_min(0)
        near = self._both([x[:, :, FIRST:count] for x in once], [x[:, :, FIRST:] for x in rest])
        rows = lambda x, index: x[index].transpose(1, 2).to(dtype)  # noqa: E731
        kinds.append(
            [
                torch.cat((torch.where(inside, rows(y, own), x), rows(y, tokens)), 2)
                for x, y in zip(near, new.both)
            ]
        )
        return kinds

    def _left_out(self, at, position, page):
        if self.layout.fine:
            return None
        return is_near(at, position, self.layout.newest(position, page)[0] - self.drafts)

    def _begin(self, cache, rows, new, batch, of):
        at, page = batch.at[of], cache.shape[2]
        group = rows.shape[2] // at.shape[1]
        kinds = self._apart(cache, new, batch, of, rows.dtype, at[:, :0])
        position = torch.arange(FIRST, device=rows.device).expand(len(rows), -1)
        visible = sees(at, position, self.window, self.itself)
        if not self.layout.fine:
            position = near_positions(at)
            near = sees(at, position, self.window, self.itself) & self._left_out(at, position, page)
            visible = torch.cat((visible, near), 2)
        keys, values = (torch.cat(side, 2) for side in zip(kinds[0], *kinds[2:]))
        # Values may be of slots that hold no second record, or of pages that are no longer the row's.
        values = torch.where(values.isfinite(), values, 0.0)
        visible = visible.repeat(1, group, 1).unsqueeze(1)
        apart = dense.attend(rows, keys, values, visible, self.softcap)
        own = (x[batch.tokens[of]].transpose(1, 2).to(rows.dtype) for x in new.own)
        keys, values = (x.repeat(1, 1, group, 1) for x in own)
        score = (rows * keys).sum(-1)
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        return combine(apart, Partial(values, score, torch.ones_like(score)))

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

    def reads(self, page: int, batch: Batch, like: Tensor) -> tuple[single.Reads, int]:
        """What the rows of a batch of single tokens read, and from how many slots.

        It is the same in all layers with as many heads and pages of this `kind`. `page` is the number of
        tokens in a page, and `like` a tensor such as the query.
        """
        kind = self.kind(page)
        num_read, capacity = self._capacity(batch, page, use_compiled(like))
        return single.reads(batch.at[:, 0], batch.table, capacity, kind), num_read

    def attend_single(self, cache: Tensor, query: Tensor, new: New, batch: Batch) -> Tensor:
        """Attention of a batch of single tokens, which are stored, [B, 1, Hq, D]; see `attend`."""
        page = cache.shape[2]
        kind = self.kind(page)
        key = kind, self.heads
        if key not in batch.shared:
            batch.shared[key] = self.reads(page, batch, query)
        of, num_read = batch.shared[key]
        runs, tokens = self.layout.runs(cache), batch.tokens[:, 0]
        keys, values = single.vectors(
            runs, *new.own, tokens, new.old, self.means, self.decoders, of, kind
        )  # fmt: skip
        view = self.view(cache, of.table, of.valid, of.first)
        return self.format.attend(
            batch.rows(query), keys, values, of.seen, [self.tier], [view], [num_read], rope=None,
            scaling=self.scaling, softcap=self.softcap, s_aux=self.s_aux,
        )  # fmt: skip

    def _attend_prefill(self, cache, query, new, group, output):
        kind = self.kind(cache.shape[2])
        if kind not in group.shared:
            group.shared[kind] = prefill.plan(group, kind)
        prefill.attend(
            query, self.layout.runs(cache), new.whole, new.old, *new.own, group.shared[kind], self.means,
            self.decoders, kind, self.scaling, self.s_aux, output,
        )  # fmt: skip

    def _capacity(self, batch: Batch, page: int, compiled: bool) -> tuple[int, int]:
        """How many slots the short rows of a batch read, and how many their view has.

        Compiled versions serve all lengths: their capacity is constant.
        """
        at_once = batch.at.shape[1]
        most = [int(batch.reach.max()), batch.table.shape[1] * page]
        if self.window is not None:
            most = [min(n, at_once + self.window + page - 2) for n in most]
        if not compiled:
            return most[0], most[0]
        num_read, capacity = (packed.bucket(len(batch.at) * self.heads, n, paged=True) for n in most)
        return num_read, capacity + packed.spare(capacity)

    def _attend_short(self, cache, query, new, batch):
        if new.single:
            return self.attend_single(cache, query, new, batch)
        page = cache.shape[2]
        key = page, self.window, self.heads, self.layout.fine
        if key not in batch.shared:
            batch.shared[key] = self._short_inputs(batch, page, use_compiled(query))
        table, first, valid, num_read, seen = batch.shared[key]
        query, *own = map(batch.rows, (query, *new.own))
        wide = torch.promote_types(query.dtype, torch.float32)
        first_ones, once, *both = self._apart(cache, new, batch, slice(None), wide, batch.at)
        parts = [first_ones, once, [x.to(wide) for x in own], *both]
        keys, values = (torch.cat(side, 2) for side in zip(*parts))
        view = self.view(cache, table, valid, first)
        return self.format.attend(
            query, keys, values, seen, [self.tier], [view], [num_read], rope=None,
            scaling=self.scaling, softcap=self.softcap, s_aux=self.s_aux,
        )  # fmt: skip

    def _short_inputs(self, batch: Batch, page: int, compiled: bool):
        """What the short rows of a batch read, the same in all layers with this window and room.

        Returns the table of the tier, the position of its first slot, its validity and the number of slots
        read, and which queries see the vectors: the `FIRST` first tokens, those at `near_positions` as their
        first records have them, the rows' own, and those near as both records have them. Vectors near a query
        also give the float16 kernels a score near the largest one.
        """
        table, first, _ = batch.pages(self.window, page)
        num_read, capacity = self._capacity(batch, page, compiled)
        if compiled:
            table = torch.nn.functional.pad(table, (0, -(-capacity // page) - table.shape[1]))
        at = batch.at
        position = first[:, None] + torch.arange(num_read, device=first.device)
        apart = (position >= FIRST) & (position < at[:, :1] - NEAR)
        valid = sees(at, position, self.window, False) & apart[:, None]
        if capacity > num_read:
            valid = torch.nn.functional.pad(valid, (0, capacity - num_read))
        early = torch.arange(FIRST, device=at.device).expand(len(at), -1)
        position = near_positions(at)
        visible = sees(at, position, self.window, False)
        own = torch.eye(at.shape[1], dtype=torch.bool, device=at.device) & (at >= 0).unsqueeze(2)
        seen = [sees(at, early, self.window, False), visible, own]
        if not self.layout.fine:
            near = self._left_out(at, position, page)
            seen[1:] = visible & ~near, own, visible & near
        return table, first, valid, num_read, torch.cat(seen, 2)


def near_positions(at: Tensor) -> Tensor:
    """Positions of the `NEAR` tokens before each row's first query, and of its queries at `at` [B, q].

    Returns int64 [B, NEAR + q]; `NOWHERE` for the first tokens of a request, which rows read apart, and where
    there is none.
    """
    old = at[:, :1] - torch.arange(NEAR, 0, -1, device=at.device)
    position = torch.cat((old, at), 1)
    return position.masked_fill(position < FIRST, NOWHERE)


def is_near(at: Tensor, position: Tensor, kept: Tensor) -> Tensor:
    """Which tokens at `position` [B, n] queries at `at` [B, q] read with their second record: bool [B, q, n].

    `kept` [B, n] is how many tokens after it a token keeps its record, and `NEAR` are read at most.
    """
    back = at.unsqueeze(2) - position.unsqueeze(1)
    return (back > 0) & (back <= kept.clamp_max(NEAR).unsqueeze(1)) & (position >= FIRST).unsqueeze(1)


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
