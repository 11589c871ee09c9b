"""The middle of a layer as codes of product quantisation: tier PQ, every token in the slot it got."""

import torch
from torch import Tensor

from fade_ref.tiers import Tier

from ..hf.codebooks import SIDES
from ..kernels import product
from .buffers import Buffers, Field
from .store import AppendStore, StoredTier


class ProductStore(AppendStore):
    """A middle without budgets whose records are codes alone: no scales, and no mean of keys.

    Args:
        books: codebooks of keys (after RoPE) and of values, [m, k, w] each, on the device of the layer.
        args: as `CompressedStore` takes them.
    """

    def __init__(self, codebooks: tuple[Tensor, Tensor], *args):
        self.codebooks = codebooks
        super().__init__(*args)

    def _open(self, batch: int, heads: int) -> None:
        fields = {
            f"{side}_codes": Field((len(book),), torch.uint8, heads)
            for side, book in zip(SIDES, self.codebooks)
        }
        records = Buffers(fields, self.step, batch, self.table.device)
        self.tiers = [StoredTier(Tier.PQ, None, records, None)]

    def demote(self, keys, values, first, seen, attention_stats, ready=lambda evicted: None):
        pairs = zip(SIDES, (keys, values), self.codebooks)
        fields, at = {f"{side}_codes": product.encode(x, book) for side, x, book in pairs}, None
        if self.token_positions.cursor is not None:
            at = self.token_positions.index(first, keys.shape[2]) - self.config.n_sink
        with self._whole():
            self.tiers[0].append(at, **fields)
            ready(None)

    def can_replay_demotion(self, new: int) -> bool:
        return 0 < self.count and self.count + new <= self.tiers[0].num_read

    def count_replayed_demotion(self, new: int) -> None:
        self.tiers[0].records.count += new

    def decode_keys(self, tier: StoredTier, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return product.decode(tier.records["key_codes"][:, :, start:stop], self.codebooks[0], dtype)

    def decode_values(self, tier: StoredTier, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return product.decode(tier.records["value_codes"][:, :, start:stop], self.codebooks[1], dtype)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.codebooks]
