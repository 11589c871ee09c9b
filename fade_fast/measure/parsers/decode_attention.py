"""Decode attention over packed tiers against SDPA over bfloat16: `fade bench attention`."""

import argparse

from fade_fast.arguments import Parser, writable

from .. import options


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fade bench attention", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the times there as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    options.add_processor(parser)
    parser.add_argument("--lengths", action="store_true", help="instead: times by live length")
    parser.add_argument("--encode", action="store_true", help="instead: compressing against prefill")
    parser.add_argument("--paged", action="store_true", help="instead: through a block table")
    parser.add_argument("--processes", action="store_true", help="instead: compiling, cold and from caches")
    args = parser.parse_args(argv)
    options.fill(args)
    return args
