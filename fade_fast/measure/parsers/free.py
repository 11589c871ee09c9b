"""Free-running quality: `fade quality --free`."""

import argparse

from fade_fast.arguments import Parser, positive

from .. import options
from .ruler import TASKS

SUITE = (
    "off", "lossless", "safe", "k4v4", "int3", "k4v2", "int2",
    "int2:quant_backend=matched", "balanced", "h2o",
)  # fmt: skip
MARGIN = 0.1  # of a near-tie, in logits


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("fade quality --free", description=__doc__.splitlines()[0])
    options.add_model(parser)
    options.add_text(parser, "of prompts")
    parser.add_argument("--prompts", type=positive, metavar="N", help="how many")
    parser.add_argument("--length", type=positive, default=512, metavar="N", help="tokens of a prompt")
    parser.add_argument("--new", type=positive, metavar="N", help="tokens of a text")
    parser.add_argument("--margin", type=float, default=MARGIN, metavar="X", help="of a near-tie, in logits")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the places of prompts")
    parser.add_argument(
        "--chunk", type=positive, default=64, metavar="N", help="tokens of a prompt fed at a time"
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="prompts at a time")
    parser.add_argument(
        "--tasks", nargs="*", choices=TASKS, default=["niah_single", "niah_multikey"], help="of RULER"
    )
    parser.add_argument("--task-length", type=positive, default=1024, metavar="N", help="tokens of a task")
    parser.add_argument("--trials", type=positive, metavar="N", help="examples of a task")
    options.add_methods(parser, SUITE)
    options.add_output(parser, "free")
    args = parser.parse_args(argv)
    if args.margin < 0:
        parser.error("--margin must be at least 0")
    names = options.named(parser, args)
    options.fill(args, prompts=(16, 4), new=(512, 128), batch=(16, 4), trials=(20, 2))
    args.methods = options.methods_of(args, names)
    return args
