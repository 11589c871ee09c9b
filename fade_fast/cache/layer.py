"""One layer of a cache: its parts, and the four verbs of a step.

A layer holds dense tokens (sinks and recent ones) and a store of compressed tokens (the middle). A step
prepares the layer, appends its keys and values, attends, and compacts. Eager steps name slots by an int,
captured steps by a tensor; the verbs are the same.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fade_ref.config import FadeConfig

from ..compile.compiled import use_compiled
from ..formats.base import Format
from ..kernels import dense as dense_kernels
from ..kernels.packed import TierView
from ..kernels.rope import RoPE
from ..policies import plan
from ..policies.scores import Observer
from .append_store import AppendStore
from .budget_store import BudgetStore
from .buffers import copy_all, take, take_rows
from .dense import DenseStore
from .positions import DeviceCounters, TokenPositions
from .ranks import Ranks
from .select_store import SelectStore
from .sharing import Sharing
from .store import CompressedStore, StoredTier, refresh

MAX_DECODE_TOKENS = 16  # most tokens of a step that are stored before they are attended
MIN_SPARE_SLOTS = 128  # free slots of a buffer that grows with the text, when the buffer is made
MIN_DOUBLED_SLOTS = 1024  # the same if the text is known to fill them
MIN_FLASH_PREFIX = 4096  # from this many dense tokens on, all but the newest are left to FlashAttention


@dataclass(frozen=True)
class ScoreOptions:
    """What a model asks of its scores: scaling, softcap, sliding window and learned attention sinks [Hq]."""

    scaling: float
    softcap: float | None = None
    window: int | None = None
    s_aux: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether `scaled_dot_product_attention` can do it."""
        return self.softcap is None and self.s_aux is None


@dataclass
class Visible:
    """What the queries of a short step see of a layer.

    Attributes:
        dense: bool [B, 1 or q, E], the dense tokens; E is at most the capacity.
        views: of the tiers that hold a token.
        flash_prefix: dense tokens, the first ones, that FlashAttention attends: each query sees them all.
        real: bool [B], which rows have a real token in a captured step; None in an eager one.
        slot: int64 [1], slot of the token of a captured step, whose statistics start afresh; None if the
            token was counted already, and in an eager step.
    """

    dense: Tensor
    views: list[TierView] = field(default_factory=list)
    flash_prefix: int = 0
    real: Tensor | None = None
    slot: Tensor | None = None


class KVLayer:
    """Keys and values of one full-attention layer, in tiers.

    Args:
        config: which tokens are kept, and how many.
        format: how compressed tokens are stored.
        positions: positions of the tokens of the cache; all its layers share them.
        rope: gives how the model rotates the keys of this layer; needed if `config.contiguous`.
        index: place of this layer among the layers of its cache.
        max_length: tokens to make room for at once; None grows on demand.
        observer: of the attention that tokens receive, if the policy asks.
        layer_idx: place among the model's layers; for messages and reports.
        ranks: the processes that hold the heads of this model; None if this process holds all of them.

    Attributes:
        length: tokens seen.
        version: counts changes that captured steps must learn of.
        appends: counts steps that were appended outside a captured step.
        telemetry: is told of what happens, where anything listens; else None.
        group: query heads of a KV head, once a step has told; else 0.
        sharing: what rows share, while a beam search lets steps read it once; else None.
        chunk: the first step of a text is attended as if its tokens had come in chunks of this size, each of
            which reads what is due before it in compressed form. It shows what compression loses. None: the
            tokens of the first step read each other uncompressed.
    """

    telemetry = None
    chunk: int | None = None

    def __init__(
        self,
        config: FadeConfig,
        format: Format,
        positions: TokenPositions,
        rope: Callable[[], RoPE] | None,
        index: int = 0,
        max_length: int | None = None,
        observer: Observer | None = None,
        layer_idx: int | None = None,
        ranks: Ranks | None = None,
    ):
        self.config, self.format, self.token_positions, self.rope = config, format, positions, rope
        self.ranks = ranks
        self.index, self.layer_idx, self.observer, self._max_length = index, layer_idx, observer, max_length
        self.version = self.appends = self.group = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything, shape and dtype included."""
        self.length = 0
        self.dense: DenseStore | None = None
        self.middle: CompressedStore | None = None
        self.static_views: list[TierView] = []  # what captured steps read of the tiers
        self.sharing: Sharing | None = None
        self.version += 1

    @property
    def is_initialized(self) -> bool:
        """Whether the buffers exist: keys have come."""
        return self.dense is not None

    @property
    def compresses(self) -> bool:
        """Whether tokens of this layer can leave the recent region."""
        return self.config.compresses and self.format.compresses

    def allocate(self, keys: Tensor) -> None:
        """Make the buffers for the shape, dtype and device of the first keys [B, H, n, D]."""
        c, most = self.config, self._max_length
        batch, heads, new, dim = keys.shape
        self.dtype, self.device = keys.dtype, keys.device
        extra = {}
        if self.observer:
            self.observer.allocate(heads, keys.dtype, keys.device)
            extra = self.observer.fields
        awaits_tables = self.format.awaits_tables  # another thread may make them at any time
        self.format.allocate(dim, keys.dtype, keys.device)
        self.dense = DenseStore(c, self.token_positions, extra, heads, dim, keys.dtype, batch, keys.device)
        if self.compresses:
            if not awaits_tables:
                self._allocate_middle()
            # All that the region ever holds, unless the window is longer than this text.
            room = min(c.n_sink + c.recent_window + c.block_size, new + c.block_size)
            most = room if most is None else min(room, most)
            if use_compiled(keys):  # one shape for all steps
                most = min(c.n_sink + c.recent_window + c.block_size, max(MIN_FLASH_PREFIX, room))
        self.dense.reserve(most or 0)

    def _allocate_middle(self) -> None:
        """Make the store of compressed tokens. The tables of the format exist."""
        c, key = self.config, self.dense.tensors["key"]
        batch, heads, _, dim = key.shape
        kind = BudgetStore if c.relocatable else AppendStore if c.select is None else SelectStore
        self.middle = kind(
            c, self.format, self.token_positions, self.rope, batch, heads, self.observer, self.ranks
        )
        self.middle.token_bytes = 2 * heads * dim * key.element_size()
        leaving = max(0, (self._max_length or 0) - c.n_sink - c.recent_window)
        self.middle.reserve(leaving // c.block_size * c.block_size)

    def _open_middle(self, tokens: dict[str, Tensor], first: int) -> None:
        """Make the store for the first tokens that are demoted, from step index `first` on, if the format had
        no tables when the layer was allocated. If the format still has none, these tokens give them.
        """
        keys, values = tokens["key"], tokens["value"]
        if self.format.awaits_tables:
            position = self.token_positions.at(first, keys.shape[2])
            self.format.learner.learn_alone(keys, values, position)
        self.format.allocate(keys.shape[3], self.dtype, self.device)
        self._allocate_middle()
        self.version += 1

    def check(self, keys: Tensor, values: Tensor, least: int = 1) -> None:
        """Refuse keys and values that cannot follow the tokens stored, before anything is written.

        Raises `ValueError` on a wrong shape, batch, head count, head_dim, dtype or device.
        """
        if keys.dim() != 4 or keys.shape != values.shape or keys.shape[2] < least:
            raise ValueError(
                "keys and values must have one shape [batch, KV heads, tokens > 0, head_dim]: "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}; pass tensors of this shape to update()"
            )
        kind, other = (keys.dtype, keys.device), (values.dtype, values.device)
        if kind != other or not keys.is_floating_point():
            raise ValueError(
                f"keys and values must have one floating dtype and device: got {kind} and {other}; convert "
                "them before update()"
            )
        if self.is_initialized:
            stored = self.dense["key"]
            ours = (stored.shape[0], stored.shape[1], stored.shape[3], stored.dtype, stored.device)
            theirs = (keys.shape[0], keys.shape[1], keys.shape[3], *kind)
            if ours != theirs:
                raise ValueError(
                    f"(batch, KV heads, head_dim, dtype, device) is {ours} in this cache but {theirs} "
                    "in these keys: reset() the cache first, or use it with the model it was made for"
                )
        elif self.token_positions.length and self.token_positions.batch != keys.shape[0]:
            raise ValueError(
                f"{keys.shape[0]} rows do not fit a cache of {self.token_positions.batch}: reset() it before "
                "another batch"
            )
        elif self.compresses:
            self.format.check(keys.shape[3], self.layer_idx, keys.shape[1])

    # -- sizes

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.dense["key"].shape[1]

    @property
    def recent(self) -> int:
        """Tokens in the recent region."""
        return self.dense.num_recent(self.length)

    @property
    def has_middle(self) -> bool:
        """Whether any token is compressed."""
        return self.middle is not None and self.middle.count > 0

    @property
    def num_evicted(self) -> int:
        """Tokens no longer held, in a batch without padding."""
        return self.length - self.dense.count - (self.middle.count if self.has_middle else 0)

    @property
    def num_croppable(self) -> int:
        """How many of the newest tokens can be cropped."""
        if not self.is_initialized:
            return 0
        return self.length if self.dense.count == self.length else self.recent

    def held_tiers(self) -> list[StoredTier]:
        """Tiers that hold a token."""
        return [t for t in self.middle.tiers if t.records.count] if self.has_middle else []

    def _max_dense(self) -> int | None:
        """Most dense tokens within a step, drafts included; None without compression."""
        c = self.config
        full = c.n_sink + (c.recent_window or 0) + c.block_size + MAX_DECODE_TOKENS
        return full if self.compresses else None

    # -- prepare

    def prepare(self, room: int) -> None:
        """See to it that `room` tokens fit into the dense buffers. More than one token is a draft."""
        count, made = self.dense.count, self._max_dense() or self._max_length
        needed, most = count + room, made or self.token_positions.expected
        if room > 1 and most and not self.compresses:  # the last drafts reach beyond the end of the text
            most += room
            needed = max(needed, most) if made else needed
        if needed <= self.dense.capacity:
            return
        if most is None or most < needed:  # little is made in advance for a text of unknown length
            spare = max(count // 8, MIN_SPARE_SLOTS)
        else:
            spare = min(most - count, max(count, MIN_DOUBLED_SLOTS))
        self.dense.reserve(max(needed, count + spare))
        self.version += 1
        if self.telemetry:
            self.telemetry.stored(self)

    # -- append

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        slots: Tensor | None = None,
        attended: bool = False,
        attention_stats: dict[str, Tensor] | None = None,
    ) -> None:
        """Store the tokens of a step, whose positions are known already.

        Args:
            keys, values: [B, H, q, D], keys after RoPE; 0 in padding slots.
            slots: int64 [q], their dense slots, in a captured step, which counts nothing in Python; None:
                they follow the slots in use.
            attended: whether the step's attention is done. Then blocks that are due leave the recent region
                at once, so that a long step never fills the dense buffers.
            attention_stats: the observer's fields of these tokens; None: no query has seen them.
        """
        if slots is not None:
            dense_kernels.store(self.dense.tensors["key"], self.dense.tensors["value"], slots, keys, values)
            return
        if not self.is_initialized:
            self.allocate(keys)
        self.version += 1
        self.appends += 1
        self.follow_choices()
        before = self.length, self.dense.count, self.dense.sinks_placed
        try:
            with torch.no_grad():  # stored tokens are data: gradients end here
                self._append(keys, values, attended, attention_stats)
        except BaseException:
            self.length, self.dense.count, self.dense.sinks_placed = before
            raise
        if self.telemetry:
            self.telemetry.stored(self)

    def _append(self, keys: Tensor, values: Tensor, attended: bool, attention_stats) -> None:
        dense, start, new = self.dense, self.length, keys.shape[2]
        sinks = max(0, min(new, self.config.n_sink - start))
        recent = self.recent
        self.length += new
        tokens = dict(key=keys, value=values)
        tokens |= self.new_stats(new) if attention_stats is None else attention_stats
        overflow = self.num_overflow(recent + new - sinks) if attended else 0
        needed, most = dense.count + new - overflow, self._max_dense() or 0
        if use_compiled(keys) and most - MAX_DECODE_TOKENS < needed <= most:  # a draft, and others to come
            dense.reserve(most)
        dense.make_room(new - overflow, dense.count)
        dense.append(**self._cut(tokens, 0, sinks))
        if self.token_positions.has_padding and not dense.sinks_placed:
            dense.place_sinks(keys, values, start, self.length)
        tokens = self._cut(tokens, sinks, new)
        if overflow:
            older, first = dense.narrow(dense.count - recent, dense.count), self.length - new + sinks
            if recent:
                tokens = {
                    name: torch.cat((older[name], x), dense.fields[name].axis) for name, x in tokens.items()
                }
            self._demote(self._cut(tokens, 0, overflow), first - recent)
            dense.count -= recent
            tokens = self._cut(tokens, overflow, recent + new - sinks)
        dense.append(**tokens)

    def new_stats(self, count: int) -> dict[str, Tensor]:
        """The observer's fields of `count` new tokens."""
        rows = self.dense["key"].shape[0]
        return self.observer.arrive(rows, count, self.device) if self.observer else {}

    def _cut(self, tokens: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Tokens `start` to `stop` of every field."""
        fields = self.dense.fields
        return {name: x.narrow(fields[name].axis, start, stop - start) for name, x in tokens.items()}

    # -- attend

    def attend(self, query: Tensor, visible: Visible, options: ScoreOptions) -> Tensor:
        """Attention of a short step, whose tokens are stored, over all tokens held: [B, q, Hq, D].

        `query` is [B, Hq, q, D]. The attention that tokens receive is counted, if the policy asks and one
        pass gives it (`counts_in_attend`).
        """
        length = visible.dense.shape[-1]
        keys, values = (self.dense.tensors[name].narrow(2, 0, length) for name in ("key", "value"))
        if visible.flash_prefix and options.plain:
            return dense_kernels.attend_long(
                query, keys, values, visible.dense, visible.flash_prefix, options.scaling
            )
        if self.has_middle and self.middle.chooses:
            return self._attend_chosen(query, keys, values, visible, options)
        sums = self.attention_sums() if self.counts_in_attend(query.shape[2]) else []
        tiers = self.held_tiers()
        slots_read = [tier.num_read for tier in tiers]
        if self.sharing is not None and len(visible.views) > len(tiers):
            reads, (shared, own) = self.sharing.reads(*tiers), visible.views
            visible = replace(visible, views=[shared, own._replace(first=reads.first)][: 1 + bool(reads.own)])
            tiers, slots_read = tiers * len(visible.views), [reads.shared, reads.own][: len(visible.views)]
        if any(view.key_index is not None for view in visible.views):  # few tokens: all of them are read
            visible = replace(visible, views=[self.middle.all_of_few(view) for view in visible.views])
            slots_read = [view.capacity for view in visible.views]
        output = self.format.attend(
            query, keys, values, visible.dense, [tier.format for tier in tiers], visible.views,
            slots_read, rope=self.rope() if self.config.contiguous else None,
            scaling=options.scaling, softcap=options.softcap, s_aux=options.s_aux, mass=sums,
        )  # fmt: skip
        if sums:
            self._count(sums, query.shape[1] // self.heads, visible)
        return output

    def _attend_chosen(
        self, query: Tensor, keys: Tensor, values: Tensor, visible: Visible, options: ScoreOptions
    ) -> Tensor:
        """The same over sinks, recent tokens, and the pages that each query and KV head chooses."""
        store, (view,) = self.middle, visible.views
        scores = dict(scaling=options.scaling, softcap=options.softcap)
        choice = store.choose(query, keys, visible.dense, view, **scores)
        outputs, (batch, _, new, _) = [], query.shape
        size = store.num_together(new)
        for i in range(0, new, size):
            # Each query becomes a row of a batch, because each has tokens of its own.
            part = query[:, :, i : i + size].transpose(1, 2)
            count, seen = (
                part.shape[1],
                visible.dense[:, i : i + size] if visible.dense.shape[1] > 1 else None,
            )
            seen = visible.dense.expand(-1, count, -1) if seen is None else seen
            each = lambda x: x if count == 1 else x.repeat_interleave(count, dim=0)  # noqa: B023, E731
            chosen = store.chosen(view, choice.of(i, count), i)
            output = self.format.attend(
                part.flatten(0, 1).unsqueeze(2).contiguous(), each(keys), each(values),
                seen.flatten(0, 1).unsqueeze(1), [store.tiers[0].format], [chosen], [chosen.capacity],
                rope=None, s_aux=options.s_aux, **scores,
            )  # fmt: skip
            outputs.append(output.unflatten(0, (batch, count)).flatten(1, 2))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def follow_choices(self) -> None:
        """Let the middle keep what queries choose, where something listens, and forget the last choice."""
        if self.middle is not None:
            self.middle.keep_choices(self.telemetry is not None)
            self.middle.forget_choices()

    def counts_in_attend(self, new: int) -> bool:
        """Whether `attend` counts the attention of a step of `new` tokens."""
        return self.observer is not None and (new == 1 or self.observer.additive)

    def attention_sums(self) -> list[Tensor]:
        """Where `attend` sums probabilities: [B, H, capacity] for dense slots and for each tier."""
        keys = self.dense.tensors["key"]
        rows, wide = keys.shape[:2], torch.promote_types(keys.dtype, torch.float32)
        sizes = [keys.shape[2], *(tier.records.capacity for tier in self.held_tiers())]
        return [torch.empty(*rows, n, dtype=wide, device=keys.device) for n in sizes]

    def observed(self) -> list[dict[str, Tensor]]:
        """The observer's fields of the dense slots, and of each tier that holds a token."""
        held = [self.dense, *(tier.records for tier in self.held_tiers())]
        return [{name: x.tensors[name] for name in self.observer.fields} for x in held]

    @torch.no_grad()
    def _count(self, sums: list[Tensor], group: int, visible: Visible) -> None:
        """Count what a step's queries paid: sums over the query rows of a KV head, `group` heads."""
        seen = [visible.dense, *(view.valid for view in visible.views)]
        if visible.real is not None:
            self.observer.add_step(self.observed(), sums, seen, visible.real, group, visible.slot)
            return
        for fields, total, sees in zip(self.observed(), sums, seen):
            n = sees.shape[-1]
            probs = (total[..., :n] / group).unsqueeze(2)
            self.observer.add({k: x[..., :n] for k, x in fields.items()}, probs, sees.unsqueeze(1))
        self.observer.advance(seen[0].shape[1])

    # -- rows that share slots

    def share(self, beams: int, slots: int) -> None:
        """Say that the rows of a text, `beams` each, are equal in the first `slots` slots, and stay so.

        One beam: from now on each row reads for itself.
        """
        found = None
        if beams > 1 and self.group and self.has_middle and not self.observer and self.middle.shares_slots:
            found = Sharing.of(self.middle.tiers[0], beams, slots, self.group)
        if found != self.sharing:
            self.sharing = found
            self.version += 1

    # -- compact

    @property
    def demotion_due(self) -> bool:
        """Whether a block has to leave the recent region."""
        return self.num_due > 0

    @torch.no_grad()
    def compact(self, counters: DeviceCounters | None = None) -> bool:
        """Demote the blocks that a step pushed out of the recent region. Returns whether any was due.

        This waits for the next step, so that tokens cropped in between (assisted decoding) leave no trace.
        With `counters`, a captured graph finds its slots on the device.
        """
        overflow = self.num_due
        if overflow:
            self.version += 1
            start = self.dense.count - self.recent
            remove = self.dense.removal(start, overflow, whole=counters is not None)
            oldest = self.dense.narrow(start, start + overflow)
            self._demote(oldest, self.length - self.recent, counters)
            remove()
            if self.telemetry:
                self.telemetry.stored(self)
        return overflow > 0

    @property
    def compacts_alone(self) -> bool:
        """Whether `compact` needs no other process. If it does, only steps may call it."""
        return self.ranks is None or not plan.averages_heads(self.config)

    @property
    def num_due(self) -> int:
        """How many tokens have to leave the recent region."""
        return self.num_overflow(self.recent) if self.is_initialized else 0

    @property
    def elements_due(self) -> int:
        """Elements of their keys, in all rows and heads."""
        batch, heads, _, dim = self.dense.tensors["key"].shape
        return batch * heads * dim * self.num_due

    @property
    def demotes_like(self) -> Hashable | None:
        """Layers of one kind can be demoted together, see `together.py`; None: this one is demoted alone."""
        if self.middle is None:
            return None
        codes, held, dense = self.format.shared, self.middle.shared, self.dense
        scores = self.observer.shared if self.observer else ()
        if self.telemetry or None in (codes, held, scores):
            return None
        key = dense.tensors["key"]
        kind = key.shape, key.dtype, key.device, dense.count, self.length, dense.sink_keys is None
        frequencies = id(self.rope().inv_freq) if self.config.contiguous else None
        c = self.config
        limits = c.n_sink, c.recent_window, c.block_size, c.int4_budget, c.int2_budget, c.eviction_policy
        return (*kind, *limits, c.plan_scope, c.positions, codes, held, scores, frequencies)

    def num_overflow(self, recent: int) -> int:
        """How many of `recent` tokens have to leave: whole blocks."""
        c = self.config
        if not self.compresses or recent < c.recent_window + c.block_size:
            return 0
        return (recent - c.recent_window) // c.block_size * c.block_size

    def _demote(self, tokens: dict[str, Tensor], first: int, counters: DeviceCounters | None = None) -> None:
        """Hand the tokens from step index `first` on to the middle, given every field of them."""

        def rotate_sinks(evicted: Tensor | None) -> None:
            if self.config.contiguous and evicted is not None:
                self.dense.rotate_sinks(self.middle.evicted, evicted, self.rope())

        if self.middle is None:
            self._open_middle(tokens, first)
        stats = {name: x for name, x in tokens.items() if name not in ("key", "value")}
        done = self.telemetry and self.telemetry.demotion(self, tokens["key"].shape[2], first)
        self.middle.demote(tokens["key"], tokens["value"], first, self.length, stats, rotate_sinks, counters)
        if done:
            done()

    @property
    def can_replay_demotion(self) -> bool:
        """Whether the next demotion can replay the captured graph of the last one."""
        block = self.config.block_size
        steady = self.num_overflow(self.recent) == block and not self.telemetry
        return steady and self.has_middle and self.middle.can_replay_demotion(block)

    @property
    def can_record_demotion(self) -> bool:
        """Whether the demotion of the next block can be recorded now, although none is due.

        So many tokens must be counted as if one were due (`num_past_threshold` is 0).
        """
        block, fits = self.config.block_size, self.dense.count <= self.dense.capacity
        return (
            fits
            and not self.telemetry
            and self.demotes_like is not None
            and self.middle.can_replay_demotion(block)
        )

    @property
    def num_past_threshold(self) -> int:
        """Recent tokens beyond those with which a block becomes due."""
        return self.recent - self.config.recent_window - self.config.block_size

    def count_replayed_demotion(self) -> None:
        """Count what a replayed graph has demoted."""
        self.dense.count -= self.config.block_size
        self.middle.count_replayed_demotion(self.config.block_size)

    # -- captured steps

    def static_inputs(self) -> list[Tensor]:
        """Tensors that captured steps know by their addresses."""
        inputs = [*self.format.tensors(), *self.dense.all_tensors()]
        inputs += self.observer.tensors() if self.observer else []
        inputs += self.middle.tensors() if self.has_middle else []
        return [*inputs, self.rope().inv_freq] if self.config.contiguous else inputs

    def slots_read(self) -> list[int]:
        """Slots that a step reads of each tier that holds a token, and at last how it reads: whether it
        chooses among them, or how many beams share some of them, as a negative number.
        """
        tiers = self.held_tiers()
        if self.sharing is not None:
            return [*self.sharing.reads(*tiers), -self.sharing.beams]
        return [*(tier.num_read for tier in tiers), self.has_middle and self.middle.chooses]

    @property
    def reads_more_at(self) -> int | None:
        """Slots in use with which a step reads more of them.

        None: it then takes other buffers or kernels, or this layer has no single tier that grows.
        """
        if type(self.middle) is not AppendStore or not self.middle.count:
            return None
        (tier,) = self.middle.tiers
        if self.sharing is not None:
            return self.sharing.more_at(tier)
        return tier.num_read + 1 if tier.next_read else None

    def allocate_static_views(self) -> None:
        """Make the views that captured steps read."""
        self.static_views = self._views()

    def _views(self) -> list[TierView]:
        """Views of the tiers that hold a token. If rows share slots: of these slots, and of the rest."""
        found = [self.middle.view(tier) for tier in self.held_tiers()]
        return found if self.sharing is None else self.sharing.parts(*found)

    @property
    def views_like(self) -> Hashable | None:
        """Layers of one kind have static views that hide the same slots; None: this one is like no other."""
        if not self.has_middle or self.middle.views_like is None:
            return None
        key = self.dense.tensors["key"]
        kind = key.shape[0], key.device, self.config.contiguous, self.config.n_sink, self.sharing
        return *kind, self.middle.views_like

    def refresh_static_views(self, counters: DeviceCounters | None = None) -> list[tuple[Tensor, Tensor]]:
        """Bring those views up to date, in place. Returns copies that are left to be made, for `copy_all`."""
        if self.sharing is not None and counters is None:
            for view, fresh in zip(self.static_views, self._views()):
                refresh(view, fresh)
            return []
        # A demotion in a graph adds tokens, which are not shared.
        views = [view for view in self.static_views if view.beams == 1]
        pairs = zip(self.held_tiers(), views)
        return [pair for tier, view in pairs for pair in self.middle.refresh_view(tier, view, counters)]

    @property
    def flash_prefix_len(self) -> int:
        """How many dense tokens, the first ones, can be left to FlashAttention in a captured step."""
        if self.has_middle or self.dense.count < MIN_FLASH_PREFIX or self.observer:  # it gives no weights
            return 0
        return self.dense.count // 256 * 256

    # -- rows, devices, crops

    def crop(self, n: int) -> None:
        """Forget the newest `n` tokens. Raises `ValueError` if fewer are dense."""
        if n > self.num_croppable:
            raise ValueError(
                f"crop({-n}): only the newest {self.num_croppable} tokens are uncompressed; "
                f"{-self.num_croppable} to 0 is allowed, and a larger recent_window allows more"
            )
        if n:
            self.dense.count -= n
            self.length -= n

    def select_rows(self, index: Tensor) -> None:
        """Rows `index` [B'] int64 take the places of the present rows.

        The copy is in place if there are as many: captured steps know the tensors by their addresses.
        """
        self.share(1, 0)
        pending = []
        self.map(lambda x: take_rows(x, index, pending))
        copy_all(pending)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every stored tensor by `function` of it."""
        if not self.is_initialized:
            return
        self.version += 1
        self.dense.map(function)
        if self.middle is not None:
            self.middle.map(function)

    def tensors(self) -> list[Tensor]:
        """Every tensor the layer holds."""
        if not self.is_initialized:
            return self.format.tensors()
        held = self.dense.all_tensors() + (self.observer.tensors() if self.observer else [])
        return held + (self.format if self.middle is None else self.middle).tensors()

    def host_tensors(self) -> list[Tensor]:
        """Those of `tensors()` that lie in host memory."""
        return [] if not self.is_initialized or self.middle is None else self.middle.host_tensors()

    # -- reading all tokens

    @property
    def evicted(self) -> Tensor | None:
        """Real tokens evicted so far, int32 [B, 1], where survivors are renumbered; else None."""
        return self.middle.evicted if self.config.contiguous and self.middle is not None else None

    def dense_positions(self, counters: DeviceCounters | None = None) -> Tensor:
        """Logical positions of the dense tokens, [B, 1, n] int32, or `PAD`."""
        return self.dense.positions(self.length, counters)

    def dense_read_at(self) -> Tensor:
        """Positions [B, 1, n] at which the dense keys are read."""
        return self.dense.read_at(self.length, self.evicted)

    def decode(self, tier: StoredTier) -> tuple[Tensor, Tensor]:
        """Keys, as they are read, and values of all slots of a tier in use, in the model's dtype."""
        wide = torch.promote_types(self.dtype, torch.float32)
        count = tier.records.count
        keys = self.middle.decode_keys(tier, 0, count, wide)
        values = self.middle.decode_values(tier, 0, count, wide)
        return keys.to(self.dtype), values.to(self.dtype)

    def decode_all(self) -> tuple[Tensor, Tensor]:
        """All keys and values held, dequantized, oldest first: [B, H, n, D] each.

        Other attention functions read these. Keys are rotated to the positions at which they are read.
        """
        keys, values = self.dense["key"], self.dense["value"]
        if not self.has_middle:
            return keys, values
        n_sink, tiers = self.config.n_sink, self.held_tiers()
        middle = [self.decode(tier) for tier in tiers]
        place = torch.cat([self.middle.positions_by_head(tier) for tier in tiers], dim=-1)
        order = place.argsort(dim=-1, stable=True)
        k, v = (torch.cat(parts, dim=2) for parts in zip(*middle))
        if len(middle) > 1:
            k, v = take(k, order), take(v, order)
        both = [
            torch.cat((x[:, :, :n_sink], m, x[:, :, n_sink:]), dim=2) for x, m in ((keys, k), (values, v))
        ]
        if self.token_positions.has_padding and not self.config.relocatable:
            # Sinks go back to the step indices at which they came.
            for slot in range(n_sink):
                here = (self.token_positions.logical[:, None, : self.length] == slot)[..., None]
                sinks = (x[:, :, slot : slot + 1] for x in (keys, values))
                both = [torch.where(here, sink, x) for sink, x in zip(sinks, both)]
        return tuple(both)
