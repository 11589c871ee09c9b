"""What a model is: its text configuration, its attention layers and their RoPE."""

import copy
import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .kernels.rope import rotate


@dataclass(frozen=True)
class Rope:
    """How a model rotates the keys of one layer.

    `source` and `buffer` say where the frequencies are. They are read at every use, because
    dynamic and long RoPE replace them while the model runs.
    """

    source: nn.Module
    buffer: str
    interleaved: bool

    def inv_freq(self) -> Tensor:
        """[d / 2] float32, radians a position."""
        return getattr(self.source, self.buffer)


def text_config(model: PreTrainedModel):
    """The configuration of the model's decoder.

    Raises:
        TypeError: not a transformers model.
        ValueError: no decoder whose keys and values could be tiered: encoder-decoder models, and
            multi-head latent attention, which caches no keys and values per head.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, not {type(model).__name__}")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model: decoders only are supported")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"{type(model).__name__} uses multi-head latent attention: its cache holds latents, "
            "which are compressed already and cannot be tiered"
        )
    return config


#: What must agree between the model that filled a cache and one that goes on with it.
FINGERPRINT = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_parameters",
    "sliding_window",
    "layer_types",
)


def fingerprint(model: PreTrainedModel) -> dict:
    """What makes two models' caches interchangeable, as JSON has it; weights are not looked at."""
    config = text_config(model)
    found = {name: getattr(config, name, None) for name in FINGERPRINT}
    return json.loads(json.dumps(found | dict(dtype=str(model.dtype)), default=str))


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Attention module of each layer, by layer index."""
    return {
        module.layer_idx: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int) and name.endswith(("attn", "attention"))
    }


def find_rope(model: PreTrainedModel, layer_idx: int) -> Rope:
    """How the keys of a layer are rotated, found by trying it.

    A copy of the model's own rotary module makes the angles and the model's own function applies
    them; whichever style of ours does the same to random vectors is the model's.

    Raises `ValueError` if the layer has no rotary embedding or neither style fits: its tokens
    cannot be renumbered.
    """
    refusal = (
        f"layer {layer_idx} of {type(model).__name__} cannot be renumbered (%s): "
        'evict with positions="original", or use a configuration that keeps every token'
    )
    attention = attention_modules(model).get(layer_idx)
    kind = getattr(attention, "layer_type", None)
    buffers = (f"{kind}_inv_freq", "inv_freq")
    found = [(m, b) for m in model.modules() for b in buffers if isinstance(getattr(m, b, None), Tensor)]
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if not found or apply is None:
        raise ValueError(refusal % "it has no rotary embedding")
    source, buffer = found[0]
    heads = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 3, attention.head_dim, generator=heads, dtype=torch.float32)
    position = torch.tensor([[0, 1, 7]])
    twin = copy.deepcopy(source).cpu().float()
    angles = twin(x, position, *([kind] if buffer != "inv_freq" else []))
    theirs = apply(x, x, *angles)[1] / getattr(source, buffer.replace("inv_freq", "attention_scaling"), 1.0)
    inv_freq = getattr(twin, buffer)
    for interleaved in (False, True):
        ours = rotate(x, position[:, None], inv_freq, interleaved)
        width = 2 * len(inv_freq)
        if torch.allclose(ours[..., :width], theirs[..., :width], rtol=1e-4, atol=1e-4):
            return Rope(source, buffer, interleaved)
    raise ValueError(refusal % "its rotary embedding is of no known style")
