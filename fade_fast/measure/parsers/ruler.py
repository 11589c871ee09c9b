"""Tasks of RULER, generated offline and answered freely: `fade ruler`.

fade ruler --model meta-llama/Llama-3.1-8B-Instruct --lengths 8192
"""

import argparse

from fade_fast.arguments import Parser, positive

from .. import options
from ..names import POLICIES, QUANTIZED

TASKS = ("niah_single", "niah_multikey", "vt", "cwe", "fwe")
SUITE = (
    "dynamic", "lossless", "safe", "k4v4", "int3", "k4v2", "int2",
    "int2:quant_backend=matched", *QUANTIZED, "balanced", "streaming", *POLICIES,
)  # fmt: skip


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fade ruler", **options.told(__doc__))
    options.add_model(parser)
    options.add_text(parser, "of prompts")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS)
    )
    parser.add_argument(
        "--lengths", nargs="+", type=positive, default=[1024, 2048, 4096, 8192], metavar="N", help="tokens"
    )
    parser.add_argument("--trials", type=positive, metavar="N", help="seeds a task")
    parser.add_argument("--chunk", type=positive, default=512, metavar="N", help="tokens fed at a time")
    parser.add_argument("--batch", type=positive, metavar="N", help="examples at a time")
    parser.add_argument(
        "--most", type=positive, metavar="N", help="tokens of an answer (default: as in RULER)"
    )
    options.add_methods(parser, SUITE)
    options.add_output(parser, "ruler")
    args = parser.parse_args(argv)
    names = options.named(parser, args)
    if not args.show:
        options.refuse_short(names, min(args.lengths), option="--lengths")
    options.fill(args, trials=(20, 2), batch=(20, 2))
    args.methods = options.methods_of(args, names)
    return args
