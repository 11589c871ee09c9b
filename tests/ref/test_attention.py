"""fade_ref.attention: partials, the merge, masks and terms, compared with plain softmax attention."""

import pytest
import torch

from fade_ref import attention
from fade_ref.attention import Terms
from fade_ref.rotation import RotatedCodec, key_mean, qr_rotation

from ..marks import slow_but

H, GROUP, Q, N, D = 2, 3, 4, 40, 16


def inputs(seed=0, n=N):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(H * GROUP, Q, D), draw(H, n, D) * 2, draw(H, n, D)


def plain(query, keys, values, seen, terms, bias=0.0):
    """Plain softmax attention, one head at a time."""
    out = torch.zeros_like(query)
    for h in range(query.shape[0]):
        k, v = keys[h // GROUP], values[h // GROUP]
        s = terms.scaling * query[h] @ k.T
        if terms.softcap:
            s = terms.softcap * torch.tanh(s / terms.softcap)
        s = s + (bias[h] if torch.is_tensor(bias) else bias)
        out[h] = s.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return out


POSITIONS = torch.arange(N - Q, N), torch.arange(N)
TERMS = {
    "plain": Terms(0.3),
    "softcap": Terms(0.3, softcap=2.0),
    "window": Terms(0.3, window=5),
    "both": Terms(0.3, 2.0, 7),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(
    "cuts", slow_but([[N], [1, N - 1], [10, 0, 30], [13, 13, 14]], [13, 13, 14]), ids=str
)
def test_merge_of_any_split_is_the_whole(name, cuts):
    query, keys, values = inputs()
    qp, kp = POSITIONS
    parts, start = [], 0
    for n in cuts:
        s = slice(start, start + n)
        parts.append(attention.over_tensors(query, keys[:, s], values[:, s], qp, kp[s], TERMS[name]))
        start += n
    seen = attention.visible(qp, kp, TERMS[name].window)
    expected = plain(query, keys, values, seen, TERMS[name])
    for order in (parts, parts[::-1]):
        torch.testing.assert_close(attention.merge(order), expected, rtol=1e-12, atol=1e-13)


def test_alibi_goes_by_distance():
    query, keys, values = inputs()
    qp, kp = POSITIONS
    kp = kp.clone()
    kp[:10] = torch.arange(10) * 2  # eviction leaves such gaps
    slopes = torch.rand(H * GROUP, dtype=torch.float64)
    terms = Terms(0.3, slopes=slopes)
    bias = -slopes[:, None, None] * (qp[:, None] - kp[None]).double()
    out = attention.merge([attention.over_tensors(query, keys, values, qp, kp, terms)])
    torch.testing.assert_close(out, plain(query, keys, values, attention.visible(qp, kp), terms, bias))


def test_sinks_take_probability_and_give_nothing():
    query, keys, values = inputs()
    qp, kp = POSITIONS
    s_aux = torch.linspace(-2, 3, H * GROUP, dtype=torch.float64)
    part = attention.over_tensors(query, keys, values, qp, kp, Terms(0.3))
    out = attention.merge([part, attention.sink(s_aux, query.shape)])
    for h in range(H * GROUP):
        s = (0.3 * query[h] @ keys[h // GROUP].T).masked_fill(~attention.visible(qp, kp), -torch.inf)
        p = torch.cat((s, s_aux[h].expand(Q, 1)), dim=-1).softmax(-1)[:, :-1]
        torch.testing.assert_close(out[h], p @ values[h // GROUP])


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 3), (2, 2), (4, 2), (2, 8)], ids=str)
@pytest.mark.parametrize("means", slow_but(["one", "one a token"], "one a token"))
def test_attention_on_codes_equals_decoding_first(bits, means):
    query, keys, values = inputs(1)
    codecs = tuple(RotatedCodec(b, D, qr_rotation(D, seed=b)) for b in bits)
    mean = key_mean(keys) if means == "one" else key_mean(keys).expand(-1, N, -1) * torch.rand(N, 1).double()
    k, v = codecs[0].encode(keys, mean), codecs[1].encode(values)
    qp, kp = POSITIONS
    for terms in TERMS.values():
        ours = attention.over_codes(query, k, v, mean, codecs, qp, kp, terms)
        decoded = attention.over_tensors(query, codecs[0].decode(k, mean), codecs[1].decode(v), qp, kp, terms)
        for a, b in zip(ours, decoded):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_visible_gives_zero():
    query, keys, values = inputs()
    hidden = torch.full((N,), -1)
    part = attention.over_tensors(query, keys, values, POSITIONS[0], hidden, Terms(0.3))
    assert torch.equal(attention.merge([part, part]), torch.zeros_like(query))
    real = attention.over_tensors(query, keys, values, *POSITIONS, Terms(0.3))
    assert torch.equal(attention.merge([real, part]), attention.merge([real]))


def test_extreme_scores_do_not_overflow():
    query, keys, values = inputs()
    out = attention.merge([attention.over_tensors(query * 1e4, keys * 1e4, values, *POSITIONS, Terms(1.0))])
    assert out.isfinite().all()
