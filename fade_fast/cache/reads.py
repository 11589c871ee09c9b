"""The queries of a step, and what they see of a layer: in one pass if they are few, else tile by tile."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..compile.compiled import use_compiled
from ..kernels import decode_loops, dense, flash
from ..kernels.merge import Partial, combine, merge, of_heads, of_rows, sinks
from ..kernels.packed import TierView
from .layer import KVLayer, ScoreOptions, Visible
from .positions import PAD
from .store import StoredTier

TILE = 2048  # keys decoded or scored at a time
ROWS = 512  # query tokens of a long step attended at a time
FLASH_TILE = 16384  # keys decoded at a time for kernels of PyTorch
FLASH_ROWS = 4096  # query tokens attended at a time by them
MASKED_TILE, MASKED_ROWS = 4096, 2048  # the same where a mask says what a query sees: it has their product


def tiles(count: int, size: int | None = None) -> list[tuple[int, int]]:
    """`(start, stop)` of the tiles of `count` keys."""
    size = size or TILE
    return [(i, min(i + size, count)) for i in range(0, count, size)]


def rows_of(mask: Tensor | None, start: int, count: int) -> Tensor | None:
    """Rows `start` to `start + count` of a step's mask [B or 1, 1, q, n]."""
    return None if mask is None else mask[:, :, start : start + count]


@functools.lru_cache(maxsize=64)
def _ones(batch: int, count: int, device: torch.device) -> Tensor:
    """A mask [batch, 1, count] that hides nothing. All layers of a step share it."""
    return torch.ones(batch, 1, count, dtype=torch.bool, device=device)


class AttentionQuery:
    """The queries of a step, or of a part of one.

    The query heads of a KV head are rows of one matrix, [B, H, R, D] with R = Hq / H * q.

    Args:
        query: [B, Hq, q, D].
        layer: the layer they read.
        start: step index of the first query.
        options: the model's score options.
        step_mask: bool [B or 1, 1, q, n], what these queries see of the n tokens of their step; None: all
            up to themselves.
    """

    def __init__(
        self,
        query: Tensor,
        layer: KVLayer,
        start: int,
        options: ScoreOptions,
        step_mask: Tensor | None = None,
    ):
        self.raw, self.layer, self.options, self.step_mask = query, layer, options, step_mask
        self.start, self.stop = start, start + query.shape[2]

    @functools.cached_property
    def query(self) -> Tensor:
        """The scaled query heads of each KV head, float32 or float64."""
        wide = torch.promote_types(self.raw.dtype, torch.float32)
        return of_rows(self.raw.to(wide) * self.options.scaling, self.layer.heads)

    @functools.cached_property
    def positions(self) -> Tensor:
        """Positions of the queries, [B, 1, q, 1]."""
        return self.layer.token_positions.logical[:, None, self.start : self.stop, None]

    # -- what the queries see

    def dense_at(self) -> Tensor:
        """Positions [B, 1, n] of dense keys. A window counts distances, so it takes those of reading."""
        layer = self.layer
        return layer.dense_positions() if self.options.window is None else layer.dense_read_at()

    def tier_at(self, tier: StoredTier) -> Tensor:
        """The same of a tier."""
        middle = self.layer.middle
        renumbered = self.options.window is not None and self.layer.config.contiguous
        return middle.read_at(tier) if renumbered else middle.position(tier)

    def sees(self, position: Tensor) -> Tensor:
        """Which keys each query sees, bool [B, 1, q, n], for keys at `position` [B, 1, n].

        A window counts distances as RoPE does. transformers counts slots of the keys it is given: the keys
        of survivors that were renumbered lie side by side.
        """
        position = position[:, :, None]
        seen = (position != PAD) & (position <= self.positions)
        if self.options.window is not None:
            seen &= position > self.positions - self.options.window
        return seen

    def sees_dense(self) -> Tensor:
        """Which dense keys each query sees, bool [B, 1, q, n]; the step's own are stored already."""
        seen = self.sees(self.dense_at())
        if self.step_mask is not None:
            new = self.step_mask.shape[-1]
            seen = torch.cat((seen[..., :-new], self.step_mask.expand(*seen.shape[:-1], new)), dim=-1)
        return seen

    def sees_step(self, first: int, start: int, stop: int) -> Tensor:
        """Which of the step's own tokens `start` to `stop` each query sees; the step began at `first`."""
        if self.step_mask is not None:
            return self.step_mask[..., start:stop]
        return self.sees(self.layer.token_positions.logical[:, None, first + start : first + stop])

    def num_reachable(self, first: int) -> int:
        """How many of the step's own tokens, from step index `first` on, any of these queries may see."""
        return self.stop - first if self.step_mask is None else self.step_mask.shape[-1]

    def visible(self) -> Visible:
        """What the queries of a short step see of the layer."""
        layer = self.layer
        if self._sees_all():
            keys = layer.dense.tensors["key"]
            seen = _ones(keys.shape[0], layer.dense.count, keys.device)
            views = [layer.middle.view(t, full=True) for t in layer.held_tiers()]
            return Visible(seen, self._shared(views))
        seen = self.sees_dense()[:, 0]
        # One shape for as long as the buffers last.
        if use_compiled(self.raw) or layer.counts_in_attend(self.raw.shape[2]):
            seen = torch.nn.functional.pad(seen, (0, layer.dense.capacity - seen.shape[-1]))
        views = [layer.middle.view(t, self.sees(self.tier_at(t))[:, 0]) for t in layer.held_tiers()]
        return Visible(seen, self._shared(views))

    def _shared(self, views: list[TierView]) -> list[TierView]:
        """These views, in parts if rows share slots and that helps.

        The compiled loops of a CPU know no parts. They are faster than eager steps in parts.
        """
        layer = self.layer
        if layer.sharing is None or self.raw.shape[2] > 1 or self.options.window is not None:
            return views
        (tier,) = layer.held_tiers()
        step = self.raw, layer.dense["key"], views, [tier.format.bits], [tier.num_read]
        return views if self.options.plain and decode_loops.takes(*step) else layer.sharing.parts(*views)

    def _sees_all(self) -> bool:
        """Whether the only query sees every token held, and nothing asks for fixed shapes."""
        layer = self.layer
        hides = self.step_mask is not None or layer.token_positions.has_padding
        fixed = use_compiled(self.raw) or layer.counts_in_attend(1)
        return (
            self.raw.shape[2] == 1
            and self.options.window is None
            and not (hides or fixed)
            and (layer.middle is None or layer.middle.fills_slots)
        )

    # -- short steps

    def attend(self) -> Tensor:
        """Attention of a short step over all that the layer holds, [B, q, Hq, D]."""
        output = self.layer.attend(self.raw, self.visible(), self.options)
        if self.layer.observer and not self.layer.counts_in_attend(self.raw.shape[2]):
            self.observe()
        return output

    # -- long steps

    def attend_beside(
        self, first: int, keys: Tensor, values: Tensor, attention_stats: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Attention of a long step, whose own `keys` and `values` are not stored yet: [B, q, Hq, D].

        The step began at step index `first`. Keys are read in tiles, so that nothing grows with queries times
        keys. `attention_stats`: the observer's fields of the step's own tokens, which are added to.
        """
        layer = self.layer
        partials = self._flash(first, keys, values) if self.fits_flash else self._tiled(first, keys, values)
        if self.options.s_aux is not None:
            partials.append(sinks(self.query, self.options.s_aux))
        total = functools.reduce(combine, partials)
        if layer.observer:
            normalizer = (total.row_max + total.row_sum.log()).unflatten(2, (-1, self.raw.shape[2]))
            self._observe_parts(first, keys, attention_stats, normalizer)
        return of_heads(merge([total]), self.raw.shape).to(self.raw.dtype)

    def in_chunks(self, keys: Tensor, values: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the queries of a whole text read if its tokens had come `chunk` at a time.

        The layer has stored the text, which has no padding. A query reads a token compressed if it was due
        to be compressed before the chunk of the query, and else from `keys` and `values` [B, H, n, D].

        Returns keys and values [B, H, m, D], those of all tokens and then those of compressed ones as they
        are read, and which of them each query sees, bool [B, 1, q, m].
        """
        layer, step = self.layer, torch.arange(keys.shape[2], device=keys.device)
        n_sink = layer.config.n_sink
        due = [layer.num_overflow(max(0, i - n_sink)) for i in range(0, len(step), chunk)]
        until = n_sink + torch.tensor(due, device=keys.device).repeat_interleave(chunk)
        until = until[self.start : self.stop, None]
        seen = self.sees_step(0, 0, len(step)) & ((step < n_sink) | (step >= until))
        parts = [(keys, values, seen)]
        for tier in layer.held_tiers():
            position = self.tier_at(tier)
            empty = (position == PAD).unsqueeze(-1)
            decoded = (x.masked_fill(empty, 0.0) for x in self._decoded(tier, 0, tier.records.count))
            early = layer.middle.position(tier).unsqueeze(2) < until
            parts.append((*decoded, self.sees(position) & early))
        keys, values, seen = zip(*parts)
        batch = len(keys[0])
        seen = torch.cat([x.expand(batch, -1, -1, -1) for x in seen], dim=-1)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2), seen

    def _observe_parts(self, first: int, keys: Tensor, attention_stats, normalizer: Tensor) -> None:
        """Count the attention of these queries, `ROWS` at a time, given their log-sum-exp [B, H, G, q]."""
        layer, horizon = self.layer, self.layer.observer.horizon
        parts = zip(self.raw.split(ROWS, dim=2), normalizer.split(ROWS, dim=-1))
        for i, (part, known) in enumerate(parts):
            mask = rows_of(self.step_mask, i * ROWS, ROWS)
            rows = AttentionQuery(part, layer, self.start + i * ROWS, self.options, mask)
            if rows.stop > layer.token_positions.length - (horizon or rows.stop):
                rows.observe(first, keys, attention_stats, [known.flatten(2)])

    @property
    def fits_flash(self) -> bool:
        """Whether kernels of PyTorch can do a long step: they know no softcap."""
        return self.options.softcap is None and flash.takes(self.raw, self.layer.dense["key"])

    @functools.cached_property
    def hides(self) -> bool:
        """Whether a query of a long step may not see a token before it, or a slot without one."""
        layer = self.layer
        if self.step_mask is not None or layer.token_positions.has_padding or self.options.window is not None:
            return True
        return not all((layer.middle.position(tier) != PAD).all() for tier in layer.held_tiers())

    @property
    def most_rows(self) -> int:
        """Queries of a long step that are attended at a time."""
        if not self.fits_flash:
            return ROWS
        return MASKED_ROWS if self.hides else FLASH_ROWS

    def _flash(self, first: int, keys: Tensor, values: Tensor) -> list[Partial]:
        """The partial over all tokens, decoded tile by tile in the dtype of the model."""
        parts = self._masked(first, keys, values) if self.hides else self._plain(first, keys, values)
        found = (flash.attend(self.raw, k, v, self.options.scaling, *rest) for k, v, *rest in parts)
        return [functools.reduce(combine, found)]

    def _plain(self, first: int, keys: Tensor, values: Tensor) -> Iterator[tuple]:
        """Keys and values that every query sees, and whether they are the queries' own."""
        dense, past, own = self.layer.dense, self.start - first, slice(self.start - first, self.stop - first)
        yield keys[:, :, own], values[:, :, own], True
        for k, v in ((dense["key"], dense["value"]), (keys[:, :, :past], values[:, :, :past])):
            if k.shape[2]:
                yield k, v, False
        for tier in self.layer.held_tiers():
            for tile in tiles(tier.records.count, FLASH_TILE):
                yield *self._decoded(tier, *tile), False

    def _masked(self, first: int, keys: Tensor, values: Tensor) -> Iterator[tuple]:
        """Keys and values, False, and which of them each query sees, bool [B or 1, 1, q, n]."""
        dense = self.layer.dense
        for start, stop in tiles(self.num_reachable(first), MASKED_TILE):
            seen = self.sees_step(first, start, stop)
            yield keys[:, :, start:stop], values[:, :, start:stop], False, seen
        at = self.dense_at()
        for start, stop in tiles(dense.count, MASKED_TILE):
            seen = self.sees(at[..., start:stop])
            yield dense["key"][:, :, start:stop], dense["value"][:, :, start:stop], False, seen
        for tier in self.layer.held_tiers():
            at = self.tier_at(tier)
            for start, stop in tiles(tier.records.count, MASKED_TILE):
                position = at[..., start:stop]
                empty = (position == PAD).unsqueeze(-1)  # holds anything, perhaps what is not a number
                decoded = (x.masked_fill(empty, 0.0) for x in self._decoded(tier, start, stop))
                yield *decoded, False, self.sees(position)

    def _decoded(self, tier: StoredTier, start: int, stop: int) -> Iterator[Tensor]:
        """Keys and values of slots `start` to `stop` in the dtype of the model."""
        for decode in (self.layer.middle.decode_keys, self.layer.middle.decode_values):
            yield decode(tier, start, stop, self.query.dtype).to(self.raw.dtype)

    def _tiled(self, first: int, keys: Tensor, values: Tensor) -> list[Partial]:
        """Partials over all tokens, by products of our own."""
        layer = self.layer
        partials = [self._dense(layer.dense["key"], layer.dense["value"], self.sees(self.dense_at()))]
        for tier in layer.held_tiers():
            partials.append(self._tier(tier, partials[0].row_max))
        for start, stop in tiles(self.num_reachable(first)):
            seen = self.sees_step(first, start, stop)
            partials.append(self._dense(keys[:, :, start:stop], values[:, :, start:stop], seen))
        return partials

    def _fold(self, seen: Tensor) -> Tensor:
        """[B, 1, q, n] for the rows of the query matrix: [B, 1, R, n]."""
        return seen.repeat(1, 1, self.query.shape[2] // seen.shape[2], 1) if seen.shape[2] > 1 else seen

    def _dense(self, keys: Tensor, values: Tensor, seen: Tensor) -> Partial:
        return dense.attend(self.query, keys, values, self._fold(seen), self.options.softcap)

    def _tier(self, tier: StoredTier, score_reference: Tensor) -> Partial:
        """Partial over one tier. `score_reference` is a score near the largest of each row."""
        layer, position = self.layer, self.tier_at(tier)
        # The middle is older than the step: without a window, each query sees all of it.
        seen = position != PAD if self.options.window is None else self._fold(self.sees(position))[:, 0]
        rope = layer.rope() if layer.config.contiguous else None
        return layer.format.attend_tier(
            tier.format, self.query, layer.middle.view(tier, seen), tier.records.count, score_reference,
            rope, self.options.softcap,
        )  # fmt: skip

    # -- the attention that tokens receive

    @torch.no_grad()
    def observe(
        self,
        first: int = 0,
        keys: Tensor | None = None,
        attention_stats: dict[str, Tensor] | None = None,
        normalizers: list[Tensor] | None = None,
    ) -> None:
        """Add the attention of these queries to what the tokens received, tile by tile.

        Args:
            first, keys, attention_stats: of the step's own tokens, where they are not stored yet.
            normalizers: log-sum-exp of the scores [B, H, R] over tokens that together are all tokens; None:
                a pass of its own computes them.
        """
        observer, new = self.layer.observer, self.raw.shape[2]
        if normalizers is None:
            parts = self._tiles(first, keys, attention_stats)
            normalizers = [self._scores(key, seen).logsumexp(-1) for key, seen, _ in parts]
            if self.options.s_aux is not None:
                normalizers.append(sinks(self.query, self.options.s_aux).row_max)
        total = functools.reduce(torch.logaddexp, normalizers)
        total = torch.where(total.isfinite(), total, 0.0).unsqueeze(-1)  # a query that sees nothing
        for key, seen, fields in self._tiles(first, keys, attention_stats):
            probs = (self._scores(key, seen) - total).exp().unflatten(2, (-1, new)).mean(2)
            observer.add(fields, probs, seen)
        observer.advance(new)

    def _scores(self, keys: Tensor, seen: Tensor) -> Tensor:
        """Scores [B, H, R, n] of keys [B, H, n, D]; -inf where not `seen`, bool [B, 1, q, n]."""
        scores = self.query @ keys.to(self.query.dtype).mT
        if self.options.softcap is not None:
            scores = self.options.softcap * torch.tanh(scores / self.options.softcap)
        return scores.masked_fill_(~self._fold(seen), -torch.inf)

    def _tiles(self, first: int, keys, stats) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Of each tile: keys as they are read, which of them the queries see, and the observer's fields."""
        layer, dtype, names = self.layer, self.query.dtype, self.layer.observer.fields
        dense_seen = self.sees_dense() if keys is None else self.sees(self.dense_at())
        for start, stop in tiles(layer.dense.count):
            fields = {name: layer.dense[name][..., start:stop] for name in names}
            yield layer.dense["key"][:, :, start:stop], dense_seen[..., start:stop], fields
        for tier in layer.held_tiers():
            for start, stop in tiles(tier.records.count):
                fields = {name: tier.records[name][..., start:stop] for name in names}
                seen = self.sees(self.tier_at(tier)[..., start:stop])
                yield layer.middle.decode_keys(tier, start, stop, dtype), seen, fields
        for start, stop in tiles(self.num_reachable(first) if keys is not None else 0):
            fields = {name: stats[name][..., start:stop] for name in names}
            yield keys[:, :, start:stop], self.sees_step(first, start, stop), fields
