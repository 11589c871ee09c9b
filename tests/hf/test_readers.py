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


#: Families whose attention has a norm of its output.
NORMED = {"Gemma 2", "Gemma 3", "Gemma 3, vision-language", "Gemma 4"}


@pytest.mark.parametrize("family", marks.named(SERVED, *KINDS))
def test_families_whose_output_is_normed_have_weights(family):
    model = random_norms(family.model())
    readers = heard(model)
    for index in family.tiered:
        weights = readers.weights(index)
        assert (weights is not None) == (family.name in NORMED)
        if weights is not None:
            assert weights.dtype == torch.float64 and weights.isfinite().all() and (weights >= 0).all()
            assert weights.std() > 0.1 * weights.mean()
    assert not any(module._forward_hooks for module in model.modules())


def gemma(index):
    """A model with random norms, what it reads of layer `index`, and this by the definition: neither the
    norm of what attention gives nor that of what the MLP gives is a reader.
    """
    model = random_norms(FAMILIES["Gemma 3"].model())
    norms = []
    for layer in model.model.layers[index:]:
        norms += [layer.input_layernorm, layer.pre_feedforward_layernorm]
    read = [1 + norm.weight for norm in (*norms[1:], model.model.norm)]
    return (
        model,
        heard(model).weights(index),
        expected(read, 1 + model.model.layers[index].post_attention_layernorm.weight),
    )


@pytest.mark.parametrize("index", (0, 1))
def test_all_later_norms_read_what_attention_adds(index):
    _, found, wanted = gemma(index)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


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
    model, weights, _ = gemma(1)
    ids = torch.randint(3, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(0))
    moments = calibrate(model, ids, [1]).moments[1]
    output = model.model.layers[1].self_attn.o_proj.weight.double()
    wanted = matched.with_output(moments, weights.unsqueeze(1) * output).outputs
    torch.testing.assert_close(moments.outputs.double(), wanted, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(wanted, matched.with_output(moments, output).outputs, rtol=0.1)


def test_without_a_norm_of_the_output_its_projection_counts_as_it_is():
    model = random_norms(tiny_llama())
    moments = calibrate(model, prompt(80)["input_ids"], [0]).moments[0]
    output = model.model.layers[0].self_attn.o_proj.weight
    wanted = matched.with_output(moments, output).outputs
    torch.testing.assert_close(moments.outputs.double(), wanted, rtol=1e-4, atol=1e-6)
