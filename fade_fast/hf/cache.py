"""`TieredKVCache`: the cache that users pass to `model.generate(cache=...)`."""

import copy
import functools
import logging
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticSlidingWindowLayer,
)

from fade_ref.config import FadeConfig

from ..cache.beams import Written, move
from ..cache.decode_graph import DecodeGraph, no_step
from ..cache.guard import Guard, reading, single_threaded
from ..cache.layer import KVLayer
from ..cache.positions import PositionsElsewhere, TokenPositions
from ..cache.ranks import Ranks
from ..formats.matched import MatchedFormat, MatchedTier
from ..formats.rotated import RotatedFormat, RotatedTier, tier_widths
from ..formats.split import tier_class
from ..kernels import rotated
from ..policies import plan, scores
from ..saved import checkpoint, memory, snapshot, telemetry
from ..saved.memory import Memory
from .attention import NAME
from .calibration import Calibration
from .first_prompt import LayerLearner, PromptCalibration, for_cache
from .foreign import ForeignLayer, static_window
from .layer import TieredLayer
from .models import (
    attention_modules,
    execution_device,
    of_process,
    ranks_of,
    split_keys,
    text_config,
    unwrapped,
)
from .prompts import SeenTokens
from .rope_probe import RopeElsewhere, probe_of

if TYPE_CHECKING:
    from .widths import Choice

CODECS = ("rotated", "matched")  # the supported values of `quant_backend`


class TieredKVCache(Cache):
    """A `transformers` cache whose full-attention layers keep their tokens in tiers.

    `fade_fast.create_cache(model)` creates one. Layers of other kinds (sliding window, linear attention,
    shared) keep the classes that `DynamicCache` gives them.

    Args:
        model: the model that the cache is for. It is not attached.
        config: a configuration without a `loss_bound`.
        max_length, policy_weights, calibration: as in `create_cache`.

    Attributes:
        fade_config: the configuration, with the widths of all layers.
        choice: how the widths were chosen, or None if the configuration gave them.

    Raises `ValueError` for a configuration that this model cannot have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: FadeConfig,
        max_length: int | None = None,
        policy_weights: str | os.PathLike | dict[str, Tensor] | None = None,
        calibration: str | os.PathLike | Calibration | None = None,
    ):
        model = unwrapped(model)
        model_config = text_config(model)
        if config.loss_bound is not None:
            raise ValueError(
                f"loss_bound={config.loss_bound!r}: create_cache() chooses the widths first; call it "
                "instead, or set loss_bound=None"
            )
        if config.select is None and config.eviction_policy not in plan.SUPPORTED:
            raise ValueError(
                f"eviction_policy={config.eviction_policy!r}: one of {', '.join(plan.SUPPORTED)} is "
                "supported inside generate()"
            )
        if config.quant_backend not in CODECS or config.plan_scope not in plan.SCOPES:
            raise ValueError(
                f"quant_backend={config.quant_backend!r}, plan_scope={config.plan_scope!r}: 'rotated' "
                f"or 'matched', and one of {', '.join(plan.SCOPES)}, are supported inside generate()"
            )
        if config.plan_scope == "head" and config.eviction_policy == "adaptive":
            raise ValueError(
                "plan_scope='head' with eviction_policy='adaptive': heads would keep different numbers of "
                "tokens, which the buffers of a layer cannot hold; every other policy is supported"
            )
        if config.plan_scope == "head" and config.contiguous and config.int2_budget != 0:
            raise ValueError(
                f"plan_scope='head' with int2_budget={config.int2_budget} and contiguous positions: heads "
                'would read a slot at different positions; int2_budget=0 or positions="original" is supported'
            )
        weights = None
        if config.eviction_policy == "learned":
            weights = scores.load(scores.SHIPPED if policy_weights is None else policy_weights)
        elif policy_weights is not None:
            raise ValueError(
                f"eviction_policy={config.eviction_policy!r}, policy_weights given: 'learned' has weights, "
                "others take none; leave them out, or set eviction_policy='learned'"
            )
        replaceable = model_config._attn_implementation == NAME or model._can_set_attn_implementation()
        if scores.observer(config, weights) and not replaceable:
            raise ValueError(
                f"eviction_policy={config.eviction_policy!r} ranks by attention, but {type(model).__name__} "
                f"does not let its attention be replaced: {', '.join(plan.SCORES)} are supported for it"
            )
        if config.select is not None and not replaceable:
            raise ValueError(
                f"select={config.select!r}: {type(model).__name__} does not let its attention be replaced, "
                "and its own reads every token: use a configuration without select, such as 'safe'"
            )
        if config.evicts and not model._can_set_attn_implementation():
            raise ValueError(
                f"{type(model).__name__} does not dispatch its attention, whose masks and biases would count "
                "evicted tokens: use a configuration that keeps every token, such as 'safe'"
            )
        layers = list(DynamicCache(config=model_config).layers)
        full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        config = config.resolved(len(layers), full)
        self.fade_config, self.token_positions, self.seen = config, TokenPositions(), SeenTokens()
        self.fingerprint, self.model_config = of_process(model), model_config
        self.began: dict[int, int] = {}  # by thread id: number of tokens when its forward pass began
        self.guard = Guard()
        self._tables: dict[tuple, Tensor] = {}
        self.choice: Choice | None = None  # if the widths were chosen for this model
        # Captured steps keep their counters on one device, so all layers must be on that device.
        on_gpu = {p.device.type for p in model.parameters()} == {"cuda"}
        on_gpu &= len({p.device for p in model.parameters()}) == 1
        if not full:
            kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
            raise ValueError(
                f"{type(model).__name__} has no layer whose cache could be tiered: no full-attention "
                f"layer that caches keys and values alone. transformers gives its layers {kinds}: use "
                "transformers' own cache, which does not grow with the text"
            )
        modules, ranks = attention_modules(model), ranks_of(model)
        for i in full if ranks is not None else ():
            keys, dim = split_keys(modules.get(i)), getattr(modules.get(i), "head_dim", None)
            if keys is not None and dim and len(keys) % dim:
                raise ValueError(
                    f"{type(model).__name__}: a layer's KV heads cannot be split between {ranks.size} "
                    f"processes, each of which would have {len(keys) / dim:g} heads: use fewer processes"
                )
        #: The device of each layer's keys. If the weights are offloaded, they are on another device.
        self.homes = [
            i in modules and execution_device(modules[i]) or model.device for i in range(len(layers))
        ]
        by_rope = config.contiguous or (config.quant_backend == "matched" and not config.relocatable)
        ropes = probe_of(model) if by_rope else None
        self.calibration: Calibration | PromptCalibration | None = None
        if config.quant_backend == "matched":
            needed = [i for i in full if tier_widths(config, config.bits(i, len(layers)))]
            self.calibration = for_cache(model, calibration, full, needed)
        elif calibration is not None:
            raise ValueError(
                f"quant_backend={config.quant_backend!r}, calibration given: "
                "'matched' has one, others take none; leave it out, or set quant_backend='matched'"
            )
        self.tiered: list[KVLayer] = []
        self._elsewhere: dict[torch.device, PositionsElsewhere] = {}  # for layers on other devices
        for index, i in enumerate(full):
            rope, positions, home = None, self.token_positions, self.homes[i]
            if i in modules and home != self.homes[full[0]]:
                positions = self._elsewhere.setdefault(home, PositionsElsewhere(self.token_positions, home))
            widths = tier_widths(config, config.bits(i, len(layers)))
            known = self.calibration is not None and (i in needed or i in self.calibration.moments)
            if ropes and (config.contiguous or known and self.calibration.rotates(i)):
                rope = ropes.find(i)
                rope = rope if positions is self.token_positions else RopeElsewhere(rope, home)
            if known:
                format = self._matched(i, widths, rope)
            else:
                tier = RotatedTier if config.select is None else tier_class("rotated", config.index_bits)
                format = RotatedFormat(widths, self._table, tier)
            observer = scores.observer(config, weights, i, len(layers)) if format.compresses else None
            self.tiered.append(
                KVLayer(config, format, positions, rope, index, max_length, observer, i, ranks)
            )
        self.decode_graph = DecodeGraph(self.token_positions, self.tiered, compileable=on_gpu)
        self.decode_graph.captures = len(full) == len(layers) and (ranks is None or ranks.captures)
        self.decode_graph.uncaptured = self._why_uncaptured(model, on_gpu, ranks)
        shared = bool(getattr(model_config, "num_kv_shared_layers", 0))

        def dispatches() -> bool:
            return model_config._attn_implementation == NAME

        for kv, i in zip(self.tiered, full):
            layers[i] = TieredLayer(
                kv, self.decode_graph, self.guard, dispatches, self._rollback_step, model_config
            )
            layers[i].shared = shared
        for i, layer in enumerate(layers):
            if type(layer) is DynamicSlidingWindowLayer and on_gpu:
                layers[i] = static_window(layer.sliding_window)
        super().__init__(layers=layers)

    def _matched(self, layer: int, widths: list[tuple[int, int]], rope) -> MatchedFormat:
        """The format of a layer with matched codes."""
        config, calibration = self.fade_config, self.calibration
        kind = "still" if config.contiguous else "moved" if rope is None else "block"
        learner = LayerLearner(calibration, layer) if isinstance(calibration, PromptCalibration) else None
        return MatchedFormat(
            widths,
            functools.partial(calibration.of_layer, layer, kind, config.block_size),
            rope if kind == "block" else None,
            MatchedTier if config.select is None else tier_class("matched", config.index_bits),
            own_means=calibration.of_prompt and not calibration.rotates(layer),
            learner=learner,
        )

    def _why_uncaptured(self, model: PreTrainedModel, on_gpu: bool, ranks: Ranks | None) -> str:
        if not on_gpu and any(home.type == "cuda" for home in self.homes):
            where = ", ".join(sorted({str(p.device) for p in model.parameters()}))
            return f"weights are on {where}, and a captured step is of one GPU"
        if not on_gpu or ranks is None or self.decode_graph.captures:
            return ""
        if not ranks.captures:
            return "the processes of the model do not talk by NCCL"
        return "layers of transformers count in Python, and Inductor's graphs know nothing of other processes"

    def __deepcopy__(self, memo: dict) -> "TieredKVCache":
        """Return an independent copy for the same model.

        The copy shares the configuration of the model and the rotary modules.
        """
        memo[id(self.model_config)] = self.model_config
        memo[id(self.calibration)] = self.calibration
        for layer in self.tiered:
            for shared in (layer.rope, layer.telemetry, *layer.format.tensors()):
                memo[id(shared)] = shared
        for graph in (self.decode_graph.demotion, self.decode_graph.order):
            memo[id(graph)] = None  # a captured CUDA graph cannot be copied
        memo[id(self.decode_graph.one_too_many)] = no_step  # the copy is no part of a search
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.decode_graph.clear()  # the copy must not replay the captured steps of this cache
        for layer in twin.tiered:
            layer.telemetry = None
        return twin

    def __reduce__(self):
        raise TypeError(
            "a TieredKVCache can be neither pickled nor copied shallowly: cache.save(path) and "
            "fade_fast.load_cache(path, model) take it to another process, copy.deepcopy(cache) copies "
            "it here"
        )

    def _table(self, dim: int, device) -> Tensor:
        """Return the rotation of the codec and the sum of its rows, float32.

        All layers with the same head_dim share one table.
        """
        key = (dim, str(device))
        if key not in self._tables:
            self._tables[key] = rotated.with_sum(rotated.rotation(dim)).float().to(device)
        return self._tables[key]

    @property
    def device(self) -> torch.device:
        """The device of the first tiered layer."""
        return self.homes[self.tiered[0].layer_idx]

    def stored_layers(self) -> list[KVLayer | ForeignLayer]:
        """Return the layers in order, in the form that files and reports use."""
        return [layer.kv if isinstance(layer, TieredLayer) else ForeignLayer(layer) for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the logical length: the number of tokens seen. Evicted tokens count too.

        `layer_idx` is a layer of the model. All have seen equally many tokens between two steps.
        """
        layer = self.layers[layer_idx]
        return layer.get_seq_length() if isinstance(layer, TieredLayer) else super().get_seq_length(layer_idx)

    def _rollback_step(self, start: int) -> None:
        """Undo a step that began at step index `start` and failed in some layer.

        The layers before that layer already hold the tokens of the step. If the step cannot be undone, the
        cache refuses the next step. This happens in two cases. The step was long and followed other steps, so
        some layers have already compressed its tokens. Or a layer of transformers cannot undo the step.
        """
        if not start:
            self.reset()
            return
        ahead = [layer for layer in self.layers if layer.get_seq_length() > start]
        kinds = (TieredLayer, DynamicSlidingWindowLayer)
        fits = all(
            layer.kv.num_croppable >= layer.kv.length - start
            for layer in ahead
            if isinstance(layer, TieredLayer)
        )
        if not fits or not all(isinstance(layer, kinds) for layer in self.layers):
            self.decode_graph.failed = True
            return
        try:
            for layer in sorted(ahead, key=lambda layer: isinstance(layer, TieredLayer)):
                layer.crop(start - layer.get_seq_length())
        except RuntimeError:  # a sliding window has already dropped tokens
            self.decode_graph.failed = True
            return
        self._cropped(self.token_positions.length - start)
        self.decode_graph.touch()

    def _cropped(self, n: int) -> None:
        """Crop the state that the layers share, after the layers have cropped their newest `n` tokens."""
        self.token_positions.crop(n)
        self.seen.crop(self.token_positions.length)
        self.decode_graph.crop(n)
        if self.token_positions.has_padding:
            held = bool((self.token_positions.newest() >= self.fade_config.n_sink - 1).all())
            for layer in self.tiered:
                if layer.is_initialized:
                    layer.dense.sinks_placed &= held

    @single_threaded
    def reset(self) -> None:
        """Remove every token. The next tokens may have another batch size, dtype or device."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # transformers before 5.18 only zeroes keys and values
                layer.keys, layer.values, layer.is_initialized = None, None, False
        self.token_positions.clear()
        self.seen.set(None)
        self.decode_graph.clear()

    @single_threaded
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens from every layer. If a layer refuses, remove nothing.

        `tokens_to_remove` is negative, or 0. Removing all tokens is the same as `reset()`. Policies have
        already counted the attention of the removed tokens, and they keep these counts. The exception is a
        step that generate() undoes (`TieredLayer.record_past`).

        Raises `ValueError` for a positive number, and for more tokens than are uncompressed. Raises
        `RuntimeError` while another thread uses the cache.
        """
        self.decode_graph.check_whole()
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        most = min(layer.num_croppable for layer in self.tiered)
        for layer in self.layers if tokens_to_remove else ():
            moved_on = getattr(layer, "cumulative_length_int", 0) > getattr(layer, "max_cache_len", 0)
            if type(layer) is StaticSlidingWindowLayer and moved_on:
                raise ValueError(
                    f"crop({tokens_to_remove}): a sliding window of {layer.max_cache_len} tokens has "
                    "moved on, and what fell out of it cannot come back; feed the shorter text to a new cache"
                )
        if not -most <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop({tokens_to_remove}): from {-most} to 0 is possible, the newest {most} tokens being "
                "uncompressed; a larger recent_window allows more"
            )
        if tokens_to_remove == -1 and self.layers[self.tiered[0].layer_idx].record_past:
            self.decode_graph.uncount()
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._cropped(-tokens_to_remove)
            if not self.token_positions.length:
                self.reset()

    @single_threaded
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by the old row `beam_idx[i]`. `beam_idx` is int64 [B].

        In a beam search of generate(), the rows of a text share most of what they hold, and only the rest
        moves. The search keeps each row within its text. A call of your own in the middle of a search must
        do that, too: on a GPU nothing checks it.
        """
        self._check_rows(beam_idx, same=True)
        if self.decode_graph.one_too_many():
            self.crop(-1)
            return
        self.decode_graph.reorder(beam_idx, self._reorder)
        if not self.decode_graph.within:  # a beam search must not wait until the host knows the indices
            self.seen.select_rows(beam_idx)

    def _reorder(self, beam_idx: Tensor, written: Written | None) -> None:
        """Move rows: all that they hold, or what was `written` since the rows of each text were equal."""
        if written is None:
            super().reorder_cache(beam_idx)
            self.token_positions.select_rows(beam_idx)
            return
        slots = iter(written.layers)
        for layer in self.layers:
            if isinstance(layer, TieredLayer):
                move(layer.kv, beam_idx, next(slots))
            else:
                layer.reorder_cache(beam_idx)
        self.token_positions.select_rows(beam_idx, written.positions)

    @single_threaded
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, int64 or int32 [B'], in that order.

        Raises `ValueError` for other indices than those of rows.
        """
        self._check_rows(indices)
        self.decode_graph.beams.close()
        for layer in self.layers:
            if isinstance(layer, TieredLayer):
                layer.kv.select_rows(indices)
            else:
                layer.batch_select_indices(indices)
        self.token_positions.select_rows(indices)
        self.seen.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, in place. Raises `ValueError` unless it is an integer above 0."""
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"repeats={repeats!r}: an integer of at least 1 is allowed")
        if self.token_positions.length:
            self.batch_select_indices(torch.arange(self.token_positions.batch).repeat_interleave(repeats))

    def _check_rows(self, index: Tensor, same: bool = False) -> None:
        """Refuse an index without rows. With `same`, also refuse an index with another number of rows.

        If the index is on a GPU, its values are not read.
        """
        self.decode_graph.check_whole()
        if not self.token_positions.length:
            return
        batch = self.token_positions.batch
        fits = isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int64, torch.int32)
        fits = fits and len(index) > 0 and (not same or len(index) == batch)
        if not fits or not index.is_cuda and not 0 <= int(index.min()) <= int(index.max()) < batch:
            number = f"{batch} numbers" if same else "numbers"
            raise ValueError(f"rows {index}: a tensor of {number} from 0 to {batch - 1} is allowed")

    @reading
    def memory(self, *, compact: bool = True) -> Memory:
        """Return how much memory the cache uses now.

        Blocks that are due for demotion are demoted first; with `compact=False` nothing is changed. The bytes
        of a tensor-parallel model are those of this process, which holds a part of the heads. There, a policy
        that averages over heads leaves the blocks to the next step, because it needs the other processes.

        Raises `RuntimeError` while another thread runs a step.
        """
        self.decode_graph.check_whole()
        for layer in self.tiered if compact else ():
            if layer.compacts_alone:
                layer.compact()
        others = self.token_positions.tensors() + self.decode_graph.kept
        others += [x for positions in self._elsewhere.values() for x in positions.tensors()]
        return memory.of(self.stored_layers(), others)

    @reading
    def save(self, path: str | os.PathLike, tokens: Tensor | None = None) -> None:
        """Write the cache to a file `path`, completely or not at all. `load_cache` reads the file.

        Each process of a tensor-parallel model stores its own heads, under a path of its own.

        `tokens` is an integer tensor with the input ids. A cache does not know these ids. The file stores
        them, and `checkpoint.read_tokens` reads them.

        Raises `ValueError` for a layer of a kind that cannot be stored. Raises `OSError` if the system cannot
        write the file.
        """
        self.decode_graph.check_whole()
        checkpoint.save(self, path, tokens)

    @reading
    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """Return cloned tensors and the other state of the cache, for users who store it themselves."""
        self.decode_graph.check_whole()
        return checkpoint.state_dict(self)

    @single_threaded
    def load_state_dict(self, tensors: dict[str, Tensor], known: dict) -> None:
        """Fill this cache with the result of `state_dict`: `tensors`, and the other state, `known`.

        The cache must be empty.

        Raises `ValueError` if the result does not fit this cache, and leaves the cache empty. Raises
        `TypeError` for arguments of another type.
        """
        checkpoint.load_state_dict(self, tensors, known)

    def listen(self, sink: str | os.PathLike | logging.Logger | telemetry.Sink) -> telemetry.Listener:
        """Send events to `sink` from now on.

        The events are demotions, plans, evictions, choices, renumbering, growth and compilation.
        `telemetry.py` documents their contents. A sink is a path, a `logging.Logger`, or a function of an
        event. At a path, lines of JSON are appended to the file. Close the returned listener, or use it in a
        `with` block.

        Raises `TypeError` for a sink of another type. Raises `OSError` if the system cannot open the file.
        """
        return telemetry.listen(self.tiered, self.tiered[0].telemetry, sink)

    def describe(self) -> str:
        """Return a text that lists the tokens each layer keeps and their storage format."""
        return snapshot.text(snapshot.of(self, positions=False))

    @reading
    def snapshot(self) -> dict:
        """Return the same information and more in a form that JSON can store.

        It contains the tiers, the positions and the bytes of each layer. See `snapshot.py`.
        """
        return snapshot.of(self)
