"""The bits of the integer tiers: packing, codes, scales, decoding, demotion to a lower tier, means."""

import itertools
from unittest import mock

import torch

from fade_fast.cache.positions import PAD
from fade_fast.formats import rotated as formats
from fade_fast.hf import cache as hf_cache
from fade_fast.kernels import matched, packed, rotated
from fade_ref import baselines, quantize
from fade_ref import matched as matched_spec
from fade_ref.config import CODECS
from fade_ref.rope import NOPE
from fade_ref.rotation import Record, RotatedCodec, key_mean, qr_rotation
from fade_ref.tiers import INTEGER_TIERS

from .. import cases as measure
from ..case import Case, Draw, Found, relative_error
from .refusals import refused_config

DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.float64, torch.float32, torch.float16)


def collect() -> list[Case]:
    cases = []
    for bits, tier in INTEGER_TIERS.items():
        covers = (f"tier {tier.name}", "codec rotated")
        for dim in (8, 72, *DIMS):
            cases.append(Case("codecs", f"packing, {bits} bits", f"D{dim}", _packing(bits, dim), covers))
        for dim, (name, make) in itertools.product(DIMS, INPUTS.items()):
            run = _encoding(bits, dim, make)
            cases.append(Case("codecs", f"encode, {bits} bits", f"D{dim} {name}", run, covers))
        for name, make in INPUTS.items():
            run = _encoding_both(bits, make)
            cases.append(
                Case("codecs", "encode keys and values", f"{bits} bits {name}", run, covers, compiled=True)
            )
        for dim in DIMS:
            run = _encoding_matched(bits, dim)
            covers_it = (f"tier {tier.name}", "codec matched")
            title = f"matched codes, {bits} bits"
            cases.append(Case("codecs", title, f"D{dim}", run, covers_it, compiled=dim == 128))
        run = _encoding_prompts(bits)
        cases.append(Case("codecs", "encode prompts", f"{bits} bits", run, covers, compiled=bits == 4))
        for dim in DIMS:
            cases.append(Case("codecs", f"decode, {bits} bits", f"D{dim}", _decoding(bits, dim), covers))
        for lower in (b for b in INTEGER_TIERS if b < bits):
            run = _requantize(bits, lower)
            cases.append(Case("codecs", "move to a lower tier", f"{bits} to {lower} bits", run, covers))
        if rotated.is_uniform(bits):
            for name in ("on codes", "ties everywhere", "constant"):
                run = _exact(bits, name)
                title = f"{bits} bits, {name}"
                cases.append(Case("codecs", "codes of exact inputs", title, run, covers, compiled=True))
    cases.append(Case("codecs", "key mean", "with holes", _mean))
    for codec in CODECS:
        if codec in hf_cache.CODECS:
            continue
        run = BY_DEFINITION[codec]  # raises KeyError for a codec without a case
        cases.append(Case("codecs", "spec only", codec, run, (f"codec {codec}",)))
    return cases


# -- inputs that are difficult for a codec: [2, 3, n, D] float32


def _base(draw: Draw, dim: int, n: int = 60) -> torch.Tensor:
    return draw.normal(2, 3, n, dim)


def _hot(draw: Draw, dim: int) -> torch.Tensor:
    x = _base(draw, dim)
    x[..., 3] = x[..., 3] * 200 + 500
    return x


INPUTS = {
    "normal": lambda draw, dim: _base(draw, dim, 400) * 3,
    "large offset": lambda draw, dim: _base(draw, dim) + torch.linspace(-90, 90, dim, dtype=torch.float64),
    "hot channel": _hot,
    "denormals": lambda draw, dim: _base(draw, dim) * 2.0**-130,
    "fp16 denormals": lambda draw, dim: _base(draw, dim) * 2.0**-20,
    "fp16 extremes": lambda draw, dim: _base(draw, dim).sign() * 65504.0,
    "ties everywhere": lambda draw, dim: (draw.integers(0, 2, 2, 3, 60, dim) * 2 - 1).double(),
    "constant": lambda draw, dim: torch.full((2, 3, 9, dim), 1.25, dtype=torch.float64),
    "zero": lambda draw, dim: torch.zeros(2, 3, 9, dim, dtype=torch.float64),
}


def _encoding(bits, dim, make):
    def run(found: Found, seed: int):
        x = make(Draw(seed), dim).float()
        for centred in (True, False):
            where = "key" if centred else "value"
            result = measure.codes(x, bits, centred=centred, device=found.device)
            # In a small sample, one code may be near a boundary.
            share = max(0, result.differing - 1) / max(1, result.total)
            found.near("codes differing", share, where)
            found.near("code distance", result.furthest, where)
            found.near("scales", result.scale_error, where)

    return run


TOKENS = (2, 3, 60, 64)  # all cases that run compiled share this shape of keys and values


def _encoding_both(bits, make):
    """The encoder of blocks, which is compiled on a GPU."""

    def run(found: Found, seed: int):
        keys, values = (_as_many(make(Draw(seed + i), TOKENS[-1]).float()) for i in (0, 1))
        for side, result in zip(
            ("key", "value"), measure.codes_of_both(keys, values, bits, device=found.device)
        ):
            share = max(0, result.differing - 1) / max(1, result.total)
            found.near("codes differing", share, side)
            found.near("code distance", result.furthest, side)
            found.near("scales", result.scale_error, side)

    return run


def _encoding_prompts(bits):
    """The encoder of prompts in tiles. The last tile is padded."""

    def run(found: Found, seed: int):
        with mock.patch.object(rotated, "MOST", 6 * 64 * 512), mock.patch.object(rotated, "TILE", 512):
            for blocks in (9, 12, 17):  # of 64 tokens: tiles of 512, and of 256
                keys, values = (_base(Draw(seed + i), 64, 64 * blocks) for i in (0, 1))
                keys += torch.linspace(-4, 4, 64)
                found_codes = measure.codes_of_both(keys, values, bits, block=64, device=found.device)
                for side, result in zip(("key", "value"), found_codes):
                    where = f"{side}, {blocks} blocks"
                    share = max(0, result.differing - 1) / max(1, result.total)
                    found.near("codes differing", share, where)
                    found.near("code distance", result.furthest, where)
                    found.near("scales", result.scale_error, where)

    return run


def _encoding_matched(bits, dim):
    """Nearly all vectors have the specified codes, and the others are as good."""

    def run(found: Found, seed: int):
        draw = Draw(seed)
        mix = draw.normal(2, dim, dim) * torch.linspace(0.1, 1, dim, dtype=torch.float64)
        keys = draw.normal(2, 300, dim) @ mix / dim**0.5 + draw.normal(2, 1, dim)
        query, values = draw.normal(6, 300, dim) @ mix[0].mT / dim**0.5, draw.normal(2, 300, dim) @ mix.mT
        moments = matched_spec.measure(query, keys, values, None, NOPE, dim**-0.5, 4)
        mean, *pair = matched_spec.frame(moments, "still", NOPE)
        mean = quantize.stored(mean)[:, None]
        for side, x, own, second in (
            ("key", keys, mean, pair), ("value", values, None, (moments.values, moments.outputs))
        ):  # fmt: skip
            of_values = side == "value"
            codec = matched_spec.MatchedCodec(bits, matched_spec.matched(*second), of_values)
            wanted = codec.encode(x, own)
            A, _, V = (m.float().to(found.device) for m in codec.matrices)
            there = None if own is None else own[None].to(found.device)
            ours = matched.encode(x[None].float().to(found.device), there, A, V, bits, of_values)
            codes, scale = ours.codes[0].cpu(), ours.scale[0].cpu().double()
            same = (codes == wanted.codes).all(-1)
            found.near("vectors differing", 1 - same.double().mean().item(), side)
            error = (scale - wanted.scale).abs() / wanted.scale.clamp_min(2.0**-14)
            found.near("scales", error[same].max().item() if same.any() else 0.0, side)
            damage = [
                codec.damage(torch.einsum("hij,hnj->hni", codec.matrices.encode, codec.decode(r, own) - x))
                for r in (Record(codes, scale, None), wanted)
            ]
            found.near("damage", (damage[0].sum() / damage[1].sum() - 1).abs().item(), side)

    return run


def _as_many(x: torch.Tensor) -> torch.Tensor:
    """Repeat or cut the vectors [2, 3, n, D] to the shape `TOKENS`."""
    return x[:, :, torch.arange(TOKENS[2]) % x.shape[2]].contiguous()


def _packing(bits, dim):
    def run(found: Found, seed: int):
        draw = Draw(seed)
        ramp = torch.arange(dim) % 2**bits
        samples = [draw.integers(0, 2**bits, 3, 7, dim), ramp, ramp * 0, ramp * 0 + 2**bits - 1]
        for i, codes in enumerate(samples):
            codes = codes.to(torch.uint8)
            specified, there = quantize.pack(codes, bits), codes.to(found.device)
            ours = rotated.pack(there, bits)
            found.same("packing", ours, specified, f"pack {i}")
            found.same("packing", rotated.unpack(ours, bits), codes, f"unpack {i}")
            found.same("packing", quantize.unpack(ours.cpu(), bits, dim), codes, f"unpack {i} by the other")
            for dtype, axis in itertools.product(DTYPES, (-1, -2)):
                if dim % 8 == 0 and (axis == -1 or codes.dim() > 1):
                    _numbers(found, ours, codes, bits, dtype, axis)

    return run


def _numbers(found: Found, data, codes, bits, dtype, axis) -> None:
    """Check the fields of a byte as factors of a product, and the sums of these products."""
    parts = packed.fields(data.movedim(-1, axis).contiguous(), bits, dtype, axis)
    width = packed.field_width(bits, codes.shape[-1])
    found.holds("packing", all(x.numbers.shape[axis] == width for x in parts))
    numbers = [(x.numbers.double() / x.unit).movedim(axis, -1).reshape(-1, width, 1) for x in parts]
    ours = torch.cat(packed.channels(numbers, bits), dim=1).view(codes.shape).cpu()
    where, dim = f"{dtype} axis {axis}", codes.shape[-1]
    kept = 0.0 if dtype == torch.float16 else (2**bits - 1) / 2
    found.same("numbers of codes", ours, codes.double() - kept, where)
    by = torch.arange(1.0, dim + 1, dtype=torch.float64)  # products with these numbers are exact
    ours = sum((x.squeeze(-1).cpu() * y).sum(-1) for x, y in zip(numbers, packed.operands(by, bits)))
    found.same("products of codes", ours, ((codes.double() - kept) * by).sum(-1).flatten(), where)


def _record(draw: Draw, bits, *size) -> tuple[rotated.Packed, Record]:
    """Random codes for both packages."""
    dim = size[-1]
    codes = draw.integers(0, 256, *size[:-1], dim * bits // 8).to(torch.uint8)
    scale = ((0.5 + draw.uniform(*size[:-1])) * 2.0 ** (2 - bits)).half()
    zero = draw.normal(*size[:-1]).half() if rotated.is_uniform(bits) else None
    spec = Record(codes, scale.double(), None if zero is None else zero.double())
    return rotated.Packed(codes, scale, zero), spec


def _decoding(bits, dim):
    def run(found: Found, seed: int):
        draw = Draw(seed)
        ours, spec = _record(draw, bits, 2, 3, 40, dim)
        mean = (draw.normal(2, 3, 1, dim) * 8).half()
        matrix = qr_rotation(dim)
        codec = RotatedCodec(bits, dim, matrix)
        there = rotated.Packed(*(None if x is None else x.to(found.device) for x in ours))
        for dtype in (torch.float64, torch.float32):
            for m in (None, mean):
                exact = codec.decode(spec, None if m is None else m.double())
                m = None if m is None else m.to(found.device)
                x = rotated.decode(there, m, matrix.float().to(found.device), bits, dtype)
                found.near("decoding", relative_error(x, exact), f"{dtype}", dtype=dtype)

    return run


def _requantize(bits, lower):
    """Requantize records of one tier for a lower tier in the rotated domain."""

    def run(found: Found, seed: int):
        for dim in (64, 80, 128):
            draw, matrix = Draw(seed + dim), qr_rotation(dim)
            high, low = (RotatedCodec(b, dim, matrix) for b in (bits, lower))
            spec = high.encode(draw.normal(2, 3, 60, dim) * 5)
            half = [None if x is None else x.half().to(found.device) for x in spec[1:]]
            ours = rotated.Packed(spec.codes.to(found.device), *half)
            names = formats.pack_record(ours, ours)
            quantizers = (rotated.quantize, rotated.quantize)
            twin = formats.requantize(names, (bits, bits), (lower, lower), quantizers)
            exact = high.requantize(spec, low)
            for side in ("key", "value"):
                out = formats.unpack_record(twin, side)
                result = measure.differing_codes(exact, rotated.Packed(*_here(out)), lower, dim)
                where = f"D{dim} {side}"
                found.near("codes differing", max(0, result.differing - 1) / max(1, result.total), where)
                found.near("code distance", result.furthest, where)
                found.near("scales", result.scale_error, where)

    return run


def _here(tensors):
    return [None if x is None else x.cpu() for x in tensors]


def _exact(bits, name):
    """Vectors with exact scale and zero point, and no rotation: ties round half to even on every device."""

    def run(found: Found, seed: int):
        top = 2**bits - 1
        dim = TOKENS[-1]
        draw, eye = Draw(seed), torch.eye(dim, dtype=torch.float64)
        codes = draw.integers(0, top + 1, *TOKENS).double()
        codes[..., 0], codes[..., 1] = 0, top
        if name == "ties everywhere":
            codes = (codes + 0.5).clamp(0, top)
            codes[..., 0] = 0
        if name == "constant":
            codes = codes[..., :1].expand_as(codes) * 0 + 3
        for power in (-9, 0, 5):
            x = codes * 2.0**power - 2.0 ** (power + 2)
            spec = RotatedCodec(bits, dim, eye).encode(x)
            there, matrix = x.float().to(found.device), eye.float().to(found.device)
            mean = torch.zeros(*TOKENS[:2], 1, dim, dtype=torch.float16, device=found.device)
            ways = {"": rotated.encode(there, None, matrix, bits)}
            ways |= dict(
                zip(("key ", "value "), rotated.encode_both(there, there, mean, matrix, (bits, bits)))
            )
            for (way, ours), part in itertools.product(ways.items(), ("codes", "scale", "zero")):
                claim, where = "codes of exact inputs", f"{way}{part}, 2^{power}"
                found.same(claim, getattr(ours, part), getattr(spec, part), where)

    return run


def _mean(found: Found, seed: int):
    draw = Draw(seed)
    for scale in (1.0, 1e-6, 1e4):
        x = (draw.normal(2, 3, 4, 50, 64) * scale + torch.linspace(-9, 9, 64)).half()
        position = torch.arange(50).expand(2, 1, 4, -1).masked_fill(draw.chance(0.3, 2, 1, 4, 50), -1)
        position[0, 0, 1] = -1
        ours = rotated.key_mean(x.to(found.device), (position != PAD).to(found.device))
        valid = (position >= 0).expand(-1, 3, -1, -1)
        exact = key_mean(x.masked_fill(~valid[..., None], torch.nan), valid)[..., 0, :]
        found.same("key mean", ours, exact, f"scale {scale}")


# -- codecs that exist only in the specification


def _channel(found: Found, seed: int):
    """The codes of KIVI compared with their definition, in exact arithmetic on a grid."""
    refused_config(found, "quant_backend", "channel")
    for bits, (name, make) in itertools.product((8, 4, 3, 2), INPUTS.items()):
        x = make(Draw(seed), 64).float()
        x = x[:, :, : x.shape[2] // 3 * 3]
        n = 3
        for encode, decode, axis in (
            (baselines.channel_encode, baselines.channel_decode, -2),
            (lambda x, b, n: baselines.group_encode(x, b, 64), baselines.group_decode, -1),
        ):
            codes, scale, zero = encode(x, bits, n)
            where = f"{bits} bits, {name}, axis {axis}"
            unpacked = rotated.unpack(rotated.pack(codes, bits), bits)
            found.same("codec by definition", unpacked, codes, where)
            for part in (codes, scale, zero):
                found.bits("codec by definition", part)
            step = scale.repeat_interleave(x.shape[axis] // scale.shape[axis], axis)
            room = zero.abs().repeat_interleave(x.shape[axis] // scale.shape[axis], axis) * 2.0**-10
            far = (
                decode(codes, scale, zero) - x.double()
            ).abs() > step / 2 + room + step * 2**bits * 2.0**-10
            fits = x.abs().max() < 3e4  # a range larger than fp16 is clipped
            found.holds("codec by definition", not (far.any() and fits), f"{where}: beyond half a step")


def _symmetric(found: Found, seed: int):
    """The four-bit codes of fade-kv compared with their definition."""
    refused_config(found, "quant_backend", "symmetric")
    for (name, make), over in itertools.product(INPUTS.items(), (-1, -2)):
        x = make(Draw(seed), 64).float()
        codes, scale = baselines.symmetric_encode(x, over)
        found.same("codec by definition", rotated.unpack(rotated.pack(codes, 4), 4), codes, name)
        for part in (codes, scale):
            found.bits("codec by definition", part)
        signed = torch.round(x.double() / scale).clamp(-8, 7)
        again = baselines.symmetric_decode(codes, scale)
        found.same("codec by definition", again, signed * scale, f"{name}, over {over}")


BY_DEFINITION = {"channel": _channel, "symmetric": _symmetric}
