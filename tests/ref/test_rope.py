"""RoPE and ALiBi compared with the modules of Hugging Face, and the identities for moving keys."""

import contextlib
import copy
import importlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fade_fast.hf.models import CACHE_NAME
from fade_ref.rope import (
    NOPE,
    SCHEMES,
    Rope,
    alibi_bias,
    alibi_slopes,
    from_config,
    from_parameters,
    renumber,
    rotate,
)  # fmt: skip

from ..marks import named, slow_but

transformers = pytest.importorskip("transformers")
rope_utils = importlib.import_module("transformers.modeling_rope_utils")

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64).to(dtype)


def random_alive(n: int, kept: int, seed: int) -> torch.Tensor:
    """A mask with `kept` live tokens of n. The newest token is live."""
    alive = torch.zeros(n, dtype=torch.bool)
    alive[torch.randperm(n - 1, generator=seeded(seed))[: kept - 1]] = True
    alive[-1] = True
    return alive


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.to(F64), expected.to(F64)
    return ((actual - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------ the rotation of the families


@dataclass(frozen=True)
class Case:
    """One variant: the tiny config of a family, and the call of its rotary module."""

    name: str
    family: str
    classes: tuple[str, str]  # config, rotary module
    overrides: dict = field(default_factory=dict)
    layer_type: str | None = None
    interleaved: bool = False
    head_dim: int = 32
    same_layout: bool = True  # the rotation of the family keeps the order of the channels


def yarn(**extra):
    return dict(rope_type="yarn", rope_theta=1e4, factor=8.0,
                original_max_position_embeddings=2048, **extra)  # fmt: skip


def scaled_llama(name, parameters, context=16384):
    overrides = dict(rope_parameters=parameters, max_position_embeddings=context)
    return Case(f"llama-{name}", "llama", ("LlamaConfig", "LlamaRotaryEmbedding"), overrides)


def phi3(name, partial, original):
    half = int(32 * partial) // 2
    parameters = dict(
        rope_type="longrope", rope_theta=1e4, partial_rotary_factor=partial,
        short_factor=[1.0 + 0.1 * i for i in range(half)],
        long_factor=[2.0 + 1.5 * i for i in range(half)],
    )  # fmt: skip
    overrides = dict(
        rope_parameters=parameters, max_position_embeddings=8 * original,
        original_max_position_embeddings=original,
    )  # fmt: skip
    return Case(f"phi3-longrope-{name}", "phi3", ("Phi3Config", "Phi3RotaryEmbedding"), overrides)


LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=512)  # fmt: skip
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
GEMMA4 = dict(head_dim=32, global_head_dim=64, num_hidden_layers=6)
GEMMA4_CLASSES = ("Gemma4TextConfig", "Gemma4TextRotaryEmbedding")
GEMMA3 = dict(head_dim=32, num_hidden_layers=6)
GEMMA3_CLASSES = ("Gemma3TextConfig", "Gemma3RotaryEmbedding")

CASES = [
    Case("llama", "llama", ("LlamaConfig", "LlamaRotaryEmbedding")),
    scaled_llama("linear", dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    scaled_llama("dynamic-short", DYNAMIC),
    scaled_llama("dynamic-long", DYNAMIC, context=16),
    scaled_llama("yarn", yarn()),
    scaled_llama("yarn-mscale", yarn(mscale=1.0, mscale_all_dim=0.5, beta_fast=16, beta_slow=2)),
    scaled_llama("yarn-untruncated", yarn(truncate=False, attention_factor=1.7)),
    scaled_llama("llama3", LLAMA3),
    Case("qwen2", "qwen2", ("Qwen2Config", "Qwen2RotaryEmbedding")),
    phi3("short", 1.0, original=2048),
    phi3("long", 1.0, original=16),
    phi3("short-partial", 0.5, original=2048),
    phi3("long-partial", 0.5, original=16),
    Case("phi", "phi", ("PhiConfig", "PhiRotaryEmbedding")),
    Case("stablelm", "stablelm", ("StableLmConfig", "StableLmRotaryEmbedding")),
    Case("gpt_neox", "gpt_neox", ("GPTNeoXConfig", "GPTNeoXRotaryEmbedding")),
    Case("qwen3_next", "qwen3_next", ("Qwen3NextConfig", "Qwen3NextRotaryEmbedding"),
         dict(head_dim=32)),
    Case("qwen3_5", "qwen3_5", ("Qwen3_5TextConfig", "Qwen3_5TextRotaryEmbedding"),
         dict(head_dim=32)),
    Case("cohere", "cohere", ("CohereConfig", "CohereRotaryEmbedding"), interleaved=True),
    Case("glm", "glm", ("GlmConfig", "GlmRotaryEmbedding"), dict(head_dim=32), interleaved=True),
    Case("llama4", "llama4", ("Llama4TextConfig", "Llama4TextRotaryEmbedding"),
         dict(head_dim=32, no_rope_layers=[1, 1, 1, 1]), interleaved=True),
    Case("gemma3-full", "gemma3", GEMMA3_CLASSES, GEMMA3, layer_type="full_attention"),
    Case("gemma3-sliding", "gemma3", GEMMA3_CLASSES, GEMMA3, layer_type="sliding_attention"),
    Case("gemma4-full", "gemma4", GEMMA4_CLASSES, GEMMA4, layer_type="full_attention", head_dim=64),
    Case("gemma4-sliding", "gemma4", GEMMA4_CLASSES, GEMMA4, layer_type="sliding_attention"),
    Case("smollm3", "smollm3", ("SmolLM3Config", "SmolLM3RotaryEmbedding"),
         dict(no_rope_layers=[1, 1, 1, 1])),
    # It reads interleaved channels and writes half-split channels. Stored keys move as in Llama.
    Case("deepseek_v3", "deepseek_v3", ("DeepseekV3Config", "DeepseekV3RotaryEmbedding"),
         dict(qk_rope_head_dim=32), same_layout=False),
]  # fmt: skip
#: One case for each scheme and each channel layout. Tests of the other cases are slow.
KINDS = (
    "llama",
    "llama-dynamic-long",
    "llama-yarn",
    "llama-llama3",
    "phi3-longrope-long-partial",
    "glm",
    "gemma3-full",
)
TINY = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4)


def load(family: str, *names: str) -> list:
    """Classes or functions of a family. Skips the test if this version of transformers lacks them."""
    loaded = []
    for name in names:
        part = "configuration" if name.endswith("Config") else "modeling"
        try:
            module = importlib.import_module(f"transformers.models.{family}.{part}_{family}")
            loaded.append(getattr(module, name))
        except (ImportError, AttributeError) as why:
            pytest.skip(f"transformers {transformers.__version__} has no {family}.{name}: {why}")
    return loaded


@contextlib.contextmanager
def in_float64():
    """Run the code of Hugging Face in float64: replaces each expression that selects float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        with (
            mock.patch.object(torch, "float", F64),
            mock.patch.object(torch, "float32", F64),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


class Model:
    """The rotary module of a family and the function that applies it, for keys [B, H, n, head_dim]."""

    def __init__(self, case: Case, dtype: torch.dtype):
        config_class, rotary_class = load(case.family, *case.classes)
        self.case, self.dtype = case, dtype
        self.config = config_class(**TINY | copy.deepcopy(case.overrides))
        with self.precision():
            self.rotary = rotary_class(copy.deepcopy(self.config))

    def precision(self):
        return in_float64() if self.dtype == F64 else contextlib.nullcontext()

    def keys(self, k: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The keys that the family stores for the raw keys k at `position` [n]."""
        layer = {} if self.case.layer_type is None else dict(layer_type=self.case.layer_type)
        apply_names = dict(llama4="apply_rotary_emb", deepseek_v3="apply_rotary_pos_emb_interleave")
        (apply,) = load(self.case.family, apply_names.get(self.case.family, "apply_rotary_pos_emb"))
        with self.precision():
            position = position.expand(len(k), -1)
            if self.case.family == "qwen3_5":  # time, height and width are the same for text
                position = position.expand(3, -1, -1)
            embedding = self.rotary(k, position, **layer)
            if self.case.family == "llama4":  # complex numbers, [B, n, H, head_dim]
                k = k.transpose(1, 2)
                return apply(k, k, embedding)[1].transpose(1, 2)
            if self.case.family == "gemma4":  # this function takes one tensor
                return apply(k, *embedding)
            if self.case.family in ("phi", "stablelm"):  # their attention modules split and concatenate
                k, rest = k.split([(d := embedding[0].shape[-1]), k.shape[-1] - d], dim=-1)
                return torch.cat((apply(k, k, *embedding)[1], rest), dim=-1)
            return apply(k, k, *embedding)[1]

    def buffer(self) -> tuple[torch.Tensor, float]:
        prefix = f"{self.case.layer_type}_" if self.case.layer_type else ""
        scaling = getattr(self.rotary, f"{prefix}attention_scaling")
        return getattr(self.rotary, f"{prefix}inv_freq"), float(scaling)

    def rope(self, seq_len: int) -> Rope:
        layer = dict(layer_type=self.case.layer_type) if self.case.layer_type else dict(layer_idx=0)
        return from_config(self.config, **layer, seq_len=seq_len, interleaved=self.case.interleaved)


each_case = pytest.mark.parametrize("case", named(CASES, *KINDS))
each_precision = pytest.mark.parametrize(
    ("dtype", "start", "tolerance"),
    # In float32 the angles of a model have an error of 6e-8 * position, so positions must be small.
    slow_but([(F64, 0, 1e-12), (F64, 1000, 1e-12), (torch.float32, 0, 1e-6)], (F64, 1000, 1e-12)),
    ids=["float64", "float64-far", "float32"],
)


@each_case
@each_precision
def test_moved_keys_equal_a_fresh_run_on_the_kept_tokens(case, dtype, start, tolerance):
    model = Model(case, dtype)
    n, kept = 40, 24  # both above the switch of the "long" cases, and below the switch of the other cases
    raw = randn(2, 3, n, case.head_dim, seed=1, dtype=dtype)
    position = start + torch.arange(n)
    stored = model.keys(raw, position)
    rope = model.rope(seq_len=start + n)
    if case.same_layout:
        made = rotate(raw.to(F64), position, rope, scaled=True)
        assert relative_error(made, stored) <= tolerance

    alive = random_alive(n, kept, seed=2)
    rank, evicted = renumber(position, alive)
    for new in (rank[alive] + evicted, rank[alive]):  # read positions of the cache, and contiguous positions
        moved = rotate(stored[:, :, alive].to(F64), new - position[alive], rope)
        assert relative_error(moved, model.keys(raw[:, :, alive], new)) <= tolerance


@each_case
def test_inv_freq_and_scaling_equal_the_modules_buffers(case):
    for dtype, tolerance in ((torch.float32, 2e-7), (F64, 1e-14)):
        model = Model(case, dtype)
        model.keys(torch.zeros(1, 1, 40, case.head_dim, dtype=dtype), torch.arange(40))
        inv_freq, scaling = model.buffer()
        rope = model.rope(seq_len=40)
        assert inv_freq.dtype == dtype and rope.inv_freq.shape == inv_freq.shape
        assert ((rope.inv_freq - inv_freq).abs() <= tolerance * inv_freq.abs()).all()
        assert rope.scaling == pytest.approx(scaling, rel=tolerance)


@each_case
def test_the_model_is_left_alone(case):
    model = Model(case, torch.float32)
    model.keys(torch.zeros(1, 1, 40, case.head_dim), torch.arange(40))

    def state():
        buffers = {name: (b.data_ptr(), b.tolist()) for name, b in model.rotary.named_buffers()}
        plain = {k: repr(v) for k, v in vars(model.rotary).items() if not k.startswith("_")}
        return buffers, plain, model.config.to_dict()

    before = copy.deepcopy(state())
    rope = model.rope(seq_len=100_000)
    x = randn(1, 1, 3, case.head_dim, seed=3)
    original = x.clone()
    rotate(x, torch.tensor([-5, 0, 90_000]), rope)
    assert state() == before and torch.equal(x, original)


@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("kind", ["llama-dynamic", "phi3-longrope", "phi3-longrope-partial"])
def test_frequencies_switch_at_the_same_length_as_the_module(kind, side):
    name = kind.removesuffix("-partial") + "-long" + ("-partial" if "partial" in kind else "")
    case = next(case for case in CASES if case.name == name)
    model, boundary = Model(case, F64), 16
    seq_len = boundary + (side == "long")
    model.keys(torch.zeros(1, 1, seq_len, case.head_dim, dtype=F64), torch.arange(seq_len))
    assert relative_error(model.rope(seq_len).inv_freq, model.buffer()[0]) <= 1e-14
    assert torch.equal(model.rope(seq_len).inv_freq, model.rope(1).inv_freq) == (side == "short")


@pytest.mark.parametrize("partial", slow_but([1.0, 0.5, 0.3], 0.5))
@pytest.mark.parametrize("seq_len", slow_but([None, 100, 5000], 5000))
@pytest.mark.parametrize("rope_type", [name for name in SCHEMES if name != "default"])
def test_schemes_equal_transformers_functions(rope_type, seq_len, partial):
    if rope_type == "yarn" and partial == 0.3:
        partial = 0.25  # transformers itself fails for an odd width
    pairs = (int(32 * partial) + 1) // 2
    parameters = dict(rope_type=rope_type, rope_theta=5e5, factor=4.0)
    parameters["partial_rotary_factor"] = partial
    if rope_type in ("yarn", "llama3", "longrope"):
        parameters["original_max_position_embeddings"] = 512
    if rope_type == "llama3":
        parameters |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    if rope_type == "longrope":
        parameters["short_factor"] = [1.0 + i for i in range(pairs)]
        parameters["long_factor"] = [3.0 + i for i in range(pairs)]
    config = load("llama", "LlamaConfig")[0](
        **TINY, max_position_embeddings=2048, rope_parameters=copy.deepcopy(parameters)
    )
    with in_float64():
        inv_freq, scaling = rope_utils.ROPE_INIT_FUNCTIONS[rope_type](config, None, seq_len=seq_len)
    rope = from_parameters(parameters, head_dim=32, max_position_embeddings=2048, seq_len=seq_len)
    assert rope.inv_freq.shape == inv_freq.shape
    assert ((rope.inv_freq - inv_freq).abs() <= 1e-14 * inv_freq).all()
    assert rope.scaling == pytest.approx(scaling, rel=1e-14)


@pytest.mark.parametrize(
    "extra",
    [dict(beta_fast=8.0, beta_slow=8.0, truncate=False),  # a ramp of width 0
     dict(beta_fast=1e6, original_max_position_embeddings=10**9),  # a ramp that ends after the last pair
     dict(mscale=0.7), dict(mscale_all_dim=0.7), dict(mscale=0.0, mscale_all_dim=1.0),
     dict(factor=0.5), dict(attention_factor=0.0)],
    ids=str,
)  # fmt: skip
def test_corners_of_yarn(extra):
    parameters = yarn() | extra
    (config_class,) = load("llama", "LlamaConfig")
    config = config_class(**TINY, rope_parameters=dict(parameters))
    with in_float64():
        inv_freq, scaling = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config)
    rope = from_parameters(parameters, head_dim=32, max_position_embeddings=2048)
    assert relative_error(rope.inv_freq, inv_freq) <= 1e-14
    assert rope.scaling == pytest.approx(scaling, rel=1e-14)


def test_a_missing_extension_factor_is_read_off_the_context():
    for parameters in (yarn(), dict(LLAMA3)):
        given = from_parameters(parameters, head_dim=32, max_position_embeddings=99)
        context = 8 * parameters["original_max_position_embeddings"]
        del parameters["factor"]
        derived = from_parameters(parameters, head_dim=32, max_position_embeddings=context)
        assert torch.equal(given.inv_freq, derived.inv_freq) and given.scaling == derived.scaling


def test_rotating_back_with_scaled_cos_and_sin_is_wrong_under_yarn():
    model = Model(next(case for case in CASES if case.name == "llama-yarn"), F64)
    raw, position = randn(1, 2, 8, 32, seed=4), torch.arange(8)
    stored, rope = model.keys(raw, position), model.rope(8)
    a = rope.scaling
    assert a > 1.2
    assert relative_error(rotate(stored, -position, rope), a * raw) <= 1e-14
    naive = rotate(stored, -position, rope, scaled=True)  # k * cos - rotate_half(k) * sin
    assert relative_error(naive, a * a * raw) <= 1e-14
    moved, fresh = model.keys(stored, torch.full((8,), 3)), model.keys(raw, position + 3)
    assert relative_error(moved, a * fresh) <= 1e-14 and relative_error(moved, fresh) > 0.2


# ------------------------------------------------------------------------- layers without a rotation


class Recorded(Exception):
    pass


class Recorder:
    """Replaces a cache: it takes the keys of an attention layer and stops the forward pass."""

    def update(self, keys, values, *args, **kwargs):
        raise Recorded(keys)

    def get_seq_length(self, *args):
        return 0


@pytest.mark.parametrize(
    ("family", "prefix", "interleaved"),
    [("smollm3", "SmolLM3", False), ("cohere2", "Cohere2", True), ("exaone4", "Exaone4", False),
     ("llama4", "Llama4Text", True)],
)  # fmt: skip
def test_keys_that_a_mixed_model_stores(family, prefix, interleaved):
    """The attention module of each layer decides whether it rotates. from_config must agree."""
    names = (f"{prefix}Config", f"{prefix}RotaryEmbedding", f"{prefix}Attention")
    config_class, rotary_class, attention_class = load(family, *names)
    config = config_class(**TINY, head_dim=32, use_qk_norm=False, attn_implementation="eager")
    torch.manual_seed(5)
    hidden, position = torch.randn(1, 12, 128), torch.arange(12)
    embedding = rotary_class(config)(hidden, position[None])
    still = []
    for layer_idx in range(4):
        attention = attention_class(config, layer_idx)
        with torch.no_grad(), pytest.raises(Recorded) as recorded:
            attention(hidden, embedding, None, **{CACHE_NAME: Recorder()})
        with torch.no_grad():
            raw = attention.k_proj(hidden).view(1, 12, 2, 32)
            raw = getattr(attention, "k_norm", lambda k: k)(raw.transpose(1, 2)).to(F64)
        rope = from_config(config, layer_idx=layer_idx, interleaved=interleaved)
        made, stored = rotate(raw, position, rope, scaled=True), recorded.value.args[0]
        assert relative_error(made, stored) <= 1e-6
        still.append(rope is NOPE)
    assert still == [False, False, False, True]
    with pytest.raises(ValueError, match="have no RoPE: pass"):
        from_config(config)


def test_models_without_rotary_positions():
    falcon, gpt2 = load("falcon", "FalconConfig")[0], load("gpt2", "GPT2Config")[0]
    assert from_config(falcon(alibi=True)) is NOPE
    assert from_config(falcon(alibi=False)) is not NOPE
    with pytest.raises(ValueError, match="not rotary"):
        from_config(gpt2())


def test_nope_is_the_identity():
    x = randn(2, 5, 6, seed=6)
    for rope in (NOPE, Rope(NOPE.inv_freq, 3.0, interleaved=True)):
        assert torch.equal(rotate(x, torch.arange(5), rope, scaled=True), x)


# ------------------------------------------------------------------------------ moving a stored key


@pytest.mark.parametrize("seed", slow_but(range(5), 0, 1))
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_identities(seed, interleaved):
    rope = Rope(randn(1 + seed, seed=seed).exp(), 1.5, interleaved)
    d, n = 2 * len(rope.inv_freq), 7
    q, k = randn(2, n, 12, seed=10 + seed), randn(2, n, 12, seed=20 + seed)
    a, b = torch.randint(-999, 999, (2, 2, n), generator=seeded(seed))

    assert relative_error(rotate(rotate(k, a, rope), b, rope), rotate(k, a + b, rope)) <= 1e-12
    assert relative_error(rotate(rotate(k, a, rope), -a, rope), k) <= 1e-12
    assert torch.equal(rotate(k, 0, rope), k)
    assert torch.equal(rotate(k, a, rope)[..., d:], k[..., d:])
    assert relative_error(rotate(k, a, rope).norm(dim=-1), k.norm(dim=-1)) <= 1e-14
    scaled = rotate(k, a, rope, scaled=True)[..., :d]
    assert relative_error(scaled, 1.5 * rotate(k, a, rope)[..., :d]) <= 1e-14

    score = (rotate(q, a, rope) * rotate(k, b, rope)).sum(-1)
    assert relative_error((rotate(q, a - b, rope) * k).sum(-1), score) <= 1e-11  # only the distance matters
    left, right = (rotate(k, a, rope) * q).sum(-1), (k * rotate(q, -a, rope)).sum(-1)
    assert relative_error(left, right) <= 1e-12  # codes may stay unchanged: rotate the query instead


def test_interleaved_is_half_split_with_the_channels_shuffled():
    inv_freq, x = randn(4, seed=1).exp(), randn(3, 8, seed=2)
    shuffle = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    split = rotate(x[:, shuffle], torch.arange(3), Rope(inv_freq))
    interleaved = rotate(x, torch.arange(3), Rope(inv_freq, interleaved=True))
    assert torch.equal(interleaved[:, shuffle], split)


def test_position_broadcasts_over_batch_and_heads():
    rope, x = Rope(randn(2, seed=1).exp()), randn(2, 3, 5, 6, seed=2)
    position = torch.randint(99, (2, 1, 5), generator=seeded(3))
    y = rotate(x, position, rope)
    for row in range(2):
        for head in range(3):
            assert torch.equal(y[row, head], rotate(x[row, head], position[row, 0], rope))
    assert torch.equal(rotate(x, 4, rope), rotate(x, torch.full((5,), 4.0), rope))


def test_forty_evictions_one_after_another_equal_one_rotation():
    rope = from_parameters(yarn(), head_dim=32, max_position_embeddings=16384)
    raw = randn(200, 32, seed=7)
    position = torch.arange(200)
    k, token = rotate(raw, position, rope, scaled=True), position.clone()
    for step in range(40):
        alive = random_alive(len(position), len(position) - 3, seed=step)
        rank, evicted = renumber(position, alive)
        new = (rank + evicted)[alive]
        k = rotate(k[alive], new - position[alive], rope)
        position, token = new, token[alive]
    assert position.tolist() == list(range(120, 200))
    assert relative_error(k, rotate(raw[token], position, rope, scaled=True)) <= 1e-12


# -------------------------------------------------------------------------------------- renumbering


@pytest.mark.parametrize("seed", slow_but(range(10), 0, 1))
def test_renumbering_identities(seed):
    n, kept = 50, 5 + 4 * seed
    position, alive = torch.arange(n), random_alive(50, 5 + 4 * seed, seed)
    rank, evicted = renumber(position, alive)
    read = rank + evicted
    assert rank[alive].tolist() == list(range(kept)) and (rank[~alive] == -1).all()
    assert evicted == n - kept
    assert read[-1] == n - 1  # the newest token, and each later token, keeps its position
    after = (~alive).flip(0).cumsum(0).flip(0)
    assert torch.equal((read - position)[alive], after[alive])

    query = torch.tensor([n - 1, n, n + 17])  # logical positions
    distance = query[:, None] - read[alive]
    assert torch.equal(distance, (query - evicted)[:, None] - rank[alive])

    # A second eviction: from the current read positions, or in one step from the original positions.
    again = random_alive(kept, 1 + kept // 2, seed=99 + seed)
    both = torch.zeros(n, dtype=torch.bool)
    both[alive.nonzero().flatten()[again]] = True
    once, twice = renumber(position, both), renumber(read[alive], again)
    assert torch.equal(once[0][both], twice[0][again]) and once[1] == twice[1]

    # The storage order does not matter: a tier may store its records in any order.
    order = torch.randperm(n, generator=seeded(seed))
    shuffled = renumber(position[order], alive[order])
    assert torch.equal(shuffled[0], rank[order]) and shuffled[1] == evicted


def test_nothing_evicted_changes_nothing():
    rank, evicted = renumber(torch.arange(9), torch.ones(9, dtype=torch.bool))
    assert torch.equal(rank, torch.arange(9)) and evicted == 0


def test_rows_with_padding_and_their_own_plans():
    pads = torch.tensor([0, 3])
    position = (torch.arange(10) - pads[:, None]).clamp(min=0)  # generate() numbers padded rows like this
    alive = torch.rand(2, 10, generator=seeded(8)) < 0.5
    alive[:, -1] = True
    alive &= torch.arange(10) >= pads[:, None]
    rank, evicted = renumber(position, alive)
    for row, pad in enumerate(pads.tolist()):
        alone = renumber(torch.arange(10 - pad), alive[row, pad:])  # padding is not counted
        assert torch.equal(rank[row, pad:], alone[0]) and evicted[row] == alone[1]


def test_both_readings_give_the_same_scores():
    rope = from_parameters(dict(rope_theta=1e4), head_dim=16, max_position_embeddings=64)
    q, k, position = randn(3, 16, seed=1), randn(30, 16, seed=2), torch.arange(30)
    alive = random_alive(30, 11, seed=3)
    rank, evicted = renumber(position, alive)
    logical = torch.tensor([30, 31, 32])
    stored = rotate(k, position, rope)[alive]
    kept, old = rank[alive], position[alive]
    cache = rotate(q, logical, rope) @ rotate(stored, kept + evicted - old, rope).T
    small = rotate(q, logical - evicted, rope) @ rotate(stored, kept - old, rope).T
    unmoved = rotate(q, logical, rope) @ stored.T
    assert relative_error(cache, small) <= 1e-12 and relative_error(cache, unmoved) > 0.1


# -------------------------------------------------------------------------------------------- ALiBi


@pytest.mark.parametrize("heads", slow_but([1, 2, 3, 4, 6, 8, 12, 14, 16, 20, 32, 71, 112], 1, 12, 71))
def test_slopes_equal_bloom_falcon_and_mpt(heads):
    slopes, n = alibi_slopes(heads), 6
    assert slopes.shape == (heads,)
    mask = torch.ones(1, n, dtype=torch.long)
    bias = alibi_bias(slopes, torch.tensor([n - 1]), torch.arange(n))  # [H, 1, n]

    bloom = load("bloom", "build_alibi_tensor")[0](mask, heads, torch.float32).to(F64)
    # Bloom adds slope * key position. It differs by a constant per query, which softmax ignores.
    assert torch.allclose(bloom - bloom[..., -1:], bias, rtol=1e-6, atol=0)

    falcon = load("falcon", "build_alibi_tensor")[0](mask, heads, torch.float32)
    assert torch.equal(falcon[:, 0, 1], slopes.bfloat16().float())  # Falcon rounds slopes to bfloat16

    mpt = load("mpt", "build_mpt_alibi_tensor")[0](heads, n).to(F64)
    assert torch.allclose(mpt, bias, rtol=1e-6, atol=0)


def test_alibi_on_the_kept_tokens_equals_dense_attention_without_the_others():
    slopes, alive = alibi_slopes(4), random_alive(20, 9, seed=1)
    scores, query, key = randn(4, 2, 20, seed=2), torch.tensor([20, 21]), torch.arange(20)
    dense = (scores + alibi_bias(slopes, query, key)).masked_fill(~alive, -torch.inf).softmax(-1)
    kept = (scores[..., alive] + alibi_bias(slopes, query, key[alive])).softmax(-1)
    assert torch.allclose(kept, dense[..., alive], rtol=1e-13)
    index = torch.arange(9)  # a model that knows only the cache uses these positions
    wrong = (scores[..., alive] + alibi_bias(slopes, query, index)).softmax(-1)
    assert relative_error(wrong, kept) > 0.01


def test_alibi_takes_positions_of_each_row():
    query, key = torch.tensor([[5], [9]]), torch.tensor([[0, 5], [2, 3]])
    bias = alibi_bias(alibi_slopes(8), query, key)
    assert bias.shape == (2, 8, 1, 2) and bias.dtype == F64
    assert bias[1, 0, 0].tolist() == [-3.5, -3.0]


# ------------------------------------------------------------------------------------------- errors


def test_errors():
    common = dict(head_dim=8, max_position_embeddings=64)
    with pytest.raises(ValueError, match="one of default, linear, .*proportional, not 'cubic'"):
        from_parameters(dict(rope_type="cubic", rope_theta=1e4), **common)
    with pytest.raises(ValueError, match="'linear' needs the parameter 'factor'"):
        from_parameters(dict(rope_type="linear", rope_theta=1e4), **common)
    with pytest.raises(ValueError, match="'default' needs the parameter 'rope_theta'"):
        from_parameters({}, **common)
    for bad in (torch.ones(4), torch.ones(2, 2, dtype=F64)):
        with pytest.raises(ValueError, match="float64"):
            Rope(bad)
    rope = from_parameters(dict(rope_theta=1e4), **common)
    for bad in (torch.ones(3, 8), torch.ones(3, 6, dtype=F64)):
        with pytest.raises(ValueError, match="float64 of >= 8 channels"):
            rotate(bad, 0, rope)
    with pytest.raises(RuntimeError):  # position does not fit x
        rotate(torch.ones(3, 8, dtype=F64), torch.arange(4), rope)
    with pytest.raises(ValueError, match="share a position"):
        renumber(torch.tensor([0, 1, 1, 2]), torch.tensor([True, True, True, False]))
    with pytest.raises(ValueError, match="positive"):
        alibi_slopes(0)
    gemma3 = load("gemma3", "Gemma3TextConfig")[0](**TINY)
    with pytest.raises(ValueError, match="layer_type must be one of .*sliding_att.*, not None"):
        from_config(gemma3)


def test_a_duck_typed_config_will_do():
    config = SimpleNamespace(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=128,
        rope_parameters=dict(type="linear", rope_theta=1e4, factor=2.0),
    )  # fmt: skip
    rope = from_config(config, interleaved=True)
    assert rope.interleaved and len(rope.inv_freq) == 8 and rope.inv_freq[0] == 0.5
    config.layer_types, parameters = ["a", "b"], config.rope_parameters
    config.rope_parameters = dict(a=parameters, b=parameters | dict(factor=4.0))
    for rope in (from_config(config, layer_idx=1), from_config(config, "b")):
        assert rope.inv_freq[0] == 0.25
