"""Attention of the vLLM plugin over packed pages against bfloat16: `fade bench paged`. vLLM is not needed."""

import argparse
from pathlib import Path

from .. import options

PREFERRED = 128  # tokens in a page of the plugin, which imports torch; a test compares them
CODECS = ("rotated", "matched")
#: Widths and codecs whose encoding and capacity are measured.
STORED = [(bits, codec) for codec in CODECS for bits in (8, 4)]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("fade bench paged", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is measured there as well")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="the decode case of this name, or those whose name contains TEXT",
    )
    parser.add_argument("--page", type=int, default=None, help=f"tokens in a page (default {PREFERRED})")
    parser.add_argument("--quick", action="store_true", help="small shapes, as without a GPU")
    parser.add_argument("--skip-decode", action="store_true", help="no decode cases")
    parser.add_argument("--skip-encode", action="store_true", help="no times of writing and prefill")
    options.add_processor(parser)
    args = parser.parse_args(argv)
    options.fill(args)
    return args
