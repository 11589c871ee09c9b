"""What choosing costs and gains, with and without host memory: `fade bench choose`."""

import argparse

from fade_fast.arguments import Parser, positive
from fade_ref.config import INDEXES

from .. import names, options

K = 1024
PARTS = ("steps", "hits", "prefill", "batch", "curve")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fade bench choose", description=__doc__.splitlines()[0])
    listed = lambda text: text.split(",")  # noqa: E731
    add = parser.add_argument
    add("--parts", type=listed, default=list(PARTS), metavar="A,B", help=f"of {','.join(PARTS)}")
    options.add_processor(parser)
    add("--layers", type=positive, metavar="N", help="of the model: 4, or 2 of a tiny one")
    add("--vocabulary", type=positive, default=K, metavar="N", help="of the model; default: %(default)s")
    add("--read", type=positive, metavar="N", help="tokens that a query reads: 2048, or 64 of a tiny text")
    add(
        "--indexes",
        type=listed,
        default=["k2", "deviation+k2"],
        metavar="A,B",
        help=f"of {','.join(INDEXES)}",
    )
    add(
        "--cold", type=listed, default=["none", "host"], metavar="A,B", help="where the payload is: none,host"
    )
    add("--cases", type=listed, metavar="BxS,...", help="of steps and hits: 8x32768,8x131072")
    add("--hits", type=listed, default=["95", "80", "50"], metavar="A,B", help="percent that are forced")
    add("--length", type=positive, metavar="N", help="of prefill and batch: 32768")
    add("--gpu-gb", type=float, default=80, help="memory of the GPU of batch; default: %(default)s")
    add("--batches", type=listed, default=["1", "8"], metavar="A,B", help="of the curve")
    add("--lengths", type=listed, metavar="A,B", help="of the curve: 2048 to 524288, times 4 each")
    add("--turns", type=positive, metavar="N", help="that count: 5, or 1 of a tiny model")
    add("--new", type=positive, metavar="N", help="tokens of a turn: 48, or 4 of a tiny model")
    options.add_output(parser, "choose")
    args = parser.parse_args(argv)
    allowed = dict(parts=PARTS, indexes=INDEXES, cold=("none", "host"))
    for name, values in allowed.items():
        if wrong := [x for x in getattr(args, name) if x not in values]:
            parser.error(f"--{name}: {', '.join(wrong)}: of {','.join(values)}")
    try:
        args.cases = args.cases and [tuple(map(int, case.split("x"))) for case in args.cases]
        args.lengths = args.lengths and [int(x) for x in args.lengths]
        args.batches = [int(x) for x in args.batches]
        args.hits = [float(x) / 100 for x in args.hits]
        for name in sum(compared(args, args.read or 64), []):
            names.check(name)
    except ValueError as error:
        parser.error(str(error))
    if any(len(case) != 2 for case in args.cases or ()) or (args.new or 4) < 4:
        parser.error("--cases: BxS, such as 8x32768; --new: at least 4")
    options.fill(args)
    usual = dict(
        layers=(4, 2), read=(2048, 64), length=(32 * K, 384), turns=(5, 1), new=(48, 4),
        cases=([(8, 32 * K), (8, 128 * K)], [(2, 384)]),
        lengths=([2 * K << 2 * i for i in range(5)], [192, 512]),
    )  # fmt: skip
    for name, values in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.device == "cpu"])
    args.near, args.far = compared(args, args.read)
    return args


def compared(args: argparse.Namespace, read: int) -> tuple[list[str], list[str]]:
    """Names of the methods that choose `read` tokens: with the payload on the GPU, and in host memory."""
    ours = [f"int4:select={read}:index={i}" for i in args.indexes]
    return ours if "none" in args.cold else [], [f"{x}:cold=host" for x in ours if "host" in args.cold]
