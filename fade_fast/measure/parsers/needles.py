"""Facts in long texts: `fade needles`.

fade needles --model meta-llama/Llama-3.1-8B-Instruct --lengths 8192
"""

import argparse

from fade_fast.arguments import Parser, positive

from .. import options, pictures
from ..names import POLICIES, QUANTIZED

TASKS = ("passkey", "multikey", "recall")
SUITE = (
    "dynamic",
    "lossless",
    "safe",
    "int3",
    "k4v2",
    "int2",
    *QUANTIZED,
    "balanced",
    "streaming",
    *POLICIES,
)
DEPTHS = (5, 20, 35, 50, 65, 80, 95)  # percent of the text before the fact


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fade needles", **options.told(__doc__))
    options.add_model(parser)
    options.add_text(parser, "around the facts")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument(
        "--lengths", nargs="+", type=positive, default=[1024, 2048], metavar="N", help="tokens"
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=int,
        default=list(DEPTHS),
        metavar="PERCENT",
        help="of the text before the fact",
    )
    parser.add_argument("--trials", type=positive, metavar="N", help="examples a depth")
    parser.add_argument("--chunk", type=positive, default=512, metavar="N", help="tokens fed at a time")
    parser.add_argument("--batch", type=positive, metavar="N", help="examples at a time")
    options.add_methods(parser, SUITE)
    parser.add_argument("--plot", type=pictures.path, metavar="FILE", help="heat map")
    options.add_output(parser, "needles")
    args = parser.parse_args(argv)
    if not all(0 <= d <= 100 for d in args.depths):
        parser.error("--depths: from 0 to 100 percent")
    names = options.named(parser, args)
    if not args.show:
        options.refuse_short(names, min(args.lengths), option="--lengths")
    options.fill(args, trials=(10, 2), batch=(35, 7))
    args.methods = options.methods_of(args, names)
    return args
