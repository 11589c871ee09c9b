"""Calibrate a model for the vLLM plugin on a text, and write a file.

The file is that of `fade calibrate`, with the layers that have a sliding window as well,
because vLLM compresses these too. vLLM reads it if --additional-config is
'{"fade": {"calibration": FILE}}'. docs/vllm.md says more.
"""

import argparse

from . import calibrate, options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade vllm-calibrate`."""
    parser.add_argument("model", metavar="MODEL", help="a hub id or a folder, as for `vllm serve`")
    options.add_device(parser)
    calibrate.add_text(parser)


def run(args: argparse.Namespace) -> None:
    """Calibrate the model and write the file."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    from . import calibrating

    wanted = (DynamicLayer, DynamicSlidingWindowLayer)
    model, found = calibrating.measure(args, args.model, lambda layer: type(layer) in wanted)
    calibrating.choose(model, found, ["rotated"])
    calibrating.write(args, found)
