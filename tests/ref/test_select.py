"""fade_ref.select: the index, the choice and residency, compared with plain loops in float64."""

import math
import random

import pytest
import torch

from fade_ref import quantize, select
from fade_ref.config import PAGES, FadeConfig
from fade_ref.matched import MatchedCodec, Matrices
from fade_ref.rotation import RotatedCodec, qr_rotation

D = 32


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matched_codec(heads=1):
    matrix = qr_rotation(D).expand(heads, -1, -1)
    return MatchedCodec(
        4, Matrices(matrix, torch.linalg.inv(matrix), torch.eye(D).double().expand(heads, -1, -1))
    )


# -- the index


def test_halves_of_a_code_are_the_code():
    codes = torch.arange(16, dtype=torch.uint8)
    upper, lower = select.split(codes)
    assert upper.max() == 3 and lower.max() == 3
    assert torch.equal(select.join(upper, lower), codes)


@pytest.mark.parametrize("codec", ["rotated", "matched"])
def test_the_index_reads_the_middle_of_each_cell(codec):
    """Each level is the mean of the four decoded numbers whose codes share their upper bits."""
    x = draw(1, 50, D)
    codec = RotatedCodec(4, D, qr_rotation(D)) if codec == "rotated" else matched_codec()
    record = codec.encode(x)
    codes = quantize.unpack(record.codes, 4, D)
    found = select.index_keys(codes, record.scale, record.zero)
    for token in range(0, 50, 7):
        for channel in range(0, D, 5):
            cell, code = [], int(codes[0, token, channel])
            for lower in range(4):
                changed = codes.clone()
                changed[0, token, channel] = code // 4 * 4 + lower
                packed = record._replace(codes=quantize.pack(changed, 4))
                cell.append(float(codec._decode_rotated(packed)[0, token, channel]))
            assert math.isclose(float(found[0, token, channel]), sum(cell) / 4, abs_tol=1e-12)


@pytest.mark.parametrize("codec", ["rotated", "matched"])
def test_the_index_is_a_two_bit_code_of_the_key(codec):
    """Its error is far below that of the sign alone, and a quarter of the levels is not lost."""
    x = draw(1, 400, D)
    codec = RotatedCodec(4, D, qr_rotation(D)) if codec == "rotated" else matched_codec()
    record = codec.encode(x)
    codes = quantize.unpack(record.codes, 4, D)
    assert select.split(codes)[0].unique().tolist() == [0, 1, 2, 3]
    y = select.index_keys(codes, record.scale, record.zero)
    exact = x @ qr_rotation(D).T
    error = (y - exact).square().mean() / exact.square().mean()
    assert 0.03 < error < 0.2


# -- the choice


def brute_mass(scores, page, heads):
    """The same with loops and plain exponentials."""
    hq, n = scores.shape
    group, out = hq // heads, torch.zeros(heads, n // page, dtype=torch.float64)
    for h in range(hq):
        weights = [0.0 if s == -math.inf else math.exp(s) for s in scores[h].tolist()]
        total = sum(weights)
        for p in range(n // page):
            out[h // group, p] += (sum(weights[p * page : (p + 1) * page]) / total if total else 0.0) / group
    return out


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_mass_equals_plain_sums(page, group):
    scores = 3 * draw(2 * group, 6 * page, seed=group)
    scores[0, : page + 3] = -torch.inf  # padding
    found = select.page_mass(scores, page, heads=2)
    torch.testing.assert_close(found, brute_mass(scores, page, 2), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.sum(-1), torch.ones(2).double())


def test_a_head_that_sees_nothing_gives_no_mass_and_large_scores_do_not_outvote():
    scores = torch.full((2, 16), -torch.inf).double()
    assert not select.page_mass(scores, 8, 2).any()
    scores = torch.zeros(2, 16).double()
    scores[0, 0], scores[1, 8:] = 5000.0, 800.0  # plain exponentials would overflow
    assert select.page_mass(scores, 8, heads=1).tolist() == [[0.5, 0.5]]


def test_the_heaviest_pages_are_chosen_and_older_ones_win_ties():
    mass = torch.tensor([[0.1, 0.3, 0.3, 0.2, 0.1]])
    assert select.choose(mass, 3) == [[1, 2, 3]]
    assert select.choose(mass, 4) == [[1, 2, 3, 0]]
    assert select.choose(mass, 99) == [[1, 2, 3, 0, 4]]


@pytest.mark.parametrize("seed", range(5))
def test_a_share_reads_the_fewest_pages_that_hold_it(seed):
    mass = (2 * draw(3, 20, seed=seed)).softmax(-1)
    for share in (0.2, 0.5, 0.9, 0.999):
        for head, pages in enumerate(select.choose(mass, 20, share)):
            held = mass[head, pages].sum()
            assert held >= share - 1e-12 or len(pages) == 20
            assert held - mass[head, pages[-1]] < share  # one page fewer would not do
    assert [len(p) for p in select.choose(mass, 4, 0.999)] == [4, 4, 4]


def test_tokens_of_chosen_pages_are_read():
    read = select.tokens_read([[2, 0], [1]], page=8, n=24)
    assert read.shape == (2, 24) and read.sum(-1).tolist() == [16, 8]
    assert read[1, 8:16].all() and not read[0, 8:16].any()


# -- residency


@pytest.mark.parametrize("seed", range(8))
def test_residency_is_least_recently_used(seed):
    """Where each page lies, what is fetched, and that no page leaves before one that was unused longer."""
    rng = random.Random(seed)
    state, used, hits = select.Residency.first(12), {}, 0
    for step in range(60):
        chosen = rng.sample(range(30), rng.randint(1, 5))
        before = set(state.pages)
        state, at, fetched = select.touch(state, chosen, step)
        assert [state.pages[slot] for slot in at] == chosen and len(set(at)) == len(chosen)
        assert fetched == [page not in before for page in chosen]
        hits += fetched.count(False)
        held = state.pages
        assert len(held) == len(set(held)) == 12
        gone, stayed = before - set(held), set(held) - set(chosen)
        since = lambda pages: [used.get(page, -1) for page in pages]  # noqa: E731
        assert not gone or not stayed or max(since(gone)) <= min(since(stayed))
        used.update(dict.fromkeys(chosen, step))
    assert hits > 20


def test_pages_of_a_step_never_replace_each_other():
    state = select.touch(select.Residency.first(3), [0, 1, 2], 0).state
    assert state == select.Residency((0, 1, 2), (0, 0, 0))
    state, at, fetched = select.touch(state, [4, 2, 5], 1)
    assert state.pages[at[1]] == 2 and fetched == [True, False, True]
    with pytest.raises(ValueError, match="only 3 slots"):
        select.touch(state, [1, 2, 3, 4], 2)


# -- configuration


def test_what_a_configuration_means():
    config = FadeConfig(select=256, cold="host")
    assert config.tokens_selected == 256 and config.tokens_resident == 512 and not config.evicts
    assert FadeConfig().tokens_selected is None and FadeConfig(select=64).tokens_resident is None
    assert FadeConfig(select=0.9, select_max=64).tokens_selected == 64
    assert FadeConfig.recall().select and not FadeConfig.recall().contiguous


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(select=0), "select=0: a multiple of select_page=8, at least 8"),
        (dict(select=60), "a multiple of select_page=8"),
        (dict(select=True), "select=True"),
        (dict(select=1.5), "between 0 and 1"),
        (dict(select="all"), "select='all'"),
        (dict(select=64, select_page=24), "select_page=24"),
        (dict(select=64, select_page=32, block_size=48), "must divide block_size=48"),
        (dict(select=64, select_max=64), "needs a share"),
        (dict(select=0.5, select_max=3), "select_max=3"),
        (dict(select=64, resident=128), "needs cold='host'"),
        (dict(select=64, cold="host", resident=32), "resident=32: a multiple of select_page=8, at least 64"),
        (dict(select=64, cold="disk"), "cold='disk'"),
        (dict(select=64, index="k9"), "index='k9'"),
        (dict(cold="host"), "cold='host' needs select"),
        (dict(select_page=16), "select_page=16 needs select"),
        (dict(select=64, int4_budget=100, positions="original"), "int4_budget=100 contradicts it"),
        (dict(select=64, eviction_policy="h2o"), "eviction_policy='h2o' contradicts it"),
        (dict(select=64, positions="contiguous"), "positions='contiguous'"),
        (dict(select=64, recent_window=None), "recent_window=None"),
        (dict(select=64, quant_backend="symmetric"), "quant_backend='symmetric'"),
        (dict(select=64, quant_backend="channel"), "quant_backend='channel'"),
        (dict(select=64, middle_k_bits=8), "keys of 8 bits contradict it"),
        (dict(select=64, layer_bits={1: (3, 4)}), "keys of 3 bits"),
        (dict(select=64, layer_bits="boundary"), "keys of 8 bits"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_contradictions_are_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=words):
        FadeConfig(**fields)


def test_widths_of_other_layers():
    assert FadeConfig(select=64, layer_bits="boundary-16").bits(0, 9) == (16, 16)
    assert FadeConfig(select=64, middle_v_bits=2).bits(0, 9) == (4, 2)
    with pytest.raises(ValueError, match="keys of 2 bits"):
        FadeConfig(select=64, layer_bits=lambda i, n: (2, 2)).bits(0, 4)
