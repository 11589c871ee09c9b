"""Bytes and times of caches with a model of yours, on a text of yours: `fade bench`.

fade bench --model meta-llama/Llama-3.1-8B --length 32768
"""

import argparse

from fade_fast.arguments import Parser, positive

from .. import options

SUITE = ("lossless", "safe", "int2", "balanced")
LEAST = 4  # new tokens: the first one, and steps before and after the warm-up


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fade bench", **options.told(__doc__))
    options.add_model(parser, None, "bf16, without a GPU fp32")
    options.add_text(parser, "of the prompt")
    parser.add_argument("--length", type=positive, metavar="N", help="tokens of the prompt")
    parser.add_argument("--new", type=positive, metavar="N", help="tokens written")
    options.add_methods(parser, SUITE)
    options.add_output(parser, "bench")
    args = parser.parse_args(argv)
    if (args.length or 64) < 64 or (args.new or LEAST) < LEAST:
        parser.error(f"--length must be at least 64, --new at least {LEAST}")
    names = options.named(parser, args)
    options.fill(args, length=(8192, 2048), new=(128, 24), dtype=("bf16", "fp32"))
    args.methods = options.methods_of(args, names)
    return args
