"""Test whether a model computes the same output under our attention as under its own.

A model may pass its attention function something that ours does not know: a bias, a scale, an extra argument.
So random tokens run through the model twice, in chunks and single steps: first under its own attention with
`DynamicCache`, then under ours with a cache that compresses nothing. The outputs of each attention layer are
compared. Then the output of the first run replaces the output of the second. So every layer gets the same
input in both runs, and an error shows in the layer that causes it.

The first run has fewer passes, which is cheaper and computes the same in most models. It still shows what the
model does with a prompt, and with several tokens and a single one after others. Only if the outputs then
differ, it is run again in the chunks of the second run, and this comparison decides: the frequencies of a
model may grow with the text, and its products may round otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from .models import CACHE_NAME, attention_modules, cache_parameter, execution_device, text_config, vocabulary
from .undisturbed import undisturbed

#: Tokens per forward pass: two chunks (the second is longer than any draft), a draft, two single tokens, of
#: which the second one reads the first.
CHUNKS = (40, 24, 6, 1, 1)
#: The same tokens in the model's own first run: a prompt, several tokens, a single one.
FEWER = (sum(CHUNKS[:2]), sum(CHUNKS[2:-1]), CHUNKS[-1])
#: Largest allowed `distance` of an attention layer's outputs. The model's own attention rounds, too: eager
#: attention computes its softmax in float32 for every dtype of the model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class LayerShape:
    """Shape of one layer's cache: KV heads, channels of a key and of a value, dtype and device."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Verification:
    """Result of running a model with and without a tiered cache.

    Attributes:
        refused: the reason why a tiered cache cannot serve the model; empty if it can.
        untried: the reason why the model could not be tested; empty if it was tested.
        shapes: shape of each layer that caches keys and values, by layer index.
    """

    refused: str = ""
    untried: str = ""
    shapes: dict[int, LayerShape] = field(default_factory=dict)


def compare(model: PreTrainedModel, ours: str, own: str, new_cache: Callable[[], Cache]) -> Verification:
    """Run a model with its own cache and with a tiered one. The model is left unchanged.

    The model is refused if only the tiered cache causes an error, or if outputs differ by more than
    `TOLERANCE`. A model that cannot run on tokens alone is not tested.

    Args:
        model: a decoder.
        ours, own: names of the two attention functions in transformers. `ours` is used if the model lets
            transformers choose its attention function.
        new_cache: returns an empty cache that compresses nothing.
    """
    found = _compared(model, ours, own, new_cache, FEWER)
    return _compared(model, ours, own, new_cache, CHUNKS) if found.refused else found


def _compared(
    model: PreTrainedModel, ours: str, own: str, new_cache: Callable[[], Cache], chunks: Sequence[int]
) -> Verification:
    """As `compare`. The model's own run gets its tokens in `chunks`: `FEWER`, or those of the other run."""
    name, config = type(model).__name__, text_config(model)
    if own == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        own = "eager"  # sdpa ignores the softcap, and transformers 5.17 does not object
    witness, cache = Witness(model, alike=chunks == CHUNKS), DynamicCache(config=config)
    dispatches = model._can_set_attn_implementation()
    with undisturbed(model):
        try:
            if dispatches:
                model.set_attn_implementation(own)
            with witness:
                expected = feed(model, cache, _tokens(model), chunks)
        except Exception as error:  # noqa: BLE001 - any error of the model's own code
            raised = f"raises {type(error).__name__}: {error}"
            takes = cache_parameter(type(model).forward) is not None
            if takes and not _runs_without_cache(model):
                return Verification(
                    untried=f"{_untried(name)} {raised}; compare a text of yours with and without the cache"
                )
            return Verification(
                f"{name} takes no DynamicCache of transformers: its forward pass {raised}; use its own cache"
            )
        if expected.is_meta:
            return Verification(
                untried=f"{_untried(name)} gives no numbers, for its weights are on meta; load them to "
                "verify it"
            )
        if cache.get_seq_length() != expected.shape[1]:
            return Verification(
                f"{name} does not use the cache that it is given: it has one of its own, or none; generate "
                "without a cache of fade_fast"
            )
        shapes = _shapes(cache)
        odd = next((x for x in shapes.values() if x.key_dim != x.value_dim), None)
        if odd is not None:
            return Verification(
                f"{name} has keys of {odd.key_dim} channels and values of {odd.value_dim}: a tiered cache "
                "takes keys and values of one width; use a DynamicCache",
                shapes=shapes,
            )
        try:
            if dispatches:
                model.set_attn_implementation(ours)
            tiered = new_cache()
            with witness:
                output = feed(model, tiered, _tokens(model), CHUNKS)
            tiered.decode_graph.check_whole()
        except Exception as error:  # noqa: BLE001 - as above
            return Verification(
                f"{name} cannot run with a tiered cache: over random tokens its forward pass raises "
                f"{type(error).__name__}: {error}; use a DynamicCache",
                shapes=shapes,
            )
    for what, error in [*witness.errors(), ("the output", distance(output, expected))]:
        allowed = TOLERANCE.get(expected.dtype, TOLERANCE[torch.bfloat16])
        if error > allowed:
            return Verification(
                f"{what} of {name} differs under a tiered cache that compresses nothing, relative error "
                f"{error:.2g} (at most {allowed:g} is rounding): its attention is not one that fade_fast "
                "knows. Use a DynamicCache; verify=False attaches regardless",
                shapes=shapes,
            )
    return Verification(shapes=shapes)


def _untried(name: str) -> str:
    return f"{name} could not be verified: its own forward pass over random tokens"


def _shapes(cache: Cache) -> dict[int, LayerShape]:
    """Shape of each layer of a filled transformers cache, by layer index."""
    shapes = {}
    for i, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and keys.dim() == 4 and isinstance(values, Tensor) and values.dim() == 4:
            widths = keys.shape[-1], values.shape[-1]
            shapes[i] = LayerShape(keys.shape[1], *widths, keys.dtype, keys.device)
    return shapes


class Witness:
    """Records the outputs of every attention layer. From the second run on, compares and replaces them.

    Later runs have the passes of the first one; if not `alike`, other passes over the same tokens.
    A context manager: the hooks are on the model inside the `with` block.
    """

    def __init__(self, model: PreTrainedModel, alike: bool = True):
        self.alike = alike
        self.modules = dict(sorted(attention_modules(model).items()))
        self.heard: dict[int, list[Tensor]] = {}
        self.relative: dict[int, float] = {}  # largest relative error of each layer
        self.repeats = False

    def __enter__(self):
        self._turn = dict.fromkeys(self.modules, 0)  # passes of a layer
        self._start = dict.fromkeys(self.modules, 0)  # and their tokens
        self._hooks = [m.register_forward_hook(self._hook(i)) for i, m in self.modules.items()]
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()
        self.repeats = True

    def _hook(self, index: int):
        def hear(module: nn.Module, args, out):
            result = out[0] if isinstance(out, tuple) else out
            if not self.repeats:
                self.heard.setdefault(index, []).append(result.clone())
                return None
            expected = self._expected(index, result.shape[1])
            self.relative[index] = max(self.relative.get(index, 0.0), distance(result, expected))
            return (expected.clone(), *out[1:]) if isinstance(out, tuple) else expected.clone()

        return hear

    def _expected(self, index: int, tokens: int) -> Tensor:
        """What the first run gave for the next tokens of a layer."""
        start, turn, heard = self._start[index], self._turn[index], self.heard[index]
        self._start[index], self._turn[index] = start + tokens, turn + 1
        return heard[turn] if self.alike else torch.cat(heard, dim=1)[:, start : start + tokens]

    def errors(self) -> Iterator[tuple[str, float]]:
        """(layer name, largest relative error) of each layer."""
        return ((f"attention layer {index}", error) for index, error in sorted(self.relative.items()))


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative error: norm of the difference over norm of `expected`. Other shapes give infinity.

    Only elements where `expected` is finite count.
    """
    if found.shape != expected.shape:
        return float("inf")
    wide = torch.promote_types(expected.dtype, torch.float32)
    if not norm(expected).isfinite():
        real = expected.isfinite()
        found, expected = found[real], expected[real]
    error = norm(found.to(wide) - expected.to(wide)) / norm(expected).clamp_min(1e-30)
    return error.nan_to_num(nan=float("inf")).item()


def norm(x: Tensor) -> Tensor:
    """Euclidean norm over all elements, float64 []."""
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def feed(model: PreTrainedModel, cache: Cache, tokens: Tensor, chunks: Sequence[int]) -> Tensor:
    """Logits of `tokens` [R, n], given in chunks: [R, n, ...]; hidden states if the model has no head."""
    tokens = tokens.to(execution_device(model.get_input_embeddings()) or model.device)
    start, outputs = 0, []
    for n in chunks:
        part = tokens[:, start : start + n]
        if not part.shape[1]:
            break
        # Call the function of the class: others may have hooked or compiled the model's own call.
        forward, real = type(model).forward, torch.ones_like(tokens[:, : start + n])
        arguments = {cache_parameter(forward) or CACHE_NAME: cache}
        step = forward(model, input_ids=part, attention_mask=real, use_cache=True, **arguments)
        outputs.append(step.logits if "logits" in step else step[0])
        start += n
    return torch.cat(outputs, dim=1)


def _runs_without_cache(model: PreTrainedModel) -> bool:
    """Whether a model runs over random tokens without a cache. If so, the cache caused its error."""
    try:
        device = execution_device(model.get_input_embeddings()) or model.device
        tokens = _tokens(model)[:, : CHUNKS[0]].to(device)
        type(model).forward(model, input_ids=tokens, attention_mask=torch.ones_like(tokens))
    except Exception:  # noqa: BLE001 - any error of the model's own code
        return False
    return True


def _tokens(model: PreTrainedModel) -> Tensor:
    """Random token ids [1, n] without special tokens; n is at most the model's number of positions."""
    config = text_config(model)
    special = {
        x
        for c in (model.config, config)
        for name, x in c.to_dict().items()
        if isinstance(x, int) and name.endswith(("_token_id", "_token_index"))
    }
    usable = [i for i in range(min(vocabulary(model), 1 << 15)) if i not in special] or [0]
    count = min(sum(CHUNKS), getattr(config, "max_position_embeddings", None) or sum(CHUNKS))
    chosen = torch.randint(len(usable), (count,), generator=torch.Generator().manual_seed(0))
    return torch.tensor(usable)[chosen][None]
