"""Corrupted kernels: would parity notice?

`python -m parity mutate` replaces one line of `fade_fast` at a time by a wrong one, in memory, runs the
cases of that line's subject until one fails, and puts the line back. A mutant that no case notices
*survives*, and the command exits with 1: then a case is missing. So it does for a mutant whose line is no
longer in the source, which says that this list has to follow.

To add one: the function, the text to replace (it must stand there once), what replaces it, and a pattern
of the titles of the cases that have to notice, the fewer the better.
"""

import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from . import subjects
from .case import Outcome, perform
from .report import _laid_out


@dataclass(frozen=True)
class Mutant:
    """One corruption: in `where`, a function `module.name` of fade_fast, `old` becomes `new`."""

    name: str
    where: str
    old: str
    new: str
    cases: str  # what the titles of the cases that must notice have in common


MUTANTS = [
    Mutant(*row)
    for row in (
        # -- packing
        (
            "swapped nibbles",
            "kernels.rotated.pack",
            "(parts << shift)",
            "(parts << shift.flip(0))",
            "packing, 4",
        ),
        (
            "swapped nibbles, unpacking",
            "kernels.rotated.unpack",
            "unsqueeze(-2), shift)",
            "unsqueeze(-2), shift.flip(0))",
            "packing, 2",
        ),
        (
            "cut codes lost",
            "kernels.rotated.unpack",
            "(x << bit)",
            "(0 * x << bit)",
            "packing, 3",
        ),
        ("cut codes, other place", "kernels.rotated.pack", "(low << 6)", "(low << 7)", "packing, 3"),
        (
            "fields in reverse",
            "kernels.packed.fields",
            "in FIELDS[bits]:",
            "in reversed(FIELDS[bits]):",
            "packing, 4",
        ),
        (
            "cut codes swapped in products",
            "kernels.packed.operands",
            "for c in cut)]",
            "for c in cut[::-1])]",
            "packing, 3",
        ),
        # -- codes and scales
        (
            "shifted scale",
            "kernels.rotated.quantize",
            "clamp(SMALLEST_SCALE, LARGEST).half()",
            "clamp(SMALLEST_SCALE, LARGEST).half() * 1.01",
            "encode, 4 bits",
        ),
        (
            "codes from the unrounded scale",
            "kernels.rotated.quantize",
            "/ scale.float()",
            "/ ((high - low) / steps).clamp_min(SMALLEST_SCALE)",
            "encode, 8 bits",
        ),
        (
            "subnormal scales",
            "kernels.rotated.quantize",
            "clamp(SMALLEST_SCALE, LARGEST)",
            "clamp(1e-7, LARGEST)",
            "encode, 4 bits",
        ),
        (
            "ties away from even",
            "kernels.rotated.quantize",
            ".round().clamp(0, steps)",
            ".add(0.5).floor().clamp(0, steps)",
            "codes of exact inputs",
        ),
        (
            "codes not clamped",
            "kernels.rotated.quantize",
            ".round().clamp(0, steps)",
            ".round()",
            "encode, 8 bits/D64 fp16",
        ),
        (
            "biased norm",
            "kernels.rotated.quantize",
            "(norm.squeeze(-1).square() / aligned)",
            "(aligned / table[codes].square().sum(-1))",
            "encode, 2 bits",
        ),
        (
            "cells of 2 bits at 3",
            "kernels.rotated.quantize",
            "STEPS[bits]",
            "STEPS[2]",
            "encode, 3 bits",
        ),
        (
            "dropped mean",
            "kernels.rotated.encode",
            "x if mean is None else x - mean.float()",
            "x",
            "encode, 4 bits",
        ),
        (
            "mean not added back",
            "kernels.rotated.decode",
            "x if mean is None else x + mean.to(dtype)",
            "x",
            "decode, 4",
        ),
        ("rotation transposed", "kernels.rotated.encode", "@ matrix.mT", "@ matrix", "encode, 8 bits"),
        (
            "rotated back the wrong way",
            "kernels.rotated.decode",
            "@ matrix.to(dtype)",
            "@ matrix.to(dtype).mT",
            "decode, 8",
        ),
        (
            "zero dropped",
            "kernels.rotated.dequantize",
            "decoded + packed.zero",
            "decoded + 0 * packed.zero",
            "decode, 8",
        ),
        (
            "mean counts padding",
            "cache.store._key_mean",
            "real.sum(-2).clamp_min(1)",
            "real.shape[-2]",
            "key mean",
        ),
        (
            "whole codes swapped",
            "kernels.rotated.pack",
            "first, second, *cut",
            "second, first, *cut",
            "packing, 3",
        ),
        (
            "bits of cut codes in reverse",
            "kernels.packed.channels",
            "low, middle, high = zip",
            "high, middle, low = zip",
            "packing, 3",
        ),
        (
            "high bits left out of products",
            "kernels.packed.operands",
            "(1 << torch.arange(3,",
            "(1 << torch.arange(3) % 2 * 1 + 0 * torch.arange(3,",
            "packing, 3",
        ),
        (
            "high bits left out of sums",
            "kernels.packed.channels",
            "+ 4 * c",
            "+ 0 * c",
            "packing, 3",
        ),
        (
            "centre of three bits",
            "kernels.packed.fields",
            "unit, center_offset = 1.0, center(width)",
            "unit, center_offset = 1.0, center(width) + (width == 3)",
            "packing, 3",
        ),
        (
            "means of the first tile",
            "kernels.rotated.encode_both",
            "mean[:, :, start // each : stop // each]",
            "mean[:, :, : (stop - start) // each]",
            "random traces",
        ),
        (
            "values centred like keys",
            "kernels.rotated._encode_both",
            "encode(values, None, matrix, bits[1])",
            "encode(values, mean[:, :, :1], matrix, bits[1])",
            "encode keys and values",
        ),
        (
            "widths of keys and values swapped",
            "kernels.rotated._encode_both",
            "mean.unsqueeze(3), matrix, bits[0]), encode(values, None, matrix, bits[1])",
            "mean.unsqueeze(3), matrix, bits[1]), encode(values, None, matrix, bits[0])",
            "life/widths/k8v4",
        ),
        (
            "lower tier from codes, not numbers",
            "cache.store.BudgetStore._requantize",
            "rotated.dequantize(unrecord(fields, side), b, torch.float32)",
            "rotated.unpack(unrecord(fields, side).codes, b).float()",
            "move to a lower tier",
        ),
        # -- scores and sums of a tier
        (
            "scale of the next token",
            "kernels.packed.products",
            "out * (scale / largest)",
            "out * (scale.roll(1, 1) / largest)",
            "tiles/4",
        ),
        (
            "zero dropped from scores",
            "kernels.packed.products",
            "+ zero * total",
            "+ 0 * total",
            "tiles/4",
        ),
        (
            "mean dropped from scores",
            "kernels.packed.products",
            "_spread(bias.mT, view.per_mean, blocks, chunk)",
            "0.0",
            "tiles/2",
        ),
        (
            "mean of the block before",
            "kernels.packed._near",
            "start // tile.per_mean",
            "max(0, start // tile.per_mean - 1)",
            "tiles/8",
        ),
        (
            "missing softcap",
            "kernels.packed.scores",
            "softcap * torch.tanh(scores / softcap)",
            "scores",
            "step, 4 bits/D64 softcap",
        ),
        (
            "mask ignored",
            "kernels.packed.scores",
            "torch.where(seen.permute(3, 0, 1, 4, 2).reshape(-1, chunk, rows), scores, -torch.inf)",
            "scores",
            "step, 4 bits/D64 window",
        ),
        (
            "mask of another query",
            "kernels.decode._for_rows",
            "seen.unsqueeze(1).expand(-1, rows // new, -1, -1)",
            "seen.flip(1).unsqueeze(1).expand(-1, rows // new, -1, -1)",
            "step, 4 bits/D64 window",
        ),
        (
            "skipped last token",
            "kernels.packed.tiles",
            "min(tile, length - start)",
            "max(1, min(tile, length - start) - 1)",
            "step, 4 bits/D64 plain",
        ),
        (
            "skipped last tile",
            "kernels.packed.tiles",
            "range(0, length, tile)",
            "range(0, max(1, length - tile), tile)",
            "tiles/4",
        ),
        (
            "value scale of the next token",
            "kernels.packed.sums",
            "finite(_cut(scale, chunk), wide(dtype))",
            "finite(_cut(scale, chunk), wide(dtype)).roll(1, 1)",
            "tiles/3",
        ),
        ("value zero dropped", "kernels.packed.statistics", "if zero is not None:", "if False:", "tiles/8"),
        (
            "value offset halved",
            "kernels.packed.statistics",
            "each(zero) + center(bits) * scale",
            "each(zero) + center(bits) * scale / 2",
            "tiles/4",
        ),
        (
            "chunks not rescaled",
            "kernels.packed.join",
            "torch.exp2(wider(top) - best)",
            "torch.ones_like(wider(top))",
            "chunks/4 bits",
        ),
        (
            "bound forgotten",
            "kernels.packed.join",
            "bound.reshape(-1, 1, 1)",
            "bound.new_ones(len(bound), 1, 1)",
            "chunks/2 bits",
        ),
        (
            "float16 products keep the offset",
            "kernels.packed.offset",
            "dtype == torch.float16",
            "False",
            "twin",
        ),
        (
            "stale position",
            "kernels.packed.decoded_products",
            "cos_sin(position,",
            "cos_sin(position - 1,",
            "step, 4 bits/D64 before RoPE",
        ),
        (
            "pairs rotated as halves",
            "kernels.packed.decoded_products",
            "rotated.shape[-1], decoder.interleaved",
            "rotated.shape[-1], False",
            "before RoPE, pairs",
        ),
        ("probabilities of one row", "kernels.packed.probabilities", ".sum(1)", "[:, 0]", "two widths"),
        # -- the step
        (
            "wrong GQA head",
            "kernels.decode._attend",
            "query.to(dtype).reshape(batch * heads, real, dim)",
            "query.to(dtype).unflatten(1, (-1, heads)).transpose(1, 2).reshape(batch * heads, real, dim)",
            "step, 4 bits/D64 plain",
        ),
        (
            "scaling forgotten",
            "kernels.decode._attend",
            "(halves[0] + halves[1]) * scaling",
            "(halves[0] + halves[1])",
            "step, 8 bits/D64 plain",
        ),
        (
            "softcap of the tiers only",
            "kernels.decode._attend",
            "scores = softcap * torch.tanh(scores / softcap)",
            "pass",
            "step, 8 bits/D64 softcap",
        ),
        (
            "learned sinks not counted",
            "kernels.decode._attend",
            "total = total + torch.exp2((learned - top) * LOG2E)",
            "pass",
            "learned sinks",
        ),
        (
            "learned sinks of another head",
            "kernels.decode._rows_of",
            "x.reshape(1, heads, group, 1)",
            "x.flip(0).reshape(1, heads, group, 1)",
            "learned sinks",
        ),
        (
            "uncompressed mask of another query",
            "kernels.decode._attend",
            "_for_rows(seen, rows).unsqueeze(1)",
            "_for_rows(seen.flip(1), rows).unsqueeze(1)",
            "step, 4 bits/D64 window",
        ),
        (
            "no reference without uncompressed tokens",
            "kernels.decode._attend",
            "torch.where(top > LOWEST / 2, top, 0.0)",
            "top + 0.0",
            "tiers alone",
        ),
        (
            "not rotated back",
            "kernels.decode._attend",
            "below = matrix.narrow(0, 0, dim)",
            "below = torch.eye(dim, device=matrix.device)",
            "step, 4 bits/D64 plain",
        ),
        (
            "off-by-one span",
            "kernels.decode._of_span",
            "narrow(0, num_read)",
            "narrow(0, max(1, span - 1))",
            "step, 4 bits/D64 plain",
        ),
        (
            "means of the tier before",
            "kernels.decode._attend",
            "start += view.means.shape[1]",
            "pass",
            "step, 4 bits/D64 two tiers",
        ),
        (
            "sums of a tier with another's weight",
            "kernels.decode._attend",
            "* factors[i + 1]",
            "* factors[i]",
            "step, 4 bits/D64 two tiers",
        ),
        (
            "values that nothing sees",
            "kernels.decode._attend",
            "torch.where(values.abs() <= torch.finfo(values.dtype).max, values, 0.0).to(dtype)",
            "values.to(dtype)",
            "step, 4 bits/D64 window",
        ),
        (
            "mass not normalised",
            "kernels.decode._attend",
            "+ torch.log2(share)",
            "",
            "step, 4 bits/D64 two tiers",
        ),
        ("mass past the span", "kernels.decode._attend", "new_zeros", "new_ones", "step, 4 bits/D64 holes"),
        (
            "mass of the padded row",
            "kernels.decode._attend",
            "weights.narrow(2, 0, real).sum(2)",
            "weights.sum(2)",
            "step, 4 bits/D64 two tiers",
        ),
        (
            "last join without its shrink",
            "kernels.decode._attend",
            "force_materialize(part * shrink[-1] * share)",
            "force_materialize(part * share)",
            "step, 4 bits/D64 plain",
        ),
        (
            "interleaved rows in one place",
            "kernels.decode._for_rows",
            "seen.unsqueeze(1).expand(-1, rows // new, -1, -1)",
            "seen.unsqueeze(2).expand(-1, -1, rows // new, -1)",
            "step, 4 bits/D64 window",
        ),
        # -- merge, uncompressed tokens, product quantisation
        (
            "merge without the maxima",
            "kernels.merge.merge",
            "torch.exp(p.row_max - row_max)",
            "torch.ones_like(p.row_max)",
            "merge",
        ),
        ("combine forgets a weight", "kernels.merge.combine", "other.row_sum * b", "other.row_sum", "merge"),
        (
            "softcap forgotten in a long step",
            "kernels.merge.soften",
            "softcap * torch.tanh(scores / softcap)",
            "scores",
            "softcap, int4",
        ),
        (
            "nearest by direction",
            "kernels.product.encode",
            "norms - 2 *",
            "0 * norms - 2 *",
            "product/encode",
        ),
        (
            "farthest of equals",
            "kernels.product._index",
            "codes.long()",
            "(codes.long() ^ 1)",
            "product/decode",
        ),
        (
            "histogram forgets a tile",
            "kernels.product.attend",
            "whole = combine(whole, Partial(sums, row_max, row_sum))",
            "whole = Partial(sums, row_max, row_sum)",
            "product/attention",
        ),
        (
            "settled columns forgotten",
            "kernels.dense._with_tail",
            "merge([known, tail])",
            "merge([tail])",
            "many uncompressed",
        ),
        (
            "settled columns with another weight",
            "kernels.dense._with_tail",
            "rows(lse.unsqueeze(-1))[..., 0].to(wide), 1.0)",
            "rows(lse.unsqueeze(-1))[..., 0].to(wide) + 0.01, 1.0)",
            "many uncompressed",
        ),
        (
            "values of the tail that nothing sees",
            "kernels.dense._with_tail",
            "torch.where(values.abs() <= torch.finfo(values.dtype).max, values, 0.0)",
            "values",
            "many uncompressed",
        ),
        # -- what tokens received
        (
            "new token keeps what its slot received",
            "policies.scores.Observer.add_step",
            "if slot is not None:",
            "if slot is None:",
            "captured/steps/h2o, evict",
        ),
        (
            "queries not counted",
            "policies.scores.Summed.update",
            "seen.sum(2, dtype=torch.int32)",
            "1",
            "life/policies/h2o",
        ),
        (
            "average that starts from nothing",
            "policies.scores.Decayed.update",
            "torch.where(ema < 0, p, later)",
            "later",
            "life/policies/ema",
        ),
        (
            "ring that does not turn",
            "policies.scores.Windowed.advance",
            "add_(queries)",
            "add_(0)",
            "policies/snapkv",
        ),
        (
            "neighbours by slot",
            "policies.scores.pool_neighbours",
            "position.argsort(dim=-1, stable=True).expand(scores.shape)",
            "torch.arange(position.shape[-1], device=position.device).expand(scores.shape)",
            "policies/snapkv",
        ),
        (
            "old scores of new tokens",
            "cache.layer.TieredLayer.count",
            "(sums[..., :n] / group)",
            "(sums[..., :n] / group).roll(1, -1)",
            "policies/tova",
        ),
        # -- plans
        (
            "wrong tie order",
            "policies.plan.rank",
            "position.argsort(dim=-1, descending=True, stable=True)",
            "position.argsort(dim=-1, descending=False, stable=True)",
            "ties everywhere",
        ),
        ("NaN is best", "policies.plan.rank", "nan=-torch.inf", "nan=1e300", "NaN"),
        (
            "padding has a place",
            "policies.plan.rank",
            "scores.masked_fill(position < 0, -torch.inf)",
            "scores + 0",
            "many ties",
        ),
        (
            "budget of one more",
            "policies.plan.plan",
            "< high) & ~already_int2",
            "<= high) & ~already_int2",
            "given scores, normal",
        ),
        (
            "second budget not after the first",
            "policies.plan.plan",
            "position.masked_fill(finer, -1)",
            "position",
            "given scores, normal",
        ),
        (
            "newest first",
            "policies.plan.kept",
            "argsort(dim=-1, stable=True)",
            "argsort(dim=-1, stable=True, descending=True)",
            "given scores, normal",
        ),
        (
            "oldest are best",
            "policies.plan.scores",
            "found = score(c) if",
            "found = -score(c) if",
            "life/policies/position",
        ),
        # -- positions
        (
            "rotated backwards",
            "kernels.rope.cos_sin",
            "angle.cos(), angle.sin()",
            "angle.cos(), -angle.sin()",
            "positions/rotate",
        ),
        (
            "angles in float32",
            "kernels.rope.cos_sin",
            "position.unsqueeze(-1).double() * (inv_freq.double() / math.tau)",
            "(position.unsqueeze(-1).float() * (inv_freq.float() / math.tau)).double()",
            "positions/rotate",
        ),
        (
            "survivors keep their rank",
            "cache.store.BudgetStore._renumber",
            "+ evicted[..., None]",
            "",
            "renumber",
        ),
        ("sinks not counted", "cache.store.BudgetStore._renumber", "+ self.config.n_sink", "", "renumber"),
        (
            "sinks not turned",
            "cache.layer.TieredLayer._turn_sinks",
            "delta = evicted[..., None]",
            "delta = 0 * evicted[..., None]",
            "of tokens/evict",
        ),
        # -- the life of tokens
        (
            "one block less than is due",
            "cache.layer.TieredLayer._num_overflow",
            "// c.block_size * c.block_size",
            "// c.block_size * c.block_size - c.block_size",
            "of tokens/int4",
        ),
        (
            "a block too late",
            "cache.layer.TieredLayer._num_overflow",
            "recent < c.recent_window + c.block_size",
            "recent <= c.recent_window + c.block_size",
            "of tokens/int4",
        ),
        (
            "records not moved",
            "cache.store.BudgetStore._collect",
            "torch.where(chosen, old[name], x)",
            "x",
            "of tokens/evict",
        ),
        (
            "kept bits of the wrong slot",
            "cache.store.BudgetStore._collect",
            "(index - offset).clamp(0, count - 1)",
            "(index - offset + 1).clamp(0, count - 1)",
            "of tokens/evict",
        ),
        (
            "mean fixed anew",
            "cache.store.BudgetStore._fix_mean",
            "if self.means.count and not self.token_positions.has_padding:",
            "self.means.count = 0\nif False:",
            "of tokens/evict",
        ),
        (
            "crop takes one more",
            "cache.layer.TieredLayer.crop",
            "self.dense.count -= n",
            "self.dense.count -= n + 1",
            "random traces",
        ),
        (
            "rows stay where they are",
            "cache.positions.TokenPositions.select_rows",
            "take_rows(self.buffer, index)",
            "self.buffer",
            "of tokens/int4, padding",
        ),
        (
            "sinks where padding was",
            "cache.layer.TieredLayer._place_sinks",
            "hit = new == slot",
            "hit = new == slot + 99",
            "of tokens/int4, padding",
        ),
        (
            "padding has a position",
            "cache.positions.TokenPositions.extend",
            "new.masked_fill(~valid, PAD)",
            "new",
            "of tokens/int4, padding",
        ),
        (
            "future tokens are seen",
            "hf.attention.AttentionQuery.sees",
            "(position <= self.positions)",
            "(position > PAD)",
            "of tokens/int4",
        ),
        (
            "window of one more",
            "hf.attention.AttentionQuery.sees",
            "self.positions - self.terms.window",
            "self.positions - self.terms.window - 1",
            "what models ask/window",
        ),
        (
            "windows go by logical positions",
            "hf.attention.AttentionQuery.tier_at",
            "windowed and",
            "False and",
            "what models ask/window, survivors",
        ),
        (
            "windows over sinks where they were",
            "cache.layer.TieredLayer.dense_read_at",
            "sinks + self.middle.evicted[..., None]",
            "sinks",
            "what models ask/all, evict",
        ),
        (
            "window forgotten before the first demotion",
            "hf.attention._attend_cached",
            "or terms.window is not None",
            "",
            "outgrows",
        ),
        (
            "rows repeated as a whole",
            "hf.cache.TieredKVCache.batch_repeat_interleave",
            "repeat_interleave(repeats)",
            "repeat(repeats)",
            "rows that come",
        ),
        (
            "values coded as keys",
            "cache.product_store.ProductStore.demote",
            "(keys, values)",
            "(keys, keys)",
            "of codes/codes, no sinks",
        ),
        (
            "codes of padding are seen",
            "kernels.product_decode.attend",
            "valid = fold(view.valid)",
            "valid = fold(slots.valid | True)",
            "of codes/codes, padding (0, 11)",
        ),
        (
            "learned sinks lost beside codes",
            "kernels.product_decode.attend",
            "if s_aux is not None:",
            "if False:",
            "what models ask/learned sinks, codes",
        ),
        (
            "long steps look ahead",
            "hf.attention.AttentionQuery._flash",
            "causal=True",
            "causal=False",
            "long steps/int4",
        ),
        (
            "long steps forget their earlier blocks",
            "hf.attention.AttentionQuery._flash",
            "keys[:, :, :past], values[:, :, :past]",
            "keys[:, :, :0], values[:, :, :0]",
            "long steps/int4",
        ),
        (
            "long steps read one span again and again",
            "hf.attention.AttentionQuery._flash",
            "decode(tier, *span,",
            "decode(tier, 0, span[1] - span[0],",
            "long steps/int4",
        ),
        (
            "long steps see padding",
            "hf.attention.AttentionQuery.flashes",
            "or layer.token_positions.has_padding",
            "",
            "long steps/int4",
        ),
        (
            "long steps see past windows",
            "hf.attention.AttentionQuery.flashes",
            "terms.window is not None or",
            "",
            "long steps/int4",
        ),
        (
            "long steps read keys as values",
            "hf.attention.AttentionQuery._coded",
            "self._exact(keys, values,",
            "self._exact(keys, keys,",
            "of codes/codes, no sinks",
        ),
        (
            "rows of the middle stay",
            "cache.store.CompressedStore.map",
            "(*self.tiers, self.means)",
            "(*self.tiers,)",
            "random traces",
        ),
        # -- checkpoints
        (
            "bounds not stored",
            "saved.checkpoint._of_tiered",
            '.bound"] = tier.bound',
            '.bound"] = tier.bound * 2',
            "checkpoints/tiers/k4v4",
        ),
        (
            "means not stored",
            "saved.checkpoint._of_tiered",
            'middle.means["mean"]',
            'middle.means["mean"] * 0',
            "checkpoints/tiers/k4v4",
        ),
        (
            "sinks as they are read now",
            "saved.checkpoint._fill_tiered",
            'parts.pop("sink_keys", None)',
            '(parts.pop("sink_keys", None), keys[:, :, : layer.config.n_sink].clone())[1]',
            "checkpoints/policies/position, contiguous",
        ),
        (
            "sinks taken to be placed",
            "saved.checkpoint._of_tiered",
            "sinks_placed=layer.sinks_placed",
            "sinks_placed=True",
            "sinks to come",
        ),
        (
            "ring from its start",
            "saved.checkpoint._fill_tiered",
            'x.copy_(parts.pop(f"observer.{i}"))',
            'parts.pop(f"observer.{i}")',
            "checkpoints/policies/snapkv",
        ),
        (
            "tokens evicted and demoted mixed up",
            "saved.checkpoint._fill_tiered",
            'parts.pop("evicted"), parts.pop("demoted")',
            'parts.pop("demoted"), parts.pop("evicted")',
            "checkpoints/policies/position, contiguous",
        ),
        (
            "holes forgotten",
            "saved.checkpoint._fill_timeline",
            "position.shape[1], holes",
            "position.shape[1], False",
            "checkpoints/what came before/padding",
        ),
        (
            "newest column lost",
            "saved.checkpoint.state_dict",
            "cache.token_positions.logical}",
            "cache.token_positions.logical[:, :-1]}",
            "checkpoints/tiers/off",
        ),
        (
            "another file than was asked for",
            "saved.checkpoint.load_state_dict",
            'known["config"] != dataclasses.asdict(cache.fade_config)',
            "False",
            "checkpoints/refused",
        ),
        (
            "codes of other codebooks",
            "saved.checkpoint.load_state_dict",
            'known.get("codebooks") != cache.codebooks',
            "False",
            "checkpoints/refused",
        ),
        (
            "window one token late",
            "saved.checkpoint._fill_sliding",
            "keys.clone(), values.clone(), length",
            "keys.clone(), values.clone(), length - 1",
            "checkpoints/sliding",
        ),
        (
            "captured step in the wrong slot",
            "cache.decode_graph.DecodeGraph._refresh",
            "self.slot.fill_(first.dense.count)",
            "self.slot.fill_(first.dense.count - 1)",
            "captured/steps/int4",
        ),
        (
            "captured step one position late",
            "cache.decode_graph.DecodeGraph._advance",
            "self.newest.add_(self.real)",
            "self.newest.add_(0)",
            "captured/steps/int4",
        ),
        (
            "rows of a beam search stay where they were",
            "cache.decode_graph.DecodeGraph._reorder",
            "select(index)",
            "None",
            "captured/steps/int4, beams",
        ),
        (
            "a draft sees those after it",
            "cache.decode_graph.DecodeGraph._advance_by",
            "<= self._at[:, None]",
            "<= self._at[-1:, None]",
            "captured/steps/int4, drafted",
        ),
        (
            "refused drafts keep their places",
            "cache.decode_graph.DecodeGraph.crop",
            "counter.sub_(n)",
            "counter.sub_(0)",
            "captured/steps/int4, drafted",
        ),
        (
            "what is demoted beside drafts is taken from their columns",
            "cache.decode_graph.DecodeGraph._demote",
            "self.column.sub_(beyond)",
            "self.column.sub_(0)",
            "captured/steps/evict, drafted",
        ),
    )
]


class Stale(Exception):
    """The source is no longer as a mutant expects it."""


@contextmanager
def corrupted(mutant: Mutant) -> Iterator[None]:
    """fade_fast with the mutant in it. Raises `Stale` if its text does not stand there once."""
    home, _, name = mutant.where.rpartition(".")
    module_name, owner = _home(home)
    module = sys.modules[module_name]
    held = inspect.getattr_static(owner, name)
    function = held.fget if isinstance(held, property) else held
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(mutant.old) != 1:
        raise Stale(f"{mutant.where} has {mutant.old!r} {source.count(mutant.old)} times")
    names: dict = {}
    indent = source[: source.index(mutant.old)].rpartition("\n")[2]
    new = mutant.new.replace("\n", "\n" + " " * (len(indent) - len(indent.lstrip())))
    code = compile(source.replace(mutant.old, new), f"<mutant: {mutant.name}>", "exec")
    exec(code, vars(module), names)
    twin = names[name]
    places = [(owner, name)] if inspect.isclass(owner) else _bound_to(held)
    try:
        for place, attribute in places:
            setattr(place, attribute, twin)
        yield
    finally:
        for place, attribute in places:
            setattr(place, attribute, held)


def _home(path: str):
    """The module, and the module or class, that a dotted path below fade_fast leads to."""
    module, parts = f"fade_fast.{path}", []
    while module not in sys.modules:
        module, _, last = module.rpartition(".")
        parts.insert(0, last)
    owner = sys.modules[module]
    for part in parts:
        owner = getattr(owner, part)
    return module, owner


def _bound_to(function) -> list[tuple]:
    """Every place in fade_fast and here that knows a function by a name of its own."""
    modules = [m for n, m in sys.modules.items() if n.split(".")[0] in ("fade_fast", "parity")]
    return [(m, name) for m in modules for name, x in list(vars(m).items()) if x is function]


@dataclass
class Fate:
    """What became of a mutant: the case that noticed it, if one did."""

    mutant: Mutant
    noticed: Outcome | None = None
    ran: int = 0
    stale: str = ""

    @property
    def caught(self) -> bool:
        return self.noticed is not None and not self.stale

    @property
    def how(self) -> str:
        if self.stale:
            return self.stale
        if self.noticed is None:
            return f"nothing, in {self.ran} cases"
        if self.noticed.raised:
            return self.noticed.raised[:60]
        worst = max(self.noticed.checks, key=lambda c: c.excess)
        return f"{worst.claim}: {worst.error:.2g} > {worst.allowed:.2g}"


def hunt(mutant: Mutant, cases) -> Fate:
    """Run cases until one fails that does not fail without the mutant."""
    fate = Fate(mutant)
    try:
        with corrupted(mutant):
            for case in cases:
                if mutant.cases in case.title and not case.known:
                    fate.ran += 1
                    outcome = perform(case)
                    if not outcome.passed:
                        fate.noticed = outcome
                        break
    except (Stale, AttributeError, KeyError, SyntaxError, TypeError) as error:
        fate.stale = f"stale: {error}"
    if fate.noticed is not None and not perform(fate.noticed.case).passed:
        fate.stale = f"{fate.noticed.case.title} fails without it, too"
    return fate


def main(only: str = "") -> int:
    """Hunt all mutants whose name has `only`; print what noticed each; 1 if one survives."""
    chosen = [m for m in MUTANTS if only in m.name]
    if not chosen:
        raise ValueError(f"--only {only}: no mutant has it in its name")
    cases = subjects.collect()
    with tqdm(chosen, unit="mutant", leave=False, disable=None) as bar:
        fates = [hunt(mutant, cases) for mutant in bar]
    lines = [
        (f.mutant.name, f.mutant.where, f.noticed.case.title if f.noticed else "", f.how,
         "caught" if f.caught else "SURVIVES")
        for f in fates
    ]  # fmt: skip
    print("\n".join(_laid_out(("mutant", "of fade_fast", "noticed by", "how", "fate"), lines)))
    survivors = sum(not f.caught for f in fates)
    print(f"\n{len(fates)} mutants: {survivors or 'none'} survived")
    return int(survivors > 0)
