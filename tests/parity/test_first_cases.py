"""The fast cache against the specification: codes, attention outputs, evicted sets, positions."""

import pytest
import torch

from fade_fast.cache import reads
from fade_fast.kernels import flash, packed, rotated
from fade_fast.policies import plan
from fade_fast.policies.scores import OBSERVERS
from fade_ref import quantize
from fade_ref.config import FadeConfig
from parity import cases
from parity.cases import Shape
from parity.tolerances import ATTENTION, CODES_DIFFERING, SCALE_ULP, SCORES

from ..marks import pairwise, slow_but

SMALL = dict(recent_window=8, block_size=4)
CONFIGS = {
    "int4": FadeConfig(**SMALL),
    "int8": FadeConfig(**SMALL, middle_k_bits=8, middle_v_bits=8),
    "k3v2": FadeConfig(**SMALL, middle_k_bits=3, middle_v_bits=2),
    "evict": FadeConfig(**SMALL, int4_budget=10),
    "evict, original positions": FadeConfig(**SMALL, int4_budget=10, positions="original"),
    "int4, int2, evict": FadeConfig(**SMALL, int4_budget=10, int2_budget=6),
    "int4, int2": FadeConfig(**SMALL, int4_budget=10, int2_budget=None),
    "before RoPE": FadeConfig(**SMALL, positions="contiguous"),
    "no sinks": FadeConfig(**SMALL, n_sink=0, int4_budget=7),
    "no recent window": FadeConfig(n_sink=2, recent_window=0, block_size=3, int4_budget=9),
    "budget 0": FadeConfig(**SMALL, int4_budget=0),
    "one plan a layer": FadeConfig(**SMALL, int4_budget=10, int2_budget=6, plan_scope="layer"),
    "both tiers INT2": FadeConfig(**SMALL, int4_budget=6, int2_budget=5, middle_k_bits=2, middle_v_bits=2),
    "off": FadeConfig(recent_window=None),
}
BY_ATTENTION = tuple(OBSERVERS)
BUDGETS = {
    "evict": dict(int4_budget=10),
    "int4, int2, evict": dict(int4_budget=7, int2_budget=6),
    "int4, int2": dict(int4_budget=7, int2_budget=None),
    "original positions": dict(int4_budget=6, positions="original"),
    "no sinks": dict(int4_budget=7, n_sink=0),
    "one plan a layer": dict(int4_budget=7, int2_budget=6, plan_scope="layer"),
}
ROWS = [
    pytest.param((), id="unpadded", marks=pytest.mark.slow),
    pytest.param((0, 11), id="one padded"),
    pytest.param((3, 6), id="both padded", marks=pytest.mark.slow),
]
STEPS = [14] + [1] * 21 + [20, 5] + [1] * 6  # prefill, decode, a long second turn, a draft


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("head_dim", slow_but([64, 80, 96, 128, 256], 80))
def test_codes(bits, head_dim):
    generator = torch.Generator().manual_seed(head_dim + bits)
    x = torch.randn(2, 3, 500, head_dim, generator=generator) * 3 + torch.linspace(-9, 9, head_dim)
    found = cases.codes(x, bits)
    assert found.differing <= CODES_DIFFERING * found.total and found.furthest <= 1
    assert found.scale_error <= SCALE_ULP
    assert found.total > 0.98 * x.numel()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("head_dim", slow_but([8, 64, 72, 80, 128], 80))
def test_fields_of_products(head_dim, bits):
    """Products with the fields of a byte, and sums over them, are those with the codes; in float16, too."""
    generator = torch.Generator().manual_seed(head_dim)
    codes = torch.randint(2**bits, (3, 50, head_dim), generator=generator, dtype=torch.uint8)
    data = quantize.pack(codes, bits)
    assert torch.equal(rotated.pack(codes, bits), data)
    query = torch.randint(-9, 9, (head_dim,), generator=generator).double()
    weights = torch.arange(50.0).double()
    for dtype in (torch.float64, torch.float32, torch.float16):
        centred = codes.double() - (2**bits - 1) / 2
        for axis in (-1, -2):
            parts = packed.fields(data if axis == -1 else data.mT, bits, dtype, axis)
            numbers = [x.numbers.double() / x.unit - x.center_offset for x in parts]
            assert {x.shape[axis] for x in numbers} == {packed.field_width(bits, head_dim)}
            if axis == -1:
                found = sum(x @ q for x, q in zip(numbers, packed.operands(query, bits)))
                assert torch.equal(found, centred @ query)
            else:
                sums = packed.channels([x @ weights[:, None] for x in numbers], bits)
                assert torch.equal(torch.cat(sums, dim=1), centred.mT @ weights[:, None])


@pytest.mark.parametrize("x", [0.0, 1e-7, 1e4, 6e4], ids=str)
def test_codes_of_extreme_vectors(x):
    """Constant vectors, vanishing ones, and ones whose range leaves fp16."""
    generator = torch.Generator().manual_seed(0)
    sample = x * torch.cat((torch.ones(1, 1, 8, 64), torch.randn(1, 1, 50, 64, generator=generator)), dim=2)
    for bits in (8, 4, 3, 2):
        found = cases.codes(sample, bits, centred=False)
        assert found.furthest <= 1 and found.scale_error <= SCALE_ULP, bits


@pytest.mark.parametrize("name", slow_but(CONFIGS, "int4, int2, evict"))
@pytest.mark.parametrize("padding", ROWS)
def test_life_of_tokens(name, padding):
    """Every step's output for the same codes, and the surviving tokens of an independent run."""
    config, shape = CONFIGS[name], Shape()
    found = list(cases.trace(config, shape, STEPS, padding=padding, holes={22: 4} if padding else {}))
    assert max(s.output_error for s in found) <= ATTENTION[shape.dtype]
    assert all(s.same_tokens for s in found)
    assert name in ("off", "budget 0") or found[-1].middle > 0


SHAPES = [
    Shape(heads=3, group=1, dtype=torch.float64),
    Shape(heads=2, group=4, head_dim=80, dtype=torch.float64),
    Shape(heads=1, group=7, head_dim=96, dtype=torch.bfloat16),
    Shape(heads=2, group=4, head_dim=128, dtype=torch.float16),
    Shape(batch=1, heads=1, group=3, head_dim=256, dtype=torch.bfloat16),
]


@pytest.mark.parametrize(
    "shape", slow_but(SHAPES, *SHAPES[1:3]), ids=lambda s: f"G{s.group} D{s.head_dim} {s.dtype}"
)
@pytest.mark.parametrize("name", slow_but(["int4", "int4, int2, evict"], "int4, int2, evict"))
def test_shapes_and_dtypes(name, shape):
    found = list(cases.trace(CONFIGS[name], shape, [30, 1, 1, 1, 1, 18, 3, 1], seed=1))
    assert max(s.output_error for s in found) <= ATTENTION[shape.dtype]
    assert found[-1].middle > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy, padding, budget",
    pairwise([p for p in plan.SUPPORTED if p != "position"], [(), (0, 11), (3, 6)], BUDGETS),
    ids=str,
)
def test_policies(policy, budget, padding):
    """The same tokens survive in the same tiers, and every token received the same."""
    config, shape = FadeConfig(**SMALL, eviction_policy=policy, **BUDGETS[budget]), Shape(dtype=torch.float64)
    holes = {8: 1, 22: 4} if padding else {}
    found = list(cases.trace(config, shape, STEPS, padding=padding, holes=holes))
    assert max(s.output_error for s in found) <= ATTENTION[shape.dtype]
    assert all(s.same_tokens for s in found) and found[-1].middle > 0
    assert max(s.score_error for s in found) <= SCORES


@pytest.mark.slow
@pytest.mark.parametrize("policy", slow_but(BY_ATTENTION, "h2o"))
@pytest.mark.parametrize("padding", ROWS[:2])
def test_scores_follow_crops_and_reordered_rows(policy, padding):
    """Drafts are rejected, rows are exchanged and doubled: scores stay with their tokens."""
    config = FadeConfig(**SMALL, int4_budget=7, int2_budget=6, eviction_policy=policy)
    steps = [20] + [1, 4] * 6 + [1] * 9 + [19, 1, 3, 1]
    # A crop must come while nothing is due, as in `fade_ref` a block leaves at the end of its step.
    crops, order = {3: 2, 9: 1, 23: 1}, {5: [1, 0], 12: [1, 1], 22: [1, 0]}
    shape = Shape(dtype=torch.float64)
    found = list(cases.trace(config, shape, steps, padding=padding, crops=crops, order=order))
    assert all(s.same_tokens for s in found) and found[-1].middle > 0
    assert max(s.score_error for s in found) <= SCORES


TERMS = {
    "softcap": dict(softcap=3.0),
    "window": dict(window=17),
    "attention sinks": dict(s_aux=torch.linspace(-1, 4, 6).double()),
    "all": dict(softcap=3.0, window=17, s_aux=torch.linspace(-1, 4, 6).double()),
}


@pytest.mark.parametrize("policy", slow_but(BY_ATTENTION, "h2o"))
@pytest.mark.parametrize("terms", slow_but(TERMS, "all"))
def test_what_models_ask_of_scores(policy, terms):
    """Softcap, windows and learned sinks shape what tokens receive, in short steps and in long ones."""
    config = FadeConfig(**SMALL, int4_budget=7, int2_budget=6, eviction_policy=policy, positions="original")
    shape = Shape(dtype=torch.float64)
    found = list(cases.trace(config, shape, STEPS, padding=(0, 5), terms=TERMS[terms], seed=1))
    assert max(s.output_error for s in found) <= ATTENTION[shape.dtype]
    assert all(s.same_tokens for s in found) and found[-1].middle > 0
    assert max(s.score_error for s in found) <= SCORES


@pytest.mark.parametrize("flashes", [False, True])
@pytest.mark.parametrize("policy", slow_but(BY_ATTENTION, "snapkv"))
def test_tiles_and_horizons_of_long_steps(policy, flashes, monkeypatch):
    """Scores do not depend on how queries and keys are cut, and queries left out make no difference."""
    config = FadeConfig(recent_window=24, block_size=16, int4_budget=40, eviction_policy=policy)
    steps, shape = [150, 1, 90, 7, 1], Shape(batch=1, dtype=torch.float64)
    for name, size in dict(ROWS=32, TILE=20, FLASH_ROWS=48, FLASH_TILE=30).items():
        monkeypatch.setattr(reads, name, size)
    if not flashes:
        monkeypatch.setattr(flash, "takes", lambda *args: False)
    found = list(cases.trace(config, shape, steps, seed=1))
    assert all(s.same_tokens for s in found) and found[-1].middle == 40
    assert max(s.score_error for s in found) <= SCORES


WINDOWS = {
    "survivors apart": FadeConfig(**SMALL, int4_budget=10, eviction_policy="knorm"),
    "by attention": FadeConfig(**SMALL, int4_budget=7, int2_budget=6, eviction_policy="h2o"),
    "nothing evicted": CONFIGS["int4"],
    "nothing compressed": CONFIGS["off"],
}


@pytest.mark.parametrize("name", slow_but(WINDOWS, "by attention"))
def test_windows_count_distances_as_rope_does(name):
    """Of renumbered survivors the contiguous ones; and from the first step that has a longer past."""
    steps = [9] + [1] * 12 + [20, 5, 1, 1]
    found = list(cases.trace(WINDOWS[name], Shape(), steps, terms=dict(window=17)))
    assert max(s.output_error for s in found) <= ATTENTION[torch.float32]
    assert all(s.same_tokens for s in found)
