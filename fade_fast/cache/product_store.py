"""The middle of a layer as codes of product quantisation: tier PQ, every token in the slot it got."""

import torch
from torch import Tensor

from fade_ref.tiers import Tier

from ..hf.codebooks import SIDES
from ..kernels import product
from .buffers import Buffers, Field
from .store import MiddleTier, PinnedMiddle


class CodedMiddle(PinnedMiddle):
    """A middle without budgets whose records are codes alone: no scales, and no mean of keys.

    Args:
        books: codebooks of keys (after RoPE) and of values, [m, k, w] each, on the device of the layer.
        args: as `Middle` takes them.
    """

    def __init__(self, books: tuple[Tensor, Tensor], *args):
        self.books = books
        super().__init__(*args)

    def _open(self, batch: int, heads: int) -> None:
        fields = {
            f"{side}_codes": Field((len(book),), torch.uint8, heads) for side, book in zip(SIDES, self.books)
        }
        records = Buffers(fields, self.step, batch, self.table.device)
        self.tiers = [MiddleTier(Tier.PQ, None, records, None)]

    def demote(self, keys, values, first, seen, received, ready=lambda evicted: None):
        pairs = zip(SIDES, (keys, values), self.books)
        fields, at = {f"{side}_codes": product.encode(x, book) for side, x, book in pairs}, None
        if self.timeline.cursor is not None:
            at = self.timeline.index(first, keys.shape[2]) - self.config.n_sink
        with self._whole():
            self.tiers[0].append(at, **fields)
            ready(None)

    def repeats(self, new: int) -> bool:
        return 0 < self.count and self.count + new <= self.tiers[0].span

    def repeat(self, new: int) -> None:
        self.tiers[0].records.count += new

    def decode_keys(self, tier: MiddleTier, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return product.decode(tier.records["key_codes"][:, :, start:stop], self.books[0], dtype)

    def decode_values(self, tier: MiddleTier, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return product.decode(tier.records["value_codes"][:, :, start:stop], self.books[1], dtype)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.books]
