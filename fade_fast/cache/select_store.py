"""A store that keeps every token, and of which a short step reads the pages that its queries choose.

A page is a run of `select_page` slots. The index, which scores every token, is a part of the records: the
upper bits of the key codes (`formats/split.py`). The rest is payload. The chosen pages are gathered into a
view of fixed size, a plain INT4 tier, and attention reads it as any other.

With `cold="host"` the payload lies in host memory, and some pages of it also in slots on the GPU. The first
pages go to both when they are stored. Later ones come to the GPU when they are chosen, in the place of those
unused longest (`policies.select.Residency`). A fetch is a part of the step, and no host waits for it.
"""

import torch
from torch import Tensor

from ..compile.compiled import Compiled, use_compiled
from ..compile.host_fetch import rows_of_either
from ..formats.base import Field
from ..formats.split import INDEX
from ..kernels import halves, packed
from ..kernels.packed import TierView
from ..kernels.rotated import Packed
from ..kernels.select import page_mass
from ..policies import select
from .append_store import AppendStore
from .buffers import Buffers
from .host import HostBuffers

#: Fields of the index beside `INDEX`. All others are payload: only tokens that are chosen need them.
KEY_NUMBERS = ("key_scale", "key_zero")
QUERIES, READ, HITS, MISSES = range(4)  # what `SelectStore.counted` counts


def is_payload(name: str) -> bool:
    """Whether a field of a record is needed only of tokens that are chosen."""
    return name != INDEX and name not in KEY_NUMBERS


class SelectStore(AppendStore):
    """An `AppendStore` whose pages are chosen.

    Attributes:
        counted: int64 [4] on the device, over all short steps that chose: queries times KV heads; tokens of
            the middle that these read; chosen pages that were on the GPU, and pages that were fetched. The
            last two stay 0 without a host.
        resident: the payload on the GPU, at least `slots + 1` pages of each field; empty without a host. The
            page after the slots takes writes that mean nothing.
        residency: which page is in which slot; None without a host.
    """

    def __init__(self, *args):
        super().__init__(*args)
        config, (tier,) = self.config, self.tiers
        codes = tier.records.tensors[INDEX]
        (batch, heads), device = codes.shape[:2], codes.device
        self.page, self.most = config.select_page, config.tokens_selected // config.select_page
        self.share = config.select if isinstance(config.select, float) else None
        self.counted = torch.zeros(4, dtype=torch.int64, device=device)
        self.payload = [name for name in tier.format_fields if is_payload(name)]
        self.resident: dict[str, Tensor] = {}
        self.residency: select.Residency | None = None
        if config.cold:
            slots = config.tokens_resident // self.page
            self.residency = select.Residency(batch, heads, slots, device)
            fields = tier.format.fields(heads)
            self.resident = {n: fields[n].empty(batch, (slots + 1) * self.page, device) for n in self.payload}
            self._fit()

    def _new_records(self, fields: dict[str, Field], batch: int, device) -> Buffers:
        if not self.config.cold:
            return super()._new_records(fields, batch, device)
        return HostBuffers(fields, tuple(filter(is_payload, fields)), self.slots_step, batch, device)

    @property
    def chooses(self) -> bool:
        """Whether a short step reads a part: there are more tokens than it may read."""
        return self._chooses(self.tiers[0].records.count)

    def _chooses(self, count: int) -> bool:
        return count > (0 if self.share is not None else self.most * self.page)

    def can_replay_demotion(self, new: int) -> bool:
        count = self.tiers[0].records.count
        return super().can_replay_demotion(new) and self._chooses(count) == self._chooses(count + new)

    # -- what is stored

    def write(self, fields, mean, at, before_write=lambda evicted: None, bound=None):
        tier = self.tiers[0]
        before = tier.records.count

        def reserved(evicted: Tensor | None) -> None:
            self._fit()
            before_write(evicted)

        super().write(fields, mean, at, reserved, bound)
        if at is None:
            self._make_resident(before, tier.records.count)
        elif self.residency:
            room = self.residency.slots * self.page
            for name, x in self.resident.items():
                x.index_copy_(2, at.clamp_max(room), tier.records.tensors[name].index_select(2, at))

    def _make_resident(self, start: int, stop: int) -> None:
        """Copy those of slots `start` to `stop` that belong to the first pages."""
        if self.residency and (new := min(stop, self.residency.slots * self.page) - start) > 0:
            for name, x in self.resident.items():
                x.narrow(2, start, new).copy_(self.tiers[0].records.tensors[name].narrow(2, start, new))

    @property
    def num_few(self) -> int:
        """Most slots that a step reads without a choice: the budget, and on CUDA a round number of slots."""
        codes = self.tiers[0].records.tensors[INDEX]
        heads, few = codes.shape[0] * codes.shape[1], self.most * self.page
        return packed.whole(heads, few) if use_compiled(codes) else few

    def _fit(self) -> None:
        """Give each page an entry, and residents as many slots as a step reads."""
        if not self.residency:
            return
        self.residency.reserve(self.tiers[0].records.capacity // self.page)
        for name, x in self.resident.items():
            if (more := self.num_few - x.shape[2]) > 0:
                more = -(-more // self.page) * self.page
                self.resident[name] = torch.cat((x, x.new_zeros(*x.shape[:2], more, *x.shape[3:])), dim=2)

    def loaded(self) -> None:
        self._make_resident(0, self.tiers[0].records.count)
        self._fit()

    def reserve(self, tokens: int) -> None:
        super().reserve(tokens)
        self._fit()

    def map(self, function) -> None:
        super().map(function)
        self.resident = {name: function(x) for name, x in self.resident.items()}
        self.counted = self.counted.to(self.tiers[0].records.tensors[INDEX].device)
        if self.residency:
            self.residency.map(function)
        self._fit()

    def tensors(self) -> list[Tensor]:
        lent = self.residency.tensors() if self.residency else []
        return [*super().tensors(), self.counted, *self.resident.values(), *lent]

    def host_tensors(self) -> list[Tensor]:
        return [self.tiers[0].records.tensors[name] for name in self.payload] if self.config.cold else []

    # -- a step that reads all

    def all_of_few(self, view: TierView) -> TierView:
        """The view of all tokens with whole key codes, where they are no more than a query may read."""
        if self.residency:
            near = self.resident
            keys = view.keys._replace(codes=near["key_codes"])
            values = Packed(near["value_codes"].mT, near.get("value_scale"), near.get("value_zero"))
            view = view._replace(keys=keys, values=values)
        return view.beginning(min(self.tiers[0].num_read, self.num_few))

    # -- a step that chooses

    def choose(
        self, query: Tensor, keys: Tensor, seen: Tensor, view: TierView, **options
    ) -> tuple[Tensor, Tensor | None]:
        """Pages that each query and KV head reads, int64 [B, H, q, n], and which of them count; None: all.

        Args:
            query: [B, Hq, q, D].
            keys, seen: dense keys, and which of them each query sees; see `page_mass`.
            view: of the tier.
            options: `scaling` and `softcap`.
        """
        num_read = self.tiers[0].num_read
        mass = page_mass(query, keys, seen, self.format.table, view, num_read, self.page, **options)
        return select.choose(mass, min(self.most, mass.shape[-1]), self.share)

    def num_together(self, new: int) -> int:
        """How many of the `new` queries of a step `chosen` takes at once.

        Pages that one query fetches may replace those of another, and compiled kernels serve one batch.
        """
        return 1 if self.residency or use_compiled(self.counted) else new

    def chosen(self, view: TierView, index: Tensor, keep: Tensor | None, first: int) -> TierView:
        """The view of the pages that some queries of the step read: an ordinary tier, a row for each query.

        Args:
            view: of the tier, B rows.
            index, keep: from `choose`, of these m queries: [B, H, m, n].
            first: place of the first of them in the step.

        Returns a view of B * m rows.
        """
        tier, page, count = self.tiers[0], self.page, index.shape[2]
        index, keep = (None if x is None else x.transpose(1, 2).flatten(0, 1) for x in (index, keep))
        tensors = tier.records.tensors
        index, keep = self._padded(index, keep)
        fetched = None
        if self.residency:
            slots, fetched = self.residency.touch(index, keep)
            payload = self._fetch(index, slots, fetched)
        else:
            payload = {name: pages_of(tensors[name], page, index) for name in self.payload}
        numbers = [pages_of(tensors[n], page, index) if n in tensors else None for n in KEY_NUMBERS]
        keys = Packed(halves.join(pages_of(tensors[INDEX], page, index), payload["key_codes"]), *numbers)
        values = Packed(payload["value_codes"].mT, payload.get("value_scale"), payload.get("value_zero"))
        means = pages_of(self.means.tensors["mean"], 1, index * page // self.per_mean)
        valid = view.valid if view.valid.shape[1] == 1 else view.valid[:, first : first + count]
        valid = self._valid(valid.expand(-1, count, -1).flatten(0, 1), index, keep)
        self._count(valid, keep, fetched)
        bound = tier.bound if count == 1 else tier.bound.repeat_interleave(count, dim=0)
        return TierView(keys, values, bound, means, valid.flatten(0, 1).unsqueeze(1), page)

    def _padded(self, index: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same with more pages that do not count, where compiled kernels read a round number of slots."""
        if not use_compiled(index):
            return index, keep
        slots = index.shape[-1] * self.page
        more = -(-(packed.whole(index.shape[0] * index.shape[1], slots) - slots) // self.page)
        if not more:
            return index, keep
        keep = torch.ones_like(index, dtype=torch.bool) if keep is None else keep
        pad = torch.nn.functional.pad
        return pad(index, (0, more)), pad(keep, (0, more))

    def _valid(self, valid: Tensor, index: Tensor, keep: Tensor | None) -> Tensor:
        """Which slots of the chosen pages hold a token that counts, bool [N, H, n * page].

        `valid`, bool [N, S], says so of all slots.
        """
        pages = valid.unflatten(-1, (-1, self.page))
        row = torch.arange(len(pages), device=pages.device).reshape(-1, 1, 1)
        found = pages[row, index]  # one row [page] for each chosen page
        return (found if keep is None else found & keep.unsqueeze(-1)).flatten(-2)

    def _fetch(self, index: Tensor, slots: Tensor, fetched: Tensor) -> dict[str, Tensor]:
        """The payload of the pages `index`: from the GPU, or from the host into its slot."""
        found = {}
        run = _compiled if use_compiled(index) else _fetch_rows
        for name in self.payload:
            far, near = self.tiers[0].records.tensors[name], self.resident[name]
            (far_rows, first), (near_rows, start) = (
                rows_of_pages(far, self.page),
                rows_of_pages(near, self.page),
            )
            rows = (first + index).flatten(), (start + slots).flatten(), fetched.flatten()
            args = [far_rows, near_rows, *rows]
            new = run([], dict, *args) if use_compiled(index) else run([], *args)
            found[name] = new.view(near.dtype).reshape(*index.shape[:2], -1, *near.shape[3:])
        return found

    def _count(self, valid: Tensor, keep: Tensor | None, fetched: Tensor | None) -> None:
        queries = torch.full_like(self.counted[0], valid.shape[0] * valid.shape[1])
        counts = [queries, valid.sum()]
        if fetched is not None:
            used = torch.full_like(queries, fetched.numel()) if keep is None else keep.sum()
            missed = fetched.sum()
            counts += [used - missed, missed]
        self.counted[: len(counts)].add_(torch.stack(counts))


def rows_of_pages(x: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """A field [B, H, S, *shape] as one row per page, and the row [B, H, 1] at which each head begins.

    A page is one run of bytes. It is seen as words of eight bytes where possible, which move faster.
    """
    batch, heads, slots = x.shape[:3]
    rows = x.view(batch * heads * (slots // page), -1)
    if rows.shape[1] * rows.element_size() % 8 == 0 and x.storage_offset() * x.element_size() % 8 == 0:
        rows = rows.view(torch.int64)
    first = torch.arange(batch * heads, device=x.device).reshape(batch, heads, 1) * (slots // page)
    return rows, first


def pages_of(x: Tensor, page: int, index: Tensor) -> Tensor:
    """Pages `index` int64 [B * m, H, n] of a field [B, H, S, *shape]: [B * m, H, n * page, *shape]."""
    rows, first = rows_of_pages(x, page)
    first = first.repeat_interleave(len(index) // len(first), dim=0)
    found = rows.index_select(0, (first + index).flatten()).view(x.dtype)
    return found.reshape(*index.shape[:2], index.shape[-1] * page, *x.shape[3:])


def _fetch_rows(dynamic_sizes, far, near, far_row, near_row, is_far) -> Tensor:
    """Rows of `far` or `near` [n, W]; those of `far` are also written to their rows of `near`."""
    rows = rows_of_either(far, near, far_row, near_row, is_far)
    near.index_copy_(0, near_row, rows)
    return rows


_compiled = Compiled(_fetch_rows, options={})
