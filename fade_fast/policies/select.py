"""Choosing pages by their mass, and the pages that stay on the GPU. Shapes are static, and no host waits."""

import torch
from torch import Tensor

from ..compile.compiled import Compiled
from .residents import Wanted

PAGE_BITS = 17  # of a sorting key, an int32, that number the page
MOST_PAGES = 1 << PAGE_BITS


def choose(
    mass: Tensor, pages: int, share: float | None = None, ages: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The heaviest pages of each query and KV head; of equal pages, the newer one. With `share`, the heaviest
    one comes first.

    Args:
        mass: [B, H, q, P], not negative. Masses are compared by their seven most significant bits.
        pages: how many to choose, at most P.
        share: stop as soon as the chosen pages hold this share of the mass.
        ages: integers [B, H, q, P] or [P], below `MOST_PAGES`, larger for newer pages, no two of a row equal;
            None: 0, 1, 2, ...

    Returns pages int64 [B, H, q, pages], and bool of the same shape, which of them are to be read; None: all.
    """
    # One number per page: first its mass, as bits that sort like the number, then its age. No two are equal,
    # so every device chooses the same pages. Few bits are sorted fast: a mass keeps seven significant ones.
    bits = mass.to(torch.float32).view(torch.int32) >> PAGE_BITS
    ages = torch.arange(mass.shape[-1], device=mass.device) if ages is None else ages
    key = (bits << PAGE_BITS) | ages.to(torch.int32)
    index = key.topk(pages, dim=-1, sorted=share is not None).indices
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
        held = self.page_of_slot, self.slot_of_page, self.last_used, self.clock
        ranks = self.wanted.ranks() if self.wanted else None
        return _compiled_touch.run(index, index, keep, ranks, *held)

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


def _touch(
    dynamic_sizes,
    index: Tensor,
    keep: Tensor | None,
    ranks: Tensor | None,
    page_of_slot: Tensor,
    slot_of_page: Tensor,
    last_used: Tensor,
    clock: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `Residency.touch`. The tensors of a `Residency` change in place.

    `ranks` [B, H, pages] says how much each page is wanted; None: by use alone.
    """
    nowhere, none = page_of_slot.shape[-1] - 1, slot_of_page.shape[-1] - 1
    found = slot_of_page.gather(-1, index)
    used = torch.ones_like(found, dtype=torch.bool) if keep is None else keep
    hit = used & (found >= 0)
    miss = used & ~hit
    now = clock.expand_as(found)
    last_used.scatter_(-1, torch.where(hit, found, nowhere), now)
    # One number per slot, by use and then by place: no two are equal.
    age = last_used[..., :-1] * nowhere + torch.arange(nowhere, device=index.device)
    most = min(index.shape[-1], nowhere)
    if ranks is None:
        oldest = age.topk(most, dim=-1, largest=False).indices
    else:
        oldest = _by_rank(age, ranks, page_of_slot[..., :-1], last_used[..., :-1] == clock)[..., :most]
    replaced = oldest.gather(-1, (miss.cumsum(-1) - 1).clamp(0, most - 1))
    old = page_of_slot.gather(-1, replaced)
    absent = torch.full_like(old, -1)
    slot_of_page.scatter_(-1, torch.where(miss, old, none), absent)
    slot_of_page.scatter_(-1, torch.where(miss, index, none), replaced)
    here = torch.where(miss, replaced, nowhere)
    page_of_slot.scatter_(-1, here, index)
    last_used.scatter_(-1, here, now)
    clock.add_(1)
    return torch.where(hit, found, here), miss


def _by_rank(age: Tensor, ranks: Tensor, page: Tensor, used: Tensor) -> Tensor:
    """Slots [B, H, slots], those `used` in this step last, before them the page wanted most, and so on.

    `age`, `page` and `used` are those of the slots, [B, H, slots].
    """
    ranks = torch.nn.functional.pad(ranks, (0, 1))
    rank = ranks.gather(-1, page.clamp_max(ranks.shape[-1] - 1)).masked_fill(used, torch.inf)
    order = age.argsort(dim=-1)
    return order.gather(-1, rank.gather(-1, order).argsort(dim=-1, stable=True))


_compiled_touch = Compiled(_touch, options={})
