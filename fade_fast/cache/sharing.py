"""Slots that the rows of a text share: a step of a beam search reads them once for all beams.

A beam search makes the rows of a text equal once (`beams.py`). In a store that appends, tokens keep their
slots. So until the search ends, the slots that were in use then are equal to the bit in all rows of a text.
Attention reads them of the first row of each text, with the queries of all its beams as rows of one product,
and reads the later slots of each row.
"""

from typing import NamedTuple

import torch

from ..kernels import packed
from ..kernels.decode import MOST_ROWS
from ..kernels.packed import TierView
from ..kernels.rotated import Packed
from .store import StoredTier

#: Slots, over rows and heads, that a step need not read. With fewer, the kernels for what is not shared take
#: longer than this reading. The first number is for compiled kernels.
LEAST_COMPILED, LEAST_EAGER = 1 << 17, 1 << 13


class Reads(NamedTuple):
    """Slots that a step reads of a tier: the first `shared` of each text, and `own` from `first` on of each
    row. Kernels ignore slots that belong to the other part.
    """

    shared: int
    first: int
    own: int


class Sharing(NamedTuple):
    """What rows of a layer share.

    Attributes:
        beams: rows that are read together; they follow one another.
        slots: the first slots, which are equal in these rows.
    """

    beams: int
    slots: int

    @classmethod
    def of(cls, tier: StoredTier, beams: int, slots: int, group: int) -> "Sharing | None":
        """How steps read a tier whose rows are equal in so many slots; None: each row reads for itself.

        Args:
            beams: rows of a text.
            group: query heads of a KV head.
        """
        rows, heads = tier.records.tensors["key_codes"].shape[:2]
        # The compiled product has a limit. Then some beams of a text read together.
        together = max(
            n for n in range(1, beams + 1) if beams % n == 0 and (n == 1 or n * group <= MOST_ROWS)
        )
        compiled = tier.records.compiled
        spared = (rows - rows // together) * heads * slots
        if together == 1 or not slots or spared < (LEAST_COMPILED if compiled else LEAST_EAGER):
            return None
        # What is not shared is read in steps, which must fit into the buffer. There must be several chunks.
        if compiled and slots - tier.records.step <= 2 * packed.coarsest(rows * heads):
            return None
        return cls(together, slots)

    def reads(self, tier: StoredTier, count: int | None = None) -> Reads:
        """What a step reads if `count` slots are in use; None: those that are in use now."""
        count = tier.records.count if count is None else count
        if not tier.records.compiled:
            return Reads(self.slots, self.slots, count - self.slots)
        rows, heads = tier.records.tensors["key_codes"].shape[:2]
        all_heads, step = rows * heads, tier.records.step
        own = packed.bucket(all_heads, max(1, count - self.slots))
        while own == packed.chunk_of(all_heads, own, 1):  # a single chunk would need kernels of its own
            own = packed.bucket(all_heads, own + 1)
        first = min(self.slots, (tier.most_read - own) // step * step)
        return Reads(packed.whole(all_heads // self.beams, self.slots), first, own)

    def more_at(self, tier: StoredTier) -> int | None:
        """Slots in use with which a step reads more of them; None: it then takes other buffers or kernels."""
        now = self.reads(tier)
        last = now.first + now.own
        if not tier.records.compiled or last >= tier.most_read:
            return None
        rows, heads = tier.records.tensors["key_codes"].shape[:2]
        later = self.reads(tier, last + 1).own
        chunks = {packed.chunk_of(rows * heads, n, 1) for n in (now.own, later)}
        return last + 1 if len(chunks) == 1 else None

    def parts(self, view: TierView) -> list[TierView]:
        """A view of the slots that are shared, with a row for each text, and one of all rows for the rest."""
        text = lambda x: None if x is None else x[:: self.beams]  # noqa: E731
        valid, first = view.valid, text(view.valid)
        if not view.full:
            later = torch.arange(view.capacity, device=valid.device) >= self.slots
            valid, first = valid & later, first & ~later
        keys, values = (Packed(*map(text, side)) for side in (view.keys, view.values))
        rest = dict(bound=text(view.bound), means=text(view.means), read_at=text(view.read_at))
        shared = view._replace(keys=keys, values=values, valid=first, beams=self.beams, **rest)
        return [shared, view._replace(valid=valid)]
