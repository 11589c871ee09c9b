"""Key means, and matrices of the `matched` format, from a calibration file.

`fade calibrate` and `fade vllm-calibrate` write such files.

A page of vLLM may be shared by requests with the same prefix, and a request may be computed again after it
was preempted. So the mean of a key must not depend on its request. It depends on the position of the key:
the mean before RoPE is rotated to `SPAN` positions at a time. Requests share a page only at the same
positions, so they agree on its means. The means are a table of the engine, made before the first token is
stored and never changed.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fade_ref import matched as spec
from fade_ref.config import FadeConfig

from ..hf.calibration import Calibration
from ..hf.calibration import load as load_file
from ..hf.widths import Choice, key
from ..kernels.matched import Matrices
from ..kernels.rope import rotate
from ..kernels.rotated import LARGEST
from .pages import SPAN

if TYPE_CHECKING:
    from vllm.config import ModelConfig

#: Fields that must agree between the calibrated model and the model at hand. vLLM rewrites other fields.
FINGERPRINT = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@functools.cache
def _of_file(path: str) -> Calibration:
    return load_file(path)


def _read(path: str) -> Calibration:
    try:
        return _of_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"calibration={path!r}: no such file; `fade vllm-calibrate` writes one") from error


def load(path: str, model: "ModelConfig") -> Calibration:
    """The calibration in a file, for this model. A process reads a file once.

    Raises `ValueError` if there is no such file, if it is no calibration or damaged, and if it is of another
    model.
    """
    found = _read(path)
    measured, config = found.provenance["fingerprint"], model.hf_text_config
    for name in FINGERPRINT:
        ours = getattr(config, name, None)
        if measured.get(name) != ours:
            raise ValueError(
                f"calibration={path!r} is of another model: {name} is {measured.get(name)!r} there, "
                f"{ours!r} here; make one for this model with `fade vllm-calibrate`"
            )
    head_dim = model.get_head_size()
    for layer, moments in found.moments.items():
        if moments.mean.dim() != 2 or moments.mean.shape[-1] != head_dim or not moments.mean.isfinite().all():
            raise ValueError(
                f"calibration={path!r}: the means of layer {layer} are {list(moments.mean.shape)}; finite "
                f"numbers [KV heads, {head_dim}] are allowed"
            )
    return found


def with_widths(path: str | None, config: FadeConfig) -> FadeConfig:
    """`config` with the widths that a calibration file has for its `loss_bound`, and else with its own.

    Raises `ValueError` if there is no such file, and if it is no calibration or damaged.
    """
    choices = {} if path is None else _read(path).provenance.get("choices", {})
    choice = Choice.of_json(choices[key(config)]) if key(config) in choices else Choice()
    return choice.apply(config)


def key_means(found: Calibration, layer: int, rows: int) -> Tensor:
    """The means of the keys of a layer as they are stored, after RoPE, of all KV heads.

    Row m [H, D] is the mean before RoPE, rotated to each of the positions m * `SPAN` to (m + 1) * `SPAN` - 1
    and averaged over them. Pairs of channels that RoPE turns fast have nearly no mean.

    Returns fp16 [H, rows, D]; [H, 1, D] where the calibration does not know how the layer rotates its keys:
    it then holds their mean as they are stored, for all positions.

    Raises `ValueError` if the calibration has no such layer.
    """
    if layer not in found.moments:
        raise ValueError(
            f"the calibration has layers {sorted(found.moments)}, and not layer {layer}: make one for this "
            "model with `fade vllm-calibrate`"
        )
    mean, rope = found.moments[layer].mean.double(), found.ropes[layer]
    means = spec.mean_at(mean, rope, SPAN).unsqueeze(1)  # at the first positions
    if found.rotates(layer):  # rotations add, so those of a row turn the first row as a whole
        first = SPAN * torch.arange(rows)
        means = rotate(means.expand(-1, rows, -1), first, rope.inv_freq, rope.interleaved)
    return means.clamp(-LARGEST, LARGEST).to(torch.float16)


def matched(found: Calibration, layer: int) -> tuple[Matrices, Matrices]:
    """Matrices of keys less their `key_means` and of values of a layer, for the `matched` format.

    Raises `ValueError` if the calibration has no such layer.
    """
    if layer not in found.moments:
        raise ValueError(
            f"the calibration has layers {sorted(found.moments)}, and not layer {layer}: make one for this "
            "model with `fade vllm-calibrate`"
        )
    _, *sides = found.tables("block", SPAN, torch.device("cpu"))[layer]
    return tuple(sides)


def of_rank(table: Tensor, heads: int, rank: int, ranks: int) -> Tensor:
    """The rows of `table` [H, ...] that belong to one of `ranks` tensor-parallel ranks, with `heads` heads.

    With more ranks than heads, vLLM gives several ranks a copy of the same head.

    Raises `ValueError` if the heads of the ranks are not those of `table`.
    """
    total = len(table)
    if heads * ranks != max(total, ranks):
        raise ValueError(
            f"the calibration has {total} KV heads, the model {heads} on each of {ranks} ranks: make one for "
            "this model with `fade vllm-calibrate`"
        )
    first = rank * total // ranks
    return table[first : first + heads]
