"""Codes of the matched codec without feedback, and those of a search in parts. Parity compares codes with the
specification.
"""

import pytest
import torch

from fade_fast.kernels import matched, rotated
from fade_fast.kernels.rotated import LARGEST, Packed, center, scaled, unpack


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("seed", range(3))
def test_codes_without_feedback_are_the_nearest_ones(bits, seed):
    """By the stored scale, in float64, and no other scale that is tried has a smaller error."""
    draws = torch.Generator().manual_seed(seed)
    y = torch.randn(2, 3, 40, 64, generator=draws) * torch.logspace(-4, 3, 40).unsqueeze(-1)
    y[0, 0, 5] = 0  # a vector of zeros
    y[0, 1, 6] = 1e9  # beyond every scale of half precision
    found = matched.quantize_to_nearest(y, bits)
    assert found.codes.dtype == torch.uint8 and found.codes.shape == y.shape
    assert found.scale.dtype == torch.float16 and found.scale.shape == y.shape[:-1] and found.zero is None
    assert found.codes.max() <= 2**bits - 1 and found.scale.isfinite().all()

    exact, middle = y.double(), center(bits)
    size = exact.square().mean(-1, keepdim=True).sqrt() * matched.STEPS[bits]
    tried = [(size * x).clamp_max(LARGEST).half().double() for x in matched.FACTORS]
    levels = [
        (torch.where(s > 0, exact / s, 0.0) + middle).round().clamp(0, 2**bits - 1) - middle for s in tried
    ]
    errors = torch.stack([(exact - s * x).square().sum(-1) for s, x in zip(tried, levels)])
    error = (exact - scaled(found, bits, torch.float64)).square().sum(-1)
    assert (error <= errors.amin(0) * (1 + 1e-5) + 1e-30).all()
    # A rounded float32 scale may be the neighbor of the float64 one; there is no third.
    assert (torch.stack(tried).squeeze(-1).half() == found.scale).any(0).double().mean() > 0.99
    assert scaled(found, bits, torch.float64)[0, 0, 5].abs().max() <= found.scale[0, 0, 5]


def matrices(heads=2, dim=64, seed=0) -> matched.Matrices:
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, dim, dim, generator=draws) / dim**0.5 + torch.eye(dim)
    encode = torch.linalg.inv(torch.linalg.inv(mix).half().float())
    decode = torch.linalg.inv(encode).mT
    feedback = torch.linalg.cholesky(mix @ mix.mT).half()
    return matched.Matrices(encode, torch.cat((decode, decode.sum(1, keepdim=True)), dim=1), feedback)


@pytest.mark.parametrize("bits", [3, 2])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_a_search_by_parts_finds_the_same_codes(bits, tokens, monkeypatch):
    """Up to vectors with a code near a boundary, because products of other sizes round differently."""
    known = matrices()
    y = torch.randn(2, 2, tokens, 64, generator=torch.Generator().manual_seed(tokens))
    whole = matched.quantize(y, known.feedback, bits)
    for most in (1, 5 * 2 * 64 * 40):
        monkeypatch.setattr(matched, "MOST_SEARCHED", most)
        parts = matched.quantize(y, known.feedback, bits)
        same = (parts.codes == whole.codes).all(-1)
        assert same.double().mean() >= 0.98 and parts.codes.shape == whole.codes.shape
        torch.testing.assert_close(parts.scale[same], whole.scale[same], rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_vectors_of_any_size_are_rounded_alike(bits):
    """Codes do not depend on the size of a vector; a zero vector decodes to zero, and no vector to NaN."""
    known = matrices(seed=1)
    y = torch.randn(1, 2, 50, 64, generator=torch.Generator().manual_seed(2))
    small, large = (matched.quantize(y * 2.0**x, known.feedback, bits) for x in (-6, 6))
    assert torch.equal(small.codes, large.codes) and torch.equal(small.scale * 2.0**12, large.scale)
    y[:, :, 3], y[:, :, 4] = 0, 1e30
    found = matched.quantize(y, known.feedback, bits)
    decoded = scaled(Packed(unpack(found.codes, bits), found.scale, None), bits, torch.float64)
    assert (decoded[:, :, 3] == 0).all() and decoded.isfinite().all() and found.scale.isfinite().all()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_long_prompts_are_encoded_in_tiles_that_are_replayed(bits, monkeypatch):
    """As on a GPU, where tiles have at most as many elements as a replayed call."""
    known, sizes = matrices(), []

    def note(keys, values, mean, *tables, bits):
        sizes.append(keys.numel())
        return matched._encode_both(keys, values, mean, *tables, bits=bits)

    keys, values = torch.randn(2, 1, 2, 2048, 64).unbind(0)
    mean = torch.zeros(1, 2, 32, 64, dtype=torch.float16)
    whole = matched.encode_both(keys, values, mean, (known, known), (4, bits))
    monkeypatch.setattr(rotated, "use_compiled", lambda x: True)
    monkeypatch.setattr(matched, "MOST_REPLAYED", 1 << 16)
    monkeypatch.setattr(matched, "_replayed", note)
    tiled = matched.encode_both(keys, values, mean, (known, known), (4, bits))
    assert len(sizes) > 1 and max(sizes) <= 1 << 16
    for one, other in zip(tiled, whole):
        assert (one.codes == other.codes).all(-1).double().mean() >= 0.98


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_keys_and_values_together_have_the_codes_that_each_has_alone(bits, monkeypatch):
    """Each side by its own matrices, keys less their means; up to codes near a boundary. As on a GPU."""
    sides = matrices(seed=1), matrices(seed=2)
    draws = torch.Generator().manual_seed(bits)
    keys, values = torch.randn(2, 2, 2, 128, 64, generator=draws).unbind(0)
    mean = torch.randn(2, 2, 2, 64, generator=draws).half()
    encode, calls = matched.encode, []
    monkeypatch.setattr(matched, "encode", lambda *args, **more: calls.append(args) or encode(*args, **more))
    alone = matched.encode_both(keys + 3, values, mean + 3, sides, (bits, bits))
    assert len(calls) == 2
    monkeypatch.setattr(matched, "use_compiled", lambda x: True)
    together = matched.encode_both(keys + 3, values, mean + 3, sides, (bits, bits))
    assert len(calls) == (4 if bits == 2 else 3)  # values of 2 bits are searched for no scales
    monkeypatch.setattr(matched, "MOST_OF_BOTH", keys.numel() - 1)
    matched.encode_both(keys, values, mean, sides, (bits, bits))
    assert len(calls) == (6 if bits == 2 else 5)
    for one, other in zip(together, alone):
        assert one.codes.shape == other.codes.shape and one.scale.shape == other.scale.shape
        same = (one.codes == other.codes).all(-1)
        assert same.double().mean() >= 0.98
        torch.testing.assert_close(one.scale[same], other.scale[same], rtol=2e-3, atol=0)
