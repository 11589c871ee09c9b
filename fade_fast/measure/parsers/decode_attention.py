"""Decode attention over packed tiers against SDPA over bfloat16: `fade bench attention`."""

import argparse

import torch

from fade_fast.arguments import Parser, writable


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fade bench attention", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the times there as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--lengths", action="store_true", help="instead: times by live length")
    parser.add_argument("--encode", action="store_true", help="instead: compressing against prefill")
    parser.add_argument("--paged", action="store_true", help="instead: through a block table")
    parser.add_argument("--processes", action="store_true", help="instead: compiling, cold and from caches")
    return parser.parse_args(argv)
