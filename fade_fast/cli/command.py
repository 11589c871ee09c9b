"""The command `fade`, also `python -m fade_fast`. Each subcommand is one module.

Modules in `COMMANDS` have `add_arguments(parser)` and `run(args)`, which may return an exit code. The first
line of their docstring is their help. Commands in `PASSED` parse the arguments after their name themselves.

Exit codes: 0, success; 1, a negative result (a refused model, a failed comparison); 2, an error that the user
can fix, reported in one line on standard error; 130, interrupted.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from ..hf.loading import LoadError
from . import (
    calibrate,
    check,
    demo,
    generate,
    inspect,
    plan,
    plot,
    report,
    serve,
    train_codebook,
    vllm_calibrate,
)

COMMANDS = {
    "demo": demo,
    "plan": plan,
    "check": check,
    "generate": generate,
    "inspect": inspect,
    "plot": plot,
    "serve": serve,
    "report": report,
    "calibrate": calibrate,
    "train-codebook": train_codebook,
    "vllm-calibrate": vllm_calibrate,
}
#: Module and help of separate commands. The module's `main(argv)` returns an exit code.
PASSED = {
    "quality": ("benchmarks.quality", "Perplexity and recall with each preset."),
    "memory": ("benchmarks.memory", "Bytes of each cache and peak memory, by length."),
    "bench": ("benchmarks.generate", "Time decode steps; also `bench attention`, `bench serve`."),
    "parity": ("parity.__main__", "Check that the fast cache matches the specification."),
    "train-policy": ("fade_fast.hf.train_policy", "Train the learned eviction policy."),
}
BENCHES = {
    "generate": "benchmarks.generate",
    "attention": "benchmarks.decode_attention",
    "serve": "benchmarks.serve",
}


class Parser(argparse.ArgumentParser):
    """Reports an error in one line. Only --help shows the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = Parser(prog="fade", description="A KV cache in tiers for Hugging Face models.")
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, more = module.__doc__.partition("\n")
        module.add_arguments(
            commands.add_parser(
                name,
                help=summary,
                description=summary,
                epilog=more.strip("\n") or None,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )  # fmt: skip
        )
    for name, (_, summary) in PASSED.items():
        commands.add_parser(name, help=summary, add_help=False)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; bad arguments raise `SystemExit(2)`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in PASSED:
            return pass_on(argv[0], argv[1:])
        args = parser().parse_args(argv)
        return COMMANDS[args.command].run(args) or 0
    except LoadError as error:
        print(f"fade {argv[0]}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def pass_on(command: str, argv: list[str]) -> int:
    """Run a command of `PASSED`; `LoadError` if its module, or one that it needs, is not installed."""
    name, shown = PASSED[command][0], f"fade {command}"
    if command == "bench" and argv and argv[0] in BENCHES:
        name, shown, argv = BENCHES[argv[0]], f"{shown} {argv[0]}", argv[1:]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise LoadError(f"{name} is not part of this installation: run it from a clone") from error
        raise LoadError(f"{name} needs {missing}, which is not installed") from error
    before, sys.argv = sys.argv, [shown, *argv]  # argparse takes the command's name from it
    try:
        return module.main(argv) or 0
    finally:
        sys.argv = before
