"""How much a model reads of each channel of what an attention layer adds to the hidden state.

Some families (Gemma, OLMo 2) norm the output of attention before they add it to the hidden state. Then the
rows of the output projection say little about what an error of a value does: the weights g of this norm
differ much by channel, and so do those of the norms that read the hidden state later, where a channel with
large values has small weights. So channel c of the output counts g_c^2 times the mean of w_c^2 over these
later norms w, each divided by its own mean.

Without a norm of the output, the rows are used as they are. The mean of w_c^2 gained nothing there.
"""

import functools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .models import attention_modules, text_config


class Readers:
    """Hears one forward pass: which norms read the hidden state, in order, and which norm attention.

    A context manager: the hooks are on the model inside the `with` block.
    """

    def __init__(self, model: PreTrainedModel):
        size, modules = getattr(text_config(model), "hidden_size", None), dict(model.named_modules())
        attention = attention_modules(model)
        names = {id(module): name for name, module in modules.items()}
        inside = tuple(f"{names[id(module)]}." for module in attention.values())
        layers = [modules[names[id(module)].rpartition(".")[0]] for module in attention.values()]
        self._attention = {id(module): index for index, module in attention.items()}
        self._parts = {id(part): part for layer in layers for part in layer.children()}
        self._norms = {
            id(module): module
            for name, module in modules.items()
            if "norm" in type(module).__name__.lower() and not name.startswith(inside)
            and getattr(getattr(module, "weight", None), "shape", None) == (size,)
        }  # fmt: skip
        self._made: list[tuple[Tensor, int | None]] = []  # what parts of a layer gave; the index if attention
        self._readers: list[nn.Module] = []
        self._from: dict[int, int] = {}  # how many norms had read when attention gave its output
        self._after: dict[int, nn.Module] = {}  # norms of the output of attention

    def __enter__(self) -> "Readers":
        heard = self._parts | self._norms
        self._hooks = [module.register_forward_hook(self._hear) for module in heard.values()]
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()
        self._made.clear()

    def _hear(self, module: nn.Module, args: tuple, output) -> None:
        index = self._attention.get(id(module))
        if index is not None:
            self._made.clear()
            self._from[index] = len(self._readers)
        if id(module) not in self._norms:
            self._made.append((output[0] if isinstance(output, tuple) else output, index))
        elif args:
            givers = [giver for given, giver in self._made if given is args[0]]
            if not givers:  # no part of the layer gave this: it is the hidden state
                self._readers.append(module)
            elif givers[0] is not None:
                self._after[givers[0]] = module

    def weights(self, index: int) -> Tensor | None:
        """The root of how much each channel of the output of layer `index` counts, float64 [hidden] on the
        CPU; None if this output is not normed, or the norms are not known.
        """
        own = weights_of(self._after[index]) if index in self._after else None
        known = [x for x in self._shares[self._from.get(index, 0) :] if x is not None]
        return torch.stack(known).mean(0).sqrt() * own if known and own is not None else None

    @functools.cached_property
    def _shares(self) -> list[Tensor | None]:
        """How much each norm reads of each channel, of mean 1; None where that cannot be found."""
        found = [weights_of(norm) for norm in self._readers]
        return [None if w is None else w.square() / w.square().mean() for w in found]


@torch.no_grad()
def weights_of(norm: nn.Module) -> Tensor | None:
    """By how much a norm multiplies each channel of a vector of the norm's own size, float64 [hidden] on the
    CPU. None if that cannot be found.

    Norms add 1 to their weights in some families. So the norm is asked, with a vector of mean 0 and its
    opposite: a bias is in both results.
    """
    x = torch.ones_like(norm.weight)
    x[1::2] = -1
    try:
        both = [type(norm).forward(norm, sign * x) for sign in (1, -1)]
        found = ((both[0] - both[1]) / 2).double().abs().cpu()
    except Exception:  # noqa: BLE001 - any error of the model's own code, which may ask for more
        return None
    return found if found.shape == x.shape and found.isfinite().all() and found.any() else None
