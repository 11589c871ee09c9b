"""Perplexity through real caches: `fade quality`.

fade quality --model meta-llama/Llama-3.1-8B --text mine.txt
"""

import argparse

from fade_fast.arguments import Parser, positive, writable

from .. import options, pictures
from ..names import POLICIES, QUANTIZED

PRESETS = ("lossless", "safe", "int3", "k4v2", "int2", "balanced", "aggressive")
SUITE = (
    "dynamic", "off", "lossless", "safe", "k4v4", "int3", "k4v2", "int2", *QUANTIZED, "balanced",
    "aggressive", "streaming", *POLICIES,
)  # fmt: skip
_FIELDS = dict(block_size=(16, 32, 128, 256), n_sink=(0, 1, 2, 8, 16), recent_window=(0, 16, 32, 128, 256))
_BUDGETS = ("int4_budget=200", "int4_budget=400", "int4_budget=800", "int4_budget=200:int2_budget=400")
#: The candidates for presets: widths of keys and values, then one field at a time, then budgets.
SWEEP = (
    *(f"k{k}v{v}" for k in (8, 4, 3, 2) for v in (8, 4, 3, 2)),
    *(f"{base}:{name}={x}" for base in ("int4", "int2") for name, values in _FIELDS.items() for x in values),
    *(f"{policy}:{budget}" for budget in _BUDGETS for policy in ("position", "h2o", "ema", "learned")),
)
SUITES = {"presets": PRESETS, "table": SUITE, "sweep": SWEEP}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fade quality", **options.told(__doc__))
    options.add_model(parser)
    options.add_text(parser, "that is read")
    parser.add_argument(
        "--free", action="store_true", help="free-running texts instead; --free --help shows its options"
    )
    parser.add_argument("--windows", type=positive, metavar="N", help="pieces of the text")
    parser.add_argument("--length", type=positive, default=2048, metavar="N", help="tokens of a window")
    parser.add_argument("--chunk", type=positive, default=64, metavar="N", help="tokens fed at a time")
    parser.add_argument("--batch", type=positive, metavar="N", help="windows at a time")
    parser.add_argument(
        "--suite", choices=(*SUITES, "report"), default="presets",
        help="presets (default) and widths; table: also policies and caches of transformers; sweep: for "
        "choosing presets; report: all measurements",
    )  # fmt: skip
    options.add_methods(parser, None)
    parser.add_argument("--compiled", action="store_true", help="on a GPU, compile kernels for every shape")
    parser.add_argument("--no-bytes", dest="weigh", action="store_false", help="do not weigh caches")
    parser.add_argument("--markdown", type=writable, metavar="FILE", help="write the table there as well")
    parser.add_argument(
        "--plot", type=pictures.path, metavar="FILE", help="perplexity ratio against bytes a token"
    )
    options.add_output(parser, "quality")
    args = parser.parse_args(argv)
    if args.length < 2:
        parser.error("--length must be at least 2")
    if args.suite not in SUITES:  # the command `fade` runs report.py
        parser.error("run it as `fade quality --suite report`")
    names = options.named(parser, args, args.configs or SUITES[args.suite])
    if not args.show:
        options.refuse_short(names, args.length, args.chunk)
    options.fill(args, windows=(8, 2), batch=(8, 1))
    args.methods = options.methods_of(args, names)
    return args
