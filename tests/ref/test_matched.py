"""The matched codec: moments at other positions, matching matrices, feedback rounding, unbiased scales."""

from dataclasses import replace

import pytest
import torch

from fade_ref import attention, matched
from fade_ref.quantize import stored
from fade_ref.rope import NOPE, Rope, rotate
from fade_ref.rotation import RotatedCodec, qr_rotation

from ..marks import slow_but

WIDTHS = (8, 4, 3, 2)
ROPES = {
    "halves": Rope(10_000.0 ** (-torch.arange(0, 16, 2) / 16).double()),
    "interleaved": Rope(100.0 ** (-torch.arange(0, 16, 2) / 16).double(), interleaved=True),
    "a part": Rope(50.0 ** (-torch.arange(0, 6, 2) / 6).double()),
    "none": NOPE,
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text(seed=0, heads=2, group=2, n=60, dim=16):
    """Queries, keys and values of a text, with channels of different strength and an offset of the keys."""
    mix = normal(heads, dim, dim, seed=seed) * torch.linspace(0.1, 2, dim)
    keys = normal(heads, n, dim, seed=seed + 1) @ mix + 3 * normal(heads, 1, dim, seed=seed + 2)
    query = (normal(heads, group * n, dim, seed=seed + 3) @ mix.mT).reshape(heads * group, n, dim)
    return query, keys, normal(heads, n, dim, seed=seed + 4) @ mix.mT


def moments(seed=0, rope=NOPE, **shape) -> matched.Moments:
    query, keys, values = text(seed, **shape)
    output = normal(40, query.shape[0] * query.shape[2], seed=seed + 5)
    return matched.measure(query, keys, values, output, rope, query.shape[2] ** -0.5, 4)


def second(x):
    return x.mT @ x / x.shape[-2]


@pytest.mark.parametrize("name", ROPES)
def test_moments_at_random_positions(name):
    """The closed forms equal sums over all positions."""
    rope, span, block = ROPES[name], 96, 32
    x = normal(2, 9, 16) + normal(2, 1, 16, seed=1)
    everywhere = torch.stack([rotate(x, p, rope) for p in range(span)], dim=1)  # [H, span, n, D]
    found = matched.at_random_positions(second(x), rope, span)
    torch.testing.assert_close(found, second(everywhere.flatten(1, 2)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matched.mean_at(x.mean(1), rope, span), everywhere.mean((1, 2)))
    known = moments(rope=rope)._replace(mean=x.mean(1), keys=second(x - x.mean(1, keepdim=True)))
    mean, keys, _ = matched.frame(known, "block", rope, block, span)
    own = [matched.block_mean(mean, torch.arange(i, i + block), rope) for i in range(0, span, block)]
    centered = everywhere - torch.stack(own, dim=1).repeat_interleave(block, dim=1)[:, :, None]
    torch.testing.assert_close(keys, second(centered.flatten(1, 2)), rtol=1e-3, atol=1e-3)  # fp16 means
    one, keys, _ = matched.frame(known, "moved", rope, block, span)
    torch.testing.assert_close(keys, second((everywhere - one[:, None, None]).flatten(1, 2)))
    mean, keys, _ = matched.frame(known, "still", rope, block, span)
    torch.testing.assert_close(keys, known.keys)


def test_measured_moments_are_before_rope():
    """A text that is moved as a whole has the same moments: scores depend on distances alone."""
    rope = ROPES["halves"]
    query, keys, values = text()
    at = torch.arange(60)
    turned = [rotate(x, at, rope) for x in (query, keys)]
    found = matched.measure(*turned, values, None, rope, 0.25, 4)
    still = keys[:, 4:] - keys[:, 4:].mean(1, keepdim=True)
    torch.testing.assert_close(found.mean, keys[:, 4:].mean(1))
    # Between the moment of all tokens and twice that: half of the weights is even.
    assert (torch.linalg.eigvalsh(found.keys - 0.5 * second(still)) > -1e-9).all()
    assert torch.equal(found.outputs, torch.eye(16).double().expand(2, -1, -1))
    with pytest.raises(ValueError, match="more than the 4 sinks"):
        matched.measure(query[:, :4], keys[:, :4], values[:, :4], None, rope, 0.25, 4)


@pytest.mark.parametrize("seed", range(3))
def test_matrices_match_both_moments(seed):
    known = moments(seed)
    S, M = matched.shrunk(known.keys), matched.shrunk(known.queries)
    A, back, V = matched.matched(known.keys, known.queries)
    assert torch.equal(V, V.tril())
    P = qr_rotation(16)
    both = [P.T @ x @ P for x in (A @ S @ A.mT, back.mT @ M @ back)]
    w = matched.WHITEN  # before the rotation, they are powers of one matrix: equal, but for the whitening
    first = matched.power(both[0], (1 + w) / (1 - w))
    even = lambda x: x / x.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]  # noqa: E731
    rounded = dict(rtol=0, atol=1e-3)  # to fp16
    torch.testing.assert_close(even(first), even(both[1]), **rounded)
    torch.testing.assert_close(even(V.mT @ V), even(back.mT @ M @ back), **rounded)


@pytest.mark.parametrize("size", (0.0, 1e-6, 1e-3, 1.0, 1e3, 1e6))
def test_matrices_are_fp16_for_vectors_of_any_size(size):
    """Very small and very large vectors do not lose their matrices, or their scales, in fp16."""
    draws = torch.Generator().manual_seed(1)
    spread = torch.logspace(-2, 2, 32, dtype=torch.float64)
    keys, asked = (spread * torch.randn(2, 500, 32, generator=draws, dtype=torch.float64) for _ in range(2))
    keys = size * keys
    S, M = keys.mT @ keys / 500, asked.mT @ asked / 500
    made = matched.matched(S, M)
    assert all(torch.equal(x, stored(x)) and x.isfinite().all() for x in made)
    assert (made.feedback.diagonal(dim1=-2, dim2=-1) > 0).all()
    product = made.encode @ made.decode
    torch.testing.assert_close(product, torch.eye(32).double().expand(2, -1, -1), rtol=0, atol=1e-3)
    error = matched.MatchedCodec(8, made).decode(matched.MatchedCodec(8, made).encode(keys)) - keys
    damage, whole = (torch.einsum("hnd,hde,hne->", x, M, x) for x in (error, keys))
    assert damage <= 2e-3**2 * whole


@pytest.mark.parametrize("equal", (False, True), ids=("moments of a text", "equal eigenvalues"))
def test_matrices_are_continuous_in_the_moments(equal):
    """Another machine rounds moments differently, and still decodes codes of this one."""
    known = moments(0)
    S, M = (torch.eye(16, dtype=torch.float64).expand(2, -1, -1) if equal else x for x in known[1:3])
    noise = normal(2, 16, 16, seed=9) * 1e-12
    near = (x + (noise + noise.mT) * x.abs().max() for x in (S, M))
    for x, y in zip(matched.matched(S, M), matched.matched(*near)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-8 * float(x.abs().max()))


def codec(bits, seed=0, **shape):
    known = moments(seed, **shape)
    mean, *pair = matched.frame(known, "still", NOPE)
    return matched.MatchedCodec(bits, matched.matched(*pair)), text(seed, **shape)[1], mean[:, None]


@pytest.mark.parametrize("bits", WIDTHS)
def test_feedback_does_less_damage(bits):
    """Than rounding to the nearest level, and than the rotated codec in more bytes."""
    subject, keys, mean = codec(bits, n=400)
    record = subject.encode(keys, mean)
    A = subject.matrices.encode
    y = torch.einsum("hij,hnj->hni", A, keys - mean)
    damage = subject.damage(y - subject._decode_rotated(record)).mean()
    unit = y.square().mean(-1, keepdim=True).sqrt() * matched.STEPS[bits]
    top = (2**bits - 1) / 2
    nearest = ((y / unit + top).round().clamp(0, 2 * top) - top) * unit
    assert damage < 0.8 * subject.damage(y - nearest).mean()
    other = RotatedCodec(bits, 16, qr_rotation(16))
    lost = keys - other.decode(other.encode(keys, mean), mean)
    share = 0.9 if bits == 8 else 0.7  # at 8 bits the zero point of the rotated codec makes steps smaller
    assert damage < share * subject.damage(torch.einsum("hij,hnj->hni", A, lost)).mean()
    assert subject.bytes_per_token == 2 * bits + 2 <= other.bytes_per_token


@pytest.mark.parametrize("bits", slow_but(WIDTHS, 2))
def test_each_channel_makes_up_for_those_before_it(bits):
    """No other code of a channel would make its own term of the damage smaller."""
    subject, _, _ = codec(bits)
    unit = normal(2, 7, 16) * 2**bits / 4
    codes = subject.round(unit)
    V, top = subject.matrices.feedback, 2**bits - 1
    error = unit - (codes.double() - top / 2)
    for i in range(16):
        before = torch.einsum("hj,hnj->hn", V[:, i, :i], error[..., :i])
        term = (before + V[:, i, i, None] * error[..., i]).abs()
        for code in range(top + 1):
            other = (before + V[:, i, i, None] * (unit[..., i] - (code - top / 2))).abs()
            assert (term <= other + 1e-9).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_are_unbiased(bits):
    subject, keys, mean = codec(bits, n=200)
    y = torch.einsum("hij,hnj->hni", subject.matrices.encode, keys - mean)
    record = subject._encode_rotated(y)
    Vy, Vz = (torch.einsum("hij,hnj->hni", subject.matrices.feedback, v) for v in (
        y, subject._decode_rotated(record)
    ))  # fmt: skip
    bias = (Vy * Vz).sum(-1) / (Vy * Vy).sum(-1)
    free = (bias - 1).abs() < 2e-3  # fp16; the others have met the limit of the scale
    assert free.float().mean() > 0.97
    zero = subject.encode(torch.zeros(2, 3, 16))
    assert (zero.scale == 0).all() and (subject.decode(zero) == 0).all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        subject.encode(torch.full((2, 3, 16), torch.inf))
    with pytest.raises(ValueError, match="bits=5"):
        matched.MatchedCodec(5, subject.matrices)


def first_codes(subject, y):
    """The factor of each vector by plain rounding, and the codes with each of the searched scales."""
    size = y.square().mean(-1, keepdim=True).sqrt() * matched.STEPS[subject.bits]
    top = (2**subject.bits - 1) / 2
    tried = torch.stack([size * factor for factor in matched.FACTORS])
    near = ((y / tried + top).round().clamp(0, 2 * top) - top) * tried
    best = (near - y).square().sum(-1).argmin(0)
    factor = torch.tensor(matched.FACTORS).double()[best].clamp_min(matched.LEAST[subject.bits])
    first = size * factor[..., None]
    known = matched.SEARCHED_FOR_VALUES if subject.of_values else matched.SEARCHED
    return factor, first, [subject.round(y / (first * by)) for by in known[subject.bits]]


@pytest.mark.parametrize("of_values", (False, True), ids=("key", "value"))
@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_are_tried_from_the_least_one(bits, of_values):
    """Rounding uses the best scale of plain rounding, or the least one that is allowed. At 3 bits, and for
    keys of 2 bits, that is the first of several. The codes with the smallest angle are rounded once more.
    """
    subject, keys, mean = codec(bits, n=200)
    subject = replace(subject, of_values=of_values)
    y = torch.einsum("hij,hnj->hni", subject.matrices.encode, keys - mean)
    factor, first, searched = first_codes(subject, y)
    levels, top = subject.levels(subject._encode_rotated(y)), (2**bits - 1) / 2
    assert (factor == matched.LEAST[bits]).any() or bits > 2
    if bits >= 4:
        assert torch.equal(levels, searched[0].double() - top) and len(searched) == 1
        return
    V = subject.matrices.feedback
    exact = torch.einsum("hij,hnj->hni", V, y)
    seen = torch.einsum("hij,khnj->khni", V, torch.stack(searched).double() - top)
    best = torch.nn.functional.cosine_similarity(seen, exact[None], dim=-1).argmax(0)
    assert len(best.unique()) == len(searched) == (1 if bits == 2 and of_values else 5)
    scales = torch.tensor(matched.SEARCHED[bits] if len(searched) > 1 else [1.0]).double()[best]
    kept = torch.stack(searched).gather(0, best[None, ..., None].expand(1, *y.shape))[0]
    again = subject.round_again(y / (first * scales[..., None]), kept)
    assert torch.equal(levels, again.double() - top) and not torch.equal(kept, again)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_second_pass_never_does_more_damage(bits):
    """It ends where no other code of a single channel would do less damage."""
    subject, _, _ = codec(bits)
    unit = normal(2, 9, 16) * 2**bits / 4
    top = (2**bits - 1) / 2
    damage = lambda codes: subject.damage(unit - (codes.double() - top))  # noqa: E731
    codes = subject.round(unit)
    before = None
    while before is None or not torch.equal(codes, before):
        before, codes = codes, subject.round_again(unit, codes)
        assert (damage(codes) <= damage(before) + 1e-9).all()
    for i in range(16):
        for code in range(2**bits):
            other = codes.clone()
            other[..., i] = code
            assert (damage(codes) <= damage(other) + 1e-9).all()


@pytest.mark.parametrize("bits", [3, 2])
def test_a_search_does_less_damage(bits):
    """Than the scale of plain rounding and one pass, with the best stored scale of each vector."""
    subject, keys, mean = codec(bits, n=400)
    y = torch.einsum("hij,hnj->hni", subject.matrices.encode, keys - mean)
    _, _, searched = first_codes(subject, y)
    plain = searched[min(range(len(searched)), key=lambda k: abs(matched.SEARCHED[bits][k] - 1))]
    exact = torch.einsum("hij,hnj->hni", subject.matrices.feedback, y)

    def lost(levels):
        seen = torch.einsum("hij,hnj->hni", subject.matrices.feedback, levels)
        cosine = torch.nn.functional.cosine_similarity(seen, exact, dim=-1)
        return (exact.square().sum(-1) * (1 - cosine**2)).mean()

    found = subject.levels(subject._encode_rotated(y))
    assert lost(found) < 0.93 * lost(plain.double() - (2**bits - 1) / 2)


@pytest.mark.parametrize("high, low", [(8, 4), (4, 2), (3, 2)])
def test_requantizing_stays_in_the_rotated_domain(high, low):
    first, keys, mean = codec(high)
    second_ = matched.MatchedCodec(low, first.matrices)
    record = first.requantize(first.encode(keys, mean), second_)
    again = second_.encode(first.decode(first.encode(keys, mean)))
    same = (second_.levels(record) == second_.levels(again)).all(-1)
    assert same.double().mean() > 0.9  # A is the inverse of A^-1 up to fp16, and some codes differ
    torch.testing.assert_close(record.scale[same], again.scale[same], rtol=2e-2, atol=0)
    y = first._decode_rotated(first.encode(keys, mean))
    damage = [second_.damage(y - second_._decode_rotated(x)).sum() for x in (record, again)]
    torch.testing.assert_close(*damage, rtol=2e-2, atol=0)
    with pytest.raises(ValueError, match="same matrices"):
        first.requantize(record, codec(low, seed=1)[0])


@pytest.mark.parametrize("bits", WIDTHS)
def test_attention_on_codes_equals_attention_on_decoded_keys(bits):
    subject, keys, mean = codec(bits)
    values = matched.MatchedCodec(bits, matched.matched(*moments()[3:]))
    records = subject.encode(keys, mean), values.encode(text()[2])
    query, at = text(seed=9)[0][:, -3:], torch.arange(60)
    terms = attention.Terms(0.25, softcap=20.0)
    decoded = subject.decode(records[0], mean), values.decode(records[1])
    expected = attention.over_tensors(query, *decoded, at[-3:], at, terms)
    found = attention.over_codes(query, *records, mean, (subject, values), at[-3:], at, terms)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_means_over_texts():
    """Of two texts: the moments of both together, if all tokens count alike."""
    texts = [moments(seed)._replace(keys=second(x - x.mean(1, keepdim=True)), mean=x.mean(1))
             for seed in (0, 7) for x in [text(seed)[1]]]  # fmt: skip
    both = torch.cat([text(0)[1], text(7)[1]], dim=1)
    found = matched.mean_of(texts)
    torch.testing.assert_close(found.mean, both.mean(1))
    torch.testing.assert_close(found.keys, second(both - both.mean(1, keepdim=True)))


def test_unknown_frames_are_refused():
    with pytest.raises(ValueError, match="frame 'turned'"):
        matched.frame(moments(), "turned", NOPE)
