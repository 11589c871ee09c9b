"""Attach a model to tiered caches, and detach it.

What `attach` changes: which attention function the configurations of the model name, the hooks of generate()
(`calls.py`), and two hooks around the model's forward (`entry.py`). `detach` undoes all of it.
"""

import functools
import warnings
import weakref
from dataclasses import dataclass, field

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from fade_ref.config import FadeConfig

from ..cache.guard import without_autocast
from . import entry, generate, versions
from .attention import NAME
from .cache import TieredKVCache
from .models import cache_in, cache_parameter, unwrapped
from .undisturbed import attention_names, restore_attention
from .verify import Verification, compare


@dataclass
class Attachment:
    """What `attach` changed of a model: kept on the model, so that a copy of the model has a copy.

    Attributes:
        names: attention functions of its configurations before; None if they could not be replaced.
        hooks: what removes the hooks around its forward.
        replaced: attributes of the model that hooks of generate() took the place of, by name.
        parameter: name under which its forward takes a cache.
    """

    names: list[tuple[PreTrainedConfig, str | None]] | None = None
    hooks: list = field(default_factory=list)
    replaced: dict = field(default_factory=dict)
    parameter: str | None = None


#: What was found out about models, which holds as long as their attention does; not on the models, which
#: `detach` leaves as they were.
_verified: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[str, Verification]]" = (
    weakref.WeakKeyDictionary()
)


def attach(model: PreTrainedModel, *, verify: bool = True) -> bool:
    """Let the model's attention read tiered caches; plain caches go on working under it.

    Returns whether the model dispatches its attention, and so could be attached. The setting lives
    on the model's configuration: models built from one configuration object share it.

    Args:
        model: a decoder of transformers.
        verify: first compare our attention, compressing nothing, with the model's own on 72 random
            tokens, in chunks and single steps; once for a model, and not where it is read dense.

    Raises `ValueError`, naming the layer and the error, if they differ, or if the model cannot run with a
    tiered cache; the model is as it was then.
    """
    model = unwrapped(model)
    versions.warn_if_untested()
    if verify:
        verification = verified(model)
        if verification.refused:
            raise ValueError(verification.refused)
        if verification.untried:
            warnings.warn(verification.untried, stacklevel=3)
    held = model.__dict__.setdefault("_fade", Attachment())
    held.parameter = cache_parameter(type(model).forward)
    if not held.hooks:
        held.hooks = [
            model.register_forward_pre_hook(entry.before, with_kwargs=True),
            model.register_forward_hook(entry.after, with_kwargs=True),
        ]
    if model.config.model_type in SWITCHING:
        model.__dict__["prepare_inputs_for_generation"] = functools.partial(_prepare_inputs, model)
    dispatches = model._can_set_attn_implementation()
    if dispatches and model.config._attn_implementation != NAME:
        held.names = attention_names(model)
        model.set_attn_implementation(NAME)
    generate.attach(model, held.replaced)
    if not dispatches:
        warnings.warn(
            f"{type(model).__name__} does not dispatch its attention: a tiered cache hands it dense "
            "keys and values at every step, so it saves memory between steps but no time",
            stacklevel=3,
        )
    return dispatches


def verified(model: PreTrainedModel) -> Verification:
    """What comparing our attention with the model's own showed; done once for a model."""
    own = _own_attention(model)
    known = _verified.get(model)
    if known is not None and known[0] == own:
        return known[1]
    plain = FadeConfig(recent_window=None)
    try:
        TieredKVCache(model, plain)
    except ValueError as refusal:
        return Verification(refused=str(refusal))
    with without_autocast():
        found = compare(model, NAME, own, lambda: TieredKVCache(model, plain))
    if not found.untried:  # perhaps it can be run later
        _verified[model] = own, found
    return found


def _own_attention(model: PreTrainedModel) -> str:
    """Name of the attention function that the model has without us."""
    held = model.__dict__.get("_fade")
    name = model.config._attn_implementation
    if name == NAME and held is not None and held.names:
        name = dict((id(config), own) for config, own in held.names)[id(model.config)]
    if name == NAME:  # attached through another model, whose configuration this one shares
        name = "sdpa" if model._supports_sdpa else "eager"
    return name


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the model is as it was before. Nothing happens without one."""
    model = unwrapped(model)
    held = model.__dict__.pop("_fade", None)
    if held is None:
        return
    if held.names is not None:
        restore_attention(held.names)
    for hook in held.hooks:
        hook.remove()
    prepare = model.__dict__.get("prepare_inputs_for_generation")
    if isinstance(prepare, functools.partial) and prepare.func is _prepare_inputs:
        del model.__dict__["prepare_inputs_for_generation"]
    generate.detach(model, held.replaced)


#: Models that drop their cache, for good, when the text reaches the length where long RoPE switches.
SWITCHING = ("phi3", "phimoe", "phi4_multimodal")


def _prepare_inputs(model, input_ids, *args, **kwargs):
    """What such a model feeds in a step, but through the same cache after the switch."""
    prepare = type(model).prepare_inputs_for_generation
    length = getattr(model.config, "original_max_position_embeddings", None)
    cache = cache_in((*args, *kwargs.values()))
    if not isinstance(cache, TieredKVCache) or length is None or input_ids.shape[1] <= length:
        return prepare(model, input_ids, *args, **kwargs)
    if cache.get_seq_length() <= length:  # keys of the short frequencies are made anew
        cache.reset()
        kwargs["next_sequence_length"] = None
    return GenerationMixin.prepare_inputs_for_generation(model, input_ids, *args, **kwargs)
