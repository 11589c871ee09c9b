"""Store a cache as a file: safetensors with a JSON header, nothing that could run code.

The slots in use are stored exactly as in memory, so decoding continues bit for bit. State that follows from
the configuration (the codec's rotation, capacities, captured CUDA graphs) is created anew. A
calibration is stored with the cache.
"""

import contextlib
import dataclasses
import hashlib
import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fade_ref.config import FadeConfig

from ..cache.budget_store import BudgetStore
from ..cache.layer import KVLayer
from ..cache.positions import TokenPositions
from ..cache.select_store import is_payload
from .files import whole

VERSION = 3
TIERED = "TieredLayer"  # kind of a tiered layer in files
CALIBRATION = "calibration."  # begins the names of the tensors of a calibration
#: Fields of a configuration that mean nothing without `select`.
SELECTION = ("select", "select_page", "select_max", "index", "cold", "resident")
TOKENS = "tokens"  # name of a tensor of ids that goes with a cache, but is none of it


def state_dict(cache) -> tuple[dict[str, Tensor], dict]:
    """Every tensor of a `TieredKVCache`, cloned, and what else it knows, as JSON would have it.

    Names are "timeline" and "{layer}.{part}.{field}". Shapes are as in memory, cut to the slots in use.

    Raises `ValueError` for a layer of a kind that cannot be stored.
    """
    tensors = {"timeline": cache.token_positions.logical} if cache.token_positions.length else {}
    layers = []
    for i, layer in enumerate(cache.stored_layers()):
        try:
            parts, known = _of_tiered(layer) if isinstance(layer, KVLayer) else layer.state()
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from error
        tensors |= {f"{i}.{name}": x for name, x in parts.items()}
        layers.append(dict(kind=_kind(layer)) | known)
    known = dict(
        config=config_dict(cache.fade_config), holes=cache.token_positions.has_padding, layers=layers
    )
    awaits = any(layer.format.awaits_tables for layer in cache.tiered)  # then there is no code yet
    if cache.calibration is not None and not awaits:  # without it, nobody could decode the codes
        tensors |= {CALIBRATION + name: x for name, x in cache.calibration.tensors().items()}
        known["calibration"] = cache.calibration.header()
    if cache.choice is not None:
        known["widths"] = dataclasses.asdict(cache.choice)
    in_host = {_storage(x) for layer in cache.tiered for x in layer.host_tensors()}
    return {name: _copied(x, in_host) for name, x in tensors.items()}, known


def _copied(x: Tensor, in_host: set[int]) -> Tensor:
    """A contiguous copy of a tensor, on its device. What lies in host memory stays there."""
    x = x.detach().cpu() if _storage(x) in in_host else x.detach()
    return x.clone().contiguous()


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def load_state_dict(cache, tensors: dict[str, Tensor], known: dict) -> None:
    """Fill an empty cache with what `state_dict` gave; tensors are copied to the model's device.

    Raises `ValueError` if the cache is not empty, has another configuration or other layers, or a tensor is
    missing, left over or of a wrong shape. Raises `TypeError` for other arguments than `state_dict` returns.
    The cache is unchanged after an error.
    """
    layers = known.get("layers") if isinstance(known, dict) else None
    complete = isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers)
    if not isinstance(tensors, dict) or not complete or not {"config", "holes"} <= known.keys():
        raise TypeError(
            "load_state_dict takes what state_dict gives: a dict of tensors, and one of the rest; pass both "
            "as they are"
        )
    if cache.token_positions.length:
        raise ValueError("the cache is not empty: reset() it first")
    _refuse_product("what is stored has", known)
    if _as_json(known["config"]) != _as_json(config_dict(cache.fade_config)):
        raise ValueError(
            f"the stored configuration is {known['config']}, the cache's {cache.fade_config}: create the "
            "cache with the stored one"
        )
    kinds, ours = (
        [layer.get("kind") for layer in layers],
        [_kind(layer) for layer in cache.stored_layers()],
    )
    if kinds != ours:
        raise ValueError(
            f"the stored layers are {kinds}, the cache's {ours}: create the cache for the model that filled "
            "it"
        )
    unplaced = dict(tensors)
    given = {n.removeprefix(CALIBRATION): unplaced.pop(n) for n in tensors if n.startswith(CALIBRATION)}
    held = {} if cache.calibration is None else cache.calibration.tensors()
    same = given.keys() == held.keys() and all(torch.equal(x.cpu(), held[n]) for n, x in given.items())
    coded = any(tensors[n].numel() for n in tensors if n.endswith("_codes"))
    if not same and (given or coded):  # before the first prompt was long enough, there is neither
        raise ValueError(
            "what is stored are codes of another calibration than the cache's: create the cache with the "
            "calibration that filled it"
        )
    position = unplaced.pop("timeline", None)
    by_layer = [{} for _ in layers]
    for name in list(unplaced):
        index, _, part = name.partition(".")
        if not index.isdigit() or int(index) >= len(by_layer):
            raise ValueError(
                f"tensor {name!r} belongs to no layer: pass the tensors of state_dict() as they are"
            )
        by_layer[int(index)][part] = unplaced.pop(name)
    homes = cache.homes
    try:
        for i, (layer, parts, about) in enumerate(zip(cache.stored_layers(), by_layer, layers)):
            in_host = isinstance(layer, KVLayer) and layer.config.cold is not None
            parts = {n: x if in_host and n in _cold(layer) else x.to(homes[i]) for n, x in parts.items()}
            if isinstance(layer, KVLayer):
                _fill_tiered(layer, parts, about)
            else:
                layer.load(parts, about)
            if parts:
                raise ValueError(f"tensors without a place: {', '.join(parts)}")
        if position is not None:
            _fill_timeline(cache.token_positions, position.to(cache.device), known["holes"])
        for layer in cache.tiered:
            if layer.middle is not None:
                layer.middle.loaded()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        cache.reset()
        raise ValueError(
            f"what is stored does not fit the cache: {error}; pass what state_dict() gave as it is"
        ) from error


def config_dict(config: FadeConfig) -> dict:
    """A configuration as JSON has it; a field that older versions do not know is left out where unused."""
    fields = dataclasses.asdict(config)
    for name in ("layer_bits", "loss_bound"):
        if fields[name] is None:
            del fields[name]
    if config.select is None:
        for name in SELECTION:
            del fields[name]
    return fields


def _as_json(x) -> str:
    return json.dumps(x, sort_keys=True)


def save(cache, path: str | os.PathLike, token_ids: Tensor | None = None) -> None:
    """Write a cache to a file, whole or not at all: a file that was there survives a crash.

    `token_ids`, an integer tensor, is stored with it as int32, for `read_tokens`.

    Raises `ValueError` for a layer of a kind that cannot be stored or for `token_ids` of another dtype, and
    `OSError` if the file cannot be written.
    """
    if token_ids is not None:
        if not isinstance(token_ids, Tensor) or token_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError("tokens are an integer tensor: the ids that were fed; pass these input_ids")
    tensors, known = state_dict(cache)
    if token_ids is not None:
        tensors[TOKENS] = token_ids.to(torch.int32).contiguous()
    header = dict(version=VERSION, model=cache.fingerprint, **known)
    header["digest"] = _digest(tensors, header)
    with whole(path) as written:
        save_file(tensors, written, metadata={"fade": json.dumps(header)})


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the header of a file that `save` wrote.

    Raises `FileNotFoundError`. Raises `ValueError` if the file is of another kind or version, or damaged.
    """
    with _opened(path) as (header, file):
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    digest = header.pop("digest", None)
    if digest != _digest(tensors, header):
        raise ValueError(f"{path} is damaged: its content is not what was written; save the cache again")
    tensors.pop(TOKENS, None)
    return tensors, header


def read_header(path: str | os.PathLike) -> tuple[dict, dict[str, tuple[tuple[int, ...], int]]]:
    """The header of a stored cache, and shape and bytes of each tensor.

    The tensors are not read, so nothing is verified. Raises as `read` does.
    """
    with _opened(path) as (header, file):
        tensors = {}
        for name in file.keys():
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            tensors[name] = (shape, torch.Size(shape).numel() * BYTES[part.get_dtype()])
        return header, tensors


def read_tensors(path: str | os.PathLike, names: list[str]) -> dict[str, Tensor]:
    """Some tensors of a stored cache, not verified. Raises as `read` does."""
    with _opened(path) as (_, file):
        return {name: file.get_tensor(name) for name in names}


def read_tokens(path: str | os.PathLike) -> Tensor | None:
    """The token ids that were stored with a cache, int64; None without ids. Raises as `read` does."""
    with _opened(path) as (_, file):
        return file.get_tensor(TOKENS).long() if TOKENS in file.keys() else None


#: Bytes of an element, by its dtype's name in safetensors.
BYTES = dict(F64=8, F32=4, F16=2, BF16=2, I64=8, I32=4, U8=1, BOOL=1)


@contextlib.contextmanager
def _opened(path: str | os.PathLike):
    """Yield header and open file. A defect of the file raises `ValueError`."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["fade"])
            if not isinstance(header, dict):
                raise ValueError("its header is no object")
            if header.get("version") == VERSION and not _is_product(header):
                yield header, file
                return
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a stored cache, or is damaged: {error}; give a file that cache.save() wrote"
        ) from error
    _refuse_product(f"{path} has", header)
    raise ValueError(
        f"{path} has version {header.get('version')}; {VERSION} is understood here: read it with the version "
        "of fade-fast that wrote it, or save the cache again"
    )


def _is_product(known: dict) -> bool:
    """Whether a header is of a cache whose codec was product quantization."""
    config = known.get("config")
    return isinstance(config, dict) and config.get("quant_backend") == "product"


def _refuse_product(what: str, known: dict) -> None:
    """Raise `ValueError` for codes that only earlier versions could read."""
    if _is_product(known):
        raise ValueError(
            f"{what} product-quantized codes, which caches no longer have: read the text again into a new "
            "cache; quant_backend='matched', middle_k_bits=2, middle_v_bits=2 gives codes of about that size"
        )


def _digest(tensors: dict[str, Tensor], header: dict) -> str:
    """SHA-256 over the header and the names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous().cpu()
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return digest.hexdigest()


def _of_tiered(layer: KVLayer) -> tuple[dict[str, Tensor], dict]:
    if layer.compacts_alone:  # else a block that is due is stored among the recent tokens
        layer.compact()
    if not layer.length:
        return {}, dict(length=0)
    parts = {f"exact.{name}": layer.dense[name] for name in layer.dense.fields}
    if layer.dense.sink_keys is not None:
        parts["sink_keys"] = layer.dense.sink_keys
    if layer.observer is not None:
        parts |= {f"observer.{i}": x for i, x in enumerate(layer.observer.tensors())}
    middle = layer.middle
    if middle is not None:
        for i, tier in enumerate(middle.tiers):
            parts |= {f"tier{i}.{name}": tier.records[name] for name in tier.records.fields}
            parts[f"tier{i}.bound"] = tier.bound
        parts["means"] = middle.means["mean"]
        if isinstance(middle, BudgetStore) and middle.evicted is not None:
            parts |= dict(evicted=middle.evicted, demoted=middle._demoted)
    return parts, dict(length=layer.length, sinks_placed=layer.dense.sinks_placed)


def _kind(layer) -> str:
    """Kind of a layer in files."""
    return TIERED if isinstance(layer, KVLayer) else layer.kind


def _cold(layer: KVLayer) -> list[str]:
    """Names of tensors that go to host memory, and so need not pass through the GPU."""
    fields = ("key_index", "key_codes", "key_scale", "key_zero", "value_codes", "value_scale", "value_zero")
    cold = [f"tier0.{field}" for field in fields if is_payload(field, layer.config)]
    return cold if layer.compresses else []


def _fill_tiered(layer: KVLayer, parts: dict[str, Tensor], about: dict) -> None:
    if not about["length"]:
        return
    keys, values = parts["exact.key"], parts["exact.value"]
    layer.check(keys, values, least=0)
    layer.allocate(keys)
    layer.dense.append(**{name: parts.pop(f"exact.{name}") for name in layer.dense.fields})
    for i, x in enumerate(layer.observer.tensors() if layer.observer else ()):
        x.copy_(parts.pop(f"observer.{i}"))
    layer.length, layer.dense.sinks_placed = about["length"], about["sinks_placed"]
    layer.dense.sink_keys = parts.pop("sink_keys", None)
    middle = layer.middle
    awaited = layer.dense.count == layer.length and not any(n.startswith("tier") for n in parts)
    if middle is None or awaited:  # nothing was compressed, because there were no tables
        return
    for i, tier in enumerate(middle.tiers):
        fields = {name: parts.pop(f"tier{i}.{name}") for name in tier.records.fields}
        tier.append(**fields)
        tier.bound.copy_(parts.pop(f"tier{i}.bound"))
    middle.means.reserve(-(-middle.tiers[0].records.capacity // middle.per_mean))
    middle.means.append(mean=parts.pop("means"))
    if "evicted" in parts:
        middle.evicted, middle._demoted = parts.pop("evicted"), parts.pop("demoted")


def _fill_timeline(token_positions: TokenPositions, position: Tensor, holes: bool) -> None:
    token_positions.buffer = position[:, :0].clone()
    token_positions.reserve(position.shape[1])
    token_positions.buffer[:, : position.shape[1]] = position
    token_positions.length, token_positions.has_padding = position.shape[1], holes
