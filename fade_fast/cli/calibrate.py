"""Calibrate a model for the codec "matched" on a text, and write a file.

Caches with `FadeConfig(quant_backend="matched")` use it.
"""

import argparse

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..hf import calibration
from ..hf.calibration_text import TEXT
from ..hf.loading import LoadError, load, quiet
from ..hf.models import text_config
from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade calibrate`."""
    options.add_model(parser)
    add_text(parser)


def add_text(parser: argparse.ArgumentParser) -> None:
    """--text, --out and --tokens."""
    parser.add_argument(
        "--text", type=options.text_file, metavar="FILE", help="UTF-8 text (default: built in)"
    )
    parser.add_argument("--out", type=options.writable, required=True, metavar="FILE", help="safetensors")
    parser.add_argument(
        "--tokens",
        type=options.positive,
        default=calibration.TOKENS,
        metavar="N",
        help=f"tokens of the text (default: {calibration.TOKENS})",
    )


def run(args: argparse.Namespace) -> None:
    """Calibrate the model and write the file."""
    found = measure(args, args.model, lambda layer: type(layer) is DynamicLayer)
    tables = found.tables("block", 64, torch.device("cpu"))
    held = sum(x.nbytes for mean, *sides in tables.values() for side in sides for x in side)
    print(f"tables in memory, shared by all caches of the model: {held / 2**20:.2f} MiB")


def measure(args: argparse.Namespace, name: str | None, wanted) -> calibration.Calibration:
    """Calibrate the layers of a model whose cache layers are `wanted`, and write the file `args.out`."""
    quiet()
    model, tokenizer = load(name, args.device, args.dtype)
    text = (args.text or TEXT)[: args.tokens * 16]  # enough characters for every tokenizer
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : args.tokens]
    layers = [i for i, x in enumerate(DynamicCache(config=text_config(model)).layers) if wanted(x)]
    try:
        found = calibration.calibrate(model, ids, layers)
    except ValueError as error:
        raise LoadError(str(error)) from error
    found.save(args.out)
    size = args.out.stat().st_size / 2**20
    print(f"{args.out}: {size:.2f} MiB, {len(layers)} layers, from {ids.shape[1]} tokens")
    return found
