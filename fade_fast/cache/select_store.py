"""A store that keeps every token, and of which a short step reads the pages that its queries choose.

A page is a run of `select_page` slots. The index, which scores every token, is a part of the records: the
upper bits of the key codes (`formats/split.py`). Or numbers of each page score it, or numbers of each block
leave some blocks to the upper bits (`summaries.py`). What does not score is payload. The chosen pages are
gathered into a view of fixed size, a plain INT4 tier, and attention reads it as any other.

With `cold="host"` the payload lies in host memory, and some pages of it also in slots on the GPU. The first
pages go to both when they are stored. Later ones come to the GPU when they are chosen, in the place of those
unused longest (`policies.select.Residency`). If a policy says what stays (`policies/residents.py`), they take
the place of those that it wants least, and new pages go to slots, too. A fetch is a part of the step, and no
host waits for it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fade_ref.config import PAGES, FadeConfig

from ..compile.compiled import TOGETHER, Compiled, use_compiled
from ..compile.host_fetch import rows_of_either
from ..formats.base import Field
from ..formats.split import INDEX
from ..kernels import packed, pages
from ..kernels.packed import TierView
from ..kernels.rotated import Packed
from ..kernels.select import page_mass
from ..policies import select
from ..policies.residents import Wanted
from .append_store import AppendStore
from .buffers import Buffers, shared_by
from .host import HostBuffers
from .positions import PAD
from .summaries import Summaries

KEY_NUMBERS = ("key_scale", "key_zero")  # fields that `INDEX` needs to score tokens
KEY_FIELDS = (INDEX, "key_codes", *KEY_NUMBERS)
QUERIES, READ, HITS, MISSES = range(4)  # what `SelectStore.counted` counts


def is_payload(name: str, config: FadeConfig) -> bool:
    """Whether a field of a record is needed only of tokens that are chosen."""
    return config.index_bits is None or (name != INDEX and name not in KEY_NUMBERS)


class Choice(NamedTuple):
    """The pages that the queries of a step read.

    Attributes:
        pages: int64 [B, H, q, n].
        keep: bool [B, H, q, n], which of them count; None: all.
        mass: [B, H, q, P], of every page, if a policy asks for it; else None.
        seen: bool [B, 1 or q, P], the pages with a token that a query sees; None without `mass`.
    """

    pages: Tensor
    keep: Tensor | None
    mass: Tensor | None = None
    seen: Tensor | None = None

    def of(self, first: int, count: int) -> "Choice":
        """The choice of `count` queries from `first` on."""
        cut = lambda x: None if x is None else x[:, :, first : first + count]  # noqa: E731
        seen = self.seen
        if seen is not None and seen.shape[1] > 1:
            seen = seen[:, first : first + count]
        return Choice(cut(self.pages), cut(self.keep), cut(self.mass), seen)


class SelectStore(AppendStore):
    """An `AppendStore` whose pages are chosen.

    Attributes:
        tallies: what short steps that chose have counted on the device, int64 [H] each; see `counted`.
        resident: the payload on the GPU, at least `slots + 1` pages of each field; empty without a host. The
            page after the slots takes writes that mean nothing.
        residency: which page is in which slot; None without a host.
        summaries: numbers of pages, or of blocks, that score them; None if only the records do.
        newest: what the newest query of each row chose, where somebody asks (`keep_choices`); else empty.
            `page`: int64 [B, H, n], page numbers, or -1; all are -1 after a step that read everything.
            `fetched`: bool [B, H, n], which of these pages came from the host.
    """

    fills_slots = False  # a query reads some of them
    shares_slots = False  # each query reads others
    writes_ahead = False  # scores of pages follow what is counted, and payload may lie in host memory

    def __init__(self, *args):
        super().__init__(*args)
        (tier,) = self.tiers
        self.page = self.config.select_page
        self.payload = [name for name in tier.format_fields if is_payload(name, self.config)]
        codes = tier.records.tensors[INDEX]
        self.summaries: Summaries | None = None
        if self.config.summary:
            size = self.page if self.config.blocks_shortlisted is None else self.config.block_size
            sizes = (*codes.shape[:2], tier.format.head_dim, codes.device)
            self.summaries = Summaries(self.config.summary, size, *sizes)
        self.choose_by(self.config)

    def choose_by(self, config: FadeConfig) -> None:
        """Read as `config` says from now on: its budget or share, and its residents. Counts start again.

        What is stored does not depend on it, so `config` may differ from that of the store in `select`,
        `select_max` and `resident`.
        """
        self.config, (tier,) = config, self.tiers
        codes = tier.records.tensors[INDEX]
        (batch, heads), device = codes.shape[:2], codes.device
        self.most = config.tokens_selected // self.page
        self.share = config.select if isinstance(config.select, float) else None
        self.tallies = [torch.zeros(heads, dtype=torch.int64, device=device) for _ in range(4)]
        self.newest: dict[str, Tensor] = {}
        self.resident: dict[str, Tensor] = {}
        self.residency: select.Residency | None = None
        if config.cold:
            slots = config.tokens_resident // self.page
            wanted = None
            if config.eviction_policy != "position":
                wanted = Wanted(config.eviction_policy, batch, heads, self._wide, device)
            self.residency = select.Residency(batch, heads, slots, device, wanted)
            fields = tier.format.fields(heads)
            self.resident = {n: fields[n].empty(batch, (slots + 1) * self.page, device) for n in self.payload}
        self.loaded()

    def _new_records(self, fields: dict[str, Field], batch: int, device) -> Buffers:
        if not self.config.cold:
            return super()._new_records(fields, batch, device)
        cold = tuple(name for name in fields if is_payload(name, self.config))
        return HostBuffers(fields, cold, self.slots_step, batch, device)

    @property
    def counted(self) -> Tensor:
        """Int64 [4], over all short steps that chose: queries times KV heads; tokens of the middle that these
        read; chosen pages that were on the GPU, and pages that were fetched. The last two stay 0 without a
        host.
        """
        return torch.stack(self.tallies).sum(-1)

    @property
    def chooses(self) -> bool:
        """Whether a short step reads a part: there are more tokens than it may read."""
        return self._chooses(self.tiers[0].records.count)

    def _chooses(self, count: int) -> bool:
        return count > (0 if self.share is not None else self.most * self.page)

    def can_replay_demotion(self, new: int) -> bool:
        count = self.tiers[0].records.count
        same = self._chooses(count) == self._chooses(count + new)
        if self.residency and self.residency.wanted:  # pages go to slots of their own at first
            same &= self.residency.slots * self.page <= count
        return super().can_replay_demotion(new) and same

    # -- what is stored

    def write(self, fields, mean, at, before_write=lambda evicted: None, bound=None):
        tier = self.tiers[0]
        before = tier.records.count

        def reserved(evicted: Tensor | None) -> None:
            self._fit()
            before_write(evicted)

        super().write(fields, mean, at, reserved, bound)
        if at is None:
            self._summarize()
            self._make_resident(before, tier.records.count)
            self._admit(before, tier.records.count)
            return
        position = self.token_positions.of(at + self.config.n_sink)[:, None]
        self._summarize_at(at, position >= self.config.n_sink)
        if self.residency:
            room = self.residency.slots * self.page
            for name, x in self.resident.items():
                x.index_copy_(2, at.clamp_max(room), tier.records.tensors[name].index_select(2, at))
            if self.residency.wanted:  # more slots than pages: `can_replay_demotion`
                pages = at[:: self.page] // self.page
                self._bring(pages.expand(*self.residency.slot_of_page.shape[:2], -1))

    def _summarize(self) -> None:
        """Add the numbers of the pages that have none: of new ones, or of all that a file brought."""
        if self.summaries is None:
            return
        tier, start = self.tiers[0], self.summaries.tokens
        if start < (count := tier.records.count):
            # In float64, so that rounding to float16 gives the same numbers everywhere.
            keys = self.decode_keys(tier, start, count, torch.float64)
            self.summaries.append(keys, (self.position(tier) != PAD)[..., start:])

    def _summarize_at(self, at: Tensor, real: Tensor) -> None:
        """The same of slots `at` in a graph being captured; `real`, bool [B, 1, n]: which hold a token."""
        if self.summaries is None:
            return
        tier, size = self.tiers[0], self.summaries.page
        held = tier.records.tensors
        fields = {name: x.index_select(2, at) if name in KEY_FIELDS else x for name, x in held.items()}
        mean = self.means.tensors["mean"].index_select(2, at // self.per_mean)
        keys = tier.format.decode_keys(fields, mean, torch.float64)
        self.summaries.append(keys, real, at[::size] // size)

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
        """Give each page an entry, and residents as many slots as a step reads.

        Raises `ValueError` if there are too many pages to choose from.
        """
        most = select.MOST_PAGES * self.page
        if (room := self.tiers[0].records.capacity) > most:
            raise ValueError(
                f"room for {room} tokens: select={self.config.select!r} chooses from at most {most} in pages "
                f"of {self.page}, and select_page={PAGES[-1]} from {select.MOST_PAGES * PAGES[-1]}; use this "
                "select_page, or a smaller max_length"
            )
        if self.summaries:
            self.summaries.pages.reserve(self.tiers[0].records.capacity // self.summaries.page)
        if not self.residency:
            return
        self.residency.reserve(self.tiers[0].records.capacity // self.page)
        for name, x in self.resident.items():
            if (more := self.num_few - x.shape[2]) > 0:
                more = -(-more // self.page) * self.page
                self.resident[name] = torch.cat((x, x.new_zeros(*x.shape[:2], more, *x.shape[3:])), dim=2)

    @property
    def _wide(self) -> torch.dtype:
        """Dtype of masses."""
        return torch.promote_types(self.tiers[0].format.dtype, torch.float32)

    def _admit(self, start: int, stop: int) -> None:
        """Bring the pages of slots `start` to `stop` to the GPU, or the newest of them, if a policy asks."""
        if self.residency is None or self.residency.wanted is None:
            return
        first = max(start // self.page, stop // self.page - self.residency.slots, self.residency.slots)
        if first < stop // self.page:
            batch, heads = self.residency.slot_of_page.shape[:2]
            pages = torch.arange(first, stop // self.page, device=self.tallies[0].device)
            self._bring(pages.expand(batch, heads, -1))

    def _bring(self, pages: Tensor) -> None:
        """Fetch those of `pages` int64 [B, H, n] that are not on the GPU."""
        slots, fetched = self.residency.touch(pages, None)
        self._fetch(pages, slots, fetched)

    def loaded(self) -> None:
        self._make_resident(0, self.tiers[0].records.count)
        self._fit()
        self._summarize()
        self._admit(0, self.tiers[0].records.count)

    def count_replayed_demotion(self, new: int) -> None:
        super().count_replayed_demotion(new)
        if self.summaries:
            self.summaries.pages.count += new // self.summaries.page

    def buffers(self) -> dict[str, Buffers]:
        return super().buffers() | ({"index": self.summaries.pages} if self.summaries else {})

    def reserve(self, tokens: int) -> None:
        super().reserve(tokens)
        self._fit()

    def map(self, function) -> None:
        super().map(function)
        self.resident = {name: function(x) for name, x in self.resident.items()}
        self.newest = {name: function(x) for name, x in self.newest.items()}
        device = self.tiers[0].records.tensors[INDEX].device
        self.tallies = [x.to(device) for x in self.tallies]
        if self.residency:
            self.residency.map(function)
        if self.summaries:
            self.summaries.map(function)
        self._fit()

    def written(self, slots: range) -> list[Tensor]:
        found = super().written(slots)
        if self.summaries:
            found += self.summaries.pages.between(shared_by(slots, self.summaries.page))
        if self.residency:  # each row has its own pages on the GPU
            found += [*self.resident.values(), *self.residency.of_rows()]
        return [*found, *self.newest.values()]

    def tensors(self) -> list[Tensor]:
        lent = self.residency.tensors() if self.residency else []
        own = [*self.summaries.pages.tensors.values()] if self.summaries else []
        kept = [*self.tallies, *self.newest.values()]
        return [*super().tensors(), *kept, *self.resident.values(), *lent, *own]

    def host_tensors(self) -> list[Tensor]:
        return [self.tiers[0].records.tensors[name] for name in self.payload] if self.config.cold else []

    # -- a step that reads all

    def all_of_few(self, view: TierView) -> TierView:
        """The view of all tokens with whole key codes, where they are no more than a query may read."""
        if self.residency:
            # Fields that are no payload are on the GPU already.
            near = self.tiers[0].records.tensors | self.resident
            keys = Packed(near["key_codes"], *(near.get(name) for name in KEY_NUMBERS))
            values = Packed(near["value_codes"].mT, near.get("value_scale"), near.get("value_zero"))
            view = view._replace(keys=keys, values=values, key_index=near[INDEX])
        return view.beginning(min(self.tiers[0].num_read, self.num_few))

    # -- a step that chooses

    def choose(self, query: Tensor, keys: Tensor, seen: Tensor, view: TierView, **options) -> Choice:
        """The pages that each query and KV head reads.

        Args:
            query: [B, Hq, q, D].
            keys, seen: dense keys, and which of them each query sees; see `page_mass`.
            view: of the tier.
            options: `scaling` and `softcap`.
        """
        num_read, table, blocks = self.tiers[0].num_read, self.format.table, None
        if self.summaries:
            mass = self.summaries.mass(query, view.valid, num_read, **options)
            shortlisted = self.config.blocks_shortlisted
            if shortlisted is None:
                return self._choice(mass, view)
            if shortlisted < mass.shape[-1]:
                blocks, _ = select.choose(mass, shortlisted)
        if blocks is None:
            mass = page_mass(query, keys, seen, table, view, num_read, self.page, **options)
            return self._choice(mass, view)
        # Each query is a row of a batch of its own, whose tier are its blocks.
        new, size = query.shape[2], self.summaries.page
        rows = blocks.transpose(1, 2).flatten(0, 1)
        each = lambda x: x if new == 1 else x.repeat_interleave(new, dim=0)  # noqa: E731
        rows, keep = self._padded(rows, None, size)
        names = [name for name in (INDEX, *KEY_NUMBERS) if name in self.tiers[0].records.tensors]
        near = self._view_of(view, rows, keep, slice(0, new), {}, size, names)
        asked = query.transpose(1, 2).flatten(0, 1).unsqueeze(2).contiguous()
        sees = seen.expand(-1, new, -1).flatten(0, 1).unsqueeze(1)
        mass = page_mass(asked, each(keys), sees, table, near, near.capacity, self.page, **options)
        per_block = size // self.page
        count = blocks.shape[-1] * per_block  # pages that only fill up are not there to be chosen
        found, keep = select.choose(
            mass.narrow(-1, 0, count), min(self.most, count), self.share,
            rows.narrow(-1, 0, blocks.shape[-1]).unsqueeze(2), per_block,
        )  # fmt: skip
        back = lambda x: x.squeeze(2).unflatten(0, (-1, new)).transpose(1, 2)  # noqa: E731
        return Choice(back(found), None if keep is None else back(keep))

    def _choice(self, mass: Tensor, view: TierView) -> Choice:
        """The choice among all pages, by their mass [B, H, q, P]."""
        found = select.choose(mass, min(self.most, mass.shape[-1]), self.share)
        if not (self.residency and self.residency.wanted):
            return Choice(*found)
        seen = view.valid.narrow(-1, 0, mass.shape[-1] * self.page).unflatten(-1, (-1, self.page)).any(-1)
        return Choice(*found, mass, seen)

    def _view_of(
        self,
        view: TierView,
        index: Tensor,
        keep: Tensor | None,
        queries: slice,
        payload: dict[str, Tensor],
        page: int,
        names: Iterable[str] | None = None,
    ) -> TierView:
        """The view of some pages, a row for each of the m `queries` of a step.

        Slots of each head are their own, so heads are rows of the view's mask.

        Args:
            view: of the tier, B rows.
            index, keep: pages [B * m, H, n], and which of them count.
            payload: fields of these pages that are gathered already.
            page: slots of a page.
            names: fields that are needed; None: all.
        """
        tier, count = self.tiers[0], index.shape[0] // view.valid.shape[0]
        held = tier.records.tensors if names is None else {n: tier.records.tensors[n] for n in names}
        valid = view.valid if view.valid.shape[1] == 1 else view.valid[:, queries]
        valid = valid.expand(-1, count, -1).flatten(0, 1).contiguous()
        near = {n: x for n, x in held.items() if n not in payload}
        whole = "key_codes" in held
        join = (INDEX, "key_codes")
        found = pages.gather(
            near, self.means.tensors["mean"], valid, index, keep, page=page, per_mean=self.per_mean,
            join=join if whole else None, given={name: payload[name] for name in join if name in payload},
        )  # fmt: skip
        found = payload | found
        numbers = [found.get(name) for name in KEY_NUMBERS]
        bound = tier.bound if count == 1 else tier.bound.repeat_interleave(count, dim=0)
        means, valid = found["mean"], found["valid"].flatten(0, 1).unsqueeze(1)
        if not whole:
            codes = found[INDEX]
            empty = Packed(codes.mT, None, None)
            return TierView(Packed(codes, *numbers), empty, bound, means, valid, page, key_index=codes)
        values = Packed(found["value_codes"].mT, found.get("value_scale"), found.get("value_zero"))
        return TierView(Packed(found["key_codes"], *numbers), values, bound, means, valid, page)

    def num_together(self, new: int) -> int:
        """How many of the `new` queries of a step `chosen` takes at once.

        Pages that one query fetches may replace those of another, and compiled kernels serve one batch.
        """
        return 1 if self.residency or use_compiled(self.tallies[0]) else new

    def chosen(self, view: TierView, choice: Choice, first: int) -> TierView:
        """The view of the pages that some queries of the step read: an ordinary tier, a row for each query.

        Args:
            view: of the tier, B rows.
            choice: of these m queries.
            first: place of the first of them in the step.

        Returns a view of B * m rows.
        """
        count, wanted = choice.pages.shape[2], (choice.pages, choice.keep)
        wanted = [None if x is None else x.transpose(1, 2).flatten(0, 1) for x in wanted]
        index, keep = self._padded(*wanted, self.page)
        fetched, payload = None, {}
        if self.residency:
            if self.residency.wanted:
                self.residency.wanted.observe(choice.mass[:, :, 0], choice.seen)
            slots, fetched = self.residency.touch(index, keep)
            payload = self._fetch(index, slots, fetched)
        chosen = self._view_of(view, index, keep, slice(first, first + count), payload, self.page)
        self._count(chosen.valid, keep, fetched)
        if self.newest:
            self._keep_newest(*wanted, fetched, count)
        return chosen

    # -- what the newest query chose

    def keep_choices(self, wanted: bool) -> None:
        if wanted == bool(self.newest):
            return
        shape = (*self.tiers[0].records.tensors[INDEX].shape[:2], self.most)
        device = self.tallies[0].device
        self.newest = {}
        if wanted:
            page = torch.full(shape, -1, dtype=torch.int64, device=device)
            self.newest = dict(page=page, fetched=torch.zeros(shape, dtype=torch.bool, device=device))

    def forget_choices(self) -> None:
        for name, x in self.newest.items():
            x.fill_(-1 if name == "page" else False)

    def _keep_newest(self, index: Tensor, keep: Tensor | None, fetched: Tensor | None, count: int) -> None:
        """Keep the choice of the last of `count` queries, in place. Shapes as in `chosen`, m = count."""
        last = lambda x: x.unflatten(0, (-1, count))[:, -1]  # noqa: E731
        page, n = last(index), index.shape[-1]
        page = page if keep is None else page.masked_fill(~last(keep), -1)
        self.newest["page"].narrow(-1, 0, n).copy_(page)
        if fetched is not None:
            self.newest["fetched"].narrow(-1, 0, n).copy_(last(fetched)[..., :n])

    # -- gathers

    def _padded(self, index: Tensor, keep: Tensor | None, page: int) -> tuple[Tensor, Tensor | None]:
        """The same with more pages that do not count, where compiled kernels read a round number of slots."""
        if not use_compiled(index):
            return index, keep
        slots = index.shape[-1] * page
        more = -(-(packed.whole(index.shape[0] * index.shape[1], slots) - slots) // page)
        if not more:
            return index, keep
        keep = torch.ones_like(index, dtype=torch.bool) if keep is None else keep
        pad = torch.nn.functional.pad
        return pad(index, (0, more)), pad(keep, (0, more))

    def _fetch(self, index: Tensor, slots: Tensor, fetched: Tensor) -> dict[str, Tensor]:
        """The payload of the pages `index`: from the GPU, or from the host into its slot."""
        held = self.tiers[0].records.tensors
        far, near = ([pages.rows_of(x[n], self.page) for n in self.payload] for x in (held, self.resident))
        rows = _compiled.run(index, far, near, index, slots, fetched)
        shape = *index.shape[:2], index.shape[2] * self.page
        return {
            n: x.view(held[n].dtype).reshape(*shape, *held[n].shape[3:]) for n, x in zip(self.payload, rows)
        }

    def _count(self, valid: Tensor, keep: Tensor | None, fetched: Tensor | None) -> None:
        _compiled_count.run(valid, self.tallies, valid, keep, fetched)


def _add_counts(
    dynamic_sizes, tallies: list[Tensor], valid: Tensor, keep: Tensor | None, fetched: Tensor | None
) -> None:
    """Add to `SelectStore.tallies`: a step reads the `valid` slots, bool [N * H, 1, S].

    Counts of KV heads are left apart, so that one kernel of several programs counts and adds.
    """
    of_heads = lambda x: x.reshape(-1, len(tallies[0]), x.shape[-1])  # noqa: E731
    valid = of_heads(valid)
    read, queries = valid.sum((0, 2)), len(valid)
    tallies[READ].add_(read)
    tallies[QUERIES].add_(read.clamp(queries, queries))  # a constant, by the same kernel
    if fetched is not None:
        fetched = of_heads(fetched)
        found = ~fetched if keep is None else of_heads(keep) & ~fetched
        tallies[HITS].add_(found.sum((0, 2)))
        tallies[MISSES].add_(fetched.sum((0, 2)))


def _fetch_rows(
    dynamic_sizes, far: list[Tensor], near: list[Tensor], index: Tensor, slots: Tensor, fetched: Tensor
) -> list[Tensor]:
    """The pages `index` of each field in `far`, or the pages `slots` in `near`, as rows; see `pages.rows_of`.

    The pages that are `fetched` come from `far`, and are also written to their places in `near`. The last
    three arguments are [B, H, n]. One kernel fetches all fields: short rows alone would only wait.
    """
    head = torch.arange(index.shape[0] * index.shape[1], device=index.device).reshape(*index.shape[:2], 1)
    found = []
    for there, here in zip(far, near):
        far_row, near_row = (
            (head * (len(rows) // head.numel()) + at).flatten()
            for rows, at in ((there, index), (here, slots))
        )
        rows = rows_of_either(there, here, far_row, near_row, fetched.flatten())
        here.index_copy_(0, near_row, rows)
        found.append(rows)
    return found


_compiled = Compiled(_fetch_rows, options=TOGETHER)
_compiled_count = Compiled(_add_counts, options=TOGETHER | {"split_reductions": False})
