"""All measurements of one model in one run: `fade quality --suite report`.

fade quality --suite report --model meta-llama/Llama-3.1-8B --length 32768
"""

import argparse

from fade_fast.arguments import Parser, positive, writable

from .. import options
from .bench import LEAST

FEW = ("lossless", "safe", "int2", "balanced")  # on a CPU, where all of them take long
SUITE = ("lossless", "safe", "int3", "int2", "recall", "balanced", "aggressive", "h2o")
PARTS = ("bytes", "quality", "needles", "ruler", "bench")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fade quality --suite report", **options.told(__doc__))
    options.add_model(parser, None, "bf16, without a GPU fp32")
    options.add_text(parser, "that is read, and that is around facts")
    parser.add_argument("--length", type=positive, metavar="N", help="tokens of every text")
    parser.add_argument("--windows", type=positive, metavar="N", help="pieces of the text")
    parser.add_argument("--trials", type=positive, metavar="N", help="examples of a task and depth")
    parser.add_argument("--new", type=positive, metavar="N", help="tokens timed")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"what to measure, of {', '.join(PARTS)}",
    )  # fmt: skip
    options.add_methods(parser, None)
    options.add_output(parser, "report")
    parser.add_argument("--markdown", type=writable, metavar="FILE", help="write the tables there")
    args = parser.parse_args(argv)
    if (args.length or 256) < 256 or (args.new or LEAST) < LEAST:
        parser.error(f"--length must be at least 256, --new {LEAST}")
    names = options.named(parser, args, args.configs or (SUITE if options.on_gpu() else FEW))
    options.fill(
        args, length=(8192, 1024), windows=(4, 1), trials=(5, 1), new=(128, 8), dtype=("bf16", "fp32")
    )
    args.methods = options.methods_of(args, names)
    return args
