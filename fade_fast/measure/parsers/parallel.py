"""A decode step on one GPU, and on several by tensor parallelism: `fade bench parallel`."""

import argparse
import os

from fade_fast.arguments import Parser, positive, readable, writable

from .. import options
from .generate import OURS

METHODS = ("safe", "dynamic", "static")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fade bench parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the numbers there as well")
    parser.add_argument("--show", type=readable, metavar="FILE", help="print a stored report, and stop")
    parser.add_argument("--batch", type=positive, metavar="N", help="rows: 8, or 2 of a tiny model")
    parser.add_argument("--length", type=positive, metavar="N", help="tokens: 32768, or 192 of a tiny model")
    parser.add_argument("--new", type=positive, metavar="N", help="timed tokens: 128, or 8 of a tiny model")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="A,B", help="what to time, in order")
    parser.add_argument(
        "--parts", default="tokens,times", metavar="A,B", help="tokens, times, or both (the default)"
    )
    parser.add_argument("--one-shot", action="store_true", help="sum over GPUs by symmetric memory")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, as without a GPU")
    options.add_processor(parser)
    args = parser.parse_args(argv)
    args.methods, args.parts = tuple(args.methods.split(",")), tuple(args.parts.split(","))
    allowed = dict(methods=("dynamic", "static", *OURS), parts=("tokens", "times"))
    for name, known in allowed.items():
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))}: of {', '.join(known)}")
    if (args.new or 3) < 3:
        parser.error("--new must be at least 3")
    if args.show is None and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        parser.error(
            "one process is here, and two or more are compared with it: "
            "torchrun --standalone --nproc-per-node 2 -m fade_fast bench parallel"
        )
    options.fill(args)
    args.tiny |= args.device == "cpu"
    args.batch, args.length = (
        args.batch or (2 if args.tiny else 8),
        args.length or (192 if args.tiny else 32 * 1024),
    )
    args.new = args.new or (8 if args.tiny else 128)
    return args
