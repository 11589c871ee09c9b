"""Prefill of the vLLM plugin over packed pages against bfloat16: `fade bench prefill`. vLLM is not needed."""

import argparse
from pathlib import Path

from .. import options


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("fade bench prefill", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is measured there as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--page", type=int, default=None, help="tokens in a page")
    parser.add_argument("--quick", action="store_true", help="small shapes, as without a GPU")
    options.add_processor(parser)
    args = parser.parse_args(argv)
    options.fill(args)
    return args
