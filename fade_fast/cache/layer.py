"""One tiered layer of the cache: the life of a token, from its arrival to the middle.

Columns are stored as sinks, middle and recent. A column joins the recent region when it arrives
and leaves it for the middle `block_size` columns at a time.
"""

import functools
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fade_ref.config import FadeConfig
from fade_ref.tiers import packed_bytes

from ..compile.compiled import use_compiled
from ..hf.rope_probe import Rope
from ..kernels import decode, product_decode
from ..kernels.packed import TierView
from ..kernels.rope import rotate
from ..policies.scores import Observer
from ..saved.telemetry import Telemetry
from .buffers import Buffers, Field, copy_all, take, take_rows
from .decode_graph import MAX_DECODE_TOKENS, MIN_FLASH_PREFIX, MIN_SPARE_SLOTS, DecodeGraph
from .guard import Guard, single_threaded
from .product_store import ProductStore
from .store import PAD, AppendStore, BudgetStore, CompressedStore, StoredTier


@dataclass(frozen=True, eq=False)
class PendingKV:
    """What `update` hands to the attention function in the place of keys, and of values."""

    layer: "TieredLayer"
    keys: Tensor
    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of all keys of the layer, the new ones included, as stock attention would see."""
        batch, heads, new, dim = self.keys.shape
        return torch.Size((batch, heads, self.layer.length + new, dim))

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def of_another(self, module) -> bool:
        """Whether the attention module that reads this is not the one whose keys these are."""
        return getattr(module, "layer_idx", self.layer.layer_idx) != self.layer.layer_idx

    def to(self, *args, **kwargs) -> "PendingKV":
        """Nothing moves: some models ask for the device that the keys are on already."""
        return self


_numbers = itertools.count()
#: Layers as compiled graphs name them.
by_number: "weakref.WeakValueDictionary[int, TieredLayer]" = weakref.WeakValueDictionary()


class TieredLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer, in tiers.

    Args:
        config: what is kept how.
        stepper: the captured steps of the cache this layer belongs to, and its columns: shared by all layers.
        rope: how the model rotates this layer's keys; needed if `config.contiguous`.
        rotations: `(head_dim, device)` -> the codec's matrix P and the sum of its rows, shared by the layers.
        dispatches: whether the model's attention calls are ours at the moment; if they are not,
            `update` returns dense keys and values.
        max_length: columns to make room for at once; None grows on demand.
        observer: of the attention that tokens receive, if the policy asks.
        books: codebooks of keys and values, [m, k, w] each, if `config` is product-quantised.
    """

    guard: Guard  # one for all layers of a cache
    rollback_step: Callable[
        [int], None
    ]  # takes back a step from column `start` on, which failed in this layer
    is_sliding = False
    is_croppable = True
    record_past = False  # whether generate() may take back a step, with all that it counted
    layer_idx: int | None = None  # of the model's layer, where the model is known
    shows_survivors = False  # whether stock attention may read what is left: right without padding only
    shared = False  # whether other layers may read what this one stores (Gemma 4)
    telemetry: Telemetry | None = None  # where anything listens

    def __init__(
        self,
        config: FadeConfig,
        decode_graph: DecodeGraph,
        rope: Rope | None,
        rotations,
        dispatches,
        max_length: int | None,
        observer: Observer | None = None,
        codebooks: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        self.decode_graph, self.index, self.number = decode_graph, len(decode_graph.layers), next(_numbers)
        by_number[self.number] = self
        decode_graph.layers.append(self)
        token_positions = decode_graph.token_positions
        self.config, self.token_positions, self.rope = config, token_positions, rope
        self._rotations, self._dispatches, self._max_length = rotations, dispatches, max_length
        self.observer, self.codebooks = observer, codebooks
        self.guard = Guard()
        self.rollback_step = lambda start: None
        self._clear()

    def _clear(self) -> None:
        self.length = 0
        self.exact: Buffers | None = None  # sinks, then recent columns
        self.middle: CompressedStore | None = None
        self.sinks_placed = False
        self.sink_keys: Tensor | None = None  # as they came; `exact` holds them as they are read
        self.static_views: list[TierView] = []  # what captured steps read of the tiers
        self.failed = False  # whether a step stopped halfway, and could not be taken back
        self.is_initialized = False

    # -- transformers' protocol

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        """Make the buffers, for the shape, dtype and device of the first keys."""
        c, most = self.config, self._max_length
        batch, heads, _, dim = keys.shape
        self.dtype, self.device = keys.dtype, keys.device
        fields = dict.fromkeys(("key", "value"), Field((dim,), keys.dtype, heads))
        if self.observer:
            self.observer.allocate(heads, keys.dtype, keys.device)
            fields |= self.observer.fields
        self.exact = Buffers(fields, 1, batch, keys.device)
        if c.compresses:
            kind = BudgetStore if c.relocatable else AppendStore
            if self.codebooks is not None:
                self.codebooks = tuple(book.to(keys.device) for book in self.codebooks)
                kind = functools.partial(ProductStore, self.codebooks)
            table = self._rotations(dim, keys.device)
            self.middle = kind(c, self.token_positions, self.rope, table, batch, heads, self.observer)
            # All that the region ever holds, unless the window is longer than this text.
            room = min(c.n_sink + c.recent_window + c.block_size, keys.shape[2] + c.block_size)
            leaving = max(0, (most or 0) - c.n_sink - c.recent_window)
            self.middle.reserve(leaving // c.block_size * c.block_size)
            most = room if most is None else min(room, most)
            if use_compiled(keys):  # one shape for all steps
                most = min(c.n_sink + c.recent_window + c.block_size, max(MIN_FLASH_PREFIX, room))
        self.exact.reserve(most or 0)
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs):
        """Check the new keys and values [B, H, q, D], and hand them on to attention.

        Our attention function stores them, once it knows which are padding. Other attention
        functions get all keys and values back, dense.
        """
        if torch.is_autocast_enabled(keys.device.type):  # what is stored has one dtype
            dtype = self.dtype if self.is_initialized else torch.get_autocast_dtype(keys.device.type)
            keys, values = keys.to(dtype), values.to(dtype)
        if self.decode_graph.active or torch.compiler.is_compiling() and self._dispatches():
            arrival = PendingKV(self, keys, values)  # which attention checks, within a compiled graph
            return arrival, arrival
        return self._update(keys, values)

    @torch.compiler.disable
    @single_threaded
    def _update(self, keys: Tensor, values: Tensor):
        self.check(keys, values)
        self.check_whole()
        if self._dispatches():
            arrival = PendingKV(self, keys, values)
            return arrival, arrival
        if self.observer:
            raise ValueError(
                f"eviction_policy={self.config.eviction_policy!r} ranks by attention, which this model's "
                "own attention function does not tell: fade_fast.attach(model) replaces it"
            )
        if (
            self.config.evicts
            and not self.shows_survivors
            or self.config.relocatable
            and self.token_positions.has_padding
        ):
            raise ValueError(
                "this cache evicts or moves tokens, and masks of the model's own attention would count "
                "columns: fade_fast.attach(model) brings ours back"
            )
        start = self.length
        try:
            self.demote_due_blocks()
            both = (keys, values)
            if start:
                both = tuple(torch.cat(parts, dim=2) for parts in zip(self.dense(), both))
            self.token_positions.extend(start, None, keys.shape[0], keys.shape[2], keys.device)
            self.store(
                keys, values, attended=keys.shape[2] > MAX_DECODE_TOKENS
            )  # drafts may be cropped again
        except BaseException:
            self.rollback_step(start)
            raise
        return both

    def check_whole(self) -> None:
        """Refuse, with `RuntimeError`, what begins while a step has not ended; the first layer knows."""
        last = self.decode_graph.layers[-1]
        if self is self.decode_graph.layers[0] and (self.failed or self.length != last.length):
            raise RuntimeError(
                f"a step has not ended: the first layer has seen {self.length} tokens, the last {last.length}"
                "; another thread is at it, or it failed halfway: reset() the cache, or load it again"
            )

    def check(self, keys: Tensor, values: Tensor, least: int = 1) -> None:
        """Refuse what cannot follow the tokens stored, before anything is written.

        Raises `ValueError` on a wrong shape, batch, head count, head_dim, dtype or device.
        """
        if keys.dim() != 4 or keys.shape != values.shape or keys.shape[2] < least:
            raise ValueError(
                "keys and values must have one shape [batch, KV heads, tokens > 0, head_dim]: "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        kind, other = (keys.dtype, keys.device), (values.dtype, values.device)
        if kind != other or not keys.is_floating_point():
            raise ValueError(
                f"keys and values must have one floating dtype and device: got {kind} and {other}"
            )
        if self.is_initialized:
            stored = self.exact["key"]
            ours = (stored.shape[0], stored.shape[1], stored.shape[3], stored.dtype, stored.device)
            theirs = (keys.shape[0], keys.shape[1], keys.shape[3], *kind)
            if ours != theirs:
                raise ValueError(
                    f"(batch, KV heads, head_dim, dtype, device) is {ours} in this cache but {theirs} "
                    "in these keys: reset() the cache first, or use it with the model it was made for"
                )
        elif self.token_positions.length and self.token_positions.batch != keys.shape[0]:
            raise ValueError(f"{keys.shape[0]} rows do not fit a cache of {self.timeline.batch}")
        elif self.codebooks is not None:
            for side, book in zip(("keys", "values"), self.codebooks):
                if book.shape[0] * book.shape[2] != keys.shape[3]:
                    raise ValueError(
                        f"layer {self.layer_idx} has {side} of {keys.shape[3]} channels, its codebook is for "
                        f"{book.shape[0] * book.shape[2]}"
                    )
        elif self.config.compresses:
            for bits in (self.config.middle_k_bits, self.config.middle_v_bits):
                packed_bytes(bits, keys.shape[3])

    def get_seq_length(self) -> int:
        """Logical length: columns seen, not columns held."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a mask must cover.

        Our attention knows which stored tokens are valid, so its mask covers the new tokens only.
        """
        if self._dispatches():
            return query_length, self.length
        self.demote_due_blocks()  # what is due is evicted before the keys are read
        held = self.length - (self.evicted_columns if self.is_initialized else 0)
        return held + query_length, self.length - held

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget everything, shape and dtype included."""
        self._clear()

    def activate_past_recording(self) -> None:
        """What generate() says before it runs ahead, and may have to crop a step (transformers)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` columns, which must still be uncompressed.

        Raises `ValueError` for a positive number, and where the cut would fall into the middle.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give a negative number, of columns to remove")
        n = -tokens_to_remove
        if n > self.croppable:
            raise ValueError(f"crop({-n}): only the newest {self.croppable} columns are uncompressed")
        if n:
            self.exact.count -= n
            self.length -= n

    @property
    def croppable(self) -> int:
        """How many of the newest columns can be cropped."""
        if not self.is_initialized:
            return 0
        return self.length if self.exact.count == self.length else self.recent

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.select_rows(beam_idx)

    def select_rows(self, index: Tensor) -> None:
        """Rows `index` [B'] int64 take the places of the rows there were.

        In place if there are as many: captured steps know the tensors by their addresses.
        """
        pending = []
        self._map(lambda x: take_rows(x, index, pending))
        copy_all(pending)

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda x: x.to(self.device, non_blocking=True))

    def _map(self, function) -> None:
        if not self.is_initialized:
            return
        self.decode_graph.touch()
        self.exact.map(function)
        if self.sink_keys is not None:
            self.sink_keys = function(self.sink_keys)
        if self.middle is not None:
            self.middle.map(function)

    def tensors(self) -> list[Tensor]:
        """Every tensor the layer holds."""
        if not self.is_initialized:
            return [*(self.codebooks or ())]
        found = list(self.exact.tensors.values())
        if self.sink_keys is not None:
            found.append(self.sink_keys)
        found += self.observer.tensors() if self.observer else []
        return found + (self.middle.tensors() if self.middle is not None else [])

    # -- the life of a token

    @property
    def recent(self) -> int:
        """Columns in the recent region."""
        return self.exact.count - min(self.length, self.config.n_sink)

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.exact["key"].shape[1]

    @property
    def has_middle(self) -> bool:
        """Whether any token is compressed."""
        return self.middle is not None and self.middle.count > 0

    @property
    def evicted_columns(self) -> int:
        """Columns no longer held, in a batch without padding."""
        return self.length - self.exact.count - (self.middle.count if self.has_middle else 0)

    @torch.no_grad()  # what is stored is data: gradients end here
    def store(
        self, keys: Tensor, values: Tensor, attended: bool, attention_stats: dict[str, Tensor] | None = None
    ) -> None:
        """Take in the columns of a step, which the timeline knows already; `demote_due_blocks` comes first.

        Args:
            keys, values: [B, H, q, D], keys after RoPE; 0 in padding slots.
            attended: whether the step's attention is done. Then what has to leave the recent
                region leaves it at once, so that a long step never fills the recent buffers.
            received: the observer's fields of these columns; None: no query has seen them.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.decode_graph.touch(stored=True)
        before = self.length, self.exact.count, self.sinks_placed
        try:
            self._store(keys, values, attended, attention_stats)
        except BaseException:
            self.length, self.exact.count, self.sinks_placed = before
            raise
        if self.telemetry:
            self.telemetry.stored(self)

    def _store(self, keys: Tensor, values: Tensor, attended: bool, attention_stats) -> None:
        start, new = self.length, keys.shape[2]
        sinks = max(0, min(new, self.config.n_sink - start))
        recent = self.recent
        self.length += new
        columns = dict(key=keys, value=values) | (
            self.arrive(new) if attention_stats is None else attention_stats
        )
        num_overflow = self._num_overflow(recent + new - sinks) if attended else 0
        needed, most = self.exact.count + new - num_overflow, self._most_exact() or 0
        if use_compiled(keys) and most - MAX_DECODE_TOKENS < needed <= most:  # a draft, and others to come
            self.exact.reserve(most)
        self.exact.make_room(new - num_overflow, self.exact.count)
        self.exact.append(**self._cut(columns, 0, sinks))
        if self.token_positions.has_padding and not self.sinks_placed:
            self._place_sinks(keys, values, start)
        columns = self._cut(columns, sinks, new)
        if num_overflow:
            older, first = self._held(self.exact.count - recent, self.exact.count), self.length - new + sinks
            if recent:
                axes = {name: field.axis for name, field in self.exact.fields.items()}
                columns = {name: torch.cat((older[name], x), axes[name]) for name, x in columns.items()}
            self._demote(self._cut(columns, 0, num_overflow), first - recent)
            self.exact.count -= recent
            columns = self._cut(columns, num_overflow, recent + new - sinks)
        self.exact.append(**columns)

    def arrive(self, count: int) -> dict[str, Tensor]:
        """The observer's fields of `count` new columns."""
        return self.observer.arrive(self.exact["key"].shape[0], count, self.device) if self.observer else {}

    def _cut(self, columns: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Columns `start` to `stop` of every field."""
        axes = self.exact.fields
        return {name: x.narrow(axes[name].axis, start, stop - start) for name, x in columns.items()}

    def _held(self, start: int, stop: int) -> dict[str, Tensor]:
        """Slots `start` to `stop` of the uncompressed region, every field."""
        return self._cut(self.exact.tensors, start, stop)

    @single_threaded
    @torch.no_grad()
    def demote_due_blocks(self) -> bool:
        """Demote the blocks that a step read from the recent buffers, and pushed out of them.

        This waits for the next step, so that tokens cropped in between (assisted decoding) leave
        no trace. Returns whether any block was due.
        """
        num_overflow = self._num_overflow(self.recent) if self.is_initialized else 0
        if num_overflow:
            self.decode_graph.touch()
            start = self.exact.count - self.recent
            remove = self.exact.removal(start, num_overflow, whole=self.token_positions.cursor is not None)
            self._demote(self._held(start, start + num_overflow), self.length - self.recent)
            remove()
            if self.telemetry:
                self.telemetry.stored(self)
        return num_overflow > 0

    @property
    def can_replay_demotion(self) -> bool:
        """Whether the next demotion can replay the captured graph of the last one."""
        block = self.config.block_size
        steady = self._num_overflow(self.recent) == block and not (self.observer or self.telemetry)
        return steady and self.middle.can_replay_demotion(block)

    @property
    def num_past_threshold(self) -> int:
        """Recent columns beyond those with which a block becomes due."""
        return self.recent - self.config.recent_window - self.config.block_size

    def count_replayed_demotion(self) -> None:
        """Count what such a replay has demoted."""
        self.exact.count -= self.config.block_size
        self.middle.count_replayed_demotion(self.config.block_size)

    def _num_overflow(self, recent: int) -> int:
        """How many of `recent` columns have to leave: whole blocks."""
        c = self.config
        if not c.compresses or recent < c.recent_window + c.block_size:
            return 0
        return (recent - c.recent_window) // c.block_size * c.block_size

    def _place_sinks(self, keys: Tensor, values: Tensor, start: int) -> None:
        """Put each row's first real tokens into its sink slots, from which padding shifted them."""
        new = self.token_positions.logical[:, start : self.length]
        for slot in range(min(self.length, self.config.n_sink)):
            hit = new == slot
            here, column = hit.any(-1)[:, None, None], hit.int().argmax(-1)[:, None, None]
            for name, x in (("key", keys), ("value", values)):
                stored = self.exact[name][:, :, slot]
                stored.copy_(torch.where(here, take(x, column)[:, :, 0], stored))
        self.sinks_placed = bool((self.token_positions.newest() >= self.config.n_sink - 1).all())

    def _demote(self, columns: dict[str, Tensor], first: int) -> None:
        """Hand columns `first` onwards to the middle, given every field of them."""

        def turn(evicted: Tensor | None) -> None:
            if self.config.contiguous and evicted is not None:
                self._turn_sinks(self.middle.evicted, evicted)

        attention_stats = {name: x for name, x in columns.items() if name not in ("key", "value")}
        done = self.telemetry and self.telemetry.demotion(self, columns["key"].shape[2], first)
        self.middle.demote(columns["key"], columns["value"], first, self.length, attention_stats, turn)
        if done:
            done()

    def _turn_sinks(self, before: Tensor | None, evicted: Tensor) -> None:
        """Rewrite the sinks' keys as they are read now: rotated on by the tokens evicted.

        Always from the keys as they came, so that rounding does not add up.
        """
        keys = self.exact["key"][:, :, : self.config.n_sink]
        if before is None:
            self.sink_keys = keys.clone()
        else:  # a row without evictions holds its sinks as they came, late ones included
            self.sink_keys.copy_(torch.where((before == 0)[..., None, None], keys, self.sink_keys))
        delta = evicted[..., None].expand(-1, -1, keys.shape[2])
        turned = rotate(self._wide(self.sink_keys), delta, self.rope.inv_freq(), self.rope.interleaved)
        keys.copy_(torch.where((delta == 0)[..., None], self.sink_keys, turned.to(keys.dtype)))

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    # -- captured steps

    @property
    def is_compileable(self) -> bool:
        """Whether generate() may compile the decode step: on a GPU, where that pays, and if it asks us."""
        return self.decode_graph.compileable and self.decode_graph.hooked

    @property
    def can_step(self) -> bool:
        """Whether a column can come by a captured step: the sinks are in their places."""
        placed = self.sinks_placed or not self.token_positions.has_padding
        return self.is_initialized and self.length >= max(1, self.config.n_sink) and placed

    @property
    def demotion_due(self) -> bool:
        """Whether a block has to leave the recent region, of this layer or, if that failed, of the last."""
        return self._num_overflow(max(self.recent, self.decode_graph.layers[-1].recent)) > 0

    @property
    def frequencies(self) -> Tensor | None:
        """RoPE's frequencies, where keys are encoded before it; dynamic RoPE replaces the tensor."""
        return self.rope.inv_freq() if self.config.contiguous else None

    def make_room(self, new: int) -> None:
        """See to it that `new` columns fit into the uncompressed buffers."""
        count, most = self.exact.count, self._most_exact() or self._max_length
        doubled = max(2 * count, count + MIN_SPARE_SLOTS)
        self.exact.reserve(max(count + new, doubled if most is None else min(most, doubled)))
        if self.telemetry:
            self.telemetry.stored(self)

    def _most_exact(self) -> int | None:
        """Uncompressed tokens there may be within a step, drafts included; None without compression."""
        c = self.config
        return c.n_sink + c.recent_window + c.block_size + MAX_DECODE_TOKENS if c.compresses else None

    def held_tiers(self) -> list[StoredTier]:
        """Tiers that hold a token."""
        return [t for t in self.middle.tiers if t.records.count] if self.has_middle else []

    def slots_read(self) -> list[int]:
        """Slots that a step reads of each."""
        return [tier.num_read for tier in self.held_tiers()]

    def static_inputs(self) -> list[Tensor]:
        """Tensors that captured steps know by their addresses."""
        found = [self.table, *self.exact.tensors.values()]  # made here, not in a graph's memory
        found += self.observer.tensors() if self.observer else []
        found += [] if self.sink_keys is None else [self.sink_keys]
        if self.has_middle:
            found += self.middle.tensors()
        return found if self.frequencies is None else [*found, self.frequencies]

    @property
    def table(self) -> Tensor:
        """The codec's rotation and, below it, the sum of its rows."""
        return self._rotations(self.exact["key"].shape[3], self.device)

    def rope_options(self) -> dict:
        """What `step.attend` needs where keys are encoded before RoPE."""
        if self.frequencies is None:
            return {}
        return dict(inv_freq=self.frequencies, interleaved=self.rope.interleaved)

    def attend(self, query, keys, values, seen: Tensor, slots: list[TierView], mass, **terms) -> Tensor:
        """Attention of a short step, [B, q, Hq, D], given `slots` of the tiers that hold a token; the rest is
        as `step.attend` takes it."""
        if slots and self.codebooks is not None:  # `mass` is of policies, which go with budgets
            return product_decode.attend(
                query, keys, values, seen, *slots, *self.slots_read(), self.codebooks, **terms
            )
        bits = [tier.bits for tier in self.held_tiers()]
        return decode.attend(
            query, keys, values, seen, self.table, slots,
            bits=bits, slots_read=self.slots_read(), mass=mass, **terms, **self.rope_options(),
        )  # fmt: skip

    def allocate_static_inputs(self) -> None:
        """Make the tensors that captured steps read beside the buffers."""
        self.static_views = [self.middle.view(tier) for tier in self.held_tiers()]

    def refresh_static_inputs(self) -> None:
        """Bring those tensors up to date."""
        for tier, frozen in zip(self.held_tiers(), self.static_views):
            self.middle.refresh_static_inputs(tier, frozen)

    def flash_prefix_len(self) -> int:
        """How many columns, the first ones, can be left to FlashAttention: whole, and not the newest."""
        if self.has_middle or self.exact.count < MIN_FLASH_PREFIX or self.observer:  # it tells no weights
            return 0
        return self.exact.count // 256 * 256

    # -- the attention that tokens receive

    def attention_sums(self) -> list[Tensor]:
        """What `step.attend` counts a step in: one tensor for the uncompressed slots and one a tier,
        [B, H, capacity], or none where nothing asks."""
        if not self.observer:
            return []
        keys = self.exact.tensors["key"]
        rows, wide = keys.shape[:2], torch.promote_types(keys.dtype, torch.float32)
        sizes = [keys.shape[2], *(tier.records.capacity for tier in self.held_tiers())]
        return [torch.empty(*rows, n, dtype=wide, device=keys.device) for n in sizes]

    def observed(self) -> list[dict[str, Tensor]]:
        """The observer's fields of the uncompressed slots, and of each tier."""
        held = [self.exact, *(tier.records for tier in self.held_tiers())]
        return [{name: x.tensors[name] for name in self.observer.fields} for x in held]

    @torch.no_grad()
    def count(self, attention_sums: list[Tensor], group: int, seen: list[Tensor]) -> None:
        """Add what a step counted, given for the same slots what its queries saw.

        Args:
            tally: see there; sums over the query rows of a KV head, `group` heads.
            seen: bool [B, 1 or q, n]; n may be less than the capacity.
        """
        for fields, sums, sees in zip(self.observed(), attention_sums, seen):
            n = sees.shape[-1]
            probs = (sums[..., :n] / group).unsqueeze(2)
            self.observer.add({k: x[..., :n] for k, x in fields.items()}, probs, sees.unsqueeze(1))
        self.observer.advance(seen[0].shape[1])

    # -- what attention reads

    def exact_positions(self) -> Tensor:
        """Logical positions of the sinks and recent columns, [B, 1, n] int32, or `PAD`."""
        sinks = min(self.length, self.config.n_sink)
        slots = torch.arange(sinks, dtype=torch.int32, device=self.device)
        # A long step is in the timeline before it is stored: its tokens are in no sink slot yet.
        whole = self.length in (0, self.token_positions.length)
        newest = (
            self.token_positions.newest()
            if whole
            else self.token_positions.logical[:, : self.length].amax(-1)
        )
        here = slots <= newest[:, None]
        recent = self.token_positions.at(self.length - self.recent, self.recent)
        recent = recent.masked_fill(recent < self.config.n_sink, PAD)
        return torch.cat((torch.where(here, slots, PAD), recent), dim=-1)[:, None]

    def exact_read_at(self) -> Tensor:
        """Positions [B, 1, n] at which these columns are read: sinks move on by the tokens evicted."""
        position = self.exact_positions()
        if not self.config.contiguous or self.middle is None or self.middle.evicted is None:
            return position
        sinks = position[..., : self.config.n_sink]
        moved = torch.where(sinks == PAD, PAD, sinks + self.middle.evicted[..., None])
        return torch.cat((moved, position[..., sinks.shape[-1] :]), dim=-1)

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values held, decoded, oldest first: what other attention functions read.

        Keys [B, H, n, D] are rotated to the positions at which they are read.
        """
        keys, values = self.exact["key"], self.exact["value"]
        if not self.has_middle:
            return keys, values
        sinks = self.config.n_sink
        middle = [self.decode(tier) for tier in self.middle.tiers if tier.records.count]
        order = torch.cat([self.middle.places(t) for t in self.middle.tiers], dim=-1).argsort(
            dim=-1, stable=True
        )
        k, v = (torch.cat(parts, dim=2) for parts in zip(*middle))
        if len(middle) > 1:
            k, v = take(k, order), take(v, order)
        found = [torch.cat((x[:, :, :sinks], m, x[:, :, sinks:]), dim=2) for x, m in ((keys, k), (values, v))]
        if (
            self.token_positions.has_padding and not self.config.relocatable
        ):  # sinks, back in the columns they came in
            for slot in range(sinks):
                here = (self.token_positions.logical[:, None, : self.length] == slot)[..., None]
                exact = (x[:, :, slot : slot + 1] for x in (keys, values))
                found = [torch.where(here, e, x) for e, x in zip(exact, found)]
        return tuple(found)

    def decode(self, tier, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys, as they are read, and values of a tier's slots, in the model's dtype."""
        wide = torch.promote_types(self.dtype, torch.float32)
        span = start, tier.records.count if stop is None else stop
        keys, values = (
            self.middle.decode_keys(tier, *span, wide),
            self.middle.decode_values(tier, *span, wide),
        )
        return keys.to(self.dtype), values.to(self.dtype)
