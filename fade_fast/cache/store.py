"""The middle of a layer: tokens in tiers, between the sinks and the recent ones.

`AppendStore` keeps every token in the slot it got, `BudgetStore` lets tokens compete for
budgets. Both hold a token as one record that depends on no other token, so that moving it is a
gather of bytes. `coded.ProductStore` is pinned too, and product-quantised.
"""

import contextlib
import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_ref.config import FadeConfig
from fade_ref.tiers import INTEGER_TIERS, Tier, packed_bytes

from ..hf.rope_probe import Rope
from ..kernels import rotated
from ..kernels.packed import TierView, bucket, longest, roomy, spare, whole
from ..kernels.rope import rotate
from ..kernels.rotated import Packed
from ..policies import plan
from ..policies.scores import Observer
from .buffers import Buffers, Field, along, take
from .positions import PAD, TokenPositions

CODECS = ("rotated", "product")  # that a middle can have
#: Codes that are stored tokens last, [B, H, bytes, n]: attention sums values over tokens, and so reads
#: them in the order of the sum.
TRANSPOSED = ("value_codes",)

HEADROOM = 1024  # slots on CUDA for tokens to come, at least, when a tier is first filled
SUMMED = 1 << 24  # numbers that are copied to be summed at a time
NEVER = 1 << 30  # slots until the next mean, where there is one for all


@dataclass
class StoredTier:
    """One tier: the widths of its keys and values, and its records; tier PQ has neither widths nor scales."""

    tier: Tier
    bits: tuple[int, int] | None
    records: Buffers
    bound: Tensor | None  # [B, H] float32: at least every value scale ever stored, and never 0
    most: int | None = None  # tokens it will ever hold; None: as many as the text has

    @property
    def name(self) -> str:
        """What reports call the tier: `INT4`, or `K4V2` where the widths differ."""
        return tier_name(self.bits) if self.bits else self.tier.name

    @property
    def num_read(self) -> int:
        """Slots a kernel runs over: those in use, and on CUDA some more, for few different lengths."""
        if not self.records.fused:
            return self.records.count
        return min(bucket(self._heads, self.records.count), self._longest)

    @property
    def _longest(self) -> int:
        """The longest span there is room for on CUDA."""
        return longest(self._heads, self.records.capacity)

    @property
    def _heads(self) -> int:
        """Batch times KV heads."""
        rows, heads = self.records.tensors["key_codes"].shape[:2]
        return rows * heads

    def packed(self, side: str, start: int, stop: int) -> Packed:
        """Codes of slots `start` to `stop`, tokens before bytes; `side` is "key" or "value"."""
        return unrecord(self.records, side, start, stop)

    def buffers(self, side: str) -> Packed:
        """Codes, scale and zero of all slots there is room for, as they are stored."""
        return Packed(*(self.records.tensors.get(f"{side}_{name}") for name in Packed._fields))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all; on CUDA for a span that holds them."""
        if self.records.fused and tokens:
            num_read = whole(self._heads, tokens)
            tokens = num_read + spare(num_read)
        self.records.reserve(tokens)

    def make_room(self, fields: dict[str, Tensor], held: int) -> None:
        """See to it that writing `fields` after `held` slots needs no more memory."""
        new = fields["key_codes"].shape[2]
        needed = held + new
        if self.records.fused and needed > self._longest:
            # Kernels are compiled for a capacity: a round one, first with some to spare, then doubled.
            more = needed if self.records.capacity else max(HEADROOM, needed // 8)
            room = roomy(self._heads, needed + more)
            self.reserve(room if self.most is None else max(needed, min(self.most, room)))
        self.records.make_room(new, held)
        if new and self.bound is not None:  # a bound that is too high does no harm
            torch.maximum(self.bound, fields["value_scale"].float().amax(-1), out=self.bound)

    def append(self, at: Tensor | None = None, **fields: Tensor) -> None:
        self.make_room(fields, self.records.count)
        self.records.append(at, **fields)

    def replace(self, **fields: Tensor) -> None:
        """Hold exactly these records, for which `make_room` has been called."""
        self.records.replace(**fields)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.records.map(function)
        self.bound = None if self.bound is None else function(self.bound)
        if self.records.fused and self._longest < self.records.count:
            self.reserve(self.records.count)  # of more rows, chunks are longer

    def tensors(self) -> list[Tensor]:
        return [*self.records.tensors.values()] + ([] if self.bound is None else [self.bound])


def tier_name(bits: tuple[int, int]) -> str:
    """What reports call a tier of these widths of keys and values."""
    key, value = bits
    return INTEGER_TIERS[key].name if key == value else f"K{key}V{value}"


def tier_names(config: FadeConfig) -> list[str]:
    """What reports call the tiers of a middle, finest first."""
    if config.quant_backend == "product":
        return [Tier.PQ.name]
    return [tier_name(bits) for bits in tier_bits(config)]


def tier_bits(config: FadeConfig) -> list[tuple[int, int]]:
    """Widths of keys and values of each tier of a middle, finest first."""
    widths = [(config.middle_k_bits, config.middle_v_bits)]
    if config.int2_budget != 0 and max(widths[0]) > 2:  # else the first tier has both budgets
        widths.append((2, 2))
    return widths


def unrecord(fields, side: str, start: int = 0, stop: int | None = None) -> Packed:
    """The `Packed` of one side, from slots of the fields that `record` named."""
    pick = lambda name, x: (x.mT if name in TRANSPOSED else x)[:, :, start:stop]  # noqa: E731
    names = [f"{side}_{name}" for name in Packed._fields]
    return Packed(*(pick(name, fields[name]) if name in fields else None for name in names))


def record(keys: Packed, values: Packed) -> dict[str, Tensor]:
    """Named fields of encoded tokens."""
    sides = {"key": keys, "value": values}
    named = {f"{side}_{name}": x for side, packed in sides.items() for name, x in packed._asdict().items()}
    return {name: x.mT if name in TRANSPOSED else x for name, x in named.items() if x is not None}


def key_mean(keys: Tensor, position: Tensor | None) -> Tensor:
    """Mean of the real tokens of each group: keys [B, H, G, n, D] to fp16 [B, H, G, D].

    `position` [B, 1, G, n]: `PAD` marks what does not count; None: all count. A group without a real
    token has mean 0. Summed in float64, so that the order of the sum leaves no trace in the fp16 result,
    and a few groups at a time, for PyTorch makes a float64 copy of what it sums.
    """
    step = max(1, SUMMED // max(1, keys[:, :, :1].numel()))
    positions = itertools.repeat(None) if position is None else position.split(step, dim=2)
    means = [_key_mean(*part) for part in zip(keys.split(step, dim=2), positions)]
    return means[0] if len(means) == 1 else torch.cat(means, dim=2)


def _key_mean(keys: Tensor, position: Tensor | None) -> Tensor:
    if position is None:
        mean = keys.sum(-2, dtype=torch.float64) / keys.shape[-2]
    else:
        real = (position != PAD)[..., None]
        total = keys.masked_fill(~real, 0).sum(-2, dtype=torch.float64)
        mean = total / real.sum(-2).clamp_min(1)
    return mean.clamp(-rotated.LARGEST, rotated.LARGEST).half()


class CompressedStore(ABC):
    """What all kinds of middle share.

    Args:
        config: what is kept how.
        timeline: the columns of the cache.
        rope: how the model rotates this layer's keys; needed if `config.contiguous`.
        table: the codec's rotation and, below it, the sum of its rows: [D + 1, D] float32.
        batch, heads: rows, and KV heads of the layer.
        observer: what tells how much attention tokens received; None where nothing asks.
    """

    def __init__(
        self,
        config: FadeConfig,
        token_positions: TokenPositions,
        rope: Rope | None,
        table: Tensor,
        batch: int,
        heads: int,
        observer: Observer | None = None,
    ):
        self.observer = observer
        self.plans = heads if config.plan_scope == "head" else 1  # that a row has
        self.config, self.token_positions, self.rope, self.table = config, token_positions, rope, table
        self.matrix = table[: table.shape[1]]
        self.tiers: list[StoredTier] = []
        self.means: Buffers | None = None  # of keys, where the codec takes them off
        self._open(batch, heads)

    def _open(self, batch: int, heads: int) -> None:
        """Make the tiers, and the means: empty."""
        config, dim, device = self.config, self.table.shape[1], self.table.device
        budgets = (config.int4_budget, config.int2_budget)
        for bits, budget in zip(tier_bits(config), budgets):
            fields = dict(self.own_fields())
            for side, b in zip(("key", "value"), bits):
                axis = -1 if f"{side}_codes" in TRANSPOSED else 2
                fields[f"{side}_codes"] = Field((packed_bytes(b, dim),), torch.uint8, heads, axis)
                fields[f"{side}_scale"] = Field((), torch.float16, heads)
                if rotated.is_uniform(b):
                    fields[f"{side}_zero"] = Field((), torch.float16, heads)
            tier = Tier.INT2 if self.tiers else INTEGER_TIERS[max(bits)]
            least = rotated.SMALLEST_SCALE
            bound = torch.full((batch, heads), least, dtype=torch.float32, device=device)
            self.tiers.append(
                StoredTier(tier, bits, Buffers(fields, self.step, batch, device), bound, budget)
            )
        self.means = Buffers({"mean": Field((dim,), torch.float16, heads)}, 1, batch, device)

    step = 1  # capacities are multiples of this
    evicted: Tensor | None = None  # [B, 1] int32: real tokens dropped so far
    planned: Callable | None = None  # is told of plans: see `plan.Candidates`

    def own_fields(self) -> dict[str, Field]:
        """Fields of a record besides its codes."""
        return {}

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all at once."""

    @abstractmethod
    def demote(
        self,
        keys: Tensor,
        values: Tensor,
        first: int,
        seen: int,
        attention_stats: dict[str, Tensor],
        ready: Callable[[Tensor | None], None] = lambda evicted: None,
    ) -> None:
        """Take in columns `first` onwards: keys after RoPE and values, [B, H, n, D].

        `seen` columns have arrived so far. `received` holds the observer's fields of those that are
        taken in; it is empty without an observer. `ready` is called when no more memory will be asked
        for, and before anything is written, with `evicted` as it is going to be; if it raises, or memory
        runs out, nothing is.
        """

    @contextlib.contextmanager
    def _whole(self):
        """What happens inside happens whole: counts are as before if anything is raised."""
        held = self.buffers().values()
        counts = [records.count for records in held]
        try:
            yield
        except BaseException:
            for records, count in zip(held, counts):
                records.count = count
            raise

    @abstractmethod
    def position(self, tier: StoredTier) -> Tensor:
        """Logical position of each slot in use, [B, 1, n] int32; `PAD` where there is no token."""

    def places(self, tier: StoredTier) -> Tensor:
        """The same, [B, H, n] where heads have plans of their own: then their tokens differ, but not which
        slots hold one."""
        return self.position(tier)

    @abstractmethod
    def read_at(self, tier: StoredTier) -> Tensor:
        """Position at which RoPE reads each slot, where `config.contiguous`."""

    @abstractmethod
    def mean(self, start: int, stop: int) -> Tensor:
        """Means of the keys in slots `start` to `stop`, [B, H, n or 1, D]."""

    def buffers(self) -> dict[str, Buffers]:
        """All that grows with the text, by the name that reports have for it."""
        means = {} if self.means is None else {"means": self.means}
        return {tier.name: tier.records for tier in self.tiers} | means

    def view(self, tier: StoredTier, seen: Tensor | None = None) -> TierView:
        """What kernels read of a tier: its buffers at full capacity.

        `seen`: bool [B, 1 or R, n], for the slots in use; None: those that hold a token.
        """
        capacity = tier.records.capacity
        seen = self.position(tier) != PAD if seen is None else seen
        pad = lambda x: torch.nn.functional.pad(x, (0, capacity - x.shape[-1]))  # noqa: E731
        return TierView(
            tier.buffers("key"),
            tier.buffers("value"),
            tier.bound,
            None if self.means is None else self.means.tensors["mean"],
            pad(seen),
            self.per_mean,
            pad(self.read_at(tier)) if self.config.contiguous else None,
        )

    def refresh_static_inputs(self, tier: StoredTier, static_view: TierView) -> None:
        """Bring a tier's `slots`, as they were, up to date."""
        for stale, fresh in zip(static_view[-3:], self.view(tier)[-3:]):
            if isinstance(stale, Tensor):
                stale.copy_(fresh)

    @abstractmethod
    def can_replay_demotion(self, new: int) -> bool:
        """Whether to demote `new` more columns does what the last time did, slots apart: the same tensors
        of the same shapes, and nothing that the host must know."""

    @abstractmethod
    def count_replayed_demotion(self, new: int) -> None:
        """Count what a captured graph has demoted: `new` columns."""

    def decode_keys(self, tier: StoredTier, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Keys of slots `start` to `stop`, [B, H, n, D] of `dtype`, as they are read."""
        packed, mean = tier.packed("key", start, stop), self.mean(start, stop)
        keys = rotated.decode(packed, mean, self.matrix, tier.bits[0], dtype)
        if not self.config.contiguous:
            return keys
        at = self.read_at(tier)[..., start:stop]
        return rotate(keys, at, self.rope.inv_freq(), self.rope.interleaved)

    def decode_values(self, tier: StoredTier, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Values of slots `start` to `stop`, [B, H, n, D] of `dtype`."""
        return rotated.decode(tier.packed("value", start, stop), None, self.matrix, tier.bits[1], dtype)

    per_mean = NEVER  # slots that share a mean

    @property
    def count(self) -> int:
        return sum(t.records.count for t in self.tiers)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function` of it."""
        for held in (*self.tiers, self.means):
            if held is not None:
                held.map(function)

    def tensors(self) -> list[Tensor]:
        """Every tensor held, the shared rotation included."""
        records = [x for tier in self.tiers for x in tier.tensors()]
        return [self.table, *records, *(self.means.tensors.values() if self.means is not None else ())]

    def column_positions(self, first: int, count: int) -> Tensor:
        """Positions [B, 1, count] of columns; sinks do not belong to the middle and are holes."""
        position = self.token_positions.at(first, count)[:, None]
        return position.masked_fill(position < self.config.n_sink, PAD)

    def before_rope(self, keys: Tensor, position: Tensor) -> Tensor:
        """Keys as they are encoded: rotated back to position 0 where survivors are renumbered."""
        if not self.config.contiguous:
            return keys
        return rotate(keys.float(), -position, self.rope.inv_freq(), self.rope.interleaved)

    def encode(self, keys: Tensor, values: Tensor, mean: Tensor, bits, recurs=True) -> dict[str, Tensor]:
        return record(*rotated.encode_both(keys, values, mean, self.matrix, bits, recurs))


class AppendStore(CompressedStore):
    """A middle without budgets: the token of column c stays in slot c - n_sink for ever.

    So positions need not be stored, and each block has a mean of its own.
    """

    @property
    def step(self) -> int:
        return self.config.block_size

    per_mean = step

    def reserve(self, tokens: int) -> None:
        self.tiers[0].reserve(tokens)
        self._fit_means()

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        super().map(function)
        self._fit_means()

    def _fit_means(self) -> None:
        """Make room for the means of all slots there are."""
        if self.means is not None:
            self.means.reserve(-(-self.tiers[0].records.capacity // self.step))

    def demote(self, keys, values, first, seen, attention_stats, ready=lambda evicted: None):
        position = self.column_positions(first, keys.shape[2])
        keys = self.before_rope(keys, position)
        blocks = (keys.shape[2] // self.step, self.step)
        real = position.unflatten(2, blocks) if self.token_positions.has_padding else None
        mean = key_mean(keys.unflatten(2, blocks), real)
        fields, at, block = self.encode(keys, values, mean, self.tiers[0].bits), None, None
        if self.token_positions.cursor is not None:
            at = self.token_positions.index(first, keys.shape[2]) - self.config.n_sink
            block = at[:: self.step] // self.step
        with self._whole():
            self.tiers[0].append(at, **fields)
            self._fit_means()
            self.means.append(block, mean=mean)
            ready(None)

    def can_replay_demotion(self, new: int) -> bool:
        tier = self.tiers[0]
        needed = tier.records.count + new
        return (
            0 < tier.records.count and needed <= tier.num_read and self.means.capacity * self.step >= needed
        )

    def count_replayed_demotion(self, new: int) -> None:
        self.tiers[0].records.count += new
        self.means.count += new // self.step

    def refresh_static_inputs(self, tier: StoredTier, static_view: TierView) -> None:
        if self.token_positions.cursor is None:
            super().refresh_static_inputs(tier, static_view)
            return
        first = self.config.n_sink + tier.records.count - self.step  # only the last block is new
        position, at = self.column_positions(first, self.step), self.token_positions.index(first, self.step)
        static_view.valid.index_copy_(-1, at - self.config.n_sink, position != PAD)
        if static_view.read_at is not None:
            static_view.read_at.index_copy_(-1, at - self.config.n_sink, position)

    def position(self, tier: StoredTier) -> Tensor:
        return self.column_positions(self.config.n_sink, tier.records.count)

    read_at = position

    def mean(self, start: int, stop: int) -> Tensor:
        blocks = self.means["mean"][:, :, start // self.step : -(-stop // self.step)]
        return blocks.repeat_interleave(self.step, dim=2).narrow(2, start % self.step, stop - start)


class BudgetStore(CompressedStore):
    """A middle with budgets: survivors move, so each stores its position.

    The mean is fixed at the first demotion, once for all, and means the same for every token.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._demoted: Tensor | None = None  # [B, 1] int32: real tokens ever demoted

    def map(self, function) -> None:
        super().map(function)
        if self.evicted is not None:
            self.evicted, self._demoted = function(self.evicted), function(self._demoted)

    def tensors(self) -> list[Tensor]:
        counts = [] if self.evicted is None else [self.evicted, self._demoted]
        return super().tensors() + counts

    def own_fields(self) -> dict[str, Field]:
        names = ("position", "read_at") if self.config.contiguous else ("position",)
        return dict.fromkeys(names, Field((), torch.int32, self.plans)) | self._observed

    @property
    def _observed(self) -> dict[str, Field]:
        return self.observer.fields if self.observer else {}

    def reserve(self, tokens: int) -> None:
        for tier, budget in zip(self.tiers, (self.config.int4_budget, self.config.int2_budget)):
            tier.reserve(tokens if budget is None else min(budget, tokens))
        self.means.reserve(1)

    def can_replay_demotion(self, new: int) -> bool:
        held = [tier.records.count for tier in self.tiers]
        full = min(held) > 0 and plan.sizes(self.config, held, new) == held
        # With padding as many stay as the fullest row has, which the host must look at.
        return full and not self.token_positions.has_padding

    def count_replayed_demotion(self, new: int) -> None:
        """Nothing is left to count: full tiers stay full."""

    def demote(self, keys, values, first, seen, attention_stats, ready=lambda evicted: None):
        with self._whole():
            self._demote(keys, values, first, seen, attention_stats, ready)

    def _demote(self, keys, values, first, seen, attention_stats, ready):
        position = self.column_positions(first, keys.shape[2])
        held = [t for t in self.tiers if t.records.count]
        already_int2 = [torch.full_like(t.records["position"], t is not self.tiers[0]) for t in held]
        new = position.expand(-1, self.plans, -1)
        candidates = plan.Candidates(
            torch.cat([t.records["position"] for t in held] + [new], -1),
            self._newest(seen)[:, None, None],
            torch.cat([*already_int2, torch.zeros_like(new)], -1).bool(),
            functools.partial(self._candidate_keys, held, keys),
            self.observer,
            {
                name: torch.cat([t.records[name] for t in held] + [attention_stats[name]], field.axis)
                for name, field in self._observed.items()
            },
            self.planned,
        )
        tiers, order = plan.choose(self.config, candidates, self.tiers[0].tier)
        keys = self.before_rope(keys, position)
        self._fix_mean(keys, position)
        sizes = plan.sizes(self.config, [t.records.count for t in self.tiers], position.shape[-1])
        sizes = [None] * len(self.tiers) if sizes is None or self.token_positions.has_padding else sizes
        chosen = [plan.kept(tiers, order, t.tier, n) for t, n in zip(self.tiers, sizes)]
        chosen = [tuple(x.expand(len(position), -1, -1) for x in pair) for pair in chosen]
        survivors = [self._collect(t, index, keys, values) for t, (index, _) in zip(self.tiers, chosen)]
        places = [candidates.position.gather(-1, index).masked_fill(~real, PAD) for index, real in chosen]
        demoted, evicted = self._counts(position, places)
        read_at = self._renumber(places, evicted)
        records = []
        for fields, place, at, (index, _) in zip(survivors, places, read_at, chosen):
            own = {"read_at": at} if self.config.contiguous else {}
            own |= {
                name: take(x, index, self._observed[name].axis)
                for name, x in candidates.attention_stats.items()
            }
            records.append(dict(**fields, position=place, **own))
        for tier, fields in zip(self.tiers, records):
            tier.make_room(fields, 0)
        ready(evicted)
        for tier, fields in zip(self.tiers, records):
            tier.replace(**fields)
        if self.evicted is None:
            self.evicted, self._demoted = evicted, demoted
        else:  # in place: captured graphs know the tensors by their addresses
            self.evicted.copy_(evicted)
            self._demoted.copy_(demoted)

    def _newest(self, seen: int) -> Tensor:
        """Position of each row's newest token of the first `seen` columns, [B] int32."""
        if seen == self.token_positions.length:
            return self.token_positions.newest()
        return self.token_positions.logical[:, :seen].amax(-1)

    def _candidate_keys(self, held: list[StoredTier], keys: Tensor) -> Tensor:
        """Keys of the tokens of some tiers and of new ones, as they are read: [B, H, n, D]."""
        wide = torch.promote_types(keys.dtype, torch.float32)
        decoded = [self.decode_keys(tier, 0, tier.records.count, wide) for tier in held]
        return torch.cat([*decoded, keys.to(wide)], dim=2)

    def _fix_mean(self, keys: Tensor, position: Tensor) -> None:
        """Fix each row's mean at the first demotion that brings it a real token."""
        if self.means.count and not self.token_positions.has_padding:
            return
        new = key_mean(keys[:, :, None], position[:, :, None])
        if not self.means.count:
            self.means.append(mean=new)
        else:
            unset = (self._demoted == 0)[:, :, None, None]
            self.means["mean"].copy_(torch.where(unset, new, self.means["mean"]))

    def _collect(self, tier: StoredTier, index: Tensor, keys: Tensor, values: Tensor) -> dict:
        """Records of the candidates `index`: moved if `tier` holds them already, else encoded."""
        offset = sum(t.records.count for t in self.tiers)
        new = (index - offset).clamp_min(0)
        recurs = self.config.eviction_policy != "adaptive"  # which keeps other numbers every time
        fields = self.encode(take(keys, new), take(values, new), self.means["mean"], tier.bits, recurs)
        offset = 0
        for source in self.tiers:
            count = source.records.count
            if count:
                here = (index >= offset) & (index < offset + count)
                slots = (index - offset).clamp(0, count - 1)
                own = self.own_fields()
                old = {n: source.records.take(n, slots) for n in source.records.fields if n not in own}
                if source is not tier:
                    old = self._requantize(old, source.bits, tier.bits)
                for name, x in fields.items():
                    chosen = along(here, x, tier.records.fields[name].axis)
                    fields[name] = torch.where(chosen, old[name], x)
            offset += count
        return fields

    def _requantize(self, fields: dict, bits, new_bits) -> dict[str, Tensor]:
        """Records of another tier, without leaving the rotated domain."""
        return record(
            *(
                rotated.quantize(rotated.dequantize(unrecord(fields, side), b, torch.float32), n)
                for side, b, n in zip(("key", "value"), bits, new_bits)
            )
        )

    def _counts(self, position: Tensor, places: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Real tokens demoted and dropped so far, [B, 1] each."""
        demoted = (position.amax(-1) + 1 - self.config.n_sink).clamp_min(0)
        demoted = demoted if self._demoted is None else torch.maximum(self._demoted, demoted)
        live = sum((place != PAD).sum(-1, dtype=torch.int32) for place in places)
        return demoted, demoted - live[:, :1]  # every head has as many

    def _renumber(self, places: list[Tensor], evicted: Tensor) -> list[Tensor]:
        """Where survivors are read: their rank among the live tokens, plus the tokens evicted.

        Queries keep logical positions, so this gives every distance that contiguous numbering
        from 0 would (StreamingLLM, arXiv 2309.17453, section 3.2).
        """
        live = torch.cat(places, dim=-1)
        last = torch.iinfo(live.dtype).max
        order = live.masked_fill(live == PAD, last).argsort(dim=-1, stable=True)
        rank = order.argsort(dim=-1).to(torch.int32) + self.config.n_sink + evicted[..., None]
        return list(rank.masked_fill(live == PAD, PAD).split([p.shape[-1] for p in places], dim=-1))

    def position(self, tier: StoredTier) -> Tensor:
        return tier.records["position"][:, :1]

    def places(self, tier: StoredTier) -> Tensor:
        return tier.records["position"]

    def read_at(self, tier: StoredTier) -> Tensor:
        return tier.records["read_at"][:, :1]  # in one tier, all heads read slot i at the same position

    def mean(self, start: int, stop: int) -> Tensor:
        return self.means["mean"]
