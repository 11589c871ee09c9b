"""The `matched` format: codes whose matrices fit the keys and queries of a model; see `fade_ref.matched`."""

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

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
            lambda y, bits, side=side, of_values=of_values: matched.quantize(
                y, side.feedback, bits, of_values
            )
            for side, of_values in zip(self.matrices, (False, True))
        ]
        return requantize(fields, source.bits, self.bits, quantize)


class Learner(Protocol):
    """Makes the tables of one layer from the first tokens of a text. All caches of a model share it."""

    @property
    def ready(self) -> bool:
        """Whether the tables exist. They never change afterwards."""

    def learn(self, query: Tensor, keys: Tensor, values: Tensor, real: Tensor | None, scaling: float) -> None:
        """Make the tables from the first tokens of a text, if these are enough.

        Args:
            query: [B, Hq, n, D]; keys, values: [B, H, n, D], all after RoPE.
            real: bool [B, n], False at padding. None: all tokens are real.
            scaling: of the scores.
        """

    def learn_alone(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        """Make the tables from keys after RoPE and values [B, H, n, D] alone.

        `position` is int [B, n], negative at padding.
        """


class MatchedFormat(RotatedFormat):
    """One or two tiers of the `matched` codec.

    Args:
        widths: of keys and values in each tier, finest first; none where the layer is not compressed.
        tables: `(device)` -> the tables of this layer. All caches of a model share them.
        rope: how the model rotates the keys of this layer, where the mean follows the positions of a block;
            None where it does not.
        tier_class: as in `RotatedFormat`.
        own_means: without `rope`, whether keys are stored less their own mean, as in the rotated codec. If
            not, one mean of the tables serves all tokens.
        learner: makes the tables, if they need not exist yet.
    """

    def __init__(
        self,
        widths: list[tuple[int, int]],
        tables: Callable[[torch.device], Tables],
        rope: Callable[[], RoPE] | None,
        tier_class: type[MatchedTier] = MatchedTier,
        own_means: bool = False,
        learner: Learner | None = None,
    ):
        super().__init__(widths, lambda dim, device: None, tier_class)
        self._of_device, self.rope, self.own_means, self.learner = tables, rope, own_means, learner

    @property
    def awaits_tables(self):
        return self.learner is not None and not self.learner.ready

    @property
    def shared(self):
        frequencies = None if self.rope is None else (id(self.rope().inv_freq), self.rope().interleaved)
        return type(self), tuple(self.widths), self.tier_class, frequencies, self.own_means

    def with_blank_tables(self, heads: int, head_dim: int) -> "MatchedFormat":
        """A copy with the sizes of this format, whose tables mean nothing."""
        one = torch.eye(head_dim, dtype=torch.float16).expand(heads, -1, -1)
        side = Matrices(one, torch.cat((one, one.sum(1, keepdim=True)), dim=1), one)
        made = copy.copy(self)
        made.learner, made._of_device = None, lambda device: (torch.zeros(heads, head_dim), side, side)
        return made

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
        if self.awaits_tables:
            return
        mean, *_ = self._of_device(torch.device("cpu"))
        if heads not in (None, len(mean)):
            raise ValueError(
                f"layer {layer} has {heads} KV heads, its calibration is for {len(mean)}: make one for this "
                "model with `fade calibrate`"
            )
        if mean.shape[-1] != head_dim:
            raise ValueError(
                f"layer {layer} has keys of {head_dim} channels, its calibration is for {mean.shape[-1]}: "
                "make one for this model with `fade calibrate`"
            )

    def allocate(self, head_dim, dtype, device):
        if self.awaits_tables:  # attention takes a table also where it reads no code
            self.table = rotated.with_sum(torch.eye(head_dim, device=device))
            return
        self.mean, *matrices = self._of_device(device)
        keys, values = matrices
        self.table, self.value_table = keys.decode_and_sum, values.decode
        self.matrices = keys, values
        widths = self._coded_widths()
        self._tiers = [self.tier_class(bits, (keys, values), code, dtype) for bits, code in widths]

    def tensors(self):
        if self.value_table is None:
            return super().tensors()
        sides = (x for side in self.matrices for x in (side.encode, side.decode_and_sum, side.feedback))
        return [self.mean, *sides]

    def key_means(self, keys, position, real):
        if self.rope is None and self.own_means:
            return super().key_means(keys, position, real)
        if self.rope is None:
            means = self.mean.clamp(-rotated.LARGEST, rotated.LARGEST).half()[None, :, None]
            return means.expand(len(keys), -1, keys.shape[2], -1).contiguous()
        batch, heads, groups, length, dim = keys.shape
        still = self.mean[None, :, None, None].expand(len(position), -1, groups, length, -1)
        return rotated.key_mean(rotate(still, position, *self.rope()), real).expand(batch, -1, -1, -1)
