"""Calibrate a model on a text, and write the file: what `fade calibrate` and `fade vllm-calibrate` do."""

import argparse
import dataclasses
from collections.abc import Callable

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from fade_ref.config import SAFE_LOSS, FadeConfig

from ..hf import calibration
from ..hf.loading import LoadError, load, quiet
from ..hf.models import text_config
from ..hf.widths import chosen, key


def measure(
    args: argparse.Namespace, name: str | None, wanted: Callable[[CacheLayerMixin], bool]
) -> tuple[PreTrainedModel, calibration.Calibration]:
    """A model, and the calibration of those layers whose cache layers are `wanted`."""
    quiet()
    model, tokenizer = load(name, args.device, args.dtype)
    if args.text is None:
        ids = calibration.built_in(model)
    else:
        text = args.text[: args.tokens * 16]  # enough characters for every tokenizer
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : args.tokens]
    layers = [i for i, x in enumerate(DynamicCache(config=text_config(model)).layers) if wanted(x)]
    try:
        return model, calibration.calibrate(model, ids, layers)
    except ValueError as error:
        raise LoadError(str(error)) from error


def choose(model: PreTrainedModel, found: calibration.Calibration, codecs: list[str]) -> None:
    """Add the widths of `safe` with some codecs to a calibration."""
    choices = {}
    for codec in codecs:
        config = FadeConfig(quant_backend=codec, loss_bound=SAFE_LOSS)
        choice = chosen(model, config, found if codec == "matched" else None, again=True)
        choices[key(config)] = dataclasses.asdict(choice)
        print(f"widths of `safe` with the {codec} codec: {choice}")
    found.provenance["choices"] = choices


def write(args: argparse.Namespace, found: calibration.Calibration) -> None:
    """Write the file `args.out` and tell its contents."""
    found.save(args.out)
    size, tokens = args.out.stat().st_size / 2**20, found.provenance["tokens"]
    print(f"{args.out}: {size:.2f} MiB, {len(found.moments)} layers, from {tokens} tokens")
