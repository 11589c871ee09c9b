"""Options that the measurements share, each defined once."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fade_fast.arguments import device, readable, writable
from fade_fast.errors import InputError
from fade_fast.hf import loading

from .methods import Method, method

#: Help of the option that takes names of methods.
CONFIGS = "such as safe, int3, k4v2, h2o, quanto4, int4:recent_window=32 (docs/quality.md explains them)"


def told(docstring: str) -> dict[str, str]:
    """Arguments of a parser: what a module measures, and its example of a command, by its docstring."""
    first, *others = docstring.splitlines()
    return dict(description=first, epilog=next((line for line in others if line.startswith("fade ")), ""))


def on_gpu() -> bool:
    """Whether measurements run on a GPU unless they are told otherwise."""
    return torch.cuda.is_available()


def add_model(parser: argparse.ArgumentParser, dtype: str | None = "fp32") -> None:
    """--model and --device; also --dtype, unless its default `dtype` is None."""
    parser.add_argument(
        "--model", default=loading.SMOLLM2, help="hub id, folder (of GGUF, too), or smollm2 (default)"
    )
    parser.add_argument("--device", type=device, default="cuda" if on_gpu() else "cpu", help="cuda or cpu")
    if dtype is not None:
        parser.add_argument(
            "--dtype", choices=tuple(loading.DTYPES), default=dtype, help=f"of the model; default: {dtype}"
        )


def add_text(parser: argparse.ArgumentParser, use: str) -> None:
    """--text, which is for `use`."""
    parser.add_argument(
        "--text", metavar="TEXT",
        help=f"{use}: a file, or NAME[:CONFIGURATION[:SPLIT[:COLUMN]]] of a data set on the hub. "
        "Default: WikiText-2 if it can be read, or else a built-in text",
    )  # fmt: skip


def add_methods(parser: argparse.ArgumentParser, default: Iterable[str] | None) -> None:
    """--configs, names of methods, and the file that one of them needs. `methods_of` reads them."""
    parser.add_argument(
        "--configs", nargs="+", default=None if default is None else list(default), metavar="NAME",
        help=CONFIGS,
    )  # fmt: skip
    parser.add_argument("--policy-weights", type=readable, metavar="FILE", help="of the policy learned")


def report_of(kind: str) -> Callable[[str], Path]:
    """The type of an option that names a report of a kind, as --json wrote it."""

    def check(path: str) -> Path:
        try:
            found = json.loads(readable(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{path} is no report that --json wrote: {error}") from error
        if not isinstance(found, dict) or found.get("kind") != kind:
            told = found.get("kind") if isinstance(found, dict) else None
            raise argparse.ArgumentTypeError(f"{path} is a report of the kind {told!r}, not {kind!r}")
        return Path(path)

    return check


def add_output(parser: argparse.ArgumentParser, kind: str) -> None:
    """--json, a file for the numbers; and --show, such a file of the `kind`, whose tables are printed."""
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the numbers there as well")
    parser.add_argument(
        "--show", type=report_of(kind), metavar="FILE", help="the tables of a stored run, and stop"
    )


def refuse_short(
    methods: Iterable[Method], length: int, chunk: int = 1, new: int = 0, option: str = "--length"
) -> None:
    """Raise `InputError`, before any work, if a method would compress none of the tokens of a text.

    The text has `length` tokens, which are fed in chunks, and `new` ones after them. `option` says how many
    there are.
    """
    for m in methods:
        if length < (least := m.least(chunk) - new):
            raise InputError(
                f"{option} {length}: {m.name} does nothing to so few tokens. Give at least {least}, or other "
                "--configs"
            )


def methods_of(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str] | None = None
) -> list[Method]:
    """The methods that --configs names, "dynamic" first, each once. A wrong name ends the program.

    `names` are those to take instead.
    """
    names = args.configs if names is None else names
    try:
        names = dict.fromkeys(("dynamic", *names))
        return [method(name, args.policy_weights) for name in names]
    except ValueError as error:
        parser.error(str(error))
