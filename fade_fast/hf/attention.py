"""What the model's attention call becomes.

A mask covers the tokens of the step only: the cache knows the position and the validity of all it
stores. Every tier gives a partial, and `merge` combines them.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..cache.decode_graph import MAX_DECODE_TOKENS
from ..cache.guard import without_autocast
from ..cache.layer import PendingKV, TieredLayer, by_number
from ..cache.positions import PAD
from ..compile.compiled import use_compiled
from ..kernels import dense, flash, packed
from ..kernels.merge import Partial, combine, empty, merge, of_heads, of_rows, sinks
from .gradient import REASON, without_gradient

NAME = "fade"  # what our attention and mask functions are registered as in transformers
ANOTHER = "this cache was made for another model: create_cache(model) makes one for it"
TILE = 2048  # keys decoded or scored at a time
ROWS = 512  # query tokens of a long step attended at a time
SPAN = 16384  # keys decoded at a time for FlashAttention
BLOCK = 4096  # query tokens attended at a time by it


def attention(
    module,
    query: Tensor,
    key,
    value,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; arguments by position are those of its own functions.

    Args:
        query: [B, Hq, q, D].
        key, value: an `PendingKV` from a tiered layer, or tensors [B, H, n, D] from any other.
        attention_mask: for an `PendingKV`, what `masks.MaskReader` reads; for tensors, what `sdpa` takes.
        dropout: probability; only over tensors.
        scaling: of the scores; None is D ** -0.5.
        softcap, sliding_window, s_aux: as Gemma 2, Mistral and gpt-oss pass them.

    Returns the output [B, q, Hq, D], and None: attention weights are never formed.

    Raises `ValueError` if the cache belongs to another model, for a mask that cannot be obeyed, for dropout
    over cached tokens, and for a window in a captured step.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(key, PendingKV):
        terms = ScoreOptions(scaling, softcap, sliding_window, s_aux)
        kwargs["dropout"] = dropout
        return _attend_tensors(module, query, key, value, attention_mask, terms, **kwargs), None
    if dropout:
        raise ValueError(
            f"dropout={dropout} in attention over a tiered cache: call model.eval(), or set "
            "attention_dropout of the configuration to 0"
        )
    decode_graph = key.layer.decode_graph
    if torch.is_autocast_enabled(query.device.type):
        query = query.to(key.dtype)
    if decode_graph.active:
        if sliding_window is not None:  # what a captured step sees is fixed, but for the newest column
            raise ValueError(
                f"sliding_window={sliding_window} for a layer with full attention, in a captured step: "
                "generate(..., disable_compile=True) takes ordinary ones"
            )
        output = torch.ops.fade.step(
            query, key.keys, key.values, attention_mask, decode_graph.dynamic_size.shape[0],
            -1 - key.layer.index if key.of_another(module) else key.layer.index,
            scaling, softcap, s_aux,
        )  # fmt: skip
        return output, None
    if torch.compiler.is_compiling():  # by the user: one operator, which no graph looks into
        if key.layer.model_config is not module.config:
            raise ValueError(ANOTHER)
        index = getattr(module, "layer_idx", key.layer.layer_idx)
        output = torch.ops.fade.eager_step(
            query, key.keys, key.values, attention_mask, key.layer.number, index,
            scaling, softcap, sliding_window, s_aux,
        )  # fmt: skip
        return output, None
    return _attend(module, query, key, attention_mask, scaling, softcap, sliding_window, s_aux, **kwargs)


@dataclass(frozen=True)
class _Module:
    """What attention asks of a module, where the module itself is not at hand."""

    config: object
    layer_idx: int | None
    num_key_value_groups: int
    is_causal: bool = True


@torch.library.custom_op("fade::eager_step", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def eager_step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    number: int,
    layer_idx: int,
    scaling: float,
    softcap: float | None,
    window: int | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of one layer in a model that its user compiles, [B, q, Hq, D]: an ordinary step inside.

    It looks at lengths and writes the cache, so that no CUDA graph may hold it.
    """
    layer = by_number[number]
    if layer_idx == layer.layer_idx:
        layer.check(keys, values)
        layer.check_whole()
    module = _Module(layer.model_config, layer_idx, query.shape[1] // keys.shape[1])
    arrival = PendingKV(layer, keys, values)
    return _attend(module, query, arrival, mask, scaling, softcap, window, s_aux)[0].contiguous()


@eager_step.register_fake
def _(query, *args):
    batch, heads, new, dim = query.shape
    return query.new_empty(batch, new, heads, dim)


def _refuse_gradient(ctx, gradient):
    raise RuntimeError(REASON)


eager_step.register_autograd(_refuse_gradient)


def _whole(attend):
    """Attention that lets one thread in, and takes its step back from all layers if it fails."""

    @functools.wraps(attend)
    def inside(module, query: Tensor, key: PendingKV, *args, **kwargs):
        layer = key.layer
        start = layer.length - (key.keys.shape[2] if key.of_another(module) else 0)
        with layer.guard, without_autocast():
            try:
                return attend(module, query, key, *args, **kwargs)
            except BaseException:
                layer.rollback_step(start)
                raise

    return inside


@torch.compiler.disable
@_whole
def _attend(module, query, key: PendingKV, attention_mask, scaling, softcap, sliding_window, s_aux, **kwargs):
    """Attention outside captured steps, and the storing of what arrived."""
    terms = ScoreOptions(scaling, softcap, sliding_window, s_aux)
    layer, keys, values = key.layer, key.keys, key.values
    if layer.model_config is not module.config:
        raise ValueError(ANOTHER)
    if key.of_another(module):
        return _read_again(module, query, key, attention_mask, terms, **kwargs), None
    new, start = query.shape[2], layer.length
    if kwargs.get("position_bias") is not None:
        raise ValueError("position_bias, which is added to scores, cannot be served by a tiered cache")
    if kwargs.get("is_causal") is False and attention_mask is None and new > 1:
        raise ValueError("attention that is not causal needs a mask to be served by a tiered cache")
    if keys.shape[2] != new:
        raise ValueError(
            f"{new} queries come with {keys.shape[2]} keys: a tiered cache cannot serve cross-attention"
        )
    token_positions = layer.token_positions
    mask = token_positions.masks.read(attention_mask, query.shape[0], new, start, token_positions.buffer)
    real, own = mask.real, mask.own if start or layer.observer else None
    if real is not None and token_positions.all_real(start, real):
        real = None  # as generate() masks the steps of caches it may compile, and where there is a window
        attention_mask = None if new == 1 else attention_mask
    if own is not None and token_positions.has_padding and not layer.sinks_placed:
        raise ValueError(
            "a mask that is not causal, in a batch with padding whose first real tokens have just come: "
            "feed a few tokens first"
        )
    if real is not None:  # a NaN in a padding slot must not reach a real token
        keys, values = (x.masked_fill(~real[:, None, :, None], 0) for x in (keys, values))
    layer.demote_due_blocks()
    token_positions.extend(start, real, query.shape[0], new, query.device)
    if not start:
        output = _attend_tensors(module, query, keys, values, attention_mask, terms, **kwargs)
        attention_stats = _observe_first(query, layer, keys, values, terms, own)
        layer.store(keys, values, attended=True, attention_stats=attention_stats)
        return output, None
    if new <= MAX_DECODE_TOKENS and not layer.index:
        layer.decode_graph.eager_steps += 1
    with torch.no_grad():
        output = _attend_cached(module, query, layer, keys, values, start, terms, own, **kwargs)
    return without_gradient(output, query, key.keys, key.values), None


def _attend_cached(
    module, query, layer: TieredLayer, keys, values, start: int, terms: "ScoreOptions", own, **kwargs
) -> Tensor:
    """Attention of a step from column `start` > 0 on, over all there is, and the storing of its tokens."""
    new = query.shape[2]
    if not layer.has_middle and terms.plain and not layer.observer:
        layer.store(keys, values, attended=False)
        rows = AttentionQuery(query, layer, start, terms, own)
        mask = None
        if new > 1 or layer.token_positions.has_padding or terms.window is not None:
            mask = rows.sees_exact()
        keys, values = layer.exact["key"], layer.exact["value"]
        return _sdpa(module, query, keys, values, mask, terms, **kwargs | dict(is_causal=False))
    if new <= MAX_DECODE_TOKENS:
        layer.store(keys, values, attended=False)
        return AttentionQuery(query, layer, start, terms, own).attend()
    attention_stats = layer.arrive(new)
    rows = AttentionQuery(query[:, :, :1], layer, start, terms, own)
    size = BLOCK if rows.flashes else ROWS
    output = torch.cat(
        [
            AttentionQuery(part, layer, start + i * size, terms, _rows_of(own, i * size, size)).attend_beside(
                start, keys, values, attention_stats
            )
            for i, part in enumerate(query.split(size, dim=2))
        ],
        dim=1,
    )
    layer.store(keys, values, attended=not layer.shared, attention_stats=attention_stats)
    return output


def _rows_of(own: Tensor | None, start: int, count: int) -> Tensor | None:
    """What some of the step's queries see of the step."""
    return None if own is None else own[:, :, start : start + count]


def _observe_first(
    query, layer: TieredLayer, keys, values, terms: "ScoreOptions", own: Tensor | None
) -> dict[str, Tensor] | None:
    """What the tokens of a first step receive, whose output `sdpa` gave: scores again, in tiles, of
    those queries that can make a difference. None where nothing asks."""
    if not layer.observer:
        return None
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    new = query.shape[2]
    first = max(0, new - (layer.observer.horizon or new))
    attention_stats = layer.arrive(new)
    for i, part in enumerate(query[:, :, first:].split(ROWS, dim=2)):
        shown = _rows_of(own, first + i * ROWS, ROWS)
        AttentionQuery(part, layer, first + i * ROWS, terms, shown).observe(0, keys, attention_stats)
    return attention_stats


def _read_again(
    module, query: Tensor, key: PendingKV, attention_mask: Tensor | None, terms: "ScoreOptions", **kwargs
) -> Tensor:
    """Attention over a layer whose columns of this step are stored already, [B, q, Hq, D].

    The queries are those of the newest columns, perhaps not of all that arrived.
    """
    layer, keys, values = key.layer, key.keys, key.values
    new, arrived = query.shape[2], keys.shape[2]
    start, first = layer.length - new, layer.length - arrived
    if attention_mask is not None and new == arrived:
        mask = layer.token_positions.masks.read(
            attention_mask, query.shape[0], new, first, layer.token_positions.buffer
        )
        own = mask.own
    else:
        own = None
    with torch.no_grad() if first else contextlib.nullcontext():
        if first:
            parts = enumerate(query.split(MAX_DECODE_TOKENS, dim=2))
            rows = (
                AttentionQuery(
                    part,
                    layer,
                    start + i * MAX_DECODE_TOKENS,
                    terms,
                    _rows_of(own, i * MAX_DECODE_TOKENS, MAX_DECODE_TOKENS),
                )
                for i, part in parts
            )
            output = torch.cat([row.attend() for row in rows], dim=1)
        else:
            position = layer.token_positions.logical[:, None]
            keys, values = (x.masked_fill((position == PAD)[..., None], 0) for x in (keys, values))
            seen = own if own is not None else AttentionQuery(query, layer, start, terms).sees(position)
            output = _attend_tensors(module, query, keys, values, seen, terms, **kwargs)
    return without_gradient(output, query, key.keys, key.values) if first else output


class ScoreOptions:
    """What a model asks of its scores: scaling, softcap, sliding window and attention sinks."""

    def __init__(self, scaling, softcap=None, window=None, s_aux=None):
        self.scaling, self.softcap, self.window, self.s_aux = scaling, softcap, window, s_aux

    @property
    def plain(self) -> bool:
        """Whether `sdpa` can do it."""
        return self.softcap is None and self.s_aux is None


class AttentionQuery:
    """The queries of a step, or of a part of one, and what they see of a layer.

    Args:
        query: [B, Hq, q, D].
        layer: the layer they read.
        start: column of the first query.
        terms: what the model asks for.
        own: bool [B or 1, 1, q, n], what these queries see of the step's n tokens; None: all up to
            themselves.

    The query heads of a KV head are rows of one matrix, [B, H, R, D] with R = Hq / H * q.
    """

    def __init__(
        self, query: Tensor, layer: TieredLayer, start: int, terms: ScoreOptions, own: Tensor | None = None
    ):
        self.raw, self.shape, self.dtype, self.layer, self.terms = (
            query,
            query.shape,
            query.dtype,
            layer,
            terms,
        )
        self.start, self.stop, self.own = start, start + query.shape[2], own
        wide = torch.promote_types(query.dtype, torch.float32)
        self.query = of_rows(query.to(wide) * terms.scaling, layer.heads)
        self.positions = layer.token_positions.logical[:, None, self.start : self.stop, None]

    def exact_at(self) -> Tensor:
        """Positions [B, 1, n] of uncompressed keys, where they are read if a window counts distances."""
        return self.layer.exact_positions() if self.terms.window is None else self.layer.exact_read_at()

    def tier_at(self, tier) -> Tensor:
        """The same of a tier."""
        middle, windowed = self.layer.middle, self.terms.window is not None
        return middle.read_at(tier) if windowed and self.layer.config.contiguous else middle.position(tier)

    def sees(self, position: Tensor) -> Tensor:
        """Which keys each query sees, bool [B, 1, q, n], for keys at `position` [B, 1, n].

        A window counts distances as RoPE does. transformers counts slots of the keys it is given: those
        of survivors that were renumbered lie side by side.
        """
        position = position[:, :, None]
        seen = (position != PAD) & (position <= self.positions)
        if self.terms.window is not None:
            seen &= position > self.positions - self.terms.window
        return seen

    def sees_exact(self) -> Tensor:
        """Which uncompressed keys each query sees, bool [B, 1, q, n]; the step's own are stored already."""
        seen = self.sees(self.exact_at())
        if self.own is not None:
            new = self.own.shape[-1]
            seen = torch.cat((seen[..., :-new], self.own.expand(*seen.shape[:-1], new)), dim=-1)
        return seen

    def sees_step(self, first: int, start: int, stop: int) -> Tensor:
        """Which of the step's own tokens `start` to `stop` each query sees; `first` is the step's column."""
        if self.own is not None:
            return self.own[..., start:stop]
        return self.sees(self.layer.token_positions.logical[:, None, first + start : first + stop])

    def reach(self, first: int) -> int:
        """How many of the step's own tokens, from column `first` on, any of these queries may see."""
        return self.stop - first if self.own is None else self.own.shape[-1]

    def attend(self) -> Tensor:
        """Attention of a short step over all the layer holds, [B, q, Hq, D]."""
        layer, terms, tiers = self.layer, self.terms, self.layer.held_tiers()
        keys, values, seen = layer.exact["key"], layer.exact["value"], self.sees_exact()
        group, observer = self.shape[1] // layer.heads, layer.observer
        counts = observer is not None and (self.shape[2] == 1 or observer.additive)
        attention_sums = layer.attention_sums() if counts else []
        if use_compiled(keys) or attention_sums:  # one shape for as long as the buffers last
            keys, values = layer.exact.tensors["key"], layer.exact.tensors["value"]
            seen = torch.nn.functional.pad(seen, (0, keys.shape[2] - seen.shape[-1]))
        sees = [self.sees(self.tier_at(tier))[:, 0] for tier in tiers]
        output = layer.attend(
            self.raw, keys, values, seen[:, 0],
            [layer.middle.view(tier, x) for tier, x in zip(tiers, sees)],
            scaling=terms.scaling, softcap=terms.softcap, s_aux=terms.s_aux, mass=attention_sums,
        )  # fmt: skip
        if counts:
            layer.count(attention_sums, group, [seen[:, 0], *sees])
        elif observer:
            self.observe()
        return output

    def attend_beside(
        self, first: int, keys: Tensor, values: Tensor, attention_stats: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The same for a long step, whose own `keys` and `values`, from column `first` on, lie beside.

        In tiles, so that nothing grows with queries times keys. `received`: the observer's fields of
        the step's own tokens, which are added to.
        """
        layer = self.layer
        partials = self._flash(first, keys, values) if self.flashes else self._tiled(first, keys, values)
        if self.terms.s_aux is not None:
            partials.append(sinks(self.query, self.terms.s_aux))
        whole = functools.reduce(combine, partials)
        if layer.observer:
            level = (whole.row_max + whole.row_sum.log()).unflatten(2, (-1, self.shape[2]))
            for i, (part, own) in enumerate(zip(self.raw.split(ROWS, dim=2), level.split(ROWS, dim=-1))):
                shown = _rows_of(self.own, i * ROWS, ROWS)
                rows = AttentionQuery(part, layer, self.start + i * ROWS, self.terms, shown)
                if rows.stop > layer.token_positions.length - (layer.observer.horizon or rows.stop):
                    rows.observe(first, keys, attention_stats, [own.flatten(2)])
        return of_heads(merge([whole]), self.shape).to(self.dtype)

    @property
    def flashes(self) -> bool:
        """Whether FlashAttention can do it: if nothing hides what came before, no padding and no window."""
        layer, terms = self.layer, self.terms
        hides = self.own is not None or layer.token_positions.has_padding
        if hides or terms.window is not None or terms.softcap is not None:
            return False
        real = ((layer.middle.position(tier) != PAD).all() for tier in layer.held_tiers())
        return flash.takes(self.raw, layer.exact["key"]) and all(real)

    def _flash(self, first: int, keys: Tensor, values: Tensor) -> list[Partial]:
        """Partials over all there is, decoded a span at a time in the dtype of the model."""
        layer, scaling = self.layer, self.terms.scaling
        past, own = self.start - first, slice(self.start - first, self.stop - first)
        partials = [flash.attend(self.raw, keys[:, :, own], values[:, :, own], scaling, causal=True)]
        for k, v in ((layer.exact["key"], layer.exact["value"]), (keys[:, :, :past], values[:, :, :past])):
            if k.shape[2]:
                partials.append(flash.attend(self.raw, k, v, scaling))
        for tier in layer.held_tiers():
            whole = None
            for span in _spans(tier.records.count, SPAN):
                decoded = (
                    decode(tier, *span, self.query.dtype).to(self.dtype)
                    for decode in (layer.middle.decode_keys, layer.middle.decode_values)
                )
                part = flash.attend(self.raw, *decoded, scaling)
                whole = part if whole is None else combine(whole, part)
            partials.append(whole)
        return partials

    def _tiled(self, first: int, keys: Tensor, values: Tensor) -> list[Partial]:
        """Partials over all there is, by products of our own."""
        layer = self.layer
        partials = [self._exact(layer.exact["key"], layer.exact["value"], self.sees(self.exact_at()))]
        for tier in layer.held_tiers():
            partials.append(self._coded(tier) if layer.codebooks else self._tier(tier, partials[0].row_max))
        for span in _spans(self.reach(first)):
            tile = slice(*span)
            partials.append(self._exact(keys[:, :, tile], values[:, :, tile], self.sees_step(first, *span)))
        return partials

    @torch.no_grad()
    def observe(
        self,
        first: int = 0,
        keys: Tensor | None = None,
        attention_stats: dict[str, Tensor] | None = None,
        normalisers: list[Tensor] | None = None,
    ) -> None:
        """Add these queries' attention to what the tokens received; in tiles, as `attend_beside`.

        Args:
            first, keys, received: of the step's own tokens, where they lie beside.
            normalisers: logarithms of sums of exponentiated scores [B, H, R], the tokens of which
                cover all; None: they are computed by a pass of their own.
        """
        observer, new = self.layer.observer, self.shape[2]
        if normalisers is None:
            tiles = self._tiles(first, keys, attention_stats)
            normalisers = [self._scores(key, seen).logsumexp(-1) for key, seen, _ in tiles]
            if self.terms.s_aux is not None:
                normalisers.append(sinks(self.query, self.terms.s_aux).row_max)
        total = functools.reduce(torch.logaddexp, normalisers)
        total = torch.where(total.isfinite(), total, 0.0).unsqueeze(-1)  # a query that sees nothing
        for key, seen, fields in self._tiles(first, keys, attention_stats):
            probs = (self._scores(key, seen) - total).exp().unflatten(2, (-1, new)).mean(2)
            observer.add(fields, probs, seen)
        observer.advance(new)

    def _scores(self, keys: Tensor, seen: Tensor) -> Tensor:
        """Scores [B, H, R, n] of keys [B, H, n, D]; -inf where not `seen`, bool [B, 1, q, n]."""
        scores = self.query @ keys.to(self.query.dtype).mT
        if self.terms.softcap is not None:
            scores = self.terms.softcap * torch.tanh(scores / self.terms.softcap)
        return scores.masked_fill_(~self._fold(seen), -torch.inf)

    def _tiles(self, first: int, keys, attention_stats) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Keys as they are read, what the queries see of them, and the observer's fields, of all in reach."""
        layer, dtype = self.layer, self.query.dtype
        names, exact_seen = (
            layer.observer.fields,
            self.sees_exact() if keys is None else self.sees(self.exact_at()),
        )
        for start, stop in _spans(layer.exact.count):
            fields = {name: layer.exact[name][..., start:stop] for name in names}
            yield layer.exact["key"][:, :, start:stop], exact_seen[..., start:stop], fields
        for tier in layer.held_tiers():
            for start, stop in _spans(tier.records.count):
                fields = {name: tier.records[name][..., start:stop] for name in names}
                seen = self.sees(self.tier_at(tier)[..., start:stop])
                yield layer.middle.decode_keys(tier, start, stop, dtype), seen, fields
        for start, stop in _spans(self.reach(first) if keys is not None else 0):
            fields = {n: attention_stats[n][..., start:stop] for n in names}
            yield keys[:, :, start:stop], self.sees_step(first, start, stop), fields

    def _fold(self, seen: Tensor) -> Tensor:
        """[B, 1, q, n] for the rows of the query matrix: [B, 1, R, n]."""
        return seen.repeat(1, 1, self.query.shape[2] // seen.shape[2], 1) if seen.shape[2] > 1 else seen

    def _exact(self, keys: Tensor, values: Tensor, seen: Tensor) -> Partial:
        return dense.attend(self.query, keys, values, self._fold(seen), self.terms.softcap)

    def _coded(self, tier) -> Partial:
        """Partial over product-quantised tokens, decoded tile by tile: many queries share that, and each
        would need tables of its own."""
        middle, position, dtype = self.layer.middle, self.tier_at(tier), self.query.dtype
        whole = empty(self.query)
        for span in _spans(tier.records.count):
            keys, values = middle.decode_keys(tier, *span, dtype), middle.decode_values(tier, *span, dtype)
            whole = combine(whole, self._exact(keys, values, self.sees(position[..., slice(*span)])))
        return whole

    def _tier(self, tier, score_reference: Tensor) -> Partial:
        """Partial over one tier of the middle, which is never dense; `near` is a likely top score."""
        layer, shape = self.layer, self.query.shape[:2]
        middle, matrix = layer.middle, layer.middle.matrix.to(self.query.dtype)
        position = self.tier_at(tier)
        seen = self._fold(self.sees(position))[:, 0] if self.terms.window else (position != PAD)
        slots = middle.view(tier, seen).flat().narrow(0, tier.records.count)
        query, score_reference = self.query.flatten(0, 1), score_reference.flatten(0, 1)
        score_reference = score_reference.masked_fill(
            score_reference <= torch.finfo(score_reference.dtype).min, 0.0
        )
        turned, decoder, bias = query @ matrix.mT, None, None
        if layer.config.contiguous:
            decoder = packed.Decoder(matrix, layer.rope.inv_freq(), layer.rope.interleaved)
        else:
            bias = query @ slots.means.to(query.dtype).mT
        queries = packed.Queries(query, turned, turned.sum(-1), score_reference)
        part = packed.attend(queries, bias, slots, decoder, tier.bits, self.terms.softcap)
        part = part._replace(acc=part.acc @ matrix)
        return Partial(*(x.unflatten(0, shape) for x in part))


def _spans(count: int, tile: int | None = None) -> list[tuple[int, int]]:
    """`(start, stop)` of the tiles of `count` keys."""
    tile = tile or TILE
    return [(i, min(i + tile, count)) for i in range(0, count, tile)]


def _sdpa(module, query, keys, values, mask, terms: ScoreOptions, **kwargs) -> Tensor:
    asked = dict(scaling=terms.scaling, sliding_window=terms.window)
    return sdpa_attention_forward(module, query, keys, values, mask, **kwargs | asked)[0]


def _attend_tensors(module, query, keys, values, mask, terms: ScoreOptions, **kwargs) -> Tensor:
    """Attention over plain tensors: `sdpa`, or our own where `sdpa` lacks what the model asks for."""
    if terms.plain:
        return _sdpa(module, query, keys, values, mask, terms, **kwargs)
    wide = torch.promote_types(query.dtype, torch.float32)
    new, held = query.shape[2], keys.shape[2]
    if mask is None:
        column = torch.arange(held, device=query.device)
        mask = (column <= column[held - new :, None])[None, None]
    parts = []
    for part, sees in zip(query.split(ROWS, dim=2), mask[..., :held].split(ROWS, dim=-2)):
        rows = of_rows(part.to(wide) * terms.scaling, keys.shape[1])
        sees = sees if sees.dtype == torch.bool else sees == 0
        seen = sees.repeat(1, 1, rows.shape[2] // part.shape[2], 1)
        partials = [dense.attend(rows, keys, values, seen, terms.softcap)]
        if terms.s_aux is not None:
            partials.append(sinks(rows, terms.s_aux))
        parts.append(of_heads(merge(partials), part.shape))
    return torch.cat(parts, dim=1).to(query.dtype)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs,
) -> Tensor | None:
    """The mask of a step as transformers asks for it: `sdpa_mask`, made at once where it is known.

    The only token of a step sees itself; so in a captured step, whose mask may not be skipped, what is
    left to say is whether each row's is real.
    """
    single = q_length == kv_length == 1 and not (args or allow_is_causal_skip or use_vmap)
    if single and attention_mask is not None and attention_mask.shape[-1] == kv_offset + 1:
        # Always new strides: those of a slice tell its length, for which a graph would be compiled anew.
        return attention_mask[:, None, None, -1:].clone(memory_format=torch.contiguous_format)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        *args,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        **kwargs,
    )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
