"""Calibrate a model on a text, choose the widths of `safe`, and write both to a file.

Caches with `FadeConfig(quant_backend="matched")` use the calibration, and `safe` uses the widths.
"""

import argparse

from .. import arguments
from . import options

TOKENS = 512  # that of the calibration, which imports torch; a test compares them


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
        default=TOKENS,
        metavar="N",
        help=f"most tokens of FILE (default: {TOKENS})",
    )


def run(args: argparse.Namespace) -> None:
    """Calibrate the model and write the file."""
    import torch
    from transformers.cache_utils import DynamicLayer

    from . import calibrating

    model, found = calibrating.measure(args, args.model, lambda layer: type(layer) is DynamicLayer)
    calibrating.choose(model, found, ["rotated", "matched"])
    calibrating.write(args, found)
    tables = found.tables("block", 64, torch.device("cpu"))
    held = sum(x.nbytes for mean, *sides in tables.values() for side in sides for x in side)
    print(f"tables in memory, shared by all caches of the model: {held / 2**20:.2f} MiB")
