"""The middle of a layer: the compressed tokens, in tiers, between the sinks and the recent tokens.

`AppendStore` keeps each token in the slot it got. In a `BudgetStore`, tokens compete for budgets. Both hold a
token as one record that depends on no other token. So moving a token is a gather of bytes.
"""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from fade_ref.config import FadeConfig

from ..formats.base import Field, Format, TierFormat
from ..kernels import rotated
from ..kernels.packed import TierView, bucket, chunk_of, longest, spare, whole
from ..kernels.rope import RoPE, rotate
from ..policies.scores import Observer
from . import growth
from .buffers import Buffers
from .positions import PAD, DeviceCounters, TokenPositions
from .ranks import Ranks

ONE_MEAN = 1 << 30  # slots that share a mean, where there is one mean for all


@functools.lru_cache(maxsize=64)
def _first_slots(batch: int, count: int, capacity: int, device: torch.device) -> Tensor:
    """The mask [batch, 1, capacity] of the first `count` slots. Layers share it, so nothing may write it."""
    valid = torch.zeros(batch, 1, capacity, dtype=torch.bool, device=device)
    valid[:, :, :count] = True
    return valid


def refresh(view: TierView, fresh: TierView) -> None:
    """Bring what `view` holds beside the buffers up to date, in place."""
    view.valid.copy_(fresh.valid)
    if view.read_at is not None:
        view.read_at.copy_(fresh.read_at)


class StoredTier:
    """One tier: its format and its records.

    Args:
        format: what a record is.
        records: the records, slot by slot.
        bound: [B, H] float32, at least every value scale ever stored, and never 0; None without scales.
        budget: most tokens the tier will ever hold; None: as many as the text has.
        outlook: see `CompressedStore.outlook`.
    """

    def __init__(
        self,
        format: TierFormat,
        records: Buffers,
        bound: Tensor,
        budget: int | None,
        outlook: Callable[["StoredTier", int], tuple[int | None, int | None]],
    ):
        self.format, self.records, self.bound, self.budget = format, records, bound, budget
        self.outlook = outlook
        self.format_fields = list(format.fields(heads=1))  # names of the fields that hold codes

    @property
    def tier(self):
        """The tier's code."""
        return self.format.tier

    @property
    def name(self) -> str:
        """The tier's name in reports."""
        return self.format.name

    @property
    def num_read(self) -> int:
        """Slots a kernel reads: those in use, and on CUDA some more, so that few lengths occur."""
        if not self.records.compiled:
            return self.records.count
        return min(bucket(self._heads, self.records.count), self._longest)

    @property
    def most_read(self) -> int:
        """Most slots a kernel can ever read of the present buffers."""
        return self._longest if self.records.compiled else self.records.count

    @property
    def next_read(self) -> int | None:
        """Slots a kernel reads once the text outgrows those it reads now.

        None: then it needs other buffers, or kernels that are compiled for another number of slots.
        """
        now = self.num_read
        if not self.records.compiled or now >= self._longest:
            return None
        later = min(bucket(self._heads, now + 1), self._longest)
        same = chunk_of(self._heads, now, 1) == chunk_of(self._heads, later, 1)
        return later if same else None

    @property
    def _longest(self) -> int:
        """Most slots a kernel can read on CUDA."""
        return longest(self._heads, self.records.capacity)

    @property
    def _heads(self) -> int:
        """Batch times KV heads."""
        rows, heads = self.records.tensors["key_codes"].shape[:2]
        return rows * heads

    def fields(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Slots `start` to `stop` of each field, views."""
        return self.records.narrow(start, self.records.count if stop is None else stop)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all; on CUDA, in whole blocks, for as many slots as a kernel reads."""
        if self.records.compiled and tokens:
            slots = whole(self._heads, tokens)
            tokens = -(-(slots + spare(slots)) // self.records.step) * self.records.step
        self.records.reserve(tokens)

    def make_room(self, fields: dict[str, Tensor], held: int) -> None:
        """Allocate now what writing `fields` after `held` slots needs."""
        new = fields["key_codes"].shape[2]
        needed = held + new
        if self.records.compiled and needed > self._longest:
            # Kernels are compiled for a capacity. So it is one of a few.
            if self.budget is None:
                self.reserve(
                    growth.slots(self._heads, needed, self.records.capacity, *self.outlook(self, needed))
                )
            else:
                self.reserve(max(needed, min(self.budget, needed + max(growth.HEADROOM, needed // 8))))
        self.records.make_room(new, held)

    def raise_bound(self, fields: dict[str, Tensor], bound: Tensor | None = None) -> None:
        """Make the bound fit the value scales of `fields`. A bound that is too high does no harm.

        `bound` is that of these records, if it is known already: [B, H] float32.
        """
        if fields["key_codes"].shape[2]:
            bound = self.format.value_bound(fields).to(self.bound.device) if bound is None else bound
            torch.maximum(self.bound, bound, out=self.bound)

    def append(self, at: Tensor | None = None, bound: Tensor | None = None, **fields: Tensor) -> None:
        """Write records after those in use; `at` names their slots to a graph being captured.

        `bound` is as in `raise_bound`.
        """
        self.make_room(fields, self.records.count)
        self.raise_bound(fields, bound)
        self.records.append(at, **fields)

    def replace(self, **fields: Tensor) -> None:
        """Hold exactly these records, for which `make_room` has been called."""
        self.records.replace(**fields)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function` of it."""
        self.records.map(function)
        self.bound = function(self.bound)
        if self.records.compiled and self._longest < self.records.count:
            self.reserve(self.records.count)  # chunks are longer for more rows

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*self.records.tensors.values(), self.bound]


class CompressedStore(ABC):
    """Common parts of both kinds of store.

    Args:
        config: budgets, block size and policy.
        format: what a record is, for this layer; its tables are allocated.
        positions: positions of the tokens of the cache.
        rope: gives how the model rotates the keys of this layer; needed if `config.contiguous`.
        batch, heads: rows, and KV heads of the layer.
        observer: knows how much attention tokens received; None where the policy does not ask.
        ranks: the processes that hold the heads of this model; None if this process holds all of them.
    """

    slots_step = 1  # capacities are multiples of this
    per_mean = ONE_MEAN  # slots that share a mean
    chooses = False  # whether a short step reads a part of the tokens
    keeps_slots = False  # whether a token stays in the slot it got
    fills_slots = False  # whether each slot in use holds a real token, in a batch without padding
    shares_slots = False  # whether a step may read slots once that are equal in several rows
    writes_ahead = False  # whether new records may be written before they are counted
    evicted: Tensor | None = None  # [B, 1] int32: real tokens dropped so far
    token_bytes = 0  # of an uncompressed token; 0: not known
    on_plan: Callable | None = None  # is told of plans: see `plan.Candidates`

    def __init__(
        self,
        config: FadeConfig,
        format: Format,
        positions: TokenPositions,
        rope: Callable[[], RoPE] | None,
        batch: int,
        heads: int,
        observer: Observer | None = None,
        ranks: Ranks | None = None,
    ):
        self.config, self.format, self.token_positions, self.rope = config, format, positions, rope
        self.observer, self.ranks = observer, ranks
        self.plans = heads if config.plan_scope == "head" else 1  # plans per row
        device, dim = format.table.device, format.table.shape[-1]
        self.tiers: list[StoredTier] = []
        for tier, budget in zip(format.tiers, (config.int4_budget, config.int2_budget)):
            records = self._new_records(self.own_fields() | tier.fields(heads), batch, device)
            least = rotated.SMALLEST_SCALE
            bound = torch.full((batch, heads), least, dtype=torch.float32, device=device)
            self.tiers.append(StoredTier(tier, records, bound, budget, self.outlook))
        self.means = Buffers({"mean": Field((dim,), torch.float16, heads)}, 1, batch, device)

    def _new_records(self, fields: dict[str, Field], batch: int, device) -> Buffers:
        """The empty records of a tier."""
        return Buffers(fields, self.slots_step, batch, device)

    def outlook(self, tier: StoredTier, needed: int) -> tuple[int | None, int | None]:
        """Slots that the text will need in a tier without a budget; None: not known. And the slots at which
        the cache is as large as one without compression; None: not asked for.

        `needed` slots are about to be in use.
        """
        c, expected, most = self.config, self.token_positions.expected, None
        if expected is not None:
            expected = max(0, expected - c.n_sink - (c.recent_window or 0)) // c.block_size * c.block_size
        if self.token_bytes:
            means = self.means.record_bytes // self.per_mean
            unused = 2 * c.block_size  # at least the dense slots that are empty, drafts' included
            most = (needed - unused) * self.token_bytes // (tier.records.record_bytes + means)
        return expected, most

    def loaded(self) -> None:  # noqa: B027 - most stores have nothing to do
        """Called when records were filled other than by `demote`, and positions of tokens are known."""

    def written(self, slots: range) -> list[Tensor]:
        """What is written while `slots` come into use: views of them, and all tensors of rows that have no
        slots. Only for stores that keep slots.
        """
        raise NotImplementedError

    def keep_choices(self, wanted: bool) -> None:  # noqa: B027 - most stores choose nothing
        """Keep what the newest query chose to read, in tensors of fixed addresses, or keep it no longer."""

    def forget_choices(self) -> None:  # noqa: B027 - most stores choose nothing
        """The newest step reads everything, unless it chooses afterwards."""

    def host_tensors(self) -> list[Tensor]:
        """Those of `tensors()` that lie in host memory."""
        return []

    def own_fields(self) -> dict[str, Field]:
        """Fields of a record besides those of its format."""
        return {}

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all."""

    @abstractmethod
    def demote(
        self,
        keys: Tensor,
        values: Tensor,
        first: int,
        seen: int,
        attention_stats: dict[str, Tensor],
        before_write: Callable[[Tensor | None], None] = lambda evicted: None,
        counters: DeviceCounters | None = None,
    ) -> None:
        """Take in the tokens from step index `first` on: keys after RoPE and values, [B, H, n, D].

        Args:
            seen: tokens that have arrived so far.
            attention_stats: the observer's fields of the tokens; empty without an observer.
            before_write: called when all memory is allocated and nothing is written yet, with `evicted` as
                it is going to be. If it raises, or memory runs out, nothing is written.
            counters: where a captured graph finds its slots; None: slots follow those in use.
        """

    @contextlib.contextmanager
    def _all_or_nothing(self):
        """Restore the counts if anything is raised inside."""
        held = self.buffers().values()
        counts = [records.count for records in held]
        try:
            yield
        except BaseException:
            for records, count in zip(held, counts):
                records.count = count
            raise

    @property
    def views_like(self) -> Hashable | None:
        """What says which slots the views hide, where other layers may have the same; else None."""
        return None

    @property
    def shared(self) -> Hashable | None:
        """What a demotion depends on beside its arguments. None: this layer is demoted alone."""
        return None

    @abstractmethod
    def position(self, tier: StoredTier) -> Tensor:
        """Logical position of each slot in use, [B, 1, n] int32; `PAD` where there is no token."""

    def positions_by_head(self, tier: StoredTier) -> Tensor:
        """Logical positions, [B, H, n] where heads have plans of their own.

        The tokens of such heads differ, but they fill the same slots.
        """
        return self.position(tier)

    @abstractmethod
    def read_at(self, tier: StoredTier) -> Tensor:
        """Position at which RoPE reads each slot, where `config.contiguous`."""

    @abstractmethod
    def mean(self, start: int, stop: int) -> Tensor:
        """Means of the keys in slots `start` to `stop`, [B, H, n or 1, D]."""

    def buffers(self) -> dict[str, Buffers]:
        """All that grows with the text, by its name in reports."""
        return {tier.name: tier.records for tier in self.tiers} | {"means": self.means}

    def view(self, tier: StoredTier, visible: Tensor | None = None, full: bool = False) -> TierView:
        """The view of a tier that kernels read: its buffers at full capacity.

        Args:
            visible: bool [B, 1 or R, n], for the slots in use; None: those that hold a token.
            full: whether every slot in use holds a token that every query sees. Then `visible` is not used.
        """
        capacity, count = tier.records.capacity, tier.records.count
        pad = lambda x: torch.nn.functional.pad(x, (0, capacity - x.shape[-1]))  # noqa: E731
        if full:
            codes = tier.records.tensors["key_codes"]
            valid = _first_slots(codes.shape[0], count, capacity, codes.device)
        else:
            valid = pad(self.position(tier) != PAD if visible is None else visible)
        read_at = pad(self.read_at(tier)) if self.config.contiguous else None
        means = self.means.tensors["mean"]
        view = tier.format.view(tier.records.tensors, tier.bound, means, valid, self.per_mean, read_at)
        return view._replace(full=True) if full else view

    def refresh_view(
        self, tier: StoredTier, view: TierView, counters: DeviceCounters | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Bring the tensors that `view` made beside the buffers up to date, in place.

        Returns copies that are left to be made, for `copy_all`.
        """
        refresh(view, self.view(tier))
        return []

    @abstractmethod
    def can_replay_demotion(self, new: int) -> bool:
        """Whether a captured demotion of `new` tokens can be replayed.

        It can if only slots differ: tensors and shapes are the same, and the host need not look at data.
        """

    @abstractmethod
    def count_replayed_demotion(self, new: int) -> None:
        """Count `new` tokens, which a captured graph has demoted."""

    def decode_keys(self, tier: StoredTier, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Keys of slots `start` to `stop`, [B, H, n, D] of `dtype`, as they are read."""
        keys = tier.format.decode_keys(tier.fields(start, stop), self.mean(start, stop), dtype)
        if not self.config.contiguous:
            return keys
        return rotate(keys, self.read_at(tier)[..., start:stop], *self.rope())

    def decode_values(self, tier: StoredTier, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Values of slots `start` to `stop`, [B, H, n, D] of `dtype`."""
        return tier.format.decode_values(tier.fields(start, stop), dtype)

    @property
    def count(self) -> int:
        """Slots in use, over all tiers."""
        return sum(t.records.count for t in self.tiers)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function` of it."""
        for tier in self.tiers:
            tier.map(function)
        self.means.map(function)

    def tensors(self) -> list[Tensor]:
        """Every tensor held or shared."""
        records = [x for tier in self.tiers for x in tier.tensors()]
        return [*self.format.tensors(), *records, *self.means.tensors.values()]

    def middle_positions(self, first: int, count: int, counters: DeviceCounters | None = None) -> Tensor:
        """Positions [B, 1, count] of step indices. Sinks are not part of the middle: they are `PAD` here."""
        position = self.token_positions.at(first, count, counters)[:, None]
        return position.masked_fill(position < self.config.n_sink, PAD)

    def before_rope(self, keys: Tensor, position: Tensor) -> Tensor:
        """Keys as they are encoded: rotated back to position 0 where survivors are renumbered."""
        if not self.config.contiguous:
            return keys
        return rotate(keys.float(), -position, *self.rope())
