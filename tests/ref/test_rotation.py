"""Rotations are orthogonal and spread spikes; the rotated codec centers, moves and requantizes."""

import math

import pytest
import torch

from fade_ref import quantize as qz
from fade_ref.baselines import hadamard_rotate, hadamard_rotation
from fade_ref.rotation import (
    Record,
    RotatedCodec,
    key_mean,
    qr_rotation,
)  # fmt: skip
from fade_ref.tiers import token_bytes

from ..marks import slow_but

DIMS = (64, 80, 96, 112, 128, 256)
WIDTHS = (8, 4, 3, 2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_mse(decoded, x):
    return ((decoded - x).square().sum(-1) / x.square().sum(-1)).mean().item()


def codec(bits, dim=128, seed=0):
    return RotatedCodec(bits, dim, qr_rotation(dim, seed))


# Rotations


@pytest.mark.parametrize("dim", slow_but(DIMS, 80))
def test_qr_rotation_is_orthogonal(dim):
    P = qr_rotation(dim, seed=dim)
    torch.testing.assert_close(P @ P.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-13)
    R = P.T @ normal(dim, dim, seed=dim)  # the triangular factor, unique because of its positive diagonal
    assert (R.diagonal() > 0).all() and R.tril(-1).abs().max() < 1e-12


@pytest.mark.parametrize("rounds", (1, 2, 3))
@pytest.mark.parametrize("dim", slow_but((1, 8, 64, 128, 256), 64))
def test_hadamard_rotation_is_orthogonal(dim, rounds):
    P = hadamard_rotation(dim, seed=5, rounds=rounds)
    torch.testing.assert_close(P @ P.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-13)
    x = normal(3, 7, dim)
    torch.testing.assert_close(hadamard_rotate(x, 5, rounds), x @ P.T, rtol=0, atol=1e-12)
    if rounds == 1:  # up to the signs, Sylvester's matrix
        assert torch.equal((P * dim**0.5).abs().round(), torch.ones(dim, dim).double())


@pytest.mark.parametrize("dim", (0, 80, 96, 112))
def test_hadamard_needs_a_power_of_two(dim):
    with pytest.raises(ValueError, match="power of two"):
        hadamard_rotation(dim)
    with pytest.raises(ValueError, match="power of two"):
        hadamard_rotate(torch.zeros(2, dim))


@pytest.mark.parametrize("make", (qr_rotation, hadamard_rotation))
def test_rotations_come_from_their_seed_alone(make):
    before = torch.random.get_rng_state()
    first = make(64, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(make(64, 3), first)
    assert not torch.equal(make(64, 4), first)
    torch.random.set_rng_state(before)


def spiky(dim, spikes):
    """All one-hot vectors, or two-hot vectors with both signs."""
    eye = torch.eye(dim, dtype=torch.float64)
    if spikes == 1:
        return eye
    return torch.cat([eye + sign * eye.roll(shift, 0) for shift in (1, 5) for sign in (1, -1)])


def spiky_mse(make, spikes, bits):
    """The error of spiky vectors with plain norms for D = 128, as a mean over 16 rotations."""
    total = 0.0
    for seed in range(16):
        x = spiky(128, spikes) @ make(seed).T
        decoded = qz.lloyd_decode(*qz.lloyd_encode(x, bits, "gaussian", "plain"), bits, "gaussian")
        total += relative_mse(decoded, x) / 16
    return total


@pytest.mark.parametrize("spikes", (1, 2))
@pytest.mark.parametrize("bits, expected", [(2, 0.1161), (3, 0.0340), (4, 0.0093)])
def test_spiky_vectors_cost_nothing_after_a_rotation(bits, expected, spikes):
    assert spiky_mse(lambda s: qr_rotation(128, s), spikes, bits) <= 1.1 * expected
    assert spiky_mse(lambda s: hadamard_rotation(128, s), spikes, bits) <= 1.1 * expected


@pytest.mark.parametrize("bits, spikes", [(2, 1), (3, 1), (4, 2)])
def test_one_hadamard_round_is_not_enough(bits, spikes):
    one = spiky_mse(lambda s: hadamard_rotation(128, s, rounds=1), spikes, bits)
    assert one > 1.5 * spiky_mse(lambda s: hadamard_rotation(128, s), spikes, bits)


# Centering


def test_key_mean():
    x = normal(2, 3, 50, 64)
    mean = key_mean(x)
    assert mean.shape == (2, 3, 1, 64) and torch.equal(mean, qz.stored(x.mean(-2, keepdim=True)))
    valid = torch.zeros(2, 3, 50, dtype=torch.bool)
    valid[0, :, 10:] = True
    padded = x.masked_fill(~valid.unsqueeze(-1), math.nan)  # the content of the padding does not matter
    mean = key_mean(padded, valid)
    assert torch.equal(mean[0], key_mean(x[0, :, 10:]))
    assert torch.equal(mean[1], torch.zeros(3, 1, 64, dtype=torch.float64))


@pytest.mark.parametrize("bits", WIDTHS)
def test_centering_helps_with_an_offset_and_costs_nothing_without(bits):
    x = normal(2048, 128, seed=bits)
    subject = codec(bits)

    def error(x, mean=None):
        return (subject.decode(subject.encode(x, mean), mean) - x).square().mean().item()

    assert error(x, key_mean(x)) <= 1.02 * error(x)
    offset = x + 20 * normal(128, seed=1)
    assert error(offset, key_mean(offset)) <= 0.02 * error(offset)
    assert error(offset, key_mean(offset)) == pytest.approx(error(x), rel=0.02)


def test_a_mean_may_differ_by_token():
    x = normal(2, 30, 64)
    means = qz.stored(normal(2, 30, 64, seed=1))
    subject = codec(4, 64)
    records = subject.encode(x, means)
    one = subject.encode(x[:, 7], means[:, 7])
    assert torch.equal(records.codes[:, 7], one.codes) and torch.equal(records.zero[:, 7], one.zero)
    half_step = records.scale / 2 + 2.0**-9  # half a step, and the rounding of the stored zero point
    assert ((subject.decode(records, means) - x).norm(dim=-1) <= math.sqrt(64) * half_step).all()


# The codec


@pytest.mark.parametrize("dim", slow_but(DIMS, 80))
@pytest.mark.parametrize("bits", WIDTHS)
def test_record_sizes(bits, dim):
    subject = codec(bits, dim)
    record = subject.encode(normal(2, 5, dim))
    assert record.codes.dtype == torch.uint8 and record.codes.shape == (2, 5, dim * bits // 8)
    numbers = [record.scale] + ([record.zero] if bits >= 4 else [])
    assert record.zero is None if bits < 4 else record.zero.shape == (2, 5)
    assert all(torch.equal(number, qz.stored(number)) for number in numbers)
    size = record.codes.shape[-1] + 2 * len(numbers)
    assert size == subject.bytes_per_token == token_bytes(bits, dim)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codec_is_its_formula(bits):
    x, mean = normal(20, 64), qz.stored(normal(1, 64, seed=2))
    subject = codec(bits, 64)
    y = (x - mean) @ subject.rotation.T
    if bits >= 4:
        codes, scale, zero = qz.uniform_encode(y, bits)
        decoded = codes.double() * scale.unsqueeze(-1) + zero.unsqueeze(-1)
    else:
        codes, scale = qz.lloyd_encode(y, bits, "linear", "unbiased")
        decoded = qz.lloyd_decode(codes, scale, bits, "linear")
    record = subject.encode(x, mean)
    assert torch.equal(record.codes, qz.pack(codes, bits))
    expected = decoded @ subject.rotation + mean
    torch.testing.assert_close(subject.decode(record, mean), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "bits, expected", [(8, 0.100**2 * (15 / 255) ** 2), (4, 0.100**2), (3, 0.0377), (2, 0.1307)]
)
def test_codec_error(bits, expected):
    """The error of a uniform code over groups of 128. At 3 and 2 bits: TurboQuant with the unbiased norm."""
    x = normal(4096, 128, seed=21)
    x[:, :4] *= 10  # the rotation is needed for outlier channels
    subject = codec(bits)
    assert relative_mse(subject.decode(subject.encode(x)), x) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("bits", (3, 2))
def test_decoded_vectors_are_unbiased(bits):
    x = normal(300, 128, seed=22)
    subject = codec(bits)
    ratio = (subject.decode(subject.encode(x)) * x).sum(-1) / x.square().sum(-1)
    assert (ratio - 1).abs().max() <= 2.0**-11


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_token_depends_on_no_other(bits):
    x = normal(4, 60, 64, seed=23)
    subject = codec(bits, 64)
    records = subject.encode(x)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    moved = subject.encode(1 * x[:, order])
    for part, moved_part in zip(records, moved):
        if part is not None:
            assert torch.equal(part[:, order], moved_part)
    x[:, 30] *= 1e4  # one very large token does not change the records of other tokens
    disturbed = subject.encode(x)
    assert torch.equal(disturbed.codes[:, :30], records.codes[:, :30])
    assert torch.equal(disturbed.scale[:, 31:], records.scale[:, 31:])


def test_requantising_stays_in_the_rotated_domain():
    x, mean = normal(500, 128, seed=24), qz.stored(normal(1, 128, seed=2))
    four, two = codec(4), codec(2)
    record = four.encode(x, mean)
    demoted = four.requantize(record, two)
    assert demoted.zero is None and demoted.codes.shape == (500, 32)
    y = qz.uniform_decode(qz.unpack(record.codes, 4, 128), record.scale, record.zero)
    codes, scale = qz.lloyd_encode(y, 2, "linear")
    assert torch.equal(demoted.codes, qz.pack(codes, 2)) and torch.equal(demoted.scale, scale)
    detour = two.encode(four.decode(record, mean), mean)  # equal up to rounding
    assert (detour.codes == demoted.codes).double().mean() > 0.999
    # Four bits as a first step add little error. Both errors are added.
    direct = relative_mse(two.decode(two.encode(x, mean), mean), x)
    assert relative_mse(two.decode(demoted, mean), x) < 1.15 * direct
    with pytest.raises(ValueError, match="rotation"):
        four.requantize(record, codec(2, seed=1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_difficult_input_stays_finite(bits):
    subject, noise = codec(bits, 64), normal(40, 64, seed=25)
    for scale in (1e-7, 6e-8, 1.0, 1e5, 65504.0):
        for x in (scale * noise, torch.full_like(noise, scale)):
            record = subject.encode(x)
            assert torch.isfinite(subject.decode(record)).all()
            assert torch.isfinite(subject.decode(subject.encode(x, key_mean(x)), key_mean(x))).all()
    assert torch.equal(subject.decode(subject.encode(0 * noise)), 0 * noise)
    noise[3, 3] = math.nan
    with pytest.raises(ValueError):
        subject.encode(noise)


@pytest.mark.parametrize("bits", WIDTHS)
def test_empty_tiers_are_fine(bits):
    subject = codec(bits, 64)
    record = subject.encode(torch.zeros(2, 0, 64))
    assert isinstance(record, Record) and subject.decode(record).shape == (2, 0, 64)


@pytest.mark.parametrize("bits, dim, rotation", [
    (5, 64, qr_rotation(64)), (16, 64, qr_rotation(64)), (4, 64, qr_rotation(128)),
    (3, 12, qr_rotation(12)), (4, 64, 2 * qr_rotation(64)),
])  # fmt: skip
def test_codec_refuses(bits, dim, rotation):
    with pytest.raises(ValueError):
        RotatedCodec(bits, dim, rotation)
