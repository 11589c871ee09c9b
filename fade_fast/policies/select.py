"""Choosing pages by their mass, and the pages that stay on the GPU. Shapes are static, and no host waits."""

import torch
from torch import Tensor

from ..compile.compiled import Compiled, use_compiled
from .residents import Wanted

PAGE_BITS = 17  # of a sorting key, an int32, that number the page
MOST_PAGES = 1 << PAGE_BITS
TAKEN = torch.iinfo(torch.int64).max  # age of a slot that a step uses already


def choose(
    mass: Tensor,
    pages: int,
    share: float | None = None,
    blocks: Tensor | None = None,
    per_block: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The heaviest pages of each query and KV head; of equal pages, the older one. With `share`, the heaviest
    one comes first.

    Args:
        mass: [B, H, q, P], not negative. Masses are compared by their seven most significant bits.
        pages: how many to choose, at most P.
        share: stop as soon as the chosen pages hold this share of the mass.
        blocks: int64 [B, H, q, n]. The masses are those of the `per_block` pages of block `blocks[..., 0]`,
            then of `blocks[..., 1]`, and so on; no two blocks of a row are equal. None: of all pages, in
            order.

    Returns pages int64 [B, H, q, pages], and bool of the same shape, which of them are to be read; None: all.
    """
    options = dict(pages=pages, share=share, per_block=per_block)
    if not use_compiled(mass) or pages == mass.shape[-1]:
        return _choose([mass], blocks, **options)
    mass, sizes = mass.contiguous(), mass.shape
    if blocks is None:  # the number of pages grows with the text
        torch._dynamo.mark_dynamic(mass, 3)
        sizes = mass.shape[:3]
    return _compiled_choose([mass], dict, blocks, sizes=sizes, **options)


def _choose(
    masses: list[Tensor],
    blocks: Tensor | None,
    *,
    pages: int,
    share: float | None,
    per_block: int,
    sizes: torch.Size | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `choose`. `masses` has one tensor; its fixed `sizes` tell compiled versions apart."""
    (mass,) = masses
    bits = mass.to(torch.float32).view(torch.int32) >> PAGE_BITS  # sort like the numbers they are cut from
    if blocks is None and share is None and mass.is_cuda:
        # A GPU sorts few bits fast, and of equal numbers it takes those that come first.
        return bits.to(torch.int16).topk(pages, dim=-1, sorted=False).indices, None
    # One number per page: first its mass, then the page. No two are equal, so the result depends on no order.
    numbers = torch.arange(mass.shape[-1] if blocks is None else per_block, device=mass.device)
    if blocks is not None:
        numbers = (blocks.unsqueeze(-1) * per_block + numbers).flatten(-2)
    key = (bits << PAGE_BITS) | (MOST_PAGES - 1 - numbers).to(torch.int32)
    found = key.topk(pages, dim=-1, sorted=share is not None)
    index = found.indices
    if blocks is not None:
        index = (MOST_PAGES - 1 - (found.values & (MOST_PAGES - 1))).to(torch.int64)
    if share is None:
        return index, None
    weight = mass.gather(-1, found.indices)
    before = weight.cumsum(-1) - weight
    keep = before < share
    return index, torch.cat((torch.ones_like(keep[..., :1]), keep[..., 1:]), dim=-1)


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

    def of_rows(self) -> list[Tensor]:
        """Every tensor that has rows."""
        more = self.wanted.stats.values() if self.wanted else []
        return [self.page_of_slot, self.slot_of_page, self.last_used, *more]

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
    # One number per slot, by use and then by place: no two are equal. Slots that are not to be had come last.
    place, most = torch.arange(nowhere + 1, device=index.device), min(index.shape[-1], nowhere)
    age = torch.where(place == nowhere, TAKEN, last_used * nowhere + place)
    _put(age, torch.where(hit, found, nowhere), torch.full_like(found, TAKEN))
    if ranks is None:
        oldest = age.topk(most, dim=-1, largest=False).indices
    else:
        oldest = _by_rank(age[..., :-1], ranks, page_of_slot[..., :-1])[..., :most]
    replaced = oldest.gather(-1, (miss.cumsum(-1) - 1).clamp(0, most - 1))
    old = page_of_slot.gather(-1, replaced)
    # One write to each tensor: the compiler makes a copy for two.
    gone, new = torch.where(miss, old, none), torch.where(miss, index, none)
    absent = torch.full_like(old, -1)
    _put(slot_of_page, torch.cat((gone, new), dim=-1), torch.cat((absent, replaced), dim=-1))
    here = torch.where(miss, replaced, nowhere)
    slots = torch.where(hit, found, here)
    _put(page_of_slot, here, index)
    _put(last_used, slots, clock.expand_as(slots))
    clock.add_(1)
    return slots, miss


def _put(x: Tensor, at: Tensor, values: Tensor) -> None:
    """`x.scatter_(-1, at, values)` of a contiguous tensor [B, H, n]. The compiler would scatter in a copy."""
    rows = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(*x.shape[:2], 1) * x.shape[-1]
    x.view(-1).index_copy_(0, (rows + at).flatten(), values.flatten())


def _by_rank(age: Tensor, ranks: Tensor, page: Tensor) -> Tensor:
    """Slots [B, H, slots], those that are `TAKEN` last, before them the page wanted most, and so on.

    `age` and `page` are those of the slots, [B, H, slots].
    """
    ranks = torch.nn.functional.pad(ranks, (0, 1))
    rank = ranks.gather(-1, page.clamp_max(ranks.shape[-1] - 1)).masked_fill(age == TAKEN, torch.inf)
    order = age.argsort(dim=-1)
    return order.gather(-1, rank.gather(-1, order).argsort(dim=-1, stable=True))


_compiled_choose = Compiled(_choose, options={})
_compiled_touch = Compiled(_touch, options={})
