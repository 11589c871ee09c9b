"""Calibrate a model for the vLLM plugin on a text, and write a file (docs/vllm.md).

The file is that of `fade calibrate`, with the layers that have a sliding window as well: vLLM compresses these
too. Pass it as {"fade": {"calibration": FILE}} in --additional-config.
"""

import argparse

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from . import calibrate, options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade vllm-calibrate`."""
    parser.add_argument("model", metavar="MODEL", help="a hub id or a folder, as for `vllm serve`")
    options.add_device(parser)
    calibrate.add_text(parser)


def run(args: argparse.Namespace) -> None:
    """Calibrate the model and write the file."""
    calibrate.measure(
        args, args.model, lambda layer: type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    )
