"""The `matched` format: codes whose matrices fit the keys and queries of a model; see `fade_ref.matched`."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels import matched, rotated
from ..kernels.matched import Matrices
from ..kernels.rope import RoPE, rotate
from .rotated import RotatedFormat, RotatedTier, pack_record, requantize

#: Mean of the keys [H, D] float32, and matrices of keys and of values, on a device.
Tables = tuple[Tensor, Matrices, Matrices]


def joined_tables(tables: Sequence[Tensor]) -> Tensor:
    """Tables [H, ...] of several layers as one tensor [layers * H, ...]: without a copy, if they lie one
    after another in one stack.
    """
    first, size = tables[0], tables[0].numel()
    follows = all(
        x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and x.storage_offset() == first.storage_offset() + i * size
        and x.is_contiguous()
        and x.shape == first.shape
        for i, x in enumerate(tables)
    )
    if not follows:
        return torch.cat(list(tables))
    shape = len(tables) * first.shape[0], *first.shape[1:]
    return first.as_strided(shape, first.stride(), first.storage_offset())


class MatchedTier(RotatedTier):
    """Symmetric codes of `bits` = (keys, values), with one scale per vector."""

    has_zero = False

    def __init__(self, bits, matrices: tuple[Matrices, Matrices], tier, dtype):
        super().__init__(bits, matrices[0].decode, tier, dtype)
        self.matrices = matrices

    @property
    def value_matrix(self):
        return self.matrices[1].decode

    def encode(self, keys, values, mean, recurs):
        return pack_record(*matched.encode_both(keys, values, mean, self.matrices, self.bits, recurs))

    def requantize(self, fields, source):
        quantize = [
            lambda y, bits, side=side: matched.quantize(y, side.feedback, bits) for side in self.matrices
        ]
        return requantize(fields, source.bits, self.bits, quantize)


class MatchedFormat(RotatedFormat):
    """One or two tiers of the `matched` codec.

    Args:
        widths: of keys and values in each tier, finest first; none where the layer is not compressed.
        tables: `(device)` -> the tables of this layer. All caches of a model share them.
        rope: how the model rotates the keys of this layer, where the mean follows the positions of a block;
            None where one mean serves all tokens.
        tier_class: as in `RotatedFormat`.
    """

    def __init__(
        self,
        widths: list[tuple[int, int]],
        tables: Callable[[torch.device], Tables],
        rope: Callable[[], RoPE] | None,
        tier_class: type[MatchedTier] = MatchedTier,
    ):
        super().__init__(widths, lambda dim, device: None, tier_class)
        self._of_device, self.rope = tables, rope

    @property
    def shared(self):
        frequencies = None if self.rope is None else (id(self.rope().inv_freq), self.rope().interleaved)
        return type(self), tuple(self.widths), self.tier_class, frequencies

    @property
    def has_own_tables(self):
        return True

    @staticmethod
    def joined(formats):
        tables = [(x.mean, *x.matrices[0], *x.matrices[1]) for x in formats]
        mean, *sides = (joined_tables(x) for x in zip(*tables))
        made = copy.copy(formats[0])
        made._of_device = lambda device: (mean, Matrices(*sides[:3]), Matrices(*sides[3:]))
        made.allocate(formats[0].tiers[0].head_dim, formats[0].tiers[0].dtype, mean.device)
        return made

    def check(self, head_dim, layer, heads=None):
        super().check(head_dim, layer, heads)
        mean, *_ = self._of_device(torch.device("cpu"))
        if heads not in (None, len(mean)):
            raise ValueError(f"layer {layer} has {heads} KV heads, its calibration is for {len(mean)}")
        if mean.shape[-1] != head_dim:
            raise ValueError(
                f"layer {layer} has keys of {head_dim} channels, its calibration is for {mean.shape[-1]}"
            )

    def allocate(self, head_dim, dtype, device):
        self.mean, *matrices = self._of_device(device)
        keys, values = matrices
        self.table, self.value_table = keys.decode_and_sum, values.decode
        self.matrices = keys, values
        widths = self._coded_widths()
        self._tiers = [self.tier_class(bits, (keys, values), code, dtype) for bits, code in widths]

    def tensors(self):
        if self.table is None:
            return []
        sides = (x for side in self.matrices for x in (side.encode, side.decode_and_sum, side.feedback))
        return [self.mean, *sides]

    def key_means(self, keys, position, real):
        if self.rope is None:
            means = self.mean.clamp(-rotated.LARGEST, rotated.LARGEST).half()[None, :, None]
            return means.expand(len(keys), -1, keys.shape[2], -1).contiguous()
        batch, heads, groups, length, dim = keys.shape
        still = self.mean[None, :, None, None].expand(len(position), -1, groups, length, -1)
        return rotated.key_mean(rotate(still, position, *self.rope()), real).expand(batch, -1, -1, -1)
