"""Attach a model to tiered caches, after our attention was compared with the model's own; detach it.

`generate.py` lists the changes to the model.
"""

import warnings
import weakref

from transformers import PreTrainedModel

from fade_ref.config import FadeConfig

from ..cache.guard import without_autocast
from . import generate, versions
from .attention import NAME
from .cache import TieredKVCache
from .models import unwrapped
from .verify import Verification, compare

#: Results of comparisons, which hold as long as a model's attention function does. They are not kept on the
#: models, because `detach` leaves these as they were.
_verified: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[str, Verification]]" = (
    weakref.WeakKeyDictionary()
)


class Attached:
    """What `attach` gives: true if the model's attention was replaced; a context that detaches the model."""

    def __init__(self, model: PreTrainedModel, dispatches: bool):
        self.model, self.dispatches = model, dispatches

    def __bool__(self) -> bool:
        return self.dispatches

    def __eq__(self, other) -> bool:
        return self.dispatches == bool(other)

    __hash__ = None  # type: ignore[assignment]

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(self, *exception) -> None:
        detach(self.model)


def attach(model: PreTrainedModel, *, verify: bool = True) -> Attached:
    """Let the model's attention read tiered caches; plain caches go on working under it.

    The result is true if the model dispatches its attention, and so could be attached. In a `with` block it
    detaches the model at the end. The setting lives on the model's configuration: models built from one
    configuration object share it.

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
    dispatches = generate.install(model)
    if not dispatches:
        warnings.warn(
            f"{type(model).__name__} does not dispatch its attention: a tiered cache hands it dense "
            "keys and values at every step, so it saves memory between steps but no time. Use a DynamicCache "
            "if memory is not short",
            stacklevel=3,
        )
    return Attached(model, dispatches)


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
    generate.remove(unwrapped(model))
