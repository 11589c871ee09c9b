"""Key means, and matrices of the `matched` format, from a calibration file.

`fade calibrate` and `fade vllm-calibrate` write such files.

A page of vLLM may be shared by requests with the same prefix, and a request may be computed again after it
was preempted. So a mean must not depend on a request. It is a table of the engine, read before the first
token is stored and never changed.
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
from ..kernels.rotated import LARGEST

if TYPE_CHECKING:
    from vllm.config import ModelConfig

#: Positions over which a mean is taken where keys are rotated by RoPE.
SPAN = 512
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
                f"{ours!r} here"
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


def key_mean(found: Calibration, layer: int) -> Tensor:
    """The mean of the keys of a layer as they are stored, after RoPE: fp16 [H, D], of all KV heads.

    It is the mean over the text, moved to positions 0 to `SPAN` - 1. Pairs of channels that RoPE turns fast
    have nearly no mean.

    Raises `ValueError` if the calibration has no such layer.
    """
    if layer not in found.moments:
        raise ValueError(f"the calibration has layers {sorted(found.moments)}, and not layer {layer}")
    mean = spec.mean_at(found.moments[layer].mean.double(), found.ropes[layer], SPAN)
    return mean.clamp(-LARGEST, LARGEST).to(torch.float16)


def matched(found: Calibration, layer: int) -> tuple[Tensor, Matrices, Matrices]:
    """Mean as `key_mean` and matrices of keys and of values of a layer, for the `matched` format.

    Raises `ValueError` if the calibration has no such layer.
    """
    key_mean(found, layer)
    mean, *sides = found.tables("moved", spec.BLOCK, torch.device("cpu"))[layer]
    return mean.clamp(-LARGEST, LARGEST).to(torch.float16), *sides


def of_rank(mean: Tensor, heads: int, rank: int, ranks: int) -> Tensor:
    """The rows of `mean` [H, ...] that belong to one of `ranks` tensor-parallel ranks, with `heads` heads.

    With more ranks than heads, vLLM gives several ranks a copy of the same head.

    Raises `ValueError` if the heads of the ranks are not those of `mean`.
    """
    total = len(mean)
    if heads * ranks != max(total, ranks):
        raise ValueError(f"the calibration has {total} KV heads, the model {heads} on each of {ranks} ranks")
    first = rank * total // ranks
    return mean[first : first + heads]
