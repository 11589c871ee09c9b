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
    gpu = options.on_gpu()
    options.add_model(parser, dtype="bf16" if gpu else "fp32")
    options.add_text(parser, "of the prompt")
    parser.add_argument(
        "--length", type=positive, default=8192 if gpu else 2048, metavar="N", help="tokens of the prompt"
    )
    parser.add_argument(
        "--new", type=positive, default=128 if gpu else 24, metavar="N", help="tokens written"
    )
    options.add_methods(parser, SUITE)
    options.add_output(parser, "bench")
    args = parser.parse_args(argv)
    if args.length < 64 or args.new < LEAST:
        parser.error(f"--length must be at least 64, --new at least {LEAST}")
    args.methods = options.methods_of(parser, args)
    return args
