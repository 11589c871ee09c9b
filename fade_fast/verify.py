"""Whether a model under our attention computes what it does under its own: tried, not believed.

A model may hand its attention something that ours does not know (a bias, a scale, an argument of its
own). So random tokens go through it twice, in chunks and single steps: once under its own attention
with `DynamicCache`, once under ours with a cache that compresses nothing. Each attention layer's output
is compared, and then the first run's is put in its place, so that every layer gets the same input twice
and an error shows in the layer that makes it.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from .kernels.compile import FUSED_ON
from .models import attention_modules, text_config

#: Tokens fed at a time: two chunks, the second longer than any step of a draft, a draft, single tokens.
CHUNKS = (40, 24, 5, 1, 1, 1)
#: Largest error of an attention layer's output, norm of the difference over norm. The model's own
#: attention rounds, too: eager attention has its softmax in float32, whatever the model's dtype is.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

SMALL = 1 << 16  # numbers of a buffer that is no weight


def compare(model: PreTrainedModel, ours: str, own: str, new_cache: Callable[[], Cache]) -> None:
    """Run both, and leave the model as it was: modes, buffers, random state, attention function.

    A model that cannot be run on tokens alone is not compared: there is a warning instead.

    Args:
        model: decodes.
        ours, own: names of the two attention functions in transformers.
        new_cache: gives an empty cache that compresses nothing.

    Raises `ValueError`, naming the layer and the error, if outputs differ by more than `TOLERANCE`.
    """
    if any(p.is_meta for p in model.parameters()):
        return
    config = text_config(model)
    if own == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        own = "eager"  # sdpa leaves the softcap out, with which transformers 5.17 puts up
    before = model.config._attn_implementation
    with _undisturbed(model):
        try:
            model.set_attn_implementation(own)
            witness = Witness(model)
            try:
                with witness:
                    expected = _feed(model, DynamicCache(config=config))
            except Exception as error:  # noqa: BLE001 - whatever the model's own code raises
                warnings.warn(
                    f"{type(model).__name__} could not be verified: its own forward pass over random tokens "
                    f"raises {type(error).__name__}: {error}",
                    stacklevel=4,
                )
                return
            model.set_attn_implementation(ours)
            with witness:
                found = _feed(model, new_cache())
        finally:
            model.set_attn_implementation(before)
    for what, error in [*witness.errors(), ("the output", distance(found, expected))]:
        allowed = TOLERANCE.get(expected.dtype, TOLERANCE[torch.bfloat16])
        if error > allowed:
            raise ValueError(
                f"{what} of {type(model).__name__} differs under a tiered cache that compresses nothing, "
                f"relative error {error:.2g} (at most {allowed:g} is rounding): its attention is not one "
                "that fade_fast knows. verify=False attaches regardless"
            )


class Witness:
    """Hears what every attention layer puts out; from the second run on, compares and replaces it.

    A context manager: its hooks are on the model inside.
    """

    def __init__(self, model: PreTrainedModel):
        self.modules = dict(sorted(attention_modules(model).items()))
        self.heard: dict[int, list[Tensor]] = {}
        self._error: dict[int, float] = {}
        self.repeats = False

    def __enter__(self):
        self._turn = dict.fromkeys(self.modules, 0)
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
            expected = self.heard[index][self._turn[index]]
            self._turn[index] += 1
            self._error[index] = max(self._error.get(index, 0.0), distance(result, expected))
            return (expected.clone(), *out[1:]) if isinstance(out, tuple) else expected.clone()

        return hear

    def errors(self) -> Iterator[tuple[str, float]]:
        """The largest error of each layer, by its name."""
        return ((f"attention layer {index}", error) for index, error in sorted(self._error.items()))


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of `expected`, where that is finite; infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    real = expected.isfinite()
    found, expected = found[real].double(), expected[real].double()
    error = (found - expected).norm() / expected.norm().clamp_min(1e-30)
    return error.nan_to_num(nan=float("inf")).item()


def _feed(model: PreTrainedModel, cache: Cache) -> Tensor:
    """Logits, or hidden states of a model without a head, of random tokens, [1, n, ...]."""
    tokens, start, found = _tokens(model), 0, []
    for n in CHUNKS:
        part = tokens[:, start : start + n]
        if not part.shape[1]:
            break
        # The class's function: calls of the model may be hooked, or compiled, by others.
        real = torch.ones_like(tokens[:, : start + n])
        step = type(model).forward(
            model, input_ids=part, attention_mask=real, past_key_values=cache, use_cache=True
        )
        found.append(step.logits if "logits" in step else step[0])
        start += n
    return torch.cat(found, dim=1)


def _tokens(model: PreTrainedModel) -> Tensor:
    """Random token ids [1, n], as many as the model has positions for, none with a meaning of its own."""
    embedding, config = model.get_input_embeddings(), text_config(model)
    special = {
        x
        for c in (model.config, config)
        for name, x in c.to_dict().items()
        if isinstance(x, int) and name.endswith(("_token_id", "_token_index"))
    }
    usable = [i for i in range(min(embedding.weight.shape[0], 1 << 15)) if i not in special] or [0]
    count = min(sum(CHUNKS), getattr(config, "max_position_embeddings", None) or sum(CHUNKS))
    chosen = torch.randint(len(usable), (count,), generator=torch.Generator().manual_seed(0))
    return torch.tensor(usable)[chosen][None].to(embedding.weight.device)


@contextlib.contextmanager
def _undisturbed(model: PreTrainedModel):
    """Eager and deterministic inside; afterwards every module holds what it held before."""
    # Dynamic RoPE replaces its frequencies, vision-language models keep what they know of positions.
    held = [(m, dict(m.__dict__), dict(m._buffers)) for m in model.modules()]
    values = {x: x.clone() for x in model.buffers() if x.numel() <= SMALL}  # long RoPE writes in place
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    fused = set(FUSED_ON)
    with (
        torch.random.fork_rng(devices=sorted(devices, key=str)),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            FUSED_ON.clear()  # nothing is compiled for these few tokens
            model.eval()
            yield
        finally:
            FUSED_ON.update(fused)
            for module, attributes, buffers in held:
                for name in module.__dict__.keys() - attributes.keys():
                    del module.__dict__[name]
                module.__dict__.update(attributes)
                for name in module._buffers.keys() - buffers.keys():
                    del module._buffers[name]
                module._buffers.update(buffers)
            for buffer, value in values.items():
                buffer.copy_(value)
