"""Report which layers of a model a tiered cache compresses, and its memory.

Exit code 1 if the model is refused.
"""

import argparse
import dataclasses

from .. import arguments
from ..saved.files import write_json
from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade check`."""
    options.add_model(parser)
    options.add_config(parser)
    parser.add_argument(
        "--length", type=arguments.positive, default=8192, metavar="N", help="tokens to predict memory for"
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="measure the loss of the widths again (for safe)"
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the prediction. Returns 0 if the model is served, else 1."""
    from ..hf.check import check_model
    from ..hf.loading import quiet

    quiet()
    model, _ = options.loaded(args)
    options.wait("Checking it. The first time, what its bits lose is measured, too ...")
    prediction = check_model(model, args.config, length=args.length, calibrate=args.calibrate)
    print(prediction)
    if args.json:
        write_json(args.json, dataclasses.asdict(prediction))
    return 0 if prediction.served else 1
