"""The contents of a live or saved cache, layer by layer, as JSON values or as text.

A snapshot is a dict of `version`, `length` (tokens seen per row), `batch`, `tokens` (tokens seen over all
rows, without padding; None for a file read without positions), `config`, `widths` (how the widths of the
layers were chosen, or ""; not for a file), `codes` (where the matrices of the codec come from, or ""; not for
a file), `uncaptured` (why decode steps on a GPU are not captured as CUDA graphs, or ""; not for a file),
`allocated`, `tables`, `packed` and `dense` (bytes, as in `cache.memory()`; a file has `packed` only) and
`layers`.
Where queries choose what they read, it also has `selected` (see `memory.Selected`), and with a host `host`,
the bytes in host memory. With a tensor-parallel model it has `part`: which process this is. Heads and bytes
are those of this process.

A layer has `layer`, `kind` ("tiered", or the transformers class of an uncompressed layer) and `bytes`. A
tiered layer also has `tiers`, by name: `slots` or `tokens` over all rows, `bytes`, and on request
`positions`, the logical positions held, as ranges [first, last + 1] for each row.
"""

import os
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fade_ref.config import FadeConfig
from fade_ref.tiers import Tier

from ..cache.layer import KVLayer
from ..formats import tier_names
from . import checkpoint
from .memory import Memory, layer_sizes
from .units import compared, grouped, size

if TYPE_CHECKING:
    from ..hf.cache import TieredKVCache

VERSION = 1
TIERED = "tiered"


def of(cache: "TieredKVCache", positions: bool = True, memory: Memory | None = None) -> dict:
    """Snapshot of a live cache, with `positions` or without.

    Blocks whose demotion is due are demoted first, unless `memory` is given: then nothing is changed.
    """
    memory = cache.memory() if memory is None else memory
    layers = []
    for i, layer in enumerate(cache.stored_layers()):
        if isinstance(layer, KVLayer):
            layers.append(_of_tiered(i, layer, positions))
        else:
            layers.append(dict(layer=i, kind=layer.name, bytes=sum(x.nbytes for x in layer.tensors())))
    token_positions = cache.token_positions
    return dict(
        version=VERSION,
        length=token_positions.length,
        batch=token_positions.batch if token_positions.length else 0,
        tokens=int((token_positions.logical >= 0).sum()) if token_positions.length else 0,
        config=checkpoint.config_dict(cache.fade_config),
        widths="" if cache.choice is None else str(cache.choice),
        codes="" if cache.calibration is None else str(cache.calibration),
        uncaptured=cache.decode_graph.uncaptured,
        allocated=memory.allocated,
        tables=memory.tables,
        packed=memory.packed,
        dense=memory.dense,
        layers=layers,
        **_part(cache.fingerprint),
        **({} if memory.selected is None else dict(selected=asdict(memory.selected))),
        **(dict(host=memory.host) if memory.host else {}),
    )


def _part(fingerprint: dict) -> dict:
    return {"part": fingerprint["part"]} if "part" in fingerprint else {}


def _of_tiered(index: int, layer: KVLayer, positions: bool) -> dict:
    packed, dense, tokens = layer_sizes(layer)
    about = dict(layer=index, kind=TIERED, bytes=packed, dense=dense, tiers={})
    if not layer.is_initialized:
        return about
    records = {Tier.FP16.name: (layer.dense.record_bytes, layer.dense_positions)}
    for tier in layer.middle.tiers if layer.middle is not None else ():
        records[tier.name] = (tier.records.record_bytes, lambda tier=tier: layer.middle.position(tier))
    for name, (each, position) in records.items():
        about["tiers"][name] = dict(tokens=tokens[name], bytes=tokens[name] * each)
        if positions:
            about["tiers"][name]["positions"] = ranges(position())
    about["evicted"] = tokens.get(Tier.EVICTED.name, 0)
    return about


def of_file(path: str | os.PathLike, positions: bool = False) -> dict:
    """Snapshot of a saved cache at `path`, from its header, and for `positions` from position tensors.

    The contents are not verified; `load_cache` verifies them. Raises as `checkpoint.read_header`.
    """
    try:
        return _of_file(path, positions)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} is not a stored cache, or is damaged: {error!r}; give a file that cache.save() wrote"
        ) from error


def _of_file(path: str | os.PathLike, positions: bool) -> dict:
    header, shapes = checkpoint.read_header(path)
    config = FadeConfig(**header["config"])
    layers, batch = [], 0
    for i, about in enumerate(header["layers"]):
        tensors = {n.partition(".")[2]: x for n, x in shapes.items() if n.startswith(f"{i}.")}
        layer = dict(layer=i, kind=about["kind"], bytes=sum(size for _, size in tensors.values()))
        if about["kind"] == checkpoint.TIERED:
            layer |= dict(kind=TIERED, tiers={})
            names = tier_names(config, i, len(header["layers"]))
            names = {f"tier{n}": name for n, name in enumerate(names)}
            for part, name in dict(exact=Tier.FP16.name, **names).items():
                fields = {n: x for n, x in tensors.items() if n.startswith(f"{part}.")}
                keys = tensors.get("exact.key" if part == "exact" else f"{part}.key_codes")
                if keys is not None:
                    batch = keys[0][0]
                    slots = batch * keys[0][2]
                    layer["tiers"][name] = dict(slots=slots, bytes=sum(size for _, size in fields.values()))
        layers.append(layer)
    snapshot = dict(
        version=VERSION,
        length=max((about.get("length", 0) for about in header["layers"]), default=0),
        batch=batch,
        tokens=None,
        config=header["config"],
        packed=sum(size for _, size in shapes.values()),
        layers=layers,
        **_part(header["model"]),
    )
    if positions and "timeline" in shapes:
        _add_positions(path, snapshot, config, shapes)
    return snapshot


def _add_positions(path, snapshot: dict, config: FadeConfig, shapes: dict) -> None:
    """Add the positions of the tiers of a saved cache, computed as its layers would."""
    kept = [name for name in shapes if name == "timeline" or name.endswith(".position")]
    tensors = checkpoint.read_tensors(path, kept)
    timeline = tensors["timeline"]
    snapshot["tokens"] = int((timeline >= 0).sum())
    for layer in snapshot["layers"]:
        if layer["kind"] != TIERED or not layer["tiers"]:
            continue
        tiers, rows = layer["tiers"], snapshot["batch"]
        recent = max(0, tiers["FP16"]["slots"] // rows - config.n_sink)
        late = timeline[:, timeline.shape[1] - recent :]
        exact = torch.cat((timeline.masked_fill(timeline >= config.n_sink, -1), late), -1)
        tiers["FP16"]["positions"] = ranges(exact[:, None])
        names = tier_names(config, layer["layer"], len(snapshot["layers"]))
        for i, name in enumerate(names if config.compresses else ()):
            at = tensors.get(f"{layer['layer']}.tier{i}.position")
            if at is None:  # no token moved: all tokens between the sinks and the recent ones
                at = timeline[:, None, config.n_sink : timeline.shape[1] - recent]
                at = at.masked_fill(at < config.n_sink, -1)
            tiers[name]["positions"] = ranges(at)


def ranges(position: Tensor) -> list[list[list[int]]]:
    """Integers `position` [B, 1, n] as sorted ranges [first, last + 1] for each row, without negative ones.

    >>> ranges(torch.tensor([[[7, 0, 1, -1, 2, 6]]]))
    [[[0, 3], [6, 8]]]
    """
    rows = []
    for row in position[:, 0].cpu():
        held = row[row >= 0].unique()
        if not len(held):
            rows.append([])
            continue
        cuts = (held.diff() != 1).nonzero()[:, 0] + 1
        rows.append([[int(x[0]), int(x[-1]) + 1] for x in torch.tensor_split(held, cuts.tolist())])
    return rows


def text(snapshot: dict) -> str:
    """A snapshot as text. Layers that hold the same share a line."""
    config = FadeConfig(**snapshot["config"])
    lines = [f"TieredKVCache, {snapshot['length']} tokens seen, {_changed(config)}"]
    lines += [f"{name}: {snapshot[name]}" for name in ("widths", "codes") if snapshot.get(name)]
    if "part" in snapshot:
        lines.append(f"part {snapshot['part']} of a tensor-parallel model: bytes are those of this process")
    if snapshot.get("uncaptured"):
        lines.append(f"decode steps are not captured: {snapshot['uncaptured']}")
    if "allocated" in snapshot and snapshot["allocated"]:
        own = snapshot["allocated"] - snapshot["tables"]
        lines.append(
            f"{size(own)} allocated, {size(snapshot['packed'])} needed, {size(snapshot['dense'])} if "
            f"uncompressed: {compared(snapshot['dense'], own) or 'nothing held'}"
        )
        if snapshot["tables"] > own // 64:
            lines.append(f"{size(snapshot['tables'])} of tables that all caches of the model share")
    elif "allocated" not in snapshot:
        lines.append(f"{size(snapshot['packed'])} of tensors, batch of {snapshot['batch']}")
    if "host" in snapshot:
        lines.append(f"{size(snapshot['host'])} in host memory")
    if "selected" in snapshot:
        chosen = snapshot["selected"]
        pages = chosen["hits"] + chosen["misses"]
        lines.append(
            f"a query reads {chosen['read']:.0f} of {chosen['held']:.0f} tokens of the middle in each KV head"
            + (f"; {chosen['hits'] / pages:.1%} of {pages:,} chosen pages were on the GPU" if pages else "")
        )
    return "\n".join(lines + grouped((layer["layer"], _layer_text(layer)) for layer in snapshot["layers"]))


def _changed(config: FadeConfig) -> str:
    """A configuration without the fields that have their default."""
    default = FadeConfig()
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    given = {name: x for name, x in given.items() if x != getattr(default, name)}
    return f"FadeConfig({', '.join(f'{name}={x!r}' for name, x in given.items())})"


def _layer_text(layer: dict) -> str:
    if layer["kind"] != TIERED:
        return f"{layer['kind']} of transformers, not compressed"
    held = [f"{x.get('tokens', x.get('slots'))} {name}" for name, x in layer["tiers"].items()]
    held += [f"{layer['evicted']} EVICTED"] if layer.get("evicted") else []
    of = f" instead of {size(layer['dense'])}" if "dense" in layer else ""
    what = "slots" if any("slots" in x for x in layer["tiers"].values()) else "tokens"
    held = f"{', '.join(held)} {what}" if held else "empty"
    return f"tiered: {held}; {size(layer['bytes'])}{of} a layer"
