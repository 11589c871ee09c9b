"""What a model is: its text configuration, its attention layers and their RoPE."""

import copy
import inspect
import json
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


def unwrapped(model):
    """The model itself, where `torch.compile(model)` is given."""
    return getattr(model, "_orig_mod", model)


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
    config = text_config(model).to_dict()  # attributes that differ by layer (Gemma 4) cannot be asked for
    found = {name: config.get(name) for name in FINGERPRINT}
    return json.loads(json.dumps(found | dict(dtype=str(model.dtype)), default=str))


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Attention module of each layer, by layer index."""
    return {
        module.layer_idx: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int) and name.endswith(("attn", "attention"))
    }


class _Caught(Exception):
    """Carries the keys that an attention module hands to its cache."""


class _Catcher:
    """A cache that takes the keys of one layer, and stops the forward pass."""

    def update(self, keys: Tensor, *args, **kwargs):
        raise _Caught(keys)


def _keys(attention: nn.Module, hidden: Tensor, angles) -> Tensor | None:
    """Keys [1, H, n, D] that an attention module would cache, rotated by `angles`.

    None if the module is not called as the attention of transformers is.
    """
    names = inspect.signature(type(attention).forward).parameters
    known = dict(
        hidden_states=hidden,
        position_embeddings=angles,
        attention_mask=None,
        past_key_values=_Catcher(),
        layer_past=_Catcher(),
        shared_kv_states={},
    )
    if "position_embeddings" not in names:
        return None
    try:
        type(attention).forward(attention, **{name: x for name, x in known.items() if name in names})
    except _Caught as caught:
        return caught.args[0]
    return None


def find_rope(model: PreTrainedModel, layer_idx: int) -> Rope:
    """How the keys of a layer are rotated, found by trying it.

    The layer's own attention makes keys of random hidden states, once with the angles of a copy of
    the model's own rotary module and once with none; whichever style of ours turns the latter into
    the former is the model's. A layer that ignores the angles has no RoPE: its frequencies are 0.

    Raises `ValueError` if the layer has no rotary embedding, if neither style fits, or if the
    frequencies change while the text grows: its tokens cannot be renumbered.
    """

    def refusal(why: str) -> ValueError:
        return ValueError(
            f"layer {layer_idx} of {type(model).__name__} cannot be renumbered ({why}): "
            'evict with positions="original", or use a configuration that keeps every token'
        )

    attention = attention_modules(model).get(layer_idx)
    kind = getattr(attention, "layer_type", None)
    buffers = (f"{kind}_inv_freq", "inv_freq")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = [(m, b) for m in decoder.modules() for b in buffers if isinstance(getattr(m, b, None), Tensor)]
    if not found or attention is None:
        raise refusal("it has no rotary embedding")
    source, buffer = found[0]
    kinds = getattr(source, "rope_type", None)
    if "dynamic" in (kinds.get(kind) if isinstance(kinds, dict) else kinds, None):
        raise refusal("dynamic RoPE changes its frequencies while the text grows")
    text = model.config.get_text_config(decoder=True)
    by_axis = "mrope_section" in (getattr(text, "rope_parameters", None) or {}) or hasattr(
        source, "mrope_section"
    )
    if by_axis and text is not model.config:
        raise refusal("images take fewer positions than tokens")
    weight = next(x for x in attention.parameters() if x.dim() == 2)
    width = attention.config.hidden_size
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, width, generator=draw).to(weight.device, weight.dtype)
    position = torch.tensor([[0, 1, 7]], device=weight.device)
    twin = copy.deepcopy(source).to(weight.device)
    with torch.no_grad():
        try:
            axes = position.expand(3, 1, 3) if by_axis else position
            angles = twin(hidden, axes, *([kind] if buffer != "inv_freq" else []))
            none = (torch.ones_like(angles[0]), torch.zeros_like(angles[1]))
            before, after = (_keys(attention, hidden, x) for x in (none, angles))
        except (TypeError, IndexError, RuntimeError, AttributeError):
            before = after = None
    if before is None:
        raise refusal("its rotary embedding is of no known style")
    scale = getattr(source, buffer.replace("inv_freq", "attention_scaling"), 1.0)
    inv_freq = getattr(twin, buffer)
    turned = 2 * len(inv_freq)
    before, after = before.float(), after.float()
    near = 4e-2 if weight.dtype.itemsize < 4 else 1e-4
    if torch.equal(before, after):
        return Rope(_Still(inv_freq), "inv_freq", False)
    for interleaved in (False, True):
        ours = rotate(before, position[:, None], inv_freq, interleaved)
        error = ours[..., :turned] - after[..., :turned] / scale
        if error.norm() <= near * before.norm():
            return Rope(source, buffer, interleaved)
    raise refusal("its rotary embedding is of no known style")


class _Still(nn.Module):
    """Frequencies of a layer without RoPE: renumbering leaves its keys as they are."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.register_buffer("inv_freq", torch.zeros_like(like), persistent=False)
