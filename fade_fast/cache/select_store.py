"""A store that keeps every token, and of which a short step reads the pages that its queries choose.

A page is a run of `select_page` slots. The index, which scores every token, is a part of the records: the
upper bits of the key codes (`formats/split.py`). The chosen pages are gathered into a view of fixed size, a
plain INT4 tier, and attention reads it as any other.
"""

import torch
from torch import Tensor

from ..compile.compiled import use_compiled
from ..formats.split import INDEX
from ..kernels import halves, packed
from ..kernels.packed import TierView
from ..kernels.rotated import Packed
from ..kernels.select import page_mass
from ..policies import select
from .append_store import AppendStore

#: Fields of the index beside `INDEX`. All others are payload: only tokens that are chosen need them.
KEY_NUMBERS = ("key_scale", "key_zero")
QUERIES, READ = range(2)  # what `SelectStore.counted` counts


class SelectStore(AppendStore):
    """An `AppendStore` whose pages are chosen.

    Attributes:
        counted: int64 [2] on the device, over all short steps that chose: queries times KV heads, and the
            tokens of the middle that these read.
    """

    def __init__(self, *args):
        super().__init__(*args)
        config, codes = self.config, self.tiers[0].records.tensors[INDEX]
        self.page, self.most = config.select_page, config.tokens_selected // config.select_page
        self.share = config.select if isinstance(config.select, float) else None
        self.counted = torch.zeros(2, dtype=torch.int64, device=codes.device)

    @property
    def chooses(self) -> bool:
        """Whether a short step reads a part: there are more tokens than it may read."""
        return self._chooses(self.tiers[0].records.count)

    def _chooses(self, count: int) -> bool:
        return count > (0 if self.share is not None else self.most * self.page)

    def can_replay_demotion(self, new: int) -> bool:
        count = self.tiers[0].records.count
        return super().can_replay_demotion(new) and self._chooses(count) == self._chooses(count + new)

    def tensors(self):
        return [*super().tensors(), self.counted]

    # -- a step that chooses

    def choose(self, query: Tensor, keys: Tensor, seen: Tensor, view: TierView, **options) -> tuple:
        """Pages that each query and KV head reads, int64 [B, H, q, n], and which of them count; None: all.

        Args:
            query: [B, Hq, q, D].
            keys, seen: dense keys, and which of them each query sees; see `page_mass`.
            view: of the tier.
            options: `scaling` and `softcap`.
        """
        tier = self.tiers[0]
        mass = page_mass(query, keys, seen, self.format.table, view, tier.num_read, self.page, **options)
        return select.choose(mass, min(self.most, mass.shape[-1]), self.share)

    def chosen(self, view: TierView, index: Tensor, keep: Tensor | None, query: int) -> TierView:
        """The view of the pages that one query of the step reads, as an ordinary tier.

        Args:
            view: of the tier.
            index, keep: from `choose`, for this query: [B, H, n].
            query: its place in the step.
        """
        tier, page = self.tiers[0], self.page
        tensors = tier.records.tensors
        index, keep = self._padded(index, keep)
        of_index = {
            name: pages_of(tensors[name], page, index) for name in (INDEX, *KEY_NUMBERS) if name in tensors
        }
        payload = {
            name: pages_of(tensors[name], page, index) for name in tier.format_fields if name not in of_index
        }
        codes = halves.join(of_index[INDEX], payload["key_codes"])
        keys = Packed(codes, of_index["key_scale"], of_index.get("key_zero"))
        values = Packed(payload["value_codes"].mT, payload.get("value_scale"), payload.get("value_zero"))
        means = pages_of(self.means.tensors["mean"], 1, index * page // self.per_mean)
        row = min(query, view.valid.shape[1] - 1)
        valid = self._valid(view.valid[:, row], index, keep)
        self.counted.add_(
            torch.stack((torch.full_like(self.counted[0], index.shape[0] * index.shape[1]), valid.sum()))
        )
        return TierView(keys, values, tier.bound, means, valid.flatten(0, 1).unsqueeze(1), page)

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
        """Which slots of the chosen pages hold a token that counts, bool [B, H, n * page]; `valid` is [B,
        S]."""
        pages = valid.unflatten(-1, (-1, self.page))
        row = torch.arange(len(pages), device=pages.device).reshape(-1, 1, 1)
        found = pages[row, index]  # one row [page] for each chosen page
        return (found if keep is None else found & keep.unsqueeze(-1)).flatten(-2)


def pages_of(x: Tensor, page: int, index: Tensor) -> Tensor:
    """Pages `index` int64 [B, H, n] of a field [B, H, S, *shape]: [B, H, n * page, *shape].

    A page is one run of bytes, which moves in words of eight bytes where possible.
    """
    batch, heads, slots = x.shape[:3]
    rows = x.reshape(batch * heads * (slots // page), -1)
    size = rows.shape[1] * rows.element_size()
    words = (
        rows.view(torch.int64) if size % 8 == 0 and x.storage_offset() * x.element_size() % 8 == 0 else rows
    )
    first = torch.arange(batch * heads, device=x.device).reshape(batch, heads, 1) * (slots // page)
    found = words.index_select(0, (first + index).flatten()).view(x.dtype)
    return found.reshape(batch, heads, index.shape[-1] * page, *x.shape[3:])
