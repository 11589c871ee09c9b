"""Calibration: what the `matched` codec knows of a model's keys, values and queries.

Moments and matrices come from `fade_ref.matched`. This is an exception to the rule that fade_fast takes no
numerics from fade_ref: they are computed once for a model, in float64, and codes depend on every bit.

`calibrate(model, ids)` runs the model over a text and measures moments; `fade_ref.matched` derives matrices
from them. One calibration serves all caches of a model. `of_model` makes it at the first cache of a model,
from a short text, and keeps it in the user's cache folder. Every process then uses the same one.

A file is safetensors. Its tensors are "{layer}.{name}", float32, for the fields of `matched.Moments`, and
"{layer}.inv_freq", float64. Its metadata hold the provenance.
"""

import contextlib
import contextvars
import functools
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fade_ref import matched as spec
from fade_ref.matched import NOPE, Moments, Rope

from ..errors import NotCalibrated
from ..kernels.matched import Matrices
from ..saved.files import whole
from .attention import attention
from .calibration_text import TEXTS
from .loading import cache_folder, tokenizer_of
from .models import (
    CACHE_NAME,
    attention_modules,
    cache_parameter,
    execution_device,
    fingerprint,
    of_process,
    ranks_of,
    split_keys,
    text_config,
    vocabulary,
)
from .readers import Readers
from .rope_probe import probe_of
from .undisturbed import undisturbed

NAME = "fade calibration"  # name of the recording attention function in transformers
VERSION = 3  # of files, and of how matrices are derived from moments: old codes need the old matrices
SINKS = 4  # first tokens of the text, which moments leave out
#: The commands that write a calibration, for messages.
MAKE = "`fade calibrate`, or `fade vllm-calibrate` for vLLM"
#: Names that models give the projection behind their attention.
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "o")


@dataclass(frozen=True)
class Calibration:
    """Moments of a model's full-attention layers.

    Attributes:
        moments: by layer index, float32 on the CPU.
        ropes: how each layer rotates its keys; `NOPE` if that is unknown, and then moments are after RoPE.
        provenance: model and text.
        of_prompt: whether the moments are those of the first prompt of a process (`first_prompt.py`).
    """

    moments: dict[int, Moments]
    ropes: dict[int, Rope]
    provenance: dict
    _tables: dict = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and bytes of the tensors, in hexadecimal."""
        digest = hashlib.sha256()
        for name, x in sorted(self.tensors().items()):
            digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
            digest.update(x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
        return digest.hexdigest()

    @property
    def of_prompt(self) -> bool:
        """See above."""
        return self.provenance.get("first_prompt", False)

    def __str__(self) -> str:
        tokens = self.provenance.get("tokens", "unknown")
        of = "the first prompt of a process" if self.of_prompt else "a text for calibration"
        return f"matrices fit {of}, {tokens} tokens"

    def rotates(self, layer: int) -> bool:
        """Whether it is known how a layer rotates its keys."""
        return len(self.ropes[layer].inv_freq) > 0

    def of_layer(
        self, layer: int, kind: str, block: int, device: torch.device
    ) -> tuple[Tensor, Matrices, Matrices]:
        """The tables of one layer."""
        return self.tables(kind, block, device)[layer]

    def tables(
        self, kind: str, block: int, device: torch.device
    ) -> dict[int, tuple[Tensor, Matrices, Matrices]]:
        """Mean of the keys [H, D] float32, and matrices of keys and of values, by layer, on `device`.

        They are computed once in float64 on the CPU, several layers at a time, each by one thread: the last
        bits of products and eigenvectors depend on the number of threads. `kind` is one of `matched.FRAMES`,
        and `block` the number of tokens that share a mean.
        """
        key = kind, block, device
        if key not in self._tables:
            if device.type != "cpu":
                here = self.tables(kind, block, torch.device("cpu"))
                self._tables[key] = _stacked(here, device)
            else:
                made = _by_single_threads(
                    lambda i: derive(self.moments[i], self.ropes[i], kind, block), self.moments
                )
                self._tables[key] = _stacked(dict(zip(self.moments, made)))
        return self._tables[key]

    def drop_tables(self, block: int) -> None:
        """Forget the tables of blocks of so many tokens. Caches that have them keep them."""
        for key in [key for key in self._tables if key[1] == block]:
            del self._tables[key]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a file."""
        named = {f"{i}.{name}": x for i, m in self.moments.items() for name, x in m._asdict().items()}
        return named | {f"{i}.inv_freq": rope.inv_freq.clone() for i, rope in self.ropes.items()}

    def header(self) -> dict:
        """The metadata of a file, as JSON values."""
        styles = {str(i): rope.interleaved for i, rope in self.ropes.items()}
        return self.provenance | dict(interleaved=styles)

    def save(self, path: str | os.PathLike) -> None:
        """Write a file, atomically. Raises `OSError` if the file cannot be written."""
        with whole(path) as written:
            save_file(self.tensors(), written, metadata={"fade-calibration": json.dumps(self.header())})


def _by_single_threads(function: Callable, items: Iterable) -> list:
    """The results of a function of each item, several at a time. No call has threads of its own: as many
    threads as cores for each of as many calls would mostly wait for one another.
    """
    threads = torch.get_num_threads()
    try:
        # The number that a thread sets for itself is also that of threads made later. It is restored below.
        with ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)


def derive(moments: Moments, rope: Rope, kind: str, block: int) -> tuple[Tensor, Matrices, Matrices]:
    """The tables of a layer, on the CPU; arguments as in `Calibration.tables`."""
    moments = Moments(*(x.double() for x in moments))
    mean, keys, queries = spec.frame(moments, kind, rope, block)
    sides = spec.matched(keys, queries), spec.matched(moments.values, moments.outputs)
    return mean.float(), *(_matrices(side) for side in sides)


def _matrices(side: spec.Matrices) -> Matrices:
    decode = side.decode.mT
    decode_and_sum = torch.cat((decode, decode.sum(1, keepdim=True)), dim=1)
    return Matrices(*(x.half().contiguous() for x in (side.encode, decode_and_sum, side.feedback)))


def _stacked(tables: dict[int, tuple], device: torch.device | str = "cpu") -> dict[int, tuple]:
    """The tables of layers on a device. Those of one shape lie one after another; see `joined_tables`."""
    leaves = {i: [mean, *keys, *values] for i, (mean, keys, values) in tables.items()}
    kinds: dict[tuple, list[int]] = {}
    for i, tensors in leaves.items():
        kinds.setdefault(tuple(x.shape for x in tensors), []).append(i)
    placed = {}
    for members in kinds.values():
        stacks = [torch.stack(x).to(device) for x in zip(*(leaves[i] for i in members))]
        for i, (mean, *sides) in zip(members, zip(*stacks)):
            placed[i] = mean, Matrices(*sides[:3]), Matrices(*sides[3:])
    return {i: placed[i] for i in tables}


def load(path: str | os.PathLike, model: PreTrainedModel | None = None) -> Calibration:
    """Load a file of `Calibration.save`. With `model`, the calibration must be of this model.

    Raises `FileNotFoundError`. Raises `ValueError` for another kind of file, another version or another
    model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            provenance = json.loads((file.metadata() or {})["fade-calibration"])
            # Copied: a mapped file that another program cuts short would end the process when it is read.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            version, _ = provenance["version"], provenance["fingerprint"]
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} holds no calibration, or is damaged: {error}; make it again with {MAKE}"
        ) from error
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version}; {VERSION} is understood here: make the calibration again with "
            f"{MAKE}"
        )
    found = of_tensors(tensors, provenance)
    if model is not None:
        _check_model(path, found, model)
    return found


def calibration_of(
    model: PreTrainedModel,
    source: "str | os.PathLike | Calibration | None",
    layers: list[int],
    needed: list[int],
) -> Calibration:
    """The calibration for a cache whose tiered layers are `layers`.

    `source` is the `calibration` argument of `create_cache`: a file, a `Calibration`, or None for `of_model`.
    If it comes from a first prompt, it may have the layers `needed` alone: those that the cache compresses.

    Raises as `load` and `of_model`, also for a `Calibration` of another model or of other layers. Raises
    `TypeError` for another type.
    """
    if source is None:
        return _shared(of_model(model, layers))
    if isinstance(source, (str, os.PathLike)):
        source = load(source)
    if not isinstance(source, Calibration):
        raise TypeError(
            f"calibration is a file or a Calibration, not {type(source).__name__}: give the path of a file "
            "that `fade calibrate` wrote"
        )
    _check_model("the calibration", source, model)
    source = _of_own_heads(source, model)
    least = needed if source.of_prompt else layers
    if not set(least) <= source.moments.keys() <= set(layers):
        raise ValueError(
            f"the calibration has layers {sorted(source.moments)}, the model needs {layers}: make one for "
            "this model with `fade calibrate`"
        )
    return _shared(source)


_in_use: "weakref.WeakValueDictionary[str, Calibration]" = weakref.WeakValueDictionary()


def _shared(calibration: Calibration) -> Calibration:
    """The equal calibration that some cache has, if there is one: its tables then exist once."""
    return _in_use.setdefault(calibration.digest, calibration)


def _of_own_heads(calibration: Calibration, model: PreTrainedModel) -> Calibration:
    """The part of a calibration for the KV heads that this process holds of a tensor-parallel model.

    A calibration of these heads alone is returned as it is. Raises `ValueError` for any other heads.
    """
    ranks, modules, moments = ranks_of(model), attention_modules(model), {}
    if ranks is None:
        return calibration
    for i, found in calibration.moments.items():
        rows = split_keys(modules[i]) if i in modules else None
        heads, dim = found.mean.shape
        here = heads if rows is None else len(rows) // dim
        if heads == here:
            moments[i] = found
        elif heads == here * ranks.size:
            first = ranks.rank * here
            moments[i] = Moments(*(x[first : first + here].clone() for x in found))
        else:
            raise ValueError(
                f"the calibration has {heads} KV heads in layer {i}, this process has {here}: make one for "
                "the whole model with `fade calibrate`"
            )
    return replace(calibration, moments=moments, _tables={})


def _check_model(name, calibration: Calibration, model: PreTrainedModel) -> None:
    ours, part = fingerprint(model), calibration.provenance.get("part")
    if part is not None and part != of_process(model).get("part"):
        raise ValueError(
            f"{name}: measured on the heads of one process, part {part} of the model; make one for the whole "
            "model with `fade calibrate`"
        )
    measured = calibration.provenance["fingerprint"] | dict(dtype=ours["dtype"])  # another dtype only rounds
    if measured != ours:
        raise ValueError(
            f"{name}: measured on another model than {type(model).__name__} at hand; make one for this model "
            "with `fade calibrate`"
        )


def of_tensors(tensors: dict[str, Tensor], provenance: dict) -> Calibration:
    """The calibration of a file's tensors and provenance. Raises `ValueError` for another version."""
    provenance = dict(provenance)
    if provenance.get("version", VERSION) != VERSION:
        raise ValueError(
            f"a calibration has version {provenance['version']}; {VERSION} is understood here: read it with "
            "the version of fade-fast that wrote it, or make it again"
        )
    styles = {int(i): interleaved for i, interleaved in provenance.pop("interleaved").items()}
    # Copies: tensors of a file are its pages, and the process would die if somebody shortened the file.
    tensors = {name: x.clone() for name, x in tensors.items()}
    moments = {i: Moments(*(tensors[f"{i}.{name}"] for name in Moments._fields)) for i in sorted(styles)}
    ropes = {i: Rope(tensors[f"{i}.inv_freq"], interleaved=styles[i]) for i in sorted(styles)}
    return Calibration(moments, ropes, provenance)


def calibrate(model: PreTrainedModel, ids: Tensor, layers: list[int]) -> Calibration:
    """Measure the moments of some layers as the model reads `ids` [R, n]. The model is left unchanged.

    Every row is a text. The moments are means over the rows.

    Raises:
        NotCalibrated: the model does not let its attention be replaced, or cannot run on token ids alone.
    """
    heard: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}
    modules, readers = attention_modules(model), Readers(model)
    with undisturbed(model):
        token = _heard.set(heard)
        try:
            model.set_attn_implementation(NAME)
            device = execution_device(model.get_input_embeddings()) or model.device
            with readers:
                type(model).forward(model, input_ids=ids.to(device), use_cache=False, logits_to_keep=1)
        except Exception as error:  # noqa: BLE001 - any error of the model's own code
            raise NotCalibrated(
                f"{type(model).__name__} cannot be calibrated: over {ids.shape[1]} tokens its forward pass "
                f"raises {type(error).__name__}: {error}"
            ) from error
        finally:
            _heard.reset(token)
    if missing := sorted(set(layers) - heard.keys()):
        raise NotCalibrated(
            f"{type(model).__name__} cannot be calibrated: its layers {missing} reach no attention function"
        )
    ropes, moments = ropes_of(model, layers), {}
    for i in layers:
        query, keys, values, scaling = heard.pop(i)  # where the layer runs: float64 is slow on a host
        there = Rope(ropes[i].inv_freq.to(query.device), interleaved=ropes[i].interleaved)
        rows = zip(query, keys, values)
        found = spec.mean_of([spec.measure(*row, None, there, scaling, SINKS) for row in rows])
        channels = query.shape[1] * query.shape[3]
        moments[i] = kept(found, modules.get(i), channels, readers.weights(i))
    broken = [i for i, found in moments.items() if not all(x.isfinite().all() for x in found)]
    ranks = ranks_of(model)
    if broken or ranks is not None and not ranks.agree(not broken, model.device):
        where = f"layer {broken[0]}" if broken else "heads of another process"
        raise NotCalibrated(
            f"{type(model).__name__} cannot be calibrated: keys, values or queries of {where} are not finite"
        )
    text = hashlib.sha256(ids.to(torch.int32).cpu().numpy().tobytes()).hexdigest()
    provenance = provenance_of(model) | dict(tokens=ids.numel(), ids_sha256=text)
    return Calibration(moments, ropes, provenance)


def provenance_of(model: PreTrainedModel) -> dict:
    """Which model is calibrated here, and which part of a tensor-parallel one, as JSON values."""
    ours = of_process(model)
    part = dict(part=ours.pop("part")) if "part" in ours else {}
    return part | dict(version=VERSION, fingerprint=ours, torch=torch.__version__)


def ropes_of(model: PreTrainedModel, layers: list[int]) -> dict[int, Rope]:
    """How layers rotate their keys, on the CPU; `NOPE` where that is not found."""
    probe, ropes = probe_of(model), {}
    for i in layers:
        try:
            found = probe.find(i)()
            ropes[i] = Rope(found.inv_freq.double().cpu(), interleaved=found.interleaved)
        except ValueError:
            ropes[i] = NOPE
    return ropes


def kept(moments: Moments, module: nn.Module | None, channels: int, weights: Tensor | None = None) -> Moments:
    """Moments as they are kept, float32 on the CPU, with those of the output projection of the attention
    module, if it is found. The query heads have so many `channels` in all. `weights` are those of
    `Readers.weights`, by which the rows of the projection count.
    """
    output = None if module is None else output_projection(module, channels)
    if output is not None:
        output = output.detach().to(moments.mean.device)
        if weights is not None and len(weights) == len(output):
            output = output.double() * weights.to(output.device).unsqueeze(1)
        moments = spec.with_output(moments, output)
    return Moments(*(x.float().cpu().contiguous() for x in moments))


#: Calibrations of the models of this process.
_known: "weakref.WeakKeyDictionary[PreTrainedModel, Calibration]" = weakref.WeakKeyDictionary()
MEASURED = 2  # version of how moments are measured; matrices of old moments stay what they were
TOKENS = 512  # most tokens of a text that is given
BUILT_IN = 256  # most tokens of each built-in text
ROWS = 8  # texts to calibrate on that a model without a tokenizer writes itself
OTHER_ROWS, OTHER_LENGTH = 4, 96  # more such texts, to measure the loss on, and their tokens
SEED = 0


def of_model(model: PreTrainedModel, layers: list[int]) -> Calibration:
    """The calibration of a model: known to this process, in the user's cache folder, or measured now.

    The texts are those of `calibration_text`, if the tokenizer is found on this machine by the name of the
    model. Else the model writes its own texts, with a fixed seed.

    Raises `NotCalibrated` as `calibrate`.
    """
    if model in _known:
        return _known[model]
    path = model_file(model, "calibration", VERSION, MEASURED, SEED, *TEXTS)
    found = None
    if path is not None and path.is_file():
        with contextlib.suppress(ValueError, OSError):  # a damaged file is written anew
            found = load(path, model)
    if found is None or sorted(found.moments) != sorted(layers):
        found = calibrate(model, same_ids(model, _texts(model)), layers)
        if path is not None:
            with contextlib.suppress(OSError):  # without a writable folder, every process measures
                path.parent.mkdir(parents=True, exist_ok=True)
                found.save(path)
    _known[model] = found
    return found


def model_file(model: PreTrainedModel, kind: str, *known) -> Path | None:
    """A file about a model in the user's cache folder; None if weights cannot be read as a whole.

    A process that holds a part of a tensor-parallel model has no such file: if one process found its file and
    another did not, the one that measures would wait for the other for ever.

    Its name is a digest of the model's configuration and weights, and of what else the contents depend on,
    `known`, as JSON. `kind` names the folder and the kind of file: "calibration", or "widths".
    """
    digest = hashlib.sha256(json.dumps([*known, fingerprint(model)]).encode())
    for name, weight in model.named_parameters():
        if weight.is_meta or hasattr(weight, "full_tensor"):  # a part of a DTensor
            return None
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 16)][:16]  # reading all weights would take long
        digest.update(f"{name} {list(weight.shape)} {some.double().tolist()}".encode())
    suffix = "safetensors" if kind == "calibration" else "json"
    return cache_folder() / kind / f"{digest.hexdigest()}.{suffix}"


def _texts(model: PreTrainedModel) -> Tensor:
    try:
        ids = built_in(model)
    except Exception as error:  # noqa: BLE001 - any error of the model's own code
        raise NotCalibrated(
            f"{type(model).__name__} cannot be calibrated: as it writes a text, its forward pass raises "
            f"{type(error).__name__}: {error}"
        ) from error
    if ids.shape[1] <= SINKS:
        raise NotCalibrated(
            f"{type(model).__name__} cannot be calibrated: it reads at most {ids.shape[1]} tokens"
        )
    return ids


def same_ids(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The ids of the first process, if `model` is split between several: all must read the same text."""
    ranks = ranks_of(model)
    return ids if ranks is None else ranks.of_first(ids, model.device)


def built_in(model: PreTrainedModel) -> Tensor:
    """Ids [R, n] of the texts that a model is calibrated on."""
    rows = [text_ids(model, text, BUILT_IN) for text in TEXTS]
    if any(row is None for row in rows):
        return own_texts(model)[0]
    return torch.cat([row[:, : min(row.shape[1] for row in rows)] for row in rows])


def text_ids(model: PreTrainedModel, text: str, most: int) -> Tensor | None:
    """Ids [1, n] of a text, at most `most`; None if the model's tokenizer is not on this machine."""
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        return None
    try:
        ids = tokenizer(text, return_tensors="pt").input_ids
    except Exception:  # noqa: BLE001 - any error of a tokenizer's own code: there is another way
        return None
    ids = ids[:, : min(most, _most_positions(model))]
    return ids if ids.shape[1] > SINKS and int(ids.max()) < vocabulary(model) else None


def _most_positions(model: PreTrainedModel) -> int:
    return getattr(text_config(model), "max_position_embeddings", None) or TOKENS


#: Texts of models, and the number of times that weights had changed by then.
_written: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, Tensor]]" = weakref.WeakKeyDictionary()


def own_texts(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Texts that the model writes: sampled at temperature 1, from random first tokens.

    All are written at once, because each token is a forward pass of the model. They are written once, unless
    weights change.

    Returns ids [ROWS, TOKENS / ROWS] to calibrate on, and ids [OTHER_ROWS, OTHER_LENGTH] to measure the loss
    on. There are fewer tokens if the model has fewer positions.
    """
    changes = sum(weight._version for weight in model.parameters() if not weight.is_inference())
    if _written.get(model, (None,))[0] != changes:
        _written[model] = changes, _write(model, ROWS + OTHER_ROWS, min(OTHER_LENGTH, _most_positions(model)))
    ids = _written[model][1]
    return ids[:ROWS, : TOKENS // ROWS], ids[ROWS:]


@torch.no_grad()
def _write(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    """Ids [rows, length] of texts that the model writes."""
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocabulary(model), (rows, 1), generator=draw)
    device = execution_device(model.get_input_embeddings()) or model.device
    forward, cache = type(model).forward, DynamicCache(config=text_config(model))
    name = cache_parameter(forward) or CACHE_NAME
    with undisturbed(model):
        if model._can_set_attn_implementation():
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        while ids.shape[1] < length:
            step = forward(model, input_ids=ids[:, -1:].to(device), use_cache=True, **{name: cache})
            shares = step.logits[:, -1].float().softmax(-1).cpu()
            ids = torch.cat((ids, torch.multinomial(shares, 1, generator=draw)), dim=1)
    return ids


def output_projection(module: nn.Module, channels: int) -> Tensor | None:
    """Weight [hidden, channels] of the projection behind an attention module; None if it is not found."""
    for name in OUTPUTS:
        weight = getattr(getattr(module, name, None), "weight", None)
        if hasattr(weight, "to_local"):  # tensor parallel: the columns of this process's heads, or of a part
            here = weight.to_local()
            weight = here if here.shape[-1] == channels else weight.full_tensor()
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
            if type(getattr(module, name)).__name__ == "Conv1D":  # GPT-2 stores the transposed matrix
                weight = weight.mT
            if weight.shape[1] == channels and not weight.is_meta:
                return weight
    return None


_heard: contextvars.ContextVar[dict] = contextvars.ContextVar("calibration")


def _note(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention function that records the queries, keys and values of each layer."""
    index = getattr(module, "layer_idx", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(index, int):
        _heard.get().setdefault(index, (query, key, value, scale))
    return attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


AttentionInterface.register(NAME, _note)
AttentionMaskInterface.register(NAME, sdpa_mask)
