"""A decode step of `model.generate()` with each cache: `fade bench generate`."""

import argparse
from dataclasses import replace

from fade_fast.arguments import Parser, positive, readable, writable
from fade_ref.config import PRESETS, FadeConfig

from .. import options
from ..names import QUANTIZED

SHOWN = tuple(name for name in PRESETS if name != "int4")
#: Our methods; "fp16" never compresses. The others are caches of transformers.
OURS = {"fp16": FadeConfig(recent_window=None)}
OURS |= {name: FadeConfig.preset(name) for name in SHOWN}
OURS["safe"] = FadeConfig.int4()  # random weights say nothing about the widths that a real model needs
OURS |= {f"int{bits}": FadeConfig(middle_k_bits=bits, middle_v_bits=bits) for bits in (3, 2)}
H2O = "balanced:eviction_policy=h2o"  # the same, but ranked by received attention
OURS[H2O] = replace(OURS["balanced"], eviction_policy="h2o")
BASELINES = ("dynamic", "static")
METHODS = (*BASELINES, *OURS, *QUANTIZED)
FILLS = ("once", "rows", "chunk", "random")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fade bench generate", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the times there as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--methods", metavar="A,B", help="these instead of each case's own")
    parser.add_argument(
        "--new", type=positive, metavar="N", help="tokens to generate: 128, or 8 of a tiny model"
    )
    parser.add_argument("--fill", choices=("auto", *FILLS), default="auto", help="how the cache is filled")
    parser.add_argument(
        "--grow", action="store_true", help="our caches grow instead of being made to measure"
    )
    parser.add_argument("--largest-batch", action="store_true", help="instead of timing: what batch fits")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, as without a GPU")
    options.add_processor(parser)
    parser.add_argument("--list", action="store_true", help="list cases and methods, and stop")
    parser.add_argument(
        "--show", type=readable, nargs="+", metavar="FILE", help="tables of stored results, and stop"
    )
    args = parser.parse_args(argv)
    if (args.new or 3) < 3:
        parser.error("--new: at least 3 tokens")
    args.methods = tuple(args.methods.split(",")) if args.methods else None
    if unknown := set(args.methods or ()) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))}: of {', '.join(METHODS)}")
    options.fill(args)
    args.tiny |= args.device == "cpu"
    args.new = args.new or (8 if args.tiny else 128)
    return args
