"""A store without budgets: the token of step index i stays in slot i - n_sink for ever."""

from collections.abc import Callable, Hashable

from torch import Tensor

from ..formats.base import Format
from .buffers import shared_by
from .positions import PAD, DeviceCounters
from .store import CompressedStore, StoredTier


class AppendStore(CompressedStore):
    """Positions follow from slots, so none is stored. Each block has a mean of its own."""

    keeps_slots = True
    fills_slots = True
    shares_slots = True
    writes_ahead = True

    @property
    def slots_step(self) -> int:
        """Tokens come in whole blocks."""
        return self.config.block_size

    per_mean = slots_step

    @property
    def views_like(self) -> Hashable | None:
        records = self.tiers[0].records
        return type(self), records.count, records.capacity

    @property
    def shared(self) -> Hashable | None:
        return type(self), self.tiers[0].records.count

    def reserve(self, tokens: int) -> None:
        self.tiers[0].reserve(tokens)
        self._reserve_means()

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        super().map(function)
        self._reserve_means()

    def written(self, slots: range) -> list[Tensor]:
        (tier,) = self.tiers
        means = self.means.between(shared_by(slots, self.per_mean))
        return [*tier.records.between(slots), tier.bound, *means]

    def _reserve_means(self) -> None:
        """Make room for the means of all slots there are."""
        self.means.reserve(-(-self.tiers[0].records.capacity // self.per_mean))

    def demote(
        self, keys, values, first, seen, attention_stats, before_write=lambda evicted: None, counters=None
    ):
        position = self.middle_positions(first, keys.shape[2], counters)
        at = None if counters is None else self.slots(first, keys.shape[2], counters)
        self.write(*self.encoded(keys, values, position, self.format), at, before_write)

    def encoded(
        self, keys: Tensor, values: Tensor, position: Tensor, format: Format
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Records of new tokens at `position` [B, 1, n], and the means of their blocks.

        `format` is that of the heads given: of this layer, or of several (`Format.joined`).
        """
        keys = self.before_rope(keys, position)
        blocks = (keys.shape[2] // self.per_mean, self.per_mean)
        grouped = position.unflatten(2, blocks)
        real = grouped != PAD if self.token_positions.has_padding else None
        mean = format.key_means(keys.unflatten(2, blocks), grouped, real)
        return format.tiers[0].encode(keys, values, mean, recurs=True), mean

    def write(
        self,
        fields: dict[str, Tensor],
        mean: Tensor,
        at: Tensor | None,
        before_write: Callable[[Tensor | None], None] = lambda evicted: None,
        bound: Tensor | None = None,
    ) -> None:
        """Append what `encoded` made. `at`: `slots`, for a captured graph. `bound`: see `StoredTier`."""
        block = None if at is None else self._blocks(at)
        with self._all_or_nothing():
            self.tiers[0].append(at, bound, **fields)
            self._reserve_means()
            self.means.append(block, mean=mean)
            before_write(None)

    def write_ahead(self, fields: dict[str, Tensor], mean: Tensor, at: Tensor) -> None:
        """Write what `encoded` made into slots `at` behind those in use, for which there is room.

        No step reads them until they are counted.
        """
        self.tiers[0].records.write(at, **fields)
        self.means.write(self._blocks(at), mean=mean)

    def _blocks(self, at: Tensor) -> Tensor:
        """Where the means of whole blocks of slots `at` lie, int64."""
        return at[:: self.per_mean] // self.per_mean

    def slots(self, first: int, count: int, counters: DeviceCounters) -> Tensor:
        """Slots of step indices `first` to `first + count`, int64 [count], as the device counts them."""
        return self.token_positions.index(first, count, counters) - self.config.n_sink

    def can_replay_demotion(self, new: int) -> bool:
        tier = self.tiers[0]
        needed = tier.records.count + new
        has_means = self.means.capacity * self.per_mean >= needed
        return 0 < tier.records.count and needed <= tier.most_read and has_means

    def count_replayed_demotion(self, new: int) -> None:
        self.tiers[0].records.count += new
        self.means.count += new // self.per_mean

    def refresh_view(self, tier, view, counters=None):
        if counters is None:
            return super().refresh_view(tier, view)
        block = self.per_mean  # only the last block is new
        first = self.config.n_sink + tier.records.count - block
        position, at = self.middle_positions(first, block, counters), self.slots(first, block, counters)
        view.valid.index_copy_(-1, at, position != PAD)
        if view.read_at is not None:
            view.read_at.index_copy_(-1, at, position)
        return []

    def position(self, tier: StoredTier) -> Tensor:
        return self.middle_positions(self.config.n_sink, tier.records.count)

    read_at = position

    def mean(self, start: int, stop: int) -> Tensor:
        per = self.per_mean
        blocks = self.means["mean"][:, :, start // per : -(-stop // per)]
        return blocks.repeat_interleave(per, dim=2).narrow(2, start % per, stop - start)
