"""Draw tokens by tier: over time, or as a map.

A telemetry file gives the plot over time. A saved cache or a snapshot gives the map.
"""

import argparse

from .. import arguments
from ..errors import LoadError, missing
from ..saved.files import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade plot`."""
    parser.add_argument(
        "file", type=arguments.readable, metavar="FILE",
        help="events (JSON lines), a saved cache, or a snapshot (JSON)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=arguments.writable, metavar="IMAGE", help="PNG, PDF or SVG (default: FILE.png)"
    )
    parser.add_argument(
        "--row", type=int, default=0, metavar="N", help="row of the batch in the map (default: 0)"
    )


def run(args: argparse.Namespace) -> None:
    """Draw one file."""
    try:
        from . import plots
    except ModuleNotFoundError as error:
        raise missing("drawing", error.name, "plot") from error
    out = args.out or args.file.with_name(args.file.name + ".png")
    try:
        figure = plots.of_file(args.file, args.row)
        with whole(out) as written:
            figure.savefig(written, dpi=120, bbox_inches="tight")
    except (ValueError, OSError) as error:
        raise LoadError(str(error)) from error
    print(out)
