"""Tiers whose key codes are stored in two parts: one is the index, which chooses what a query reads.

A record is the same as in the tier without parts, to the bit. The upper bits of the key codes, with scale
and zero point, are the **index**. The lower bits and the value are the **payload**. Tokens come before bytes
in all fields, so that a page of tokens is one run of bytes.
"""

from ..kernels import halves
from .base import Field
from .matched import MatchedTier
from .rotated import TRANSPOSED, RotatedTier

INDEX = "key_index"  # the field with the upper bits of key codes
KEY_BITS = 4  # of keys that can be split


class SplitKeys:
    """What changes in a tier of `RotatedTier`'s kind. Its keys have 4 bits."""

    index_bits = 2  # upper bits of a key code that are stored apart
    parts = (2,)

    def fields(self, heads):
        made = super().fields(heads)
        for name in TRANSPOSED:
            made[name] = Field(made[name].shape, made[name].dtype, heads)
        (width,), dtype = made["key_codes"].shape, made["key_codes"].dtype
        upper = width * self.index_bits // KEY_BITS
        return {
            INDEX: Field((upper,), dtype, heads),
            **made,
            "key_codes": Field((width - upper,), dtype, heads),
        }

    def encode(self, keys, values, mean, recurs):
        return self.split(super().encode(keys, values, mean, recurs))

    def split(self, record):
        """The fields of this tier, of a record of the tier without parts."""
        upper, lower = halves.split(record["key_codes"], self.index_bits)
        turned = {name: record[name].mT for name in TRANSPOSED}
        return {INDEX: upper, **record, **turned, "key_codes": lower}

    def whole(self, fields):
        record = {name: x for name, x in fields.items() if name != INDEX}
        record["key_codes"] = halves.join(fields[INDEX], fields["key_codes"])
        return record | {name: fields[name].mT for name in TRANSPOSED}

    def decode_keys(self, fields, mean, dtype):
        return super().decode_keys(self.whole(fields), mean, dtype)

    def decode_values(self, fields, dtype):
        return super().decode_values(fields | {name: fields[name].mT for name in TRANSPOSED}, dtype)

    def view(self, tensors, bound, means, valid, per_mean, read_at):
        turned = {name: tensors[name].mT for name in TRANSPOSED}
        view = super().view(tensors | turned, bound, means, valid, per_mean, read_at)
        return view._replace(key_index=tensors[INDEX])


class SplitRotatedTier(SplitKeys, RotatedTier):
    """A tier of the `rotated` codec."""


class SplitMatchedTier(SplitKeys, MatchedTier):
    """A tier of the `matched` codec."""


class OneBit:
    """What changes if the index is the uppermost bit."""

    index_bits = 1
    parts = (2, 1)


class OneBitRotatedTier(OneBit, SplitRotatedTier):
    """A tier of the `rotated` codec."""


class OneBitMatchedTier(OneBit, SplitMatchedTier):
    """A tier of the `matched` codec."""


def tier_class(codec: str, index_bits: int | None) -> type[RotatedTier]:
    """The tier of a codec, "rotated" or "matched", whose index has so many bits.

    None: no index has any. Two are stored apart, and nothing reads them alone.
    """
    one = index_bits == 1
    if codec == "matched":
        return OneBitMatchedTier if one else SplitMatchedTier
    return OneBitRotatedTier if one else SplitRotatedTier
