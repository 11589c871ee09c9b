"""Options that the measurements share, each defined once.

Importing this module imports nothing slow.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fade_fast.arguments import device, readable, writable
from fade_fast.errors import InputError
from fade_fast.hf.names import DTYPES, SMOLLM2

from . import names as known

if TYPE_CHECKING:
    from .methods import Method

FILES = (".txt", ".md", ".rst", ".text", ".json", ".jsonl", ".csv", ".parquet")  # endings of no data set
#: Help of the option that takes names of methods.
CONFIGS = "such as safe, int3, k4v2, h2o, quanto4, int4:recent_window=32 (docs/quality.md explains them)"


def told(docstring: str) -> dict[str, str]:
    """Arguments of a parser: what a module measures, and its example of a command, by its docstring."""
    first, *others = docstring.splitlines()
    return dict(description=first, epilog=next((line for line in others if line.startswith("fade ")), ""))


def on_gpu() -> bool:
    """Whether measurements run on a GPU unless they are told otherwise."""
    import torch  # takes seconds

    return torch.cuda.is_available()


def fill(args: argparse.Namespace, **usual: tuple) -> None:
    """Give the options that were left out their values: the first one on a GPU, else the second one.

    The device is among them. It is looked for last, after all that is given was found to be right.
    """
    which = 0 if on_gpu() else 1
    for name, values in {"device": ("cuda", "cpu"), **usual}.items():
        if getattr(args, name) is None:
            setattr(args, name, values[which])


def add_model(parser: argparse.ArgumentParser, dtype: str | None = "fp32", told: str | None = None) -> None:
    """--model and --device, which `fill` fills in; also --dtype, unless `dtype` and `told` are None.

    `told` tells a default that `fill` chooses, too.
    """
    parser.add_argument(
        "--model", default=SMOLLM2, help="hub id, folder (of GGUF, too), or smollm2 (default)"
    )
    parser.add_argument("--device", type=device, help="cuda or cpu")
    if dtype or told:
        parser.add_argument(
            "--dtype", choices=DTYPES, default=dtype, help=f"of the model; default: {told or dtype}"
        )


def add_processor(parser: argparse.ArgumentParser) -> None:
    """--device of a measurement that runs on a GPU, or shrinks. `fill` fills it in."""
    parser.add_argument("--device", choices=("cuda", "cpu"))


def add_text(parser: argparse.ArgumentParser, use: str) -> None:
    """--text, which is for `use`."""
    parser.add_argument(
        "--text", metavar="TEXT", type=text_source,
        help=f"{use}: a file, or NAME[:CONFIGURATION[:SPLIT[:COLUMN]]] of a data set on the hub. "
        "Default: WikiText-2 if it can be read, or else a built-in text",
    )  # fmt: skip


def text_source(given: str) -> str:
    """What `texts.read` takes."""
    if is_missing_file(given):
        raise argparse.ArgumentTypeError(f"cannot read {given}: no such file; give the path of a file")
    return given


def is_missing_file(source: str) -> bool:
    """Whether a source of text can only be a file, by its name, and there is none."""
    path = Path(source)
    return not path.is_file() and (path.suffix in FILES or source.startswith((".", "/", "~")))


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
    names: Iterable[str], length: int, chunk: int = 1, new: int = 0, option: str = "--length"
) -> None:
    """Raise `InputError`, before any work, if a method would compress none of the tokens of a text.

    `names` are those of methods. The text has `length` tokens, which are fed in chunks, and `new` ones after
    them. `option` says how many there are.
    """
    for name in names:
        if length < (least := known.least(name, chunk) - new):
            raise InputError(
                f"{option} {length}: {name} does nothing to so few tokens. Give at least {least}, or other "
                "--configs"
            )


def named(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Iterable[str] | None = None
) -> list[str]:
    """The names of methods of --configs, "dynamic" first, each once. A wrong name ends the program.

    `names` are those to take instead.
    """
    found = list(dict.fromkeys(("dynamic", *(args.configs if names is None else names))))
    try:
        for name in found:
            known.check(name)
    except ValueError as error:
        parser.error(str(error))
    return found


def methods_of(args: argparse.Namespace, names: Iterable[str]) -> "list[Method]":
    """The methods of these names, with the files that `add_methods` lets name."""
    from .methods import method  # imports torch

    return [method(name, args.policy_weights) for name in names]
