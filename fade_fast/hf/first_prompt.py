"""Calibration at the first prompt, for a model that cannot run a text by itself.

Some models need more than tokens: an image, or an argument of their own. Such a model has no calibration
before it is used. Its caches of the `matched` codec then take the moments from the first tokens that any of
them reads. No token is encoded before. The tables of a layer are made in one of two places:

- At the start of the first prompt that has `LEAST` tokens, from its queries, keys and values. `step.run`
  calls `learn` before it allocates anything.
- At the first demotion of a cache whose prompt was shorter, from the keys and values that are demoted.
  Captured steps show no queries. `KVLayer._open_middle` calls `learn_alone`.

Tables never change afterwards. All caches of the model share them, until the process ends. They are not
written to the user's cache folder, because moments are a trace of what a person wrote.
"""

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fade_ref import matched as spec
from fade_ref.matched import Moments, Rope

from ..errors import NotCalibrated
from ..kernels.matched import Matrices
from .calibration import (
    SINKS,
    TOKENS,
    Calibration,
    calibration_of,
    derive,
    kept,
    provenance_of,
    ropes_of,
)
from .models import attention_modules

LEAST = 32  # tokens of a prompt, sinks included, whose queries are worth measuring


class PromptCalibration:
    """What the first prompt of a model gives, layer by layer.

    Attributes:
        why: the reason why the model could not be calibrated before.
        moments: of the layers that have tables, as in `Calibration`.
        tokens: most tokens that a layer was measured on.
    """

    of_prompt = True

    def __init__(self, model: PreTrainedModel, layers: list[int], why: str):
        self.why, self._layers, self.tokens = why, layers, 0
        self.moments: dict[int, Moments] = {}
        self.ropes: dict[int, Rope] = ropes_of(model, layers)
        self._modules = weakref.WeakValueDictionary(attention_modules(model))
        self._provenance = provenance_of(model)
        self._lock = threading.RLock()
        self._stacks: dict[tuple, list[Tensor]] = {}
        self._placed: dict[tuple, tuple[Tensor, Matrices, Matrices]] = {}

    def __str__(self) -> str:
        if not self.moments:
            return f"matrices will fit the first prompt ({self.why})"
        return f"matrices fit the first prompt of this process, {self.tokens} tokens ({self.why})"

    def rotates(self, layer: int) -> bool:
        """Whether it is known how a layer rotates its keys."""
        return len(self.ropes[layer].inv_freq) > 0

    # -- as a file has it

    def known(self) -> Calibration:
        """What is known now, as a calibration of those layers that have tables."""
        moments = dict(sorted(self.moments.items()))
        provenance = self._provenance | dict(first_prompt=True, tokens=self.tokens)
        return Calibration(moments, {i: self.ropes[i] for i in moments}, provenance)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a file."""
        return self.known().tensors()

    def header(self) -> dict:
        """The metadata of a file, as JSON values."""
        return self.known().header()

    # -- tables

    def of_layer(
        self, layer: int, kind: str, block: int, device: torch.device
    ) -> tuple[Tensor, Matrices, Matrices]:
        """The tables of a layer that has been learned; arguments as in `Calibration.tables`.

        Those of layers of one shape lie one after another; see `joined_tables`.
        """
        key = layer, kind, block, device
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if key not in self._placed:
                if device.type == "cpu":
                    mean, *sides = derive(self.moments[layer], self.ropes[layer], kind, block)
                else:
                    mean, *sides = self.of_layer(layer, kind, block, torch.device("cpu"))
                made = [mean, *sides[0], *sides[1]]
                shapes = tuple(x.shape for x in made)
                stacks = self._stacks.get((key[1:], shapes))
                if stacks is None:
                    stacks = [x.new_empty((len(self._layers), *x.shape), device=device) for x in made]
                    self._stacks[key[1:], shapes] = stacks
                rows = [stack[self._layers.index(layer)] for stack in stacks]
                for row, x in zip(rows, made):
                    row.copy_(x)
                self._placed[key] = rows[0], Matrices(*rows[1:4]), Matrices(*rows[4:])
            return self._placed[key]

    # -- learning

    def module(self, layer: int) -> nn.Module | None:
        """The attention module of a layer, if it is found."""
        return self._modules.get(layer)

    def learn(self, layer: int, found: Moments, channels: int, tokens: int) -> None:
        """Keep the moments of a layer, if they are finite and no other cache was earlier."""
        found = kept(found, self.module(layer), channels)
        with self._lock:
            if layer not in self.moments and all(x.isfinite().all() for x in found):
                self.moments[layer], self.tokens = found, max(self.tokens, tokens)


@dataclass(frozen=True)
class LayerLearner:
    """A `formats.matched.Learner`: makes the tables of one layer."""

    calibration: PromptCalibration
    layer: int

    @property
    def ready(self) -> bool:
        return self.layer in self.calibration.moments

    def learn(self, query: Tensor, keys: Tensor, values: Tensor, real: Tensor | None, scaling: float) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if real is None:  # as many rows as in a calibration
                rows = max(1, TOKENS // keys.shape[2])
                texts = [x[:rows, :, :TOKENS] for x in (query, keys, values)]
            else:
                longest = int(real.sum(-1).argmax())
                texts = [x[longest][None, :, real[longest]][:, :, :TOKENS] for x in (query, keys, values)]
            count = texts[1].shape[2]
            if count < LEAST:
                return
            rope = self._rope(keys.device)
            rows = [spec.measure(*row, None, rope, scaling, SINKS) for row in zip(*texts)]
            channels = query.shape[1] * query.shape[3]
            self.calibration.learn(self.layer, spec.mean_of(rows), channels, len(rows) * count)

    def learn_alone(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            real = position >= 0
            keys, values = (x.transpose(1, 2)[real].transpose(0, 1)[:, :TOKENS] for x in (keys, values))
            at = position[real][:TOKENS].long()
            rope, (heads, count, dim) = self._rope(keys.device), keys.shape
            learn = self.calibration.learn
            if count:
                found = spec.measure_alone(keys, values, at, None, rope)
                group = getattr(self.calibration.module(self.layer), "num_key_value_groups", 0)
                learn(self.layer, found, heads * group * dim, count)
            if not self.ready:  # no number is finite: without a rotation of its own, a code is as good
                one = torch.eye(dim, dtype=torch.float64).expand(heads, -1, -1)
                learn(self.layer, Moments(one[:, 0] * 0, *[one] * 4), 0, 0)

    def _rope(self, device: torch.device) -> Rope:
        rope = self.calibration.ropes[self.layer]
        return Rope(rope.inv_freq.to(device), interleaved=rope.interleaved)


#: Calibrations of the models of this process that could not be calibrated before.
_known: "weakref.WeakKeyDictionary[PreTrainedModel, PromptCalibration]" = weakref.WeakKeyDictionary()


def for_cache(
    model: PreTrainedModel, source, layers: list[int], needed: list[int]
) -> Calibration | PromptCalibration:
    """The calibration of a cache, as `calibration_of` gives it; where the model has none, that of its first
    prompt.

    A prompt that was measured serves all later caches. Before, each cache tries to calibrate the model: a
    failure for want of memory need not come again.

    Raises as `calibration_of`: `NotCalibrated` only for a model whose attention cannot be replaced, because
    its queries never show.
    """
    known = _known.get(model)
    if source is None and known is not None and known.moments:
        return known
    try:
        return calibration_of(model, source, layers, needed)
    except NotCalibrated as error:
        if not model._can_set_attn_implementation():
            raise
        if known is None:
            known = _known.setdefault(model, PromptCalibration(model, layers, error.why))
        return known
