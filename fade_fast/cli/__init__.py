"""The command `fade`. Each subcommand is a module with `add_arguments(parser)` and `run(args)`."""

from .command import main

__all__ = ["main"]
