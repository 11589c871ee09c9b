"""Compile what a model needs in a deployment, and keep it in a file.

fade warm --model MODEL --config safe --batch 1 8 --mode greedy sampled --file model.warm

With the file, the same command compiles nothing on another machine with the same GPU and versions.
So does fade_fast.warm(model, file=...).
"""

import argparse
import dataclasses

from .. import arguments
from ..errors import LoadError
from ..hf.names import MODES
from ..saved.files import write_json
from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade warm`."""
    options.add_model(parser)
    options.add_config(parser)
    number = arguments.positive
    parser.add_argument("--batch", type=number, nargs="+", default=[1], metavar="N", help="rows (default: 1)")
    parser.add_argument(
        "--length", type=number, nargs="+", default=[1024], metavar="N", help="tokens of prompts (1024)"
    )
    parser.add_argument(
        "--mode", nargs="+", choices=tuple(MODES), default=["greedy"], metavar="MODE",
        help=f"{', '.join(MODES)} (default: greedy)",
    )  # fmt: skip
    parser.add_argument("--max-length", type=number, metavar="N", help="tokens that the caches make room for")
    parser.add_argument(
        "--file", type=arguments.writable, metavar="FILE", help="load it if it is there; store it at the end"
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Warm up. Prints what was compiled."""
    from ..hf.loading import load, quiet
    from ..hf.warm import warm

    quiet()
    model, _ = load(args.model, args.device, args.dtype)
    chosen = dict(batches=args.batch, lengths=args.length, modes=args.mode)
    try:
        found = warm(model, args.config, **chosen, max_length=args.max_length, file=args.file)
    except ValueError as error:
        raise LoadError(str(error)) from error
    print(found)
    if args.json:
        write_json(args.json, dataclasses.asdict(found))
