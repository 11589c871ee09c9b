"""Find how a model rotates its keys, by running it instead of reading its code or parameter names.

The model runs over a few tokens under an attention function that records the keys and returns zeros. So the
hidden states do not depend on positions, and the keys of two runs differ by their rotation alone.
"""

import contextvars
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..kernels.rope import RoPE, rotate
from .models import execution_device, vocabulary
from .undisturbed import undisturbed

NAME = "fade probe"  # name of the recording attention function in transformers
POSITIONS = (0, 1, 7)


@dataclass(frozen=True)
class Rope:
    """How a model rotates the keys of one layer.

    `source` and `buffer` say where the frequencies are stored. They are read at every use, because dynamic
    and long RoPE replace them while the model runs.
    """

    source: nn.Module
    buffer: str
    interleaved: bool

    def inv_freq(self) -> Tensor:
        """[d / 2] float32, radians per position."""
        return getattr(self.source, self.buffer)

    def __call__(self) -> RoPE:
        """Both, as they are now."""
        return RoPE(self.inv_freq(), self.interleaved)


class RopeElsewhere:
    """How the keys of a layer are rotated, with the frequencies on the device of the layer.

    Args:
        rope: finds the frequencies where the model keeps them.
        device: of the layer.
    """

    def __init__(self, rope: Rope, device: torch.device):
        self.rope, self.device = rope, device
        self._copy: Tensor | None = None
        self._copied: tuple[Tensor, int] | None = None  # frequencies of the model, and their version

    def __call__(self) -> RoPE:
        """Both, as they are now."""
        found = self.rope()
        now = found.inv_freq
        version = -1 if now.is_inference() else now._version
        if self._copied is None or self._copied[0] is not now or self._copied[1] != version or version < 0:
            self._copy, self._copied = now.to(self.device), (now, version)
        return found._replace(inv_freq=self._copy)


class _Still(nn.Module):
    """Zero frequencies for a layer without RoPE: renumbering leaves its keys unchanged."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.register_buffer("inv_freq", torch.zeros_like(like), persistent=False)


class RopeProbe:
    """Keys of a model's layers before and after RoPE.

    Attributes:
        model: the model that was run.
        still: keys [1, H, n, D] by layer index, with all tokens at position 0.
        moved: the same with tokens at `POSITIONS`.
        failure: the error message if the model could not be run, else None.
    """

    def __init__(self, model: PreTrainedModel):
        self._model, self.failure = weakref.ref(model), None
        self.still: dict[int, Tensor] = {}
        self.moved: dict[int, Tensor] = {}
        if _unsuited(model):
            return
        with undisturbed(model):
            try:
                model.set_attn_implementation(NAME)
                self.still = _keys(model, [0] * len(POSITIONS))
                self.moved = _keys(model, list(POSITIONS))
            except Exception as error:  # noqa: BLE001 - any error of the model's own code
                self.failure = f"{type(error).__name__}: {error}"
            # Long RoPE replaces its frequencies while the model runs. These belong to the recorded keys.
            self._inv_freq = {name: x.clone() for name, _, x in _frequencies(model)}

    @property
    def model(self) -> PreTrainedModel:
        return self._model()

    def find(self, layer_idx: int) -> Rope:
        """How the keys of a layer are rotated.

        Raises `ValueError` if the layer's tokens cannot be renumbered: the model could not be run, it has no
        rotary embedding, the embedding is of no known style, or its frequencies change while the text grows.
        """
        if why := _unsuited(self.model):
            raise self._refusal(layer_idx, why)
        if self.failure:
            raise self._refusal(layer_idx, f"its keys could not be probed, {self.failure}")
        if layer_idx not in self.moved:
            raise self._refusal(layer_idx, "its keys could not be probed, they reached no attention function")
        still, moved = self.still[layer_idx].float(), self.moved[layer_idx].float()
        candidates = _frequencies(self.model)
        if still.shape != moved.shape:
            raise self._refusal(layer_idx, "its keys could not be probed, their shape depends on positions")
        position = torch.tensor([POSITIONS], device=still.device)[:, None]
        near = 4e-2 if self.still[layer_idx].dtype.itemsize < 4 else 1e-4
        if torch.equal(still, moved):
            if not candidates:
                raise self._refusal(layer_idx, "it has no rotary embedding")
            return Rope(_Still(candidates[0][2]), "inv_freq", False)
        if not candidates:
            raise self._refusal(layer_idx, "it has no rotary embedding")
        errors = {}
        for name, source, _ in candidates:
            inv_freq = self._inv_freq[name].to(still.device)
            for interleaved in (False, True) if 2 * len(inv_freq) <= still.shape[-1] else ():
                error = (rotate(still, position, inv_freq, interleaved) - moved).norm() / still.norm()
                errors[error.item()] = Rope(source, name.rpartition(".")[2], interleaved)
        if not errors or min(errors) > near:
            raise self._refusal(layer_idx, "its rotary embedding is of no known style")
        return errors[min(errors)]

    def _refusal(self, layer_idx: int, why: str) -> ValueError:
        return ValueError(
            f"layer {layer_idx} of {type(self.model).__name__} cannot be renumbered ({why}): "
            'evict with positions="original", or use a configuration that keeps every token'
        )


#: Probes of the models of this process, and the buffers that each model had then.
_known: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[list, RopeProbe]]" = weakref.WeakKeyDictionary()


def probe_of(model: PreTrainedModel) -> RopeProbe:
    """The probe of a model. It runs the model once: another thread may use the model the next time."""
    buffers = [(name, weakref.ref(module)) for name, module, _ in _frequencies(model)]
    if model not in _known or _known[model][0] != buffers:
        probe = RopeProbe(model)
        if probe.failure:  # perhaps the model can run later
            return probe
        _known[model] = buffers, probe
    return _known[model][1]


def _unsuited(model: PreTrainedModel) -> str:
    """The reason from the configuration why a model's tokens cannot be renumbered; empty if there is none."""
    text = model.config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [parameters, *(x for x in parameters.values() if isinstance(x, dict))]
    if any(kind.get("rope_type") == "dynamic" for kind in kinds):
        return "dynamic RoPE changes its frequencies while the text grows"
    if text is not model.config and any("mrope_section" in kind for kind in kinds):
        return "images take fewer positions than tokens"
    return ""


def _frequencies(model: PreTrainedModel) -> list[tuple[str, nn.Module, Tensor]]:
    """(name, module, value) of every buffer of the decoder that could hold RoPE frequencies."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return [
        (f"{path}.{name}", module, x)
        for path, module in decoder.named_modules()
        for name, x in module._buffers.items()
        if name.endswith("inv_freq") and not name.startswith("original") and x is not None and x.dim() == 1
    ]


_heard: contextvars.ContextVar[dict[int, Tensor]] = contextvars.ContextVar("heard")


def _keys(model: PreTrainedModel, positions: list[int]) -> dict[int, Tensor]:
    """Keys [1, H, n, D] by layer index, of the same tokens at the given positions."""
    embedding = model.get_input_embeddings()
    device = execution_device(embedding) or model.device
    ids = torch.arange(3, 3 + len(positions), device=device)[None] % vocabulary(model)
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.tensor([positions], device=device),
        use_cache=False,
    )
    heard: dict[int, Tensor] = {}
    token = _heard.set(heard)
    try:
        # The function of the class, because the model's own call may be hooked or compiled.
        type(model).forward(model, **inputs)
    finally:
        _heard.reset(token)
    return heard


def _note(module, query, key, value, attention_mask, *args, **kwargs) -> tuple[Tensor, None]:
    """Attention function that records the first keys of each layer and returns zeros."""
    index = getattr(module, "layer_idx", None)
    if isinstance(index, int):
        _heard.get().setdefault(index, key.detach().clone())
    batch, heads, new, _ = query.shape
    return query.new_zeros(batch, new, heads, value.shape[-1]), None


AttentionInterface.register(NAME, _note)
AttentionMaskInterface.register(NAME, sdpa_mask)
