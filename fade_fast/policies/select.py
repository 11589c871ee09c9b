"""Choosing pages by their mass, and the pages that stay on the GPU. Shapes are static, and no host waits."""

import torch
from torch import Tensor

from .residents import Wanted

PAGE_BITS = 32  # of a sorting key that number the page


def choose(mass: Tensor, pages: int, share: float | None = None) -> tuple[Tensor, Tensor | None]:
    """The heaviest pages of each query and KV head, heaviest first; of equal pages, the newer one first.

    Args:
        mass: [B, H, q, P], not negative.
        pages: how many to choose, at most P.
        share: stop as soon as the chosen pages hold this share of the mass.

    Returns pages int64 [B, H, q, pages], and bool of the same shape, which of them are to be read; None: all.
    """
    # One number per page: first its mass, as bits that sort like the number, then its age. No two are equal,
    # so every device chooses the same pages in the same order.
    bits = mass.to(torch.float32).view(torch.int32).to(torch.int64)
    key = (bits << PAGE_BITS) | torch.arange(mass.shape[-1], device=mass.device)
    index = key.topk(pages, dim=-1).indices
    if share is None:
        return index, None
    weight = mass.gather(-1, index)
    before = weight.cumsum(-1) - weight
    keep = before < share
    keep[..., 0] = True
    return index, keep


class Residency:
    """Which pages of the payload lie in the slots on the GPU, for each row and KV head.

    At first slot i holds page i, for every slot there is: the first pages go there when they are stored. All
    changes are in place, and nothing waits for the host.

    Args:
        batch, heads: rows and KV heads.
        slots: slots of a row and head, at least as many as pages that a step uses.
        device: of the tensors.
        wanted: says which pages stay first. None: those used last.

    Attributes:
        page_of_slot, last_used: int64 [B, H, slots + 1]. slot_of_page: int64 [B, H, pages + 1], -1 where a
            page is absent. The last entry of each takes writes that mean nothing.
        clock: int64 [1], steps so far.
    """

    def __init__(self, batch: int, heads: int, slots: int, device, wanted: Wanted | None = None):
        self.slots, self.wanted = slots, wanted
        first = torch.arange(slots + 1, device=device)
        self.page_of_slot = first.expand(batch, heads, -1).clone()
        self.slot_of_page = self.page_of_slot.clone()
        self.last_used = torch.full_like(self.page_of_slot, -1)
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)

    def reserve(self, pages: int) -> None:
        """Make room for `pages` pages in all."""
        held = self.slot_of_page.shape[-1] - 1
        if pages > held:
            self.slot_of_page = torch.nn.functional.pad(
                self.slot_of_page[..., :held], (0, pages + 1 - held), value=-1
            )
        if self.wanted:
            self.wanted.reserve(pages)

    def touch(self, index: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Use some pages in a step: those that are absent replace the ones unused longest, or wanted least.

        Args:
            index: pages int64 [B, H, n], no two of those in use equal.
            keep: bool [B, H, n], which of them are in use, at most `slots`; None: all.

        Returns the slot of each page, int64 [B, H, n], `slots` for pages that are not in use; and bool
        [B, H, n], which have to be fetched into their slots.
        """
        nowhere, none = self.slots, self.slot_of_page.shape[-1] - 1
        found = self.slot_of_page.gather(-1, index)
        used = torch.ones_like(found, dtype=torch.bool) if keep is None else keep
        hit = used & (found >= 0)
        miss = used & ~hit
        now = self.clock.expand_as(found)
        self.last_used.scatter_(-1, torch.where(hit, found, nowhere), now)
        # One number per slot, by use and then by place: no two are equal.
        age = self.last_used[..., :-1] * self.slots + torch.arange(self.slots, device=index.device)
        most = min(index.shape[-1], self.slots)
        if self.wanted is None:
            oldest = age.topk(most, dim=-1, largest=False).indices
        else:
            oldest = self._by_rank(age)[..., :most]
        replaced = oldest.gather(-1, (miss.cumsum(-1) - 1).clamp(0, most - 1))
        old = self.page_of_slot.gather(-1, replaced)
        absent = torch.full_like(old, -1)
        self.slot_of_page.scatter_(-1, torch.where(miss, old, none), absent)
        self.slot_of_page.scatter_(-1, torch.where(miss, index, none), replaced)
        here = torch.where(miss, replaced, nowhere)
        self.page_of_slot.scatter_(-1, here, index)
        self.last_used.scatter_(-1, here, now)
        self.clock.add_(1)
        return torch.where(hit, found, here), miss

    def _by_rank(self, age: Tensor) -> Tensor:
        """Slots [B, H, slots], those of this step last, before them the page wanted most, and so on."""
        ranks = torch.nn.functional.pad(self.wanted.ranks(), (0, 1))
        page = self.page_of_slot[..., :-1].clamp_max(ranks.shape[-1] - 1)
        rank = ranks.gather(-1, page).masked_fill(self.last_used[..., :-1] == self.clock, torch.inf)
        order = age.argsort(dim=-1)
        return order.gather(-1, rank.gather(-1, order).argsort(dim=-1, stable=True))

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        more = self.wanted.tensors() if self.wanted else []
        return [self.page_of_slot, self.slot_of_page, self.last_used, self.clock, *more]

    def map(self, function) -> None:
        """Replace every tensor that has rows by `function` of it."""
        for name in ("page_of_slot", "slot_of_page", "last_used"):
            setattr(self, name, function(getattr(self, name)))
        if self.wanted:
            self.wanted.map(function)
        self.clock = self.clock.to(self.last_used.device)
