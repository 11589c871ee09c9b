"""The `rotated` format: keys less their mean and values, rotated, as codes of 8, 4, 3 or 2 bits."""

from collections.abc import Callable

import torch
from torch import Tensor

from fade_ref.config import FadeConfig
from fade_ref.tiers import INTEGER_TIERS, Tier, first_tier, packed_bytes

from ..kernels import packed, rotated
from ..kernels.merge import Partial
from ..kernels.packed import DENSE, Decoder, Queries, TierView
from ..kernels.rope import RoPE
from ..kernels.rotated import Packed
from .base import Field, Format, TierFormat

#: Fields whose tokens lie last, [B, H, bytes, n]. Attention sums values over tokens, and so reads them in
#: the order of the sum.
TRANSPOSED = ("value_codes",)


def tier_widths(config: FadeConfig, bits: tuple[int, int]) -> list[tuple[int, int]]:
    """Widths of keys and values in each tier, finest first, given those of the first tier.

    The list is empty if keys have 16 bits: then the layer is not compressed.
    """
    if bits[0] == DENSE:
        return []
    second = (2, DENSE if bits[1] == DENSE else 2)
    return [bits] if config.int2_budget == 0 or bits == second else [bits, second]


def tier_name(bits: tuple[int, int]) -> str:
    """Name of a tier of these widths in reports."""
    key, value = bits
    return INTEGER_TIERS[key].name if key == value else f"K{key}V{value}"


def pack_record(keys: Packed, values: Packed) -> dict[str, Tensor]:
    """Named fields of encoded tokens."""
    sides = {"key": keys, "value": values}
    named = {f"{side}_{name}": x for side, codes in sides.items() for name, x in codes._asdict().items()}
    return {name: x.mT if name in TRANSPOSED else x for name, x in named.items() if x is not None}


def unpack_record(fields: dict[str, Tensor], side: str) -> Packed:
    """Codes, scale and zero point of one side, tokens before bytes. `side` is "key" or "value"."""
    named = {name: fields.get(f"{side}_{name}") for name in Packed._fields}
    if f"{side}_codes" in TRANSPOSED:
        named["codes"] = named["codes"].mT
    return Packed(**named)


class RotatedTier(TierFormat):
    """Codes of `bits` = (keys, values), a scale per vector, and a zero point at 8 and 4 bits.

    Values of 16 bits are stored in the model's dtype, neither rotated nor quantized.

    Args:
        matrix: the codec's rotation, float32 [D, D].
        tier: the tier's code.
        dtype: of the keys and values.
    """

    parts: tuple[int, ...] = ()  # bits of the parts of a code that are stored apart

    has_zero = True  # whether codes of 8 and 4 bits have a zero point

    def __init__(self, bits: tuple[int, int], matrix: Tensor, tier: Tier, dtype: torch.dtype):
        self.bits, self.matrix, self.tier, self.name = bits, matrix, tier, tier_name(bits)
        self.dtype = dtype

    @property
    def key_matrix(self) -> Tensor:
        """Decodes rotated keys, as rows y: y @ matrix. [D, D], or [H, D, D]."""
        return self.matrix

    value_matrix = key_matrix

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.key_matrix.shape[-1]

    def fields(self, heads):
        made = {}
        for side, bits in zip(("key", "value"), self.bits):
            axis = -1 if f"{side}_codes" in TRANSPOSED else 2
            if bits == DENSE:
                made[f"{side}_codes"] = Field((self.head_dim,), self.dtype, heads, axis)
                continue
            made[f"{side}_codes"] = Field((packed_bytes(bits, self.head_dim),), torch.uint8, heads, axis)
            made[f"{side}_scale"] = Field((), torch.float16, heads)
            if self.has_zero and rotated.is_uniform(bits):
                made[f"{side}_zero"] = Field((), torch.float16, heads)
        return made

    def encode(self, keys, values, mean, recurs):
        return pack_record(*rotated.encode_both(keys, values, mean, self.matrix, self.bits, recurs))

    def decode_keys(self, fields, mean, dtype):
        return rotated.decode(unpack_record(fields, "key"), mean, self.key_matrix, self.bits[0], dtype)

    def decode_values(self, fields, dtype):
        return rotated.decode(unpack_record(fields, "value"), None, self.value_matrix, self.bits[1], dtype)

    def value_bound(self, fields: dict[str, Tensor]) -> Tensor:
        """At least every value scale of these records, or absolute value at 16 bits: [B, H] float32."""
        if self.bits[1] != DENSE:
            return fields["value_scale"].float().amax(-1)
        values = fields["value_codes"].abs().nan_to_num(0.0, 0.0)  # padding may hold anything
        most = values.amax((-2, -1)).float()
        return torch.nextafter(most, torch.full_like(most, torch.inf))  # float64 may be rounded down

    def requantize(self, fields: dict[str, Tensor], source: "RotatedTier") -> dict[str, Tensor]:
        """Records of this tier, made from records of a finer one, which never leave the rotated domain."""
        return requantize(fields, source.bits, self.bits, (rotated.quantize, rotated.quantize))

    def view(self, tensors, bound, means, valid, per_mean, read_at):
        keys, values = (
            Packed(*(tensors.get(f"{side}_{name}") for name in Packed._fields)) for side in ("key", "value")
        )
        return TierView(keys, values, bound, means, valid, per_mean, read_at)


def requantize(
    fields: dict[str, Tensor],
    bits: tuple[int, int],
    to: tuple[int, int],
    quantize: tuple[Callable[[Tensor, int], Packed], Callable[[Tensor, int], Packed]],
) -> dict[str, Tensor]:
    """Records of widths `to`, made from records of widths `bits`.

    `quantize` makes codes of rotated keys and of rotated values, `(vectors, bits) -> codes`.
    """
    sides = []
    for side, old, new, encode in zip(("key", "value"), bits, to, quantize):
        codes = unpack_record(fields, side)
        if old != new:
            codes = encode(rotated.dequantize(codes, old, torch.float32), new)
        sides.append(codes)
    return pack_record(*sides)


class RotatedFormat(Format):
    """One or two tiers of the `rotated` codec.

    Args:
        widths: of keys and values in each tier, finest first; none where the layer is not compressed.
        tables: see `Format`.
        tier_class: makes a tier of its widths, matrix, code and dtype; see `split.py` for another.
    """

    def __init__(
        self,
        widths: list[tuple[int, int]],
        tables: Callable[[int, torch.device], Tensor],
        tier_class: type[RotatedTier] = RotatedTier,
    ):
        super().__init__(tables)
        self.widths, self.tier_class = widths, tier_class
        self._tiers: list[RotatedTier] = []

    @property
    def tiers(self):
        return self._tiers

    @property
    def compresses(self):
        return bool(self.widths)

    def check(self, head_dim, layer, heads=None):
        for bits in {b for pair in self.widths for b in (*pair, *self.tier_class.parts)}:
            packed_bytes(bits, head_dim)

    def allocate(self, head_dim, dtype, device):
        super().allocate(head_dim, dtype, device)
        matrix = self.table[:head_dim]
        self._tiers = [self.tier_class(bits, matrix, code, dtype) for bits, code in self._coded_widths()]

    @property
    def shared(self):
        return type(self), tuple(self.widths), self.tier_class, id(self.table)

    def _coded_widths(self) -> list[tuple[tuple[int, int], Tier]]:
        """Widths and code of each tier."""
        return [(bits, first_tier(*bits) if i == 0 else Tier.INT2) for i, bits in enumerate(self.widths)]

    def attend_tier(self, tier, query, view, count, score_reference, rope: RoPE | None, softcap) -> Partial:
        shape = query.shape[:2]
        matrix, value_matrix = (_each(m, shape, query.dtype) for m in (tier.key_matrix, tier.value_matrix))
        flat = view.flat().narrow(0, count)
        query, reference = query.flatten(0, 1), score_reference.flatten(0, 1)
        reference = reference.masked_fill(reference <= torch.finfo(reference.dtype).min, 0.0)
        turned, decoder, bias = query @ matrix.mT, None, None
        if rope is not None:
            decoder = Decoder(matrix, rope.inv_freq, rope.interleaved)
        else:
            bias = query @ flat.means.to(query.dtype).mT
        queries = Queries(query, turned, turned.sum(-1), reference)
        part = packed.attend(queries, bias, flat, decoder, tier.bits, softcap)
        if tier.bits[1] != DENSE:
            part = part._replace(acc=part.acc @ value_matrix)
        return Partial(*(x.unflatten(0, shape) for x in part))


def _each(matrix: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A matrix [D, D], or that of each KV head [H, D, D] for all rows and heads: [B * H, D, D]."""
    matrix = matrix.to(dtype)
    return matrix if matrix.dim() == 2 else matrix.expand(*shape, -1, -1).flatten(0, 1)
