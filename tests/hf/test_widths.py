"""Widths by layer that a bound on the loss chooses: the bound holds, and fewer changes would break it."""

import copy
import functools
import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import LlamaForCausalLM

import fade_fast
from fade_fast.errors import NotCalibrated
from fade_fast.hf import calibration, widths
from fade_fast.hf.models import CACHE_NAME
from fade_fast.hf.undisturbed import undisturbed
from fade_fast.hf.widths import CHUNK, Choice, Ladder, chosen
from fade_ref.config import FadeConfig

from ..marks import slow_but
from ..models import SMALL, compressed_tokens, dense, generate, prompt, tiny_llama


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    """Choices are written to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user"


class Counting(LlamaForCausalLM):
    """Counts its forward passes."""

    passes = 0

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args, **kwargs):
        Counting.passes += 1
        return super().forward(*args, **kwargs)


def sharp(layers=3, dtype=torch.float32, **config):
    """A model whose second layer depends most on exact keys."""
    model = tiny_llama(layers=layers, **config)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight *= 4
    model.__class__ = Counting
    return model.to(dtype)


def measured(model, bits, text):
    """KL divergence per token, by a teacher-forced run of our own through the public cache."""
    plain = dict(middle_k_bits=bits[0][0], middle_v_bits=bits[0][1])
    config = FadeConfig(recent_window=0, block_size=CHUNK, layer_bits=dict(enumerate(bits)), **plain)
    exact, ours = dense(model), fade_fast.create_cache(model, config)
    total = count = 0
    for part in text.split(CHUNK, dim=1):
        with torch.no_grad():
            p, q = (model(part, **{CACHE_NAME: c}).logits.double().log_softmax(-1) for c in (exact, ours))
        if ours.get_seq_length() > CHUNK:
            total += (p.exp() * (p - q)).sum().item()
            count += part.numel()
    assert compressed_tokens(ours) > 0
    return total / count


def bits_of(choice, config, layers):
    return [choice.apply(config).bits(i, layers) for i in range(layers)]


def test_tables_of_the_measurement_are_not_kept():
    """A cache holds those of its own blocks alone, also in the process that measured the widths."""
    model = sharp()
    cache = fade_fast.create_cache(model, "safe")
    assert cache.choice.tokens > 0 and not cache.choice.untried
    generate(model, cache, prompt(200), new=2)
    blocks = {block for _, block, _ in cache.calibration._tables}
    assert compressed_tokens(cache) > 0 and blocks == {cache.fade_config.block_size} != {CHUNK}


@pytest.mark.parametrize("codec", slow_but(["rotated", "matched"], "rotated"))
@pytest.mark.parametrize("k_bits, v_bits", slow_but([(4, 4), (2, 4), (3, 8), (2, 16)], (4, 4)))
def test_the_loss_is_below_the_bound_and_each_change_is_needed(codec, k_bits, v_bits):
    model = sharp()
    fields = dict(quant_backend=codec, middle_k_bits=k_bits, middle_v_bits=v_bits)
    plain = chosen(model, FadeConfig(loss_bound=1e6, **fields))
    assert plain.layer_bits == () and plain.plain == plain.loss > 0
    config = FadeConfig(loss_bound=plain.loss / 5, **fields)
    choice = chosen(model, config)
    assert choice.layer_bits and choice.loss <= config.loss_bound < choice.plain == plain.loss
    bits = bits_of(choice, config, 3)
    assert all(k >= k_bits and v >= v_bits for k, v in bits)
    text = calibration.own_texts(model)[1]
    if codec == "rotated":
        assert measured(model, bits, text) == pytest.approx(choice.loss, rel=1e-3)
        assert measured(model, [(k_bits, v_bits)] * 3, text) == pytest.approx(choice.plain, rel=1e-3)
    with undisturbed(model):
        ladder = Ladder(model, config, None)
        ladder._read_exact()
        changes = ladder.changes(False)
        used = next(n for n in range(len(changes) + 1) if ladder.after(changes[:n]) == dict(enumerate(bits)))
        assert ladder.loss(ladder.after(changes[: used - 1])) > config.loss_bound


def test_the_most_damaged_layer_comes_first():
    model = sharp()
    with undisturbed(model):
        ladder = Ladder(model, FadeConfig(loss_bound=1.0, middle_k_bits=2), None)
        ladder._read_exact()
        damage = ladder.damage(2, 8)
        assert set(damage) == {0, 1, 2} and max(damage, key=damage.get) == 1
        assert ladder.changes(False)[0] == (1, 8, 0)
        assert [len(ladder.changes(give_up)) for give_up in (False, True)] == [6, 9]


def test_a_tight_bound_leaves_layers_uncompressed():
    model = sharp()
    config = FadeConfig(loss_bound=1e-12)
    choice = chosen(model, config)
    assert set(bits_of(choice, config, 3)) == {(16, 16)} and choice.loss == 0.0


def test_the_cache_has_the_choice_and_tells_it(tmp_path):
    model, inputs = sharp(), prompt(200)
    loss = chosen(model, FadeConfig(loss_bound=1e6)).loss
    cache = fade_fast.create_cache(model, FadeConfig(loss_bound=loss / 5))
    assert cache.choice.layer_bits and cache.fade_config.loss_bound is None
    assert cache.fade_config == cache.choice.apply(FadeConfig(loss_bound=loss / 5))
    expected = generate(model, copy.deepcopy(cache), inputs, new=8)
    generate(model, cache, inputs, new=4)
    assert compressed_tokens(cache) > 0
    assert f"KL {cache.choice.loss:.2g}" in cache.describe() and "layers with K8" in cache.describe()
    assert cache.snapshot()["widths"] == str(cache.choice)
    twin = copy.deepcopy(cache)
    cache.save(tmp_path / "cache")
    Counting.passes = 0
    loaded = fade_fast.load_cache(tmp_path / "cache", model, verify=False)
    assert Counting.passes == 0  # nothing was measured
    assert loaded.choice == twin.choice == cache.choice and loaded.fade_config == cache.fade_config
    again = fade_fast.create_cache(model, FadeConfig(loss_bound=loss / 5))
    assert torch.equal(generate(model, again, inputs, new=8), expected)
    found = fade_fast.check_model(model, FadeConfig(loss_bound=loss / 5))
    assert found.widths == str(cache.choice) in str(found)
    assert any("keys at 8 bits" in layer.text for layer in found.layers)


@pytest.mark.slow
def test_measured_once_and_kept_for_a_model_with_a_name(user_folder):
    model, config = sharp(), FadeConfig(loss_bound=1e-4)
    model.name_or_path = "a/name"
    first = chosen(model, config)
    file = next((user_folder / "fade" / "widths").glob("*.json"))
    assert Choice.of_json(json.loads(file.read_text())) == first
    Counting.passes = 0
    assert chosen(model, replace(config, recent_window=8)) == first and Counting.passes == 0
    widths._known.clear()
    assert chosen(model, config) == first and Counting.passes == 0  # from the file, as in another process
    assert chosen(model, config, again=True) == first and Counting.passes > 0  # deterministic
    for damaged in ("{", "{}", '{"layer_bits": 3}', '{"bits": []}'):
        file.write_text(damaged)
        widths._known.clear()
        assert chosen(model, config) == first
        assert Choice.of_json(json.loads(file.read_text())) == first
    with torch.no_grad():
        model.lm_head.weight *= 1.01  # other weights: another model
    Counting.passes = 0
    widths._known.clear()
    assert chosen(model, config) != first and Counting.passes > 0
    assert len(list(file.parent.glob("*.json"))) == 2


def test_the_model_is_unchanged_and_a_plain_generate_goes_on():
    model, inputs = sharp(), prompt(50)
    expected = generate(model, dense(model), inputs, new=8)
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}, model.config.to_dict()
    torch.manual_seed(7)
    chosen(model, FadeConfig(loss_bound=1e-4))
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(7))
    assert before == ({name: dict(m.__dict__) for name, m in model.named_modules()}, model.config.to_dict())
    assert torch.equal(generate(model, dense(model), inputs, new=8), expected)


def test_rounding_of_half_precision_is_subtracted():
    model = sharp(dtype=torch.bfloat16)
    config = FadeConfig(loss_bound=1e-5)
    choice = chosen(model, config)
    assert choice.noise > 0 and f"rounding {choice.noise:.2g} subtracted" in str(choice)
    assert all(k <= 8 and v <= 8 for k, v in bits_of(choice, config, 3))  # no layer is given up for rounding


class Needy(Counting):
    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args, extra=None, **kwargs):
        if extra is None:
            raise ValueError("this model needs more than tokens")
        return super().forward(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*could not be verified")
def test_a_model_that_cannot_read_tokens_alone_keeps_its_widths():
    model = sharp()
    model.__class__ = Needy
    choice = chosen(model, FadeConfig.safe())
    assert choice.layer_bits == () and choice.loss is None and "needs more than tokens" in choice.untried
    cache = fade_fast.create_cache(model, "safe")
    assert "their loss is unknown" in cache.describe() and cache.fade_config == FadeConfig.preset("int4")
    model.__class__ = Counting
    assert chosen(model, FadeConfig.safe()).loss is not None  # the failure was not remembered


class Fixed(Needy):
    @classmethod
    def _can_set_attn_implementation(cls):
        return False


@pytest.mark.filterwarnings("ignore:.*could not be verified", "ignore:Fixed does not dispatch")
def test_a_model_without_queries_gets_the_rotated_codec():
    model = sharp()
    model.__class__ = Fixed
    with pytest.warns(widths.CodecWarning, match="needs more than tokens.*has the codec 'rotated'"):
        cache = fade_fast.create_cache(model, "safe")
    assert "their loss is unknown" in cache.describe() and cache.fade_config == FadeConfig()
    with pytest.raises(
        NotCalibrated, match="needs more than tokens; quant_backend='rotated' needs no calibration"
    ):
        fade_fast.create_cache(model, FadeConfig(quant_backend="matched", block_size=32))


def test_a_calibration_file_contains_choices(tmp_path):
    model = sharp()
    ids = prompt(64)["input_ids"]
    found = calibration.calibrate(model, ids, [0, 1, 2])
    for codec in ("rotated", "matched"):
        config = FadeConfig(quant_backend=codec, loss_bound=1e-3)
        made = Choice(((1, (8, 4)),), 1e-4, 2e-3, 1e-3, 0.0, 99)
        found.provenance["choices"] = {widths.key(config): asdict(made)}
        found.save(tmp_path / "file")
        Counting.passes = 0
        cache = fade_fast.create_cache(model, config, calibration=tmp_path / "file", verify=False)
        assert cache.choice == made and Counting.passes == 0  # nothing was measured
        assert cache.fade_config.bits(1, 3) == (8, 4) and (cache.calibration is None) == (codec == "rotated")


def test_what_contradicts_a_bound_is_refused():
    for value in (0, -1.0, float("nan"), float("inf"), "0.003", True):
        with pytest.raises(ValueError, match="loss_bound="):
            FadeConfig(loss_bound=value)
    against = [
        dict(layer_bits="boundary"), dict(int4_budget=9), dict(recent_window=None),
        dict(quant_backend="symmetric"), dict(quant_backend="channel"), dict(select=64),
    ]  # fmt: skip
    for fields in against:
        with pytest.raises(ValueError, match=f"loss_bound=0.1 .*{next(iter(fields))}"):
            FadeConfig(loss_bound=0.1, **fields)
    with pytest.raises(ValueError, match="create_cache"):
        fade_fast.TieredKVCache(sharp(), FadeConfig.safe())
    assert FadeConfig.preset("int4") == replace(FadeConfig.safe(), loss_bound=None)
    assert fade_fast.create_cache(sharp(), FadeConfig(**SMALL)).choice is None


def test_a_model_without_a_tokenizer_writes_its_texts_once():
    """Each token is a pass of the model. Other weights write other texts."""
    model = sharp()
    Counting.passes = 0
    first = calibration.own_texts(model)
    assert [tuple(x.shape) for x in first] == [(8, 64), (4, 96)] and Counting.passes == 95
    assert all(torch.equal(x, y) for x, y in zip(first, calibration.own_texts(model)))
    assert Counting.passes == 95
    cache = fade_fast.create_cache(model, "safe")
    assert cache.choice.tokens == 4 * (96 - CHUNK) and Counting.passes < 95 + 40
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
    assert not torch.equal(first[0], calibration.own_texts(model)[0])
