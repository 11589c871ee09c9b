"""The `product` format: one tier of product-quantization codes, which needs a codebook per layer and side."""

from collections.abc import Callable

import torch
from torch import Tensor

from fade_ref.tiers import Tier

from ..kernels import dense, product, product_decode
from ..kernels.merge import combine, empty
from ..kernels.packed import TierView
from ..kernels.rotated import Packed
from .base import Field, Format, TierFormat

SIDES = ("key", "value")
TILE = 2048  # keys decoded at a time


class ProductTier(TierFormat):
    """Codes alone: no scales, and no key means.

    Args:
        codebooks: of keys (after RoPE) and of values, [m, k, w] each; see `kernels/product.py`.
    """

    tier, name, has_bound = Tier.PQ, Tier.PQ.name, False

    def __init__(self, codebooks: tuple[Tensor, Tensor]):
        self.codebooks = codebooks

    def fields(self, heads):
        return {
            f"{side}_codes": Field((len(book),), torch.uint8, heads)
            for side, book in zip(SIDES, self.codebooks)
        }

    def encode(self, keys, values, mean, recurs):
        sides = zip(SIDES, (keys, values), self.codebooks)
        return {f"{side}_codes": product.encode(x, book) for side, x, book in sides}

    def decode_keys(self, fields, mean, dtype):
        return product.decode(fields["key_codes"], self.codebooks[0], dtype)

    def decode_values(self, fields, dtype):
        return product.decode(fields["value_codes"], self.codebooks[1], dtype)

    def view(self, tensors, bound, means, valid, per_mean, read_at):
        keys, values = (Packed(tensors[f"{side}_codes"], None, None) for side in SIDES)
        return TierView(keys, values, bound, means, valid, per_mean, read_at)


class ProductFormat(Format):
    """Tier PQ, which keeps every token.

    Args:
        codebooks: of keys and of values, [m, k, w] each, on any device.
        tables: see `Format`. Attention over dense tokens needs them.
    """

    def __init__(self, codebooks: tuple[Tensor, Tensor], tables: Callable[[int, torch.device], Tensor]):
        super().__init__(tables)
        self.codebooks = codebooks

    @property
    def tiers(self):
        return [ProductTier(self.codebooks)]

    @property
    def compresses(self):
        return True

    def check(self, head_dim, layer, heads=None):
        for side, book in zip(("keys", "values"), self.codebooks):
            channels = book.shape[0] * book.shape[2]
            if channels != head_dim:
                raise ValueError(
                    f"layer {layer} has {side} of {head_dim} channels, its codebook is for {channels}: train "
                    "codebooks on this model with `fade train-codebook`"
                )

    def allocate(self, head_dim, dtype, device):
        super().allocate(head_dim, dtype, device)
        self.codebooks = tuple(book.to(device) for book in self.codebooks)

    @property
    def table_bytes(self):
        return sum(book.nbytes for book in self.codebooks)

    def tensors(self):
        return [*super().tensors(), *self.codebooks]

    def attend(
        self,
        query,
        keys,
        values,
        visible,
        tiers,
        views: list[TierView],
        slots_read,
        *,
        rope,
        mass=None,
        **options,
    ):
        """Codes are looked up in tables of the query. `mass` is of policies, which need budgets."""
        if not views:
            return super().attend(
                query, keys, values, visible, tiers, views, slots_read, rope=rope, mass=mass, **options
            )
        return product_decode.attend(
            query, keys, values, visible, *views, *slots_read, self.codebooks, **options
        )

    def attend_tier(self, tier, query, view, count, score_reference, rope, softcap):
        """Tokens are decoded: many queries share that, and each would need tables of its own."""
        whole = empty(query)
        for start in range(0, count, TILE):
            tile = slice(start, min(start + TILE, count))
            keys = product.decode(view.keys.codes[:, :, tile], self.codebooks[0], query.dtype)
            values = product.decode(view.values.codes[:, :, tile], self.codebooks[1], query.dtype)
            visible = view.valid[:, None, :, tile]
            whole = combine(whole, dense.attend(query, keys, values, visible, softcap))
        return whole
