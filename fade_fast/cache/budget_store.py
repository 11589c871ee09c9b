"""A store with budgets: a policy plans which tokens stay, and in which tier.

Survivors move, so each record stores its position. One key mean per row serves all its tokens. The first
demotion fixes it.
"""

import copy
import functools
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.base import Field
from ..policies import plan
from .buffers import Buffers, concatenated, take
from .eviction import warn_once
from .positions import PAD, DeviceCounters, RepeatedPositions
from .store import CompressedStore, StoredTier

#: Where a tier's new records come from: slots among the candidates, and False for slots without a token.
Choice = tuple[Tensor, Tensor]


class Planned(NamedTuple):
    """What a demotion writes.

    Attributes:
        records: of each tier, [B, ...].
        demoted, evicted: real tokens demoted and evicted so far, int32 [B, 1].
    """

    records: list[dict[str, Tensor]]
    demoted: Tensor
    evicted: Tensor


class BudgetStore(CompressedStore):
    """A store in which new tokens and stored ones compete for the budgets at each demotion."""

    def __init__(self, *args):
        super().__init__(*args)
        self._demoted: Tensor | None = None  # [B, 1] int32: real tokens ever demoted

    @property
    def _observed(self) -> dict[str, Field]:
        """The observer's fields, which move with a token."""
        return self.observer.fields if self.observer else {}

    def own_fields(self) -> dict[str, Field]:
        names = ("position", "read_at") if self.config.contiguous else ("position",)
        return dict.fromkeys(names, Field((), torch.int32, self.plans)) | self._observed

    def map(self, function) -> None:
        super().map(function)
        if self.evicted is not None:
            self.evicted, self._demoted = function(self.evicted), function(self._demoted)

    def tensors(self) -> list[Tensor]:
        counts = [] if self.evicted is None else [self.evicted, self._demoted]
        return super().tensors() + counts

    def reserve(self, tokens: int) -> None:
        for tier in self.tiers:
            tier.reserve(tokens if tier.budget is None else min(tier.budget, tokens))
        self.means.reserve(1)

    @property
    def asks_ranks(self) -> bool:
        """Whether a demotion needs the scores of heads that other processes hold.

        Such a demotion is never captured: a graph with collectives must be captured by all processes at once.
        """
        return self.ranks is not None and plan.averages_heads(self.config)

    @property
    def shared(self) -> Hashable | None:
        held = [tier.records.count for tier in self.tiers]
        if self.config.plan_scope == "layer":  # rows of one layer share a plan
            return None
        if self.asks_ranks:  # which layers are joined must not differ between processes
            return None
        if self.format.has_own_tables:
            return None
        if self._sizes(self.config.block_size) is None:  # the layers may keep different numbers of tokens
            return None
        slots = [tier.records.capacity for tier in self.tiers]
        return type(self), *held, *slots, self.means.count, self.evicted is None

    def can_replay_demotion(self, new: int) -> bool:
        held = [tier.records.count for tier in self.tiers]
        return min(held) > 0 and self._sizes(new) == held and not self.asks_ranks

    def _sizes(self, new: int) -> list[int] | None:
        """Slots of each tier after `new` tokens have come. None: the host must look at the plan.

        With padding, the fullest row decides. Once its tiers are full, they stay so. In other rows some slots
        then hold no token.
        """
        held = [tier.records.count for tier in self.tiers]
        sizes = plan.sizes(self.config, held, new)
        if self.token_positions.has_padding and (sizes != held or self.config.plan_scope == "layer"):
            return None
        return sizes

    def count_replayed_demotion(self, new: int) -> None:
        """Nothing is left to count: full tiers stay full."""

    # -- demotion

    def demote(
        self, keys, values, first, seen, attention_stats, before_write=lambda evicted: None, counters=None
    ):
        with self._all_or_nothing():
            planned = self.planned(keys, values, first, seen, attention_stats, counters)
            for tier, fields in zip(self.tiers, planned.records):
                tier.make_room(fields, 0)
                tier.raise_bound(fields)
            before_write(planned.evicted)
            for tier, fields in zip(self.tiers, planned.records):
                tier.replace(**fields)
            self.count_tokens(planned.demoted, planned.evicted)

    def planned(
        self,
        keys: Tensor,
        values: Tensor,
        first: int,
        seen: int,
        attention_stats: dict[str, Tensor],
        counters: DeviceCounters | None = None,
    ) -> Planned:
        """What `demote` writes. Nothing changes but the mean, which the first demotion fixes."""
        position = self.middle_positions(first, keys.shape[2], counters)
        candidates = self._candidates(keys, position, seen, attention_stats, counters)
        choices = self._choose(candidates, position)
        keys = self.before_rope(keys, position)
        self._fix_mean(keys, position)
        places = [candidates.position.gather(-1, i).masked_fill(~real, PAD) for i, real in choices]
        demoted, evicted = self._counts(position, places)
        records = [
            self._records(tier, index, place, at, keys, values, candidates)
            for tier, (index, _), place, at in zip(
                self.tiers, choices, places, self._renumber(places, evicted)
            )
        ]
        self._warn(candidates.position, places, evicted, looked=self._sizes(position.shape[-1]) is None)
        return Planned(records, demoted, evicted)

    @classmethod
    def joined(cls, stores: list["BudgetStore"]) -> "BudgetStore":
        """A store to plan with: its rows are those of all `stores`, one store after another.

        It holds copies. The stores must have one configuration and hold equally many tokens.
        """
        first, twin = stores[0], copy.copy(stores[0])
        twin.token_positions = RepeatedPositions(first.token_positions, len(stores))
        records = [Buffers.joined([x.tiers[i].records for x in stores]) for i in range(len(first.tiers))]
        twin.tiers = [
            StoredTier(tier.format, held, None, tier.budget, tier.outlook)
            for tier, held in zip(first.tiers, records)
        ]
        twin.means = Buffers.joined([x.means for x in stores])
        if first.evicted is not None:
            twin.evicted = torch.cat([x.evicted for x in stores])
            twin._demoted = torch.cat([x._demoted for x in stores])
        return twin

    def _candidates(
        self,
        keys: Tensor,
        position: Tensor,
        seen: int,
        attention_stats: dict[str, Tensor],
        counters: DeviceCounters | None,
    ) -> plan.Candidates:
        """Stored tokens, tier by tier, then the new ones."""
        held = [tier for tier in self.tiers if tier.records.count]
        already_int2 = [torch.full_like(t.records["position"], t is not self.tiers[0]) for t in held]
        new = position.expand(-1, self.plans, -1)
        return plan.Candidates(
            torch.cat([t.records["position"] for t in held] + [new], -1),
            self.token_positions.newest_of(seen, counters)[:, None, None],
            torch.cat([*already_int2, torch.zeros_like(new)], -1).bool(),
            functools.partial(self._candidate_keys, held, keys),
            self.observer,
            {
                name: torch.cat([t.records[name] for t in held] + [attention_stats[name]], field.axis)
                for name, field in self._observed.items()
            },
            self.on_plan,
            self.ranks.all_heads if self.asks_ranks else None,
        )

    def _candidate_keys(self, held: list[StoredTier], keys: Tensor) -> Tensor:
        """Keys of the stored tokens of some tiers and of new ones, as they are read: [B, H, n, D]."""
        wide = torch.promote_types(keys.dtype, torch.float32)
        decoded = [self.decode_keys(tier, 0, tier.records.count, wide) for tier in held]
        return torch.cat([*decoded, keys.to(wide)], dim=2)

    def _choose(self, candidates: plan.Candidates, position: Tensor) -> list[Choice]:
        """The candidates of each tier, [B, P, m], oldest first."""
        tiers, order = plan.choose(self.config, candidates, self.tiers[0].tier)
        sizes = self._sizes(position.shape[-1]) or [None] * len(self.tiers)
        kept = [plan.kept(tiers, order, tier.tier, size) for tier, size in zip(self.tiers, sizes)]
        return [tuple(x.expand(len(position), -1, -1) for x in pair) for pair in kept]

    def _fix_mean(self, keys: Tensor, position: Tensor) -> None:
        """Fix each row's mean at the first demotion that brings the row a real token."""
        if self.means.count and not self.token_positions.has_padding:
            return
        grouped = position[:, :, None]
        new = self.format.key_means(keys[:, :, None], grouped, grouped != PAD)
        if not self.means.count:
            self.means.append(mean=new)
        else:
            unset = (self._demoted == 0)[:, :, None, None]
            self.means["mean"].copy_(torch.where(unset, new, self.means["mean"]))

    def _records(
        self,
        tier: StoredTier,
        index: Tensor,
        place: Tensor,
        read_at: Tensor,
        keys: Tensor,
        values: Tensor,
        candidates: plan.Candidates,
    ) -> dict[str, Tensor]:
        """The new records of a tier, of the candidates `index` at positions `place`."""
        fields = self._codes(tier, index, keys, values)
        fields["position"] = place
        if self.config.contiguous:
            fields["read_at"] = read_at
        for name, stats in candidates.attention_stats.items():
            fields[name] = take(stats, index, self._observed[name].axis)
        return fields

    def _codes(self, tier: StoredTier, index: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Codes of the candidates `index` in a tier: those that it holds, requantized ones, and new ones.

        No token ever leaves a coarse tier for a finer one, so those of coarser tiers stand as zeros. Of a
        long prompt, only the tokens that stay are encoded.
        """
        count, held_now, recurs = index.shape[-1], sum(t.records.count for t in self.tiers), True
        if keys.shape[2] > count:
            chosen = (index - held_now).clamp_min(0)
            keys, values = take(keys, chosen), take(values, chosen)
            index = torch.where(index < held_now, index, held_now + torch.arange(count, device=index.device))
            recurs = self.config.eviction_policy != "adaptive"  # which keeps another number each time
        new = tier.format.encode(keys, values, self.means["mean"], recurs)
        new = {name: x.contiguous() for name, x in new.items()}
        parts, passed = [], False
        for source in self.tiers:
            passed |= source is tier
            if not source.records.count:
                continue
            held = {name: source.records[name] for name in source.format_fields}
            if source is not tier and not passed:
                held = tier.format.requantize(held, source.format)
            elif source is not tier:
                held = {name: self._zeros(tier, name, source.records.count, x) for name, x in new.items()}
            parts.append(held)
        parts.append(new)
        axes = {name: tier.records.fields[name].axis for name in new}
        return {
            name: take(concatenated([part[name] for part in parts], axis), index, axis)
            for name, axis in axes.items()
        }

    @staticmethod
    def _zeros(tier: StoredTier, name: str, slots: int, like: Tensor) -> Tensor:
        """Zeros of a field of `slots` slots, which take no memory."""
        shape = tier.records.fields[name].shape_of(len(like), slots)
        return like.new_zeros(()).expand(shape)

    def _counts(self, position: Tensor, places: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Real tokens demoted and evicted so far, [B, 1] each."""
        demoted = (position.amax(-1) + 1 - self.config.n_sink).clamp_min(0)
        demoted = demoted if self._demoted is None else torch.maximum(self._demoted, demoted)
        live = sum((place != PAD).sum(-1, dtype=torch.int32) for place in places)
        return demoted, demoted - live[:, :1]  # every head holds as many

    def _warn(self, position: Tensor, places: list[Tensor], evicted: Tensor, looked: bool) -> None:
        """Warn of the first eviction, before anything is written.

        Shapes tell how many tokens are dropped, so a captured demotion waits for nothing. With padding they
        may not, but then the host has `looked` at the plan already.
        """
        dropped = position.shape[-1] - sum(place.shape[-1] for place in places)
        if dropped > 0 and looked and self.token_positions.has_padding:
            dropped = int(evicted.max())
        if dropped > 0:
            warn_once(self.config, dropped)

    def count_tokens(self, demoted: Tensor, evicted: Tensor) -> None:
        """Store both counts of a `Planned`."""
        if self.evicted is None:
            self.evicted, self._demoted = evicted, demoted
        else:  # in place: captured graphs know the tensors by their addresses
            self.evicted.copy_(evicted)
            self._demoted.copy_(demoted)

    def refresh_view(self, tier, view, counters=None):
        held, count = tier.records.tensors, tier.records.count
        if counters is None or self.token_positions.has_padding:
            torch.ne(self.position(tier), PAD, out=view.valid.narrow(-1, 0, count))
        if counters is None:
            view.valid.narrow(-1, count, view.valid.shape[-1] - count).zero_()
        # Captured demotions leave full tiers full. Without padding, all their slots stay visible.
        return [] if view.read_at is None else [(view.read_at, held["read_at"][:, :1])]

    def _renumber(self, places: list[Tensor], evicted: Tensor) -> list[Tensor]:
        """Positions at which survivors are read: rank among the live tokens, plus the tokens evicted.

        Queries keep logical positions. So every distance is as contiguous numbering from 0 makes it
        (StreamingLLM, arXiv 2309.17453, section 3.2).
        """
        live = torch.cat(places, dim=-1)
        last = torch.iinfo(live.dtype).max
        order = live.masked_fill(live == PAD, last).argsort(dim=-1, stable=True)
        rank = order.argsort(dim=-1).to(torch.int32) + self.config.n_sink + evicted[..., None]
        return list(rank.masked_fill(live == PAD, PAD).split([p.shape[-1] for p in places], dim=-1))

    # -- reading

    def position(self, tier: StoredTier) -> Tensor:
        return tier.records["position"][:, :1]

    def positions_by_head(self, tier: StoredTier) -> Tensor:
        return tier.records["position"]

    def read_at(self, tier: StoredTier) -> Tensor:
        return tier.records["read_at"][:, :1]  # in one tier, all heads read slot i at the same position

    def mean(self, start: int, stop: int) -> Tensor:
        return self.means["mean"]
