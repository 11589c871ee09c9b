"""Properties of a model: its decoder's configuration, attention layers, cache parameter and devices."""

import functools
import inspect
import json
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel

from ..cache.ranks import Ranks


def unwrapped(model):
    """The original model of `torch.compile(model)`; other models are returned unchanged."""
    return getattr(model, "_orig_mod", model)


def text_config(model: PreTrainedModel):
    """The configuration of the model's decoder.

    Raises:
        TypeError: not a transformers model.
        ValueError: the model has no keys and values that can be tiered: encoder-decoder models, models
            without attention heads, cross-attention layers, and multi-head latent attention, which caches no
            keys and values per head.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, not {type(model).__name__}: pass the model "
            "inside, if it is a wrapper"
        )
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model: decoders only are supported")
    heads = config.attribute_map.get("num_attention_heads", "num_attention_heads")
    if not _setting(config, heads):
        raise ValueError(
            f"{type(model).__name__} has no attention heads, and so no keys and values to cache: use "
            "transformers' own cache"
        )
    if _setting(config, "cross_attention_layers") or _setting(config, "add_cross_attention"):
        raise ValueError(
            f"{type(model).__name__} keeps keys of its cross-attention layers in the same cache: decoders "
            "whose layers attend to the text alone are supported"
        )
    if _setting(config, "kv_lora_rank"):
        raise ValueError(
            f"{type(model).__name__} uses multi-head latent attention: its cache holds latents, "
            "which are compressed already and cannot be tiered; use a DynamicCache"
        )
    return config


def _setting(config, name: str):
    """A field of a configuration, or its first value in a layer if layers differ; None without it."""
    fields = config.to_dict()  # attributes that differ by layer cannot be read directly
    layers = fields.get("per_layer_config")
    layers = layers.values() if isinstance(layers, dict) else layers or ()
    return fields.get(name) or next((x[name] for x in layers if isinstance(x, dict) and x.get(name)), None)


#: Fields that must agree between the model that filled a cache and a model that continues with it.
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
    """Properties that make caches of two models interchangeable, as JSON values. Weights are not compared."""
    config = text_config(model).to_dict()  # attributes that differ by layer (Gemma 4) cannot be read directly
    fields = {name: config.get(name) for name in FINGERPRINT}
    return json.loads(json.dumps(fields | dict(dtype=str(model.dtype)), default=str))


def of_process(model: PreTrainedModel) -> dict:
    """`fingerprint`, and which part of a tensor-parallel model this process holds: caches of two differ."""
    meshes = (getattr(weight, "device_mesh", None) for weight in model.parameters())
    mesh = next((x for x in meshes if x is not None), None)
    part = {} if mesh is None else dict(part=f"{list(mesh.get_coordinate())} of {list(mesh.shape)}")
    return fingerprint(model) | part


def split_keys(module: nn.Module | None) -> torch.Tensor | None:
    """This process's rows of the projection that gives the keys of an attention module.

    None if the module has no `k_proj` that is split between processes: then each process has all heads.
    """
    weight = getattr(getattr(module, "k_proj", None), "weight", None)
    here = weight.to_local() if hasattr(weight, "to_local") else None
    return None if here is None or here.shape == weight.shape else here


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """The processes between which a tensor-parallel model is split; None for a model that is not split."""
    for weight in model.parameters():
        mesh = getattr(weight, "device_mesh", None)
        if mesh is None:
            continue
        names = mesh.mesh_dim_names
        if names and "tp" in names:
            mesh = mesh["tp"] if mesh.ndim > 1 else mesh
        elif names or not getattr(model, "_tp_size", None):  # transformers 5.17 gives the mesh no names
            continue
        return Ranks(mesh.get_group()) if mesh.size() > 1 else None
    return None


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention module of each layer, by layer index."""
    return {
        module.layer_idx: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int) and name.endswith(("attn", "attention"))
    }


def vocabulary(model: PreTrainedModel) -> int:
    """Number of token ids of a model. The shape of quantized embeddings does not show it."""
    sizes = getattr(text_config(model), "vocab_size", None), model.get_input_embeddings().weight.shape[0]
    return next(n for n in sizes if n)


# -- the cache among arguments

#: Names of the cache parameter: since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")


@functools.lru_cache(maxsize=256)
def cache_parameter(function: Callable) -> str | None:
    """Name of the cache parameter of a transformers function; None if it has none."""
    parameters = inspect.signature(function).parameters
    known = [name for name in CACHE_NAMES if name in parameters]
    annotated = [name for name, x in parameters.items() if "Cache" in str(x.annotation)]
    return next(iter(known + annotated), None)


#: Name of the cache parameter of generate() and of models in the installed version.
CACHE_NAME = cache_parameter(GenerationMixin.prepare_inputs_for_generation) or CACHE_NAMES[0]


def named_cache(arguments: dict) -> tuple[str, Cache] | tuple[None, None]:
    """Name and value of the cache among keyword arguments, found by type; (None, None) without one."""
    return next(((name, x) for name, x in arguments.items() if isinstance(x, Cache)), (None, None))


def cache_in(arguments: Iterable) -> Cache | None:
    """The cache among some values, found by type; None without one."""
    return next((x for x in arguments if isinstance(x, Cache)), None)


# -- where a module runs


def execution_device(module: nn.Module) -> torch.device | None:
    """Device on which a module computes. With accelerate, its weights may be elsewhere between calls.

    None for a module without weights.
    """
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    held = next((x for x in (*module.parameters(), *module.buffers())), None)
    return None if held is None else held.device
