"""Calibrate a model for the codec "matched" on a text, and write a file.

Caches with `FadeConfig(quant_backend="matched")` use it.
"""

import argparse
import dataclasses

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fade_ref.config import SAFE_LOSS, FadeConfig

from ..hf import calibration
from ..hf.loading import LoadError, load, quiet
from ..hf.models import text_config
from ..hf.widths import chosen, key
from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade calibrate`."""
    options.add_model(parser)
    parser.add_argument(
        "--text", type=options.text_file, metavar="FILE", help="UTF-8 text (default: built in)"
    )
    parser.add_argument("--out", type=options.writable, required=True, metavar="FILE", help="safetensors")
    parser.add_argument(
        "--tokens",
        type=options.positive,
        default=calibration.TOKENS,
        metavar="N",
        help=f"most tokens of FILE (default: {calibration.TOKENS})",
    )


def run(args: argparse.Namespace) -> None:
    """Calibrate the model and write the file."""
    quiet()
    model, tokenizer = load(args.model, args.device, args.dtype)
    if args.text is None:
        ids = calibration.built_in(model)
    else:
        text = args.text[: args.tokens * 16]  # enough characters for every tokenizer
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : args.tokens]
    layers = DynamicCache(config=text_config(model)).layers
    full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    try:
        found = calibration.calibrate(model, ids, full)
    except ValueError as error:
        raise LoadError(str(error)) from error
    choices = {}
    for codec in ("rotated", "matched"):
        config = FadeConfig(quant_backend=codec, loss_bound=SAFE_LOSS)
        given = found if codec == "matched" else None
        choices[key(config)] = dataclasses.asdict(chosen(model, config, given, again=True))
    found.provenance["choices"] = choices
    found.save(args.out)
    size = args.out.stat().st_size / 2**20
    print(f"{args.out}: {size:.2f} MiB, {len(full)} layers, from {ids.numel()} tokens")
    tables = found.tables("block", 64, torch.device("cpu"))
    held = sum(x.nbytes for mean, *sides in tables.values() for side in sides for x in side)
    print(f"tables in memory, shared by all caches of the model: {held / 2**20:.2f} MiB")
