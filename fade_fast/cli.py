"""The command `fade`, also `python -m fade_fast`: it hands over to one module a subcommand.

Such a module has `add_arguments(parser)` and `run(args)`; the first line of its docstring is its help.
Whatever the user can put right ends in one line on standard error and exit code 2.
"""

import argparse
import sys
from collections.abc import Sequence

from . import __version__, demo
from .loading import LoadError

COMMANDS = {"demo": demo}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is there for --help."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = Parser(prog="fade", description="A KV cache in tiers for Hugging Face models.")
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; bad arguments raise `SystemExit(2)`."""
    args = parser().parse_args(argv)
    try:
        COMMANDS[args.command].run(args)
    except LoadError as error:
        print(f"fade {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0
