"""Print the contents of a saved cache.

Its tensors are not read, so they are not verified.
"""

import argparse

from .. import arguments
from ..errors import LoadError
from ..saved.files import write_json
from ..saved.units import size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade inspect`."""
    parser.add_argument("file", type=arguments.readable, metavar="FILE", help="what cache.save() wrote")
    parser.add_argument(
        "--json", type=arguments.writable, metavar="FILE", help="write the snapshot there as well"
    )


def run(args: argparse.Namespace) -> None:
    """Print the snapshot of a file."""
    from ..saved import checkpoint, snapshot

    try:
        header, shapes = checkpoint.read_header(args.file)
        contents = snapshot.of_file(args.file)
    except ValueError as error:
        raise LoadError(str(error)) from error
    model = {name: value for name, value in header["model"].items() if value is not None}
    print(f"{args.file}: {size(args.file.stat().st_size)}, version {header['version']}")
    print("model: " + ", ".join(f"{name} {value}" for name, value in model.items()))
    if checkpoint.TOKENS in shapes:
        print(f"token ids: {list(shapes[checkpoint.TOKENS][0])}")
    print(snapshot.text(contents))
    if args.json:
        write_json(args.json, contents | dict(model=header["model"]))
