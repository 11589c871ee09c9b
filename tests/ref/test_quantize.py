"""Codes, levels and packing, compared with theory, bounds and slow independent implementations."""

import math
from fractions import Fraction

import pytest
import torch
from scipy.optimize import minimize

from fade_ref import baselines as base
from fade_ref import quantize as qz
from fade_ref.tiers import packed_bytes

from ..marks import slow_but

DIMS = (64, 80, 96, 112, 128, 256)

# Positive halves, from closed-form iteration: (kind, dim, bits) -> levels.
LEVELS = {
    ("gaussian", None, 2): (0.452780, 1.510418),
    ("gaussian", None, 3): (0.245094, 0.756005, 1.343909, 2.151946),
    ("gaussian", None, 4):
        (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
    ("sphere", 64, 2): (0.4521, 1.5000),
    ("sphere", 64, 3): (0.2438, 0.7507, 1.3293, 2.1113),
    ("sphere", 64, 4): (0.1274, 0.3847, 0.6505, 0.9319, 1.2394, 1.5908, 2.0233, 2.6464),
    ("sphere", 80, 4): (0.1276, 0.3854, 0.6517, 0.9340, 1.2427, 1.5962, 2.0323, 2.6632),
    ("sphere", 96, 4): (0.1277, 0.3858, 0.6526, 0.9354, 1.2450, 1.5998, 2.0383, 2.6746),
    ("sphere", 128, 2): (0.4525, 1.5052),
    ("sphere", 128, 3): (0.2444, 0.7533, 1.3366, 2.1315),
    ("sphere", 128, 4): (0.1279, 0.3864, 0.6536, 0.9371, 1.2478, 1.6043, 2.0459, 2.6889),
    ("sphere", 256, 2): (0.4526, 1.5078),
    ("sphere", 256, 3): (0.2448, 0.7547, 1.3402, 2.1417),
    ("sphere", 256, 4): (0.1281, 0.3872, 0.6552, 0.9397, 1.2520, 1.6112, 2.0574, 2.7106),
}  # fmt: skip

# Mean squared error of a decoded unit vector, plain norm: dim -> kind -> (2, 3, 4 bits).
UNIT_MSE = {
    64: {"sphere": (0.1145, 0.0334, 0.0091), "gaussian": (0.1147, 0.0334, 0.0092)},
    128: {"sphere": (0.1160, 0.0340, 0.0093), "gaussian": (0.1161, 0.0340, 0.0093)},
    256: {"sphere": (0.1167, 0.0343, 0.0094), "gaussian": (0.1168, 0.0343, 0.0094)},
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_mse(decoded, x):
    return ((decoded - x).square().sum(-1) / x.square().sum(-1)).mean().item()


def relative_error(decoded, x):
    return ((decoded - x).norm() / x.norm()).item()


def gaussian_mse(level):
    """Expected squared error for N(0, 1) with midpoints as boundaries: E x^2 - 2 E x c + E c^2."""
    end = torch.tensor([math.inf], dtype=torch.float64)
    bounds = torch.cat((-end, (level[1:] + level[:-1]) / 2, end))
    mass = torch.special.ndtr(bounds).diff()
    moment = -(torch.exp(-bounds.square() / 2) / math.sqrt(2 * math.pi)).diff()
    return (1 - 2 * level @ moment + level.square() @ mass).item()


# Levels


@pytest.mark.parametrize("kind, dim, bits", slow_but(LEVELS, ("gaussian", None, 3), ("sphere", 128, 4)))
def test_levels_match_the_closed_values(kind, dim, bits):
    half = torch.tensor(LEVELS[kind, dim, bits], dtype=torch.float64)
    expected = torch.cat((-half.flip(0), half))
    assert (qz.levels(bits, kind, dim) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("bits, expected", [(2, 0.117482), (3, 0.034548), (4, 0.009501)])
def test_gaussian_levels_have_the_textbook_error(bits, expected):
    assert gaussian_mse(qz.levels(bits, "gaussian")) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bits, excess", slow_but([(2, 1.0), (3, 1.0022), (4, 1.0197)], (2, 1.0)))
def test_cubic_levels_are_close_to_lloyd_max(bits, excess):
    ratio = gaussian_mse(qz.levels(bits)) / gaussian_mse(qz.levels(bits, "gaussian"))
    assert ratio == pytest.approx(excess, abs=1e-4)


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_cubic_is_the_best_odd_cubic(bits):
    u = torch.arange(1 - 2**bits, 2**bits, 2, dtype=torch.float64)
    a, b = qz.cubic(bits)
    torch.testing.assert_close(qz.levels(bits), u * (a + b * u * u), rtol=0, atol=1e-13)
    search = minimize(
        lambda p: gaussian_mse(u * (p[0] + p[1] * u * u)), (0.3, 0.001), method="Nelder-Mead",
        options={"xatol": 1e-10, "fatol": 1e-15, "maxiter": 2000},
    )  # fmt: skip
    assert gaussian_mse(qz.levels(bits)) <= search.fun + 1e-12
    assert (a, b) == pytest.approx(tuple(search.x), abs=1e-6)


@pytest.mark.parametrize("bits, excess", [(2, 1.0117), (3, 1.0837)])
def test_linear_levels_are_the_best_evenly_spaced_ones(bits, excess):
    """No other step size has a smaller squared error on a fine grid of N(0, 1).

    `excess` is the ratio to the error of the Gaussian levels.
    """
    y = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    weight = torch.exp(-y.square() / 2)

    def error(level):
        nearest = level[torch.bucketize(y, (level[1:] + level[:-1]) / 2)]
        return ((y - nearest).square() * weight).sum() / weight.sum()

    level = qz.levels(bits, "linear")
    assert torch.allclose(level.diff(), level.diff()[:1])
    best = error(level)
    assert best < min(error(level * 1.01), error(level * 0.99))
    assert best / error(qz.levels(bits, "gaussian")) == pytest.approx(excess, abs=2e-4)
    assert torch.equal(qz.steps(bits, "linear"), torch.arange(2**bits) - (2**bits - 1) / 2)


@pytest.mark.parametrize("norm", ("plain", "least_squares", "unbiased"))
def test_the_norm_does_not_depend_on_how_levels_are_written(norm):
    """The scale may multiply steps or levels. The decoded vector is the same, up to the scale's rounding."""
    y = torch.randn(50, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    codes, scale = qz.lloyd_encode(y, 2, "linear", norm)
    z = qz.levels(2, "linear")[codes.long()]
    length = y.norm(dim=-1)
    factor = {"plain": length / 8, "least_squares": (y * z).sum(-1) / (z * z).sum(-1)}
    factor["unbiased"] = length**2 / (y * z).sum(-1)
    expected = factor[norm].unsqueeze(-1) * z
    torch.testing.assert_close(qz.lloyd_decode(codes, scale, 2, "linear"), expected, rtol=2**-10, atol=0)


@pytest.mark.parametrize("kind", slow_but(("gaussian", "cubic", "sphere"), "cubic"))
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_levels_ascend_are_symmetric_and_cannot_be_spoiled(kind, bits):
    level = qz.levels(bits, kind, 128)
    assert (level.diff() > 0).all() and torch.equal(level, -level.flip(0))
    level.zero_()  # this must not change the cached levels
    assert (qz.levels(bits, kind, 128).diff() > 0).all()


@pytest.mark.parametrize("args", [(1,), (5,), (8,), (4, "other"), (4, "sphere"), (4, "sphere", 2)])
def test_unknown_levels_are_refused(args):
    with pytest.raises(ValueError):
        qz.levels(*args)


# Lloyd-Max codes


@pytest.mark.parametrize("kind", ("gaussian", "sphere", "cubic"))
@pytest.mark.parametrize("dim", slow_but(UNIT_MSE, 128))
def test_unit_vectors_have_the_error_of_turboquant(dim, kind):
    x = normal(8192, dim, seed=dim)
    for i, bits in enumerate((2, 3, 4)):
        codes, scale = qz.lloyd_encode(x, bits, kind, norm="plain")
        mse = relative_mse(qz.lloyd_decode(codes, scale, bits, kind), x)
        assert 4.0**-bits <= mse <= 2.7207 * 4.0**-bits
        table = UNIT_MSE[dim]["gaussian" if kind == "cubic" else kind][i]
        assert mse == pytest.approx(table, rel=0.02 if kind != "cubic" else 0.035)
        assert set(codes.unique().tolist()) == set(range(2**bits))


@pytest.mark.parametrize("bits, table", [
    (2, {"plain": 0.1161, "least_squares": 0.1153, "unbiased": 0.1307}),
    (3, {"plain": 0.0340, "least_squares": 0.0335, "unbiased": 0.0347}),
    (4, {"plain": 0.0093, "least_squares": 0.0092, "unbiased": 0.0093}),
])  # fmt: skip
def test_norm_rules(bits, table):
    x = normal(8192, 128, seed=bits)
    for norm, expected in table.items():
        decoded = qz.lloyd_decode(*qz.lloyd_encode(x, bits, "gaussian", norm), bits, "gaussian")
        assert relative_mse(decoded, x) == pytest.approx(expected, rel=0.02)
        shrinkage = ((decoded * x).sum(-1) / x.square().sum(-1)).mean().item()
        expected = 1.0 if norm == "unbiased" else 1 - table["plain"]
        assert shrinkage == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("kind", slow_but(("gaussian", "sphere", "cubic"), "cubic"))
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_unbiased_norm_keeps_the_inner_product(bits, kind):
    x = 1000 * normal(500, 64, seed=7)
    codes, scale = qz.lloyd_encode(x, bits, kind)
    ratio = (qz.lloyd_decode(codes, scale, bits, kind) * x).sum(-1) / x.square().sum(-1)
    assert (ratio - 1).abs().max() <= 2.0**-11  # only the rounding of an fp16 scale


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_a_value_on_a_midpoint_takes_the_lower_code(bits):
    level = qz.levels(bits)
    midpoints = (level[1:] + level[:-1]) / 2
    # A vector of length sqrt(D) equals its normalized form. One additional element sets the length.
    dim = 1024
    y = torch.zeros(2**bits - 1, dim, dtype=torch.float64)
    y[:, 0] = midpoints
    y[:, 1] = (dim - midpoints.square()).sqrt()
    on_it = (y * math.sqrt(dim) / y.norm(dim=-1, keepdim=True))[:, 0] == midpoints
    codes = qz.lloyd_encode(y, bits)[0][:, 0]
    assert on_it.sum() >= 1  # at least the midpoint 0, which is exact
    assert torch.equal(codes[on_it].long(), torch.arange(2**bits - 1)[on_it])
    above = qz.lloyd_encode(torch.where(y == midpoints.unsqueeze(-1), y + 1e-9, y), bits)[0][:, 0]
    assert torch.equal(above.long(), torch.arange(1, 2**bits))


def test_codes_by_slow_comparison():
    y = normal(40, 64, seed=3)
    for bits in (2, 3, 4):
        level = qz.levels(bits).tolist()
        codes = qz.lloyd_encode(y, bits)[0].tolist()
        for row, row_codes in zip(y.tolist(), codes):
            length = math.sqrt(sum(v * v for v in row))
            for v, code in zip(row, row_codes):
                u = v * 8 / length
                assert code == sum((a + b) / 2 < u for a, b in zip(level, level[1:]))


def test_lloyd_refuses_unknown_norms():
    with pytest.raises(ValueError, match="median"):
        qz.lloyd_encode(normal(2, 64), 4, norm="median")


# Uniform codes


def adversarial(bits):
    """Vectors with ties, with values at the ends, far from zero, or with a very small range."""
    grid = torch.linspace(0, 2**bits - 1, 64, dtype=torch.float64)
    return torch.stack([
        grid, (grid.floor() + 0.5).clamp(max=2**bits - 1), grid - 1000, grid * 1e-6 + 0.5,
        torch.cat((torch.full((63,), -3.0), torch.tensor([9.0]))).double(),
        normal(64, seed=bits), normal(64, seed=bits).sign(), 6e4 * torch.linspace(-1, 1, 64),
    ])  # fmt: skip


@pytest.mark.parametrize("bits", (8, 4, 3, 2))
def test_uniform_error_is_at_most_half_a_step(bits):
    x = torch.cat((adversarial(bits), 50 * normal(200, 64, seed=bits)))
    codes, scale, zero = qz.uniform_encode(x, bits)
    error = (qz.uniform_decode(codes, scale, zero) - x).abs().amax(-1)
    low, high = x.aminmax(dim=-1)
    # The rounding of zero point and scale moves the ends of the range. Only there can codes be clamped.
    lower_end = (zero - low).clamp(min=0)
    upper_end = (high - zero - scale * (2**bits - 1)).clamp(min=0)
    assert (error <= torch.maximum(scale / 2, torch.maximum(lower_end, upper_end)) + 1e-9).all()
    end = torch.maximum(low.abs(), high.abs()) * 2.0**-10  # the largest shift by fp16 rounding
    assert (lower_end <= end).all() and (upper_end <= 2 * end).all()


def test_uniform_ties_go_to_even():
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 13.5, 14.5, 15.0, 7.0], dtype=torch.float64)
    codes, scale, zero = qz.uniform_encode(x, 4)
    assert (scale.item(), zero.item()) == (1.0, 0.0)
    assert codes.tolist() == [0, 0, 2, 2, 14, 14, 15, 7]


def test_uniform_codes_are_chosen_from_stored_numbers():
    """With exact fractions: first zero point and scale are rounded, then the nearest code is chosen."""
    x = normal(30, 64, seed=5) + 3
    for bits in (8, 4, 2):
        codes, scale, zero = qz.uniform_encode(x, bits)
        assert torch.equal(scale, qz.stored(scale)) and torch.equal(zero, qz.stored(zero))
        assert torch.equal(zero, x.amin(-1).half().double())
        for row, row_codes, s, z in zip(x.tolist(), codes.tolist(), scale, zero):
            s, z = Fraction(s.item()), Fraction(z.item())
            exact = [min(max(round((Fraction(v) - z) / s), 0), 2**bits - 1) for v in row]
            assert exact == row_codes


@pytest.mark.parametrize("bits", (8, 4, 3, 2))
def test_all_uniform_codes_occur(bits):
    codes = qz.uniform_encode(normal(500, 128, seed=1), bits)[0]
    assert codes.dtype == torch.uint8
    assert codes.unique().tolist() == list(range(2**bits))


@pytest.mark.parametrize("bits", (0, 9))
def test_uniform_refuses_other_widths(bits):
    with pytest.raises(ValueError):
        qz.uniform_encode(normal(2, 64), bits)


# Each encoder with difficult input


def lloyd(bits):
    return lambda x: qz.lloyd_decode(*qz.lloyd_encode(x, bits), bits)


ROUND_TRIPS = {
    "uniform 8": lambda x: qz.uniform_decode(*qz.uniform_encode(x, 8)),
    "uniform 4": lambda x: qz.uniform_decode(*qz.uniform_encode(x, 4)),
    "lloyd 4": lloyd(4),
    "lloyd 3": lloyd(3),
    "lloyd 2": lloyd(2),
    "group 4": lambda x: base.group_decode(*base.group_encode(x, 4, 32)),
    "channel 4": lambda x: base.channel_decode(*base.channel_encode(x, 4, 32)),
    "symmetric keys": lambda x: base.symmetric_decode(*base.symmetric_encode(x, -2)),
    "symmetric values": lambda x: base.symmetric_decode(*base.symmetric_encode(x, -1)),
    "akv 4": lambda x: base.akv_decode(*base.akv_encode(x, 4), x.shape[-1]),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_difficult_input_stays_finite(name):
    trip = ROUND_TRIPS[name]
    noise = normal(64, 64, seed=9)
    for scale in (1e-7, 1.0, 1e5, 6.0e-8, 65504.0):
        assert torch.isfinite(trip(scale * noise)).all(), scale
        assert torch.isfinite(trip(scale * noise.sign())).all(), scale
    assert torch.equal(trip(0 * noise), 0 * noise)
    assert (trip(1e-7 * noise).abs() < 1e-3).all()
    if "lloyd" not in name:  # a constant is exact if fp16 can represent it
        assert torch.allclose(trip(torch.full_like(noise, 2.5)), 2.5 + 0 * noise, rtol=2.0**-11)


@pytest.mark.parametrize("value", (0.0, 2.5, 1e-7))
def test_a_vanishing_range_keeps_a_normal_fp16_scale(value):
    x = torch.full((4, 64), value, dtype=torch.float64)
    assert (qz.uniform_encode(x, 4)[1] == 2.0**-14).all()
    assert (base.symmetric_encode(x)[1] >= 2.0**-14).all()
    assert (qz.uniform_encode(x, 4)[0] == qz.uniform_encode(x, 4)[0][0, 0]).all()


@pytest.mark.parametrize("norm", slow_but(("plain", "least_squares", "unbiased"), "unbiased"))
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_a_zero_vector_has_scale_zero_and_codes_below_the_middle(bits, norm):
    codes, scale = qz.lloyd_encode(torch.zeros(3, 64), bits, norm=norm)
    assert (codes == 2 ** (bits - 1) - 1).all() and (scale == 0).all()


@pytest.mark.parametrize("name", ROUND_TRIPS)
@pytest.mark.parametrize("bad", slow_but((math.nan, math.inf, -math.inf), math.nan))
def test_nan_and_infinity_raise(name, bad):
    x = normal(64, 64)
    x[5, 7] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        ROUND_TRIPS[name](x)


def test_stored_is_fp16_without_infinity():
    x = torch.tensor([0.1, 65504.0, 65519.0, 1e9, -1e9, 2.0**-24, 2.0**-26], dtype=torch.float64)
    expected = [0.0999755859375, 65504.0, 65504.0, 65504.0, -65504.0, 2.0**-24, 0.0]
    assert qz.stored(x).tolist() == expected


# Packing


def slow_bytes(codes, bits):
    """The bytes of one vector, computed with Python integers."""
    dim = len(codes)
    count = dim * bits // 8
    if bits == 3:
        n = dim // 8
        bit = lambda j, part: codes[part * n + j % n] >> j // n & 1  # noqa: E731
        low = [codes[j] + (codes[j + count] << 3) for j in range(count)]
        return [x + (bit(j, 6) << 6) + (bit(j, 7) << 7) for j, x in enumerate(low)]
    return [sum(codes[j + part * count] << (bits * part) for part in range(8 // bits)) for j in range(count)]


@pytest.mark.parametrize("bits", (8, 4, 3, 2))
@pytest.mark.parametrize("dim", slow_but(DIMS, 80))
def test_packing(dim, bits):
    generator = torch.Generator().manual_seed(dim)
    codes = torch.randint(2**bits, (2, 5, dim), generator=generator, dtype=torch.uint8)
    packed = qz.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 5, packed_bytes(bits, dim))
    expected = [slow_bytes(vector, bits) for vector in codes.flatten(0, 1).tolist()]
    assert packed.flatten(0, 1).tolist() == expected
    restored = qz.unpack(packed, bits, dim)
    assert restored.dtype == torch.uint8 and torch.equal(restored, codes)
    assert qz.unpack(qz.pack(codes[:0], bits), bits, dim).shape == (0, 5, dim)


@pytest.mark.parametrize("codes, bits", [
    ([16] * 8, 4), ([8] * 8, 3), ([4] * 8, 2), ([256] * 8, 8), ([-1] * 8, 4),
    ([0] * 7, 4), ([0] * 6, 2), ([0] * 12, 3), ([0] * 8, 5), ([0] * 8, 16),
])  # fmt: skip
def test_pack_refuses(codes, bits):
    with pytest.raises(ValueError):
        qz.pack(torch.tensor(codes), bits)


@pytest.mark.parametrize("size, bits, dim", [(32, 4, 128), (3, 3, 16), (4, 2, 18), (8, 5, 8)])
def test_unpack_refuses(size, bits, dim):
    with pytest.raises(ValueError):
        qz.unpack(torch.zeros(size, dtype=torch.uint8), bits, dim)


# Baselines


@pytest.mark.parametrize("bits, table", [(4, (0.078, 0.090, 0.100)), (2, (0.393, 0.450, 0.502))])
def test_kivi_error(bits, table):
    x = normal(2048, 128, seed=11)
    for n, expected in zip((32, 64, 128), table):
        keys = base.channel_decode(*base.channel_encode(x, bits, n))
        values = base.group_decode(*base.group_encode(x, bits, n))
        assert relative_error(keys, x) == pytest.approx(expected, rel=0.02)
        assert relative_error(values, x) == pytest.approx(expected, rel=0.02)


def test_symmetric_error():
    x = normal(2048, 128, seed=12)
    whole = base.symmetric_decode(*base.symmetric_encode(x, -2))
    assert relative_error(whole, x) == pytest.approx(0.151, rel=0.02)
    for n, expected in ((32, 0.097), (64, 0.108), (128, 0.118)):
        for over, groups in ((-2, x.unflatten(0, (-1, n))), (-1, x.unflatten(1, (-1, n)))):
            decoded = base.symmetric_decode(*base.symmetric_encode(groups, over))
            assert relative_error(decoded, groups) == pytest.approx(expected, rel=0.02)


def test_symmetric_codes_are_fifteen_nibbles():
    x = torch.arange(-7, 8, dtype=torch.float64).unsqueeze(0)
    codes, scale = base.symmetric_encode(x)
    assert codes.dtype == torch.uint8 and codes.tolist() == [[v & 15 for v in range(-7, 8)]]
    assert torch.equal(base.symmetric_decode(codes, scale), x)
    assert 8 not in base.symmetric_encode(normal(2048, 128))[0]  # -8 never occurs
    assert base.symmetric_encode(normal(5, 16, 64), -2)[1].shape == (5, 1, 64)
    assert base.symmetric_encode(normal(5, 16, 64), -1)[1].shape == (5, 16, 1)


def test_group_and_channel_shapes_and_independence():
    x = normal(2, 128, 64)
    codes, scale, zero = base.channel_encode(x, 4, 32)
    assert codes.shape == x.shape and scale.shape == zero.shape == (2, 4, 64)
    alone = base.channel_encode(x[:, 32:64], 4, 32)
    assert torch.equal(alone[0], codes[:, 32:64]) and torch.equal(alone[1], scale[:, 1:2])
    codes, scale, zero = base.group_encode(x, 2, 16)
    assert codes.shape == x.shape and scale.shape == zero.shape == (2, 128, 4)
    alone = base.group_encode(x[..., 16:32], 2, 16)
    assert torch.equal(alone[0], codes[..., 16:32]) and torch.equal(alone[2], zero[..., 1:2])
    for encode in (base.channel_encode, base.group_encode):
        with pytest.raises(ValueError):
            encode(normal(100, 100), 4, 64)


def test_outlier_channels_want_per_channel_keys():
    """The error of the other channels, if one channel is 20 times larger and one has an offset of 15."""
    x = normal(2048, 128, seed=13)
    x[:, 3] *= 20
    x[:, 77] += 15
    others = [c for c in range(128) if c not in (3, 77)]
    keys = base.channel_decode(*base.channel_encode(x, 4, 64))
    values = base.group_decode(*base.group_encode(x, 4, 64))
    assert relative_error(keys[:, others], x[:, others]) == pytest.approx(0.090, rel=0.02)
    assert relative_error(values[:, others], x[:, others]) == pytest.approx(0.396, rel=0.05)


def test_akv_pads_to_whole_groups_and_keeps_exact_scales():
    x = normal(2048, 64, seed=14)
    codes, scale, zero = base.akv_encode(x, 4)
    assert codes.shape == (2048, 128) and scale.shape == zero.shape == (2048, 1)
    assert torch.equal(zero[:, 0], x.amin(-1))
    decoded = base.akv_decode(codes, scale, zero, 64)
    assert relative_error(decoded, x) == pytest.approx(0.090, rel=0.02)
    tiny = 1e-7 * x  # an unrounded scale follows where fp16 would stop
    assert relative_error(base.akv_decode(*base.akv_encode(tiny, 4), 64), tiny) < 0.1
