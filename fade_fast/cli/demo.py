"""Compare each preset with DynamicCache on a long prompt.

Every run prefills the whole prompt into a fresh cache and decodes greedily with the model's own
generate(). The uncompressed run comes first. The other runs are compared with it.
"""

import argparse

from fade_ref.config import PRESETS

from .. import arguments
from . import options

SHOWN = tuple(name for name in PRESETS if name != "int4")  # `safe` shows the same on most models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade demo`."""
    options.add_model(parser)
    parser.add_argument(
        "--quick", action="store_true", help="`safe` alone: bytes, KL and top-1 agreement, in half a minute"
    )
    parser.add_argument(
        "--config", nargs="+", type=options.preset, default=list(SHOWN), metavar="PRESET",
        help=f"presets to run, of {', '.join(PRESETS)} (default: {', '.join(SHOWN)})",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-file", type=arguments.text_file, metavar="FILE", help="UTF-8 text for the prompt"
    )
    options.add_new_tokens(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the demo. Prints one table, and writes `args.json` if it is given."""
    from . import comparison

    comparison.run(args)
