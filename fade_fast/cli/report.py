"""Draw the events of a cache as one page that opens in any browser.

`fade generate --telemetry FILE` and `cache.listen(FILE)` write such files. The page
needs no other file and no network.
"""

import argparse

from .. import arguments
from ..errors import LoadError
from ..saved.files import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade report`."""
    parser.add_argument("file", type=arguments.readable, metavar="FILE", help="events (JSON lines)")
    parser.add_argument(
        "-o", "--out", type=arguments.writable, metavar="PAGE", help="HTML (default: FILE.html)"
    )
    parser.add_argument("--title", metavar="TEXT", help="title of the page (default: the file's name)")


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    from ..saved import telemetry
    from ..serve import report

    out = args.out or args.file.with_name(args.file.name + ".html")
    try:
        page = report.page_of(telemetry.read(args.file), args.title or args.file.name)
        with whole(out) as written:
            written.write_text(page, encoding="utf-8")
    except (ValueError, OSError) as error:
        raise LoadError(str(error)) from error
    print(out)
