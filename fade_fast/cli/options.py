"""Options that the subcommands of `fade` share, and checks of their values.

Importing this module imports nothing slow.
"""

import argparse
import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING

from fade_ref.config import PRESETS, FadeConfig

from .. import arguments
from ..errors import LoadError
from ..hf.names import DTYPES, HUB_ID

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --device, --dtype: the arguments of `loading.load`."""
    parser.add_argument(
        "--model", help=f"hub id or folder (default: {HUB_ID}, or smollm2, found online or offline)"
    )
    add_device(parser)


def loaded(args: argparse.Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer of `add_model`. Who watches is told that it takes time."""
    from ..hf.loading import called, load

    wait(f"Loading {called(args.model)} ...")
    return load(args.model, args.device, args.dtype)


def wait(text: str) -> None:
    """Say what takes time, where somebody watches a terminal."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype."""
    parser.add_argument("--device", type=arguments.device, help="default: cuda if available, else cpu")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto is bf16 (default)")


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config, one configuration."""
    parser.add_argument(
        "--config", type=config, default="safe", metavar="PRESET",
        help=f"{', '.join(PRESETS)} (default: safe); or FIELD=VALUE,... of FadeConfig",
    )  # fmt: skip


#: Fields that leave no widths to choose.
WIDTHS = {"middle_k_bits", "middle_v_bits", "layer_bits", "int4_budget", "select"}


def add_fields(parser: argparse.ArgumentParser) -> None:
    """An option for each field of `FadeConfig`, such as --int4-budget. `with_fields` reads them.

    They are not listed by --help, which says that they exist.
    """
    for field in dataclasses.fields(FadeConfig):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", dest=f"field_{field.name}", default=argparse.SUPPRESS,
            type=layer_bits if field.name == "layer_bits" else _value, help=argparse.SUPPRESS,
        )  # fmt: skip


def with_fields(args: argparse.Namespace) -> FadeConfig:
    """The configuration of --config, with the fields of `add_fields` that were given.

    If the widths are among them, nothing is left to choose, and the bound of `safe` does not apply.

    Raises `LoadError` if they contradict each other.
    """
    given = fields_of(args)
    if given.keys() & WIDTHS:
        given = {"loss_bound": None} | given
    try:
        return dataclasses.replace(args.config, **given)
    except ValueError as error:
        raise LoadError(str(error)) from error


def fields_of(args: argparse.Namespace) -> dict:
    """The fields of `FadeConfig` that were given as options of their own."""
    return {name.removeprefix("field_"): x for name, x in vars(args).items() if name.startswith("field_")}


def layer_bits(text: str) -> str | dict[int, tuple[int, int]] | None:
    """A named rule, or bits of keys and values for some layers.

    >>> layer_bits("boundary"), layer_bits("0=8/8,5=16/16")
    ('boundary', {0: (8, 8), 5: (16, 16)})
    """
    if "=" not in text:
        return _value(text)
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(layer): tuple(int(x) for x in bits.split("/")) for layer, bits in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: LAYER=KEYS/VALUES,... is allowed") from error


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json, a file for the numbers."""
    parser.add_argument(
        "--json", type=arguments.writable, metavar="FILE", help="write the figures there as well"
    )


def add_new_tokens(parser: argparse.ArgumentParser) -> None:
    """--max-new-tokens."""
    parser.add_argument(
        "--max-new-tokens", type=arguments.positive, default=64, metavar="N", help="default: 64"
    )


def preset(name: str) -> str:
    """The name of a preset."""
    try:
        FadeConfig.preset(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def config(text: str) -> FadeConfig:
    """A preset, or fields of a `FadeConfig`.

    >>> config("int4_budget=400,eviction_policy=h2o") == FadeConfig(int4_budget=400, eviction_policy="h2o")
    True
    >>> config("select=0.95,select_max=512") == FadeConfig(select=0.95, select_max=512)
    True
    """
    if "=" not in text:
        return FadeConfig.preset(preset(text))
    try:
        pairs = [part.split("=") for part in text.split(",")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("FIELD=VALUE,... is allowed, such as int4_budget=400,eviction_policy=h2o")
        return FadeConfig(**{name: _value(value) for name, value in pairs})
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _value(text: str) -> int | float | str | None:
    if text == "None":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
