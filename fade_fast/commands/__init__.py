"""Subcommands of `fade`, one a module, with `add_arguments(parser)` and `run(args)`; see `cli.py`."""
