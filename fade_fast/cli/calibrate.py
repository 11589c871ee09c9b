"""Calibrate a model on a text, choose the widths of `safe`, and write both to a file.

Caches with `FadeConfig(quant_backend="matched")` use the calibration, and `safe` uses the widths.
"""

import argparse
import dataclasses
from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from fade_ref.config import SAFE_LOSS, FadeConfig

from .. import arguments
from ..hf import calibration
from ..hf.loading import LoadError, load, quiet
from ..hf.models import text_config
from ..hf.widths import chosen, key
from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade calibrate`."""
    options.add_model(parser)
    add_text(parser)


def add_text(parser: argparse.ArgumentParser) -> None:
    """--text, --out and --tokens."""
    parser.add_argument(
        "--text", type=arguments.text_file, metavar="FILE", help="UTF-8 text (default: built in)"
    )
    parser.add_argument("--out", type=arguments.writable, required=True, metavar="FILE", help="safetensors")
    parser.add_argument(
        "--tokens",
        type=arguments.positive,
        default=calibration.TOKENS,
        metavar="N",
        help=f"most tokens of FILE (default: {calibration.TOKENS})",
    )


def run(args: argparse.Namespace) -> None:
    """Calibrate the model and write the file."""
    model, found = measure(args, args.model, lambda layer: type(layer) is DynamicLayer)
    choose(model, found, ["rotated", "matched"])
    write(args, found)
    tables = found.tables("block", 64, torch.device("cpu"))
    held = sum(x.nbytes for mean, *sides in tables.values() for side in sides for x in side)
    print(f"tables in memory, shared by all caches of the model: {held / 2**20:.2f} MiB")


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
