"""Published formats: bytes, bounds of the error, inputs that they represent exactly, what sets them apart."""

import math

import pytest
import torch

from benchmarks import baselines as base
from fade_ref.quantize import stored
from fade_ref.rotation import qr_rotation

ALL = [
    f"{form}{bits}" for form, of in base.FORMS.items() for bits in of.widths if bits < 8
]  # every form and width


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(name, x):
    """x as keys and as values, read back."""
    return zip(("keys", "values"), base.baseline(name).read(x, x))


@pytest.mark.parametrize(
    "name, keys, values",
    [  # head_dim 128: packed codes, and two bytes for each number
        ("kivi2", 32 + 4 * 128 / 32, 32 + 4 * 4),
        ("kivi4:group=64", 64 + 4 * 128 / 64, 64 + 4 * 2),
        ("kivi-k4v2", 64 + 4 * 128 / 32, 32 + 4 * 4),
        ("quanto4", 64 + 4 * 2, 64 + 4 * 2),
        ("hqq2", 32 + 4 * 2, 32 + 4 * 2),
        ("hqq3", 48 + 4 * 2, 48 + 4 * 2),
        ("kvarn2", 32 + 4 * 128 / 128 + 2, 32 + 4 + 2 * 128 / 128),
        ("turboquant3", 48 + 2, 48 + 2),
    ],
)
def test_bytes(name, keys, values):
    found = base.baseline(name)
    assert found.keys.bytes_per_token(128) == keys and found.values.bytes_per_token(128) == values
    # The same bytes in a record of many tokens, and codes that fit their width.
    for side, expected in ((found.keys, keys), (found.values, values)):
        record = side.encode(normal(3, 256, 128))
        assert record.bytes == 3 * 256 * expected
        assert record.codes.shape == (3, 256, 128) and record.codes.max() == 2**record.bits - 1


@pytest.mark.parametrize("name", ALL)
def test_stored_numbers_are_fp16(name):
    for side in (base.baseline(name).keys, base.baseline(name).values):
        assert all(torch.equal(x, stored(x)) for x in side.encode(normal(2, 200, 64) * 3 + 1).numbers)


@pytest.mark.parametrize("bits", (4, 2))
def test_the_error_is_at_most_half_a_step(bits):
    """Uniform codes over the range of a group: half a step, and what fp16 numbers add."""
    x = normal(2, 128, 64) * torch.linspace(0.1, 8, 64)
    steps = {
        f"kivi{bits}": (x.unflatten(1, (-1, 32)), 2),
        f"quanto{bits}": (x, 2),
    }
    for name, (grouped, dim) in steps.items():
        low, high = grouped.aminmax(dim=dim, keepdim=True)
        half = ((high - low) / (2**bits - 1) / 2).expand_as(grouped).reshape_as(x)
        found = base.baseline(name).read(x, x)[0]
        assert ((found - x).abs() <= half * 1.02 + x.abs() * 2e-3).all(), name
        assert ((found - x).abs() > half / 2).any(), name


def test_kivi_groups_keys_by_channel_and_values_by_token():
    """Keys: a large channel leaves the others alone. Values: a large token does."""
    x = normal(1, 96, 64)
    wide = x * torch.where(torch.arange(64) == 5, 100.0, 1.0)
    keys, values = base.baseline("kivi4").read(wide, wide)
    others = torch.arange(64) != 5
    error = lambda y: ((y - wide)[..., others].norm() / wide[..., others].norm()).item()  # noqa: E731
    assert error(keys) < 0.1 < 1 < error(values)
    long = x.clone()
    long[:, 40] *= 100
    keys, values = base.baseline("kivi4").read(long, long)
    rest = torch.arange(96) != 40
    error = lambda y: ((y - long)[:, rest].norm() / long[:, rest].norm()).item()  # noqa: E731
    assert error(values) < 0.1 < 0.5 < error(keys)  # a third of the tokens shares its groups


def test_a_short_last_group_has_numbers_of_its_own():
    for name in ("kivi4", "kvarn4"):
        side = base.baseline(name).keys
        x = normal(1, side.whole + 7, 64)
        x[:, side.whole :] *= 1000
        together, alone = side.decode(side.encode(x)), side.decode(side.encode(x[:, : side.whole]))
        assert torch.equal(together[:, : side.whole], alone)
        assert (together - x)[:, side.whole :].norm() < 0.2 * x[:, side.whole :].norm()


@pytest.mark.parametrize("bits", (4, 3, 2))
def test_levels_that_a_group_holds_are_exact(bits):
    """Two or more levels at equal distances, in fp16: kivi, quanto and hqq lose nothing."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (2, 64, 64), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1  # each token has both ends
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1  # and each channel of 32 tokens
    codes[:, ::32, 1], codes[:, 1::32, 0] = 2**bits - 1, 0
    x = codes.double() * 0.25 - 0.5
    names = [
        name for name in (f"kivi{bits}:group=32", f"quanto{bits}", f"hqq{bits}") if name in ALL or ":" in name
    ]
    for name in names:
        for side, found in both(name, x):
            if name.startswith("kivi") and side == "values":
                continue  # groups of 32 channels need not hold both ends
            assert torch.equal(found, x), (name, side)


def test_hqq_is_never_worse_than_the_range_and_better_with_outliers():
    x = normal(4, 200, 64, seed=3)
    x[..., 7] *= 6
    for bits in (4, 3, 2):
        size = lambda y: (y - x).abs().mean(-1)  # noqa: E731
        fitted = size(base.half_quadratic(bits, 64).decode(base.half_quadratic(bits, 64).encode(x)))
        ranged = size(base.per_token(bits, 64).decode(base.per_token(bits, 64).encode(x)))
        assert (fitted <= ranged * 1.01 + 1e-4).all()
        assert fitted.mean() < 0.97 * ranged.mean(), bits


def test_kvarn_evens_out_deviations():
    x = normal(2, 128, 64) * torch.linspace(1, 2, 64) * torch.linspace(1, 20, 128)[:, None]
    tokens, channels = base.balanced(x)
    assert tokens.shape == (2, 128, 1) and channels.shape == (2, 1, 64)
    even = x / tokens / channels
    ratio = lambda y, dim: (y.std(dim).amax() / y.std(dim).amin()).item()  # noqa: E731
    assert ratio(x, -1) > 15 and ratio(x, -2) > 2
    assert ratio(even, -1) < 1.1 and ratio(even, -2) < 1.1
    # Tokens of different lengths: a token scale keeps the relative error of the short ones.
    long = normal(1, 128, 64) * torch.where(torch.arange(128) % 16 == 0, 15.0, 1.0)[:, None]
    rest = torch.arange(128) % 16 != 0
    error = lambda y: ((y - long)[:, rest].norm() / long[:, rest].norm()).item()  # noqa: E731
    kvarn, kivi = (base.baseline(name).read(long, long)[0] for name in ("kvarn4", "kivi4:group=64"))
    assert error(kvarn) < 0.15 and error(kivi) > 3 * error(kvarn)


def test_kvarn_has_no_scales_where_none_help():
    """The most even round counts, and the tile as it is counts as a round. Limits hold."""
    signs = torch.where(normal(1, 128, 64) > 0, 1.0, -1.0).double()
    for scale in base.balanced(signs):
        assert (scale - 1).abs().max() < 0.3
    for scale in base.balanced(1e-4 * normal(1, 128, 64)):
        assert scale.min() == math.exp(base.LOGARITHMS[0])
    constant = torch.full((1, 5, 64), 2.5, dtype=torch.float64)
    keys, _ = base.baseline("kvarn4").read(constant, constant)
    torch.testing.assert_close(keys, constant, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("bits, distortion", [(4, 0.009), (3, 0.034), (2, 0.117)])
def test_turboquant_reaches_its_published_distortion(bits, distortion):
    """arXiv 2504.19874, theorem 1: mean squared error of unit vectors, whatever their direction."""
    one_hot = torch.eye(64, dtype=torch.float64)[None]
    for x in (normal(1, 400, 64, seed=4), one_hot, 5 * one_hot + normal(1, 64, 64, seed=5)):
        found = base.baseline(f"turboquant{bits}").read(x, x)[0]
        measured = ((found - x).square().sum(-1) / x.square().sum(-1)).mean().item()
        assert measured == pytest.approx(distortion, rel=0.12)


def test_turboquant_is_exact_where_all_levels_are_reached():
    """A vector whose rotated coordinates are levels comes back, up to the fp16 norm."""
    level = base.quantize.levels(2, "sphere", 64)
    codes = torch.randint(4, (1, 50, 64), generator=torch.Generator().manual_seed(1))
    y = level[codes]
    x = 3 * y / y.norm(dim=-1, keepdim=True) * 8 @ qr_rotation(64)  # the norm that levels have on average
    found = base.baseline("turboquant2").read(x, x)[0]
    cosine = (found * x).sum(-1) / found.norm(dim=-1) / x.norm(dim=-1)
    assert (cosine > 0.97).all() and cosine.median() > 0.999


@pytest.mark.parametrize("name", ALL)
def test_difficult_inputs_stay_finite(name):
    for x in (0 * normal(2, 40, 64), 1e-7 * normal(2, 40, 64), 1e4 * normal(2, 40, 64), normal(2, 1, 64)):
        for side, found in both(name, x):
            assert torch.isfinite(found).all() and found.shape == x.shape, side
    bad = normal(1, 40, 64)
    bad[0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        base.baseline(name).read(bad, bad)


@pytest.mark.parametrize(
    "name", ["kivi", "kivi5", "quanto3", "turboquant8", "kvarn4:group=64", "kivi4:group=0", "x4"]
)
def test_names_that_mean_nothing(name):
    with pytest.raises(ValueError):
        base.baseline(name)


def test_more_bits_are_better():
    x = normal(2, 256, 64) + 1
    for form, of in base.FORMS.items():
        errors = [
            sum((found - x).norm().item() for _, found in both(f"{form}{bits}", x)) for bits in of.widths
        ]
        assert errors == sorted(errors) and len(set(errors)) == len(errors), form
