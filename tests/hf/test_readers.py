"""Which norms read what attention adds, and by how much each channel counts."""

import pytest
import torch
from torch import nn

from fade_fast.hf.calibration import calibrate
from fade_fast.hf.readers import Readers, weights_of
from fade_ref import matched

from .. import marks
from ..conformance.families import FAMILIES, KINDS, VOCABULARY
from ..models import prompt, tiny_llama

SERVED = [family for family in FAMILIES.values() if not family.refused and family.dispatches]


def random_norms(model):
    """Give all norms weights that differ."""
    draws = torch.Generator().manual_seed(1)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for weight in module.parameters(recurse=False):
                weight.data.copy_(torch.randn(weight.shape, generator=draws))
    return model


def heard(model):
    readers = Readers(model)
    ids = torch.randint(3, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    with readers, torch.no_grad():
        model(ids, use_cache=False)
    return readers


def expected(norms, own=None):
    """By the definition; `norms` and `own` are weights as they multiply."""
    mean = sum(w.double() ** 2 / (w.double() ** 2).mean() for w in norms) / len(norms)
    return mean.sqrt() * (1 if own is None else own.double().abs())


@pytest.mark.parametrize("family", marks.named(SERVED, *KINDS))
def test_every_family_has_readers(family):
    model = random_norms(family.model())
    readers = heard(model)
    for index in family.tiered:
        weights = readers.weights(index)
        assert weights.dtype == torch.float64 and weights.isfinite().all() and (weights >= 0).all()
        assert weights.std() > 0.1 * weights.mean()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_is_read_by_all_later_norms():
    model = random_norms(tiny_llama(layers=3))
    readers, (_, second, third) = heard(model), model.model.layers
    later = [third.input_layernorm.weight, third.post_attention_layernorm.weight, model.model.norm.weight]
    torch.testing.assert_close(
        readers.weights(1), expected([second.post_attention_layernorm.weight, *later]), rtol=1e-5, atol=0
    )
    last = [third.post_attention_layernorm.weight, model.model.norm.weight]
    torch.testing.assert_close(readers.weights(2), expected(last), rtol=1e-5, atol=0)
    assert readers.weights(7) is None


def test_a_norm_of_the_output_counts_itself():
    """Gemma: it is no reader, and neither is the norm of what the MLP gives."""
    model = random_norms(FAMILIES["Gemma 3"].model())
    last = model.model.layers[1]
    norms = [1 + last.pre_feedforward_layernorm.weight, 1 + model.model.norm.weight]
    wanted = expected(norms, 1 + last.post_attention_layernorm.weight)
    torch.testing.assert_close(heard(model).weights(1), wanted, rtol=1e-5, atol=0)


def test_layers_whose_attention_and_mlp_read_the_same():
    """Cohere: no norm of its own layer reads what attention adds."""
    model = random_norms(FAMILIES["Cohere"].model())
    wanted = expected([model.model.norm.weight])
    torch.testing.assert_close(heard(model).weights(1), wanted, rtol=1e-5, atol=0)


class Odd(nn.LayerNorm):
    def forward(self, x, condition):
        return super().forward(x) * condition


def test_the_weights_of_a_norm():
    norm = nn.LayerNorm(64)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    torch.testing.assert_close(weights_of(norm), norm.weight.double().abs(), rtol=1e-4, atol=1e-6)
    assert weights_of(Odd(64)) is None
    assert weights_of(nn.LayerNorm(64, device="meta")) is None
    nn.init.constant_(norm.weight, float("nan"))
    assert weights_of(norm) is None


def test_values_are_calibrated_by_what_is_read():
    model = random_norms(tiny_llama())
    ids = prompt(80)["input_ids"]
    found, weights = calibrate(model, ids, [0, 1]), heard(model)
    for index in (0, 1):
        output = model.model.layers[index].self_attn.o_proj.weight.double()
        moments = found.moments[index]
        wanted = matched.with_output(moments, weights.weights(index).unsqueeze(1) * output).outputs
        torch.testing.assert_close(moments.outputs.double(), wanted, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(wanted, matched.with_output(moments, output).outputs, rtol=0.1)
