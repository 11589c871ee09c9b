"""The size of caches: `fade memory`.

fade memory --model meta-llama/Llama-3.1-8B --lengths 8192 32768
"""

import argparse

from fade_fast.arguments import Parser, positive

from .. import options, pictures

SUITE = (
    "dynamic",
    "quanto4",
    "hqq4",
    "lossless",
    "safe",
    "int3",
    "k4v2",
    "int2",
    "balanced",
    "aggressive",
    "h2o",
)
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fade memory", **options.told(__doc__))
    options.add_model(parser, dtype=None)
    parser.add_argument("--lengths", nargs="+", type=positive, default=LENGTHS, metavar="N", help="tokens")
    options.add_methods(parser, SUITE)
    parser.add_argument("--peak", action="store_true", help="run the model, too")
    parser.add_argument("--plot", type=pictures.path, metavar="FILE", help="bytes against length")
    options.add_output(parser, "memory")
    args = parser.parse_args(argv)
    names = options.named(parser, args)
    options.fill(args)
    args.methods = options.methods_of(args, names)
    return args
