"""Plan which caches fit on a GPU, from a model's configuration alone.

fade plan --model meta-llama/Llama-3.1-8B --gpu 24GB --length 32768

No weights are loaded or fetched. Bytes of caches are exact: of caches made with max_length.
Weights are counted in --dtype; for quantized ones, give --weights. --reserve is for activations.
"""

import argparse

from fade_ref.config import PRESETS, FadeConfig

from .. import arguments
from ..hf import capacity
from ..hf.loading import DTYPES, HUB_ID, LoadError, called, configuration, quiet
from ..saved.files import write_json
from . import options

MIB, GIB = 2**20, 2**30
UNCOMPRESSED = "uncompressed"
SHOWN = tuple(name for name in PRESETS if name != "int4")  # `safe` has the same bytes here
NO_LIMIT = 1 << 27  # tokens that mean that a length is not limited by memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade plan`."""
    parser.add_argument("--model", help=f"hub id, folder or GGUF file (default: {HUB_ID})")
    parser.add_argument(
        "--gpu",
        type=arguments.size,
        required=True,
        metavar="SIZE",
        help="memory of the GPU: 24GB, 80GiB, ...",
    )
    parser.add_argument(
        "--length", type=arguments.positive, metavar="N",
        help="tokens of a sequence (default: 32768, or what the model reads)",
    )  # fmt: skip
    parser.add_argument(
        "--config", nargs="+", default=list(SHOWN), metavar="PRESET",
        help=f"presets, or FIELD=VALUE,... of FadeConfig (default: {', '.join(SHOWN)})",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="default: bf16")
    parser.add_argument(
        "--weights", type=arguments.size, metavar="SIZE", help="bytes of the weights, if known"
    )
    parser.add_argument(
        "--reserve", type=arguments.size, metavar="SIZE",
        help="left for activations and the rest (default: a tenth of --gpu)",
    )  # fmt: skip
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Print one table."""
    quiet()
    configs = {name: _config(name) for name in dict.fromkeys(args.config)}
    try:
        model = capacity.architecture(configuration(args.model), DTYPES[args.dtype])
    except (ValueError, TypeError) as error:
        raise LoadError(f"cannot plan for {called(args.model)!r}: {error}") from error
    weights = model.weights if args.weights is None else args.weights
    reserve = args.gpu // 10 if args.reserve is None else args.reserve
    length = args.length or min(32768, model.longest or 32768)
    room = args.gpu - weights - reserve
    found = "from the configuration" if args.weights is None else "as given"
    print(f"{called(args.model)} ({model.name}), {args.dtype}")
    print(
        f"{args.gpu / GIB:.2f} GiB of memory - {weights / GIB:.2f} GiB of weights ({found}) "
        f"- {reserve / GIB:.2f} GiB in reserve = {max(room, 0) / GIB:.2f} GiB for caches\n"
    )
    rows = [
        row(model, name, config, length, room) for name, config in {UNCOMPRESSED: None, **configs}.items()
    ]
    print(table(rows, length))
    print("\n" + "\n".join(notes(model, rows, configs, length, room)))
    if args.json:
        head = dict(model=called(args.model), dtype=args.dtype, gpu=args.gpu, weights=weights)
        write_json(args.json, head | dict(reserve=reserve, room=room, length=length, caches=rows))


def _config(text: str) -> FadeConfig:
    try:
        return options.config(text)
    except argparse.ArgumentTypeError as error:
        raise LoadError(f"--config {error}") from error


def row(
    model: capacity.Architecture, name: str, config: FadeConfig | None, length: int, room: int
) -> dict[str, object]:
    """The figures of one cache: JSON values, bytes as integers. `config` None is `DynamicCache`."""
    refused = model.refusal(config) if config else None
    if refused:
        return dict(cache=name, refused=refused)

    def size(tokens: int, rows: int = 1) -> capacity.Size:
        if config is None:
            return capacity.Size(capacity.uncompressed(model, tokens, rows))
        return capacity.size(model, config, tokens, rows)

    each = size(length)
    tokens = capacity.most_tokens(lambda n: size(n).device, room, most=NO_LIMIT)
    return dict(
        cache=name,
        tokens=tokens,
        any_length=tokens >= NO_LIMIT
        or bool(config and config.evicts and tokens >= (model.longest or NO_LIMIT)),
        sequences=capacity.most_rows(lambda n: size(length, n).device, room),
        bytes=each.device,
        tables=each.tables,
        host=each.host,
        per_token=per_token(model, config, length),
        ratio=capacity.uncompressed(model, length) / own if (own := each.device - each.tables) else 1.0,
        forgets=bool(config and config.evicts),
    )


def per_token(model: capacity.Architecture, config: FadeConfig | None, length: int) -> float:
    """Bytes on the device that one more token takes, from a sequence of twice the length."""
    if config is None:
        return (capacity.uncompressed(model, 2 * length) - capacity.uncompressed(model, length)) / length
    more = capacity.size(model, config, 2 * length).device - capacity.size(model, config, length).device
    return more / length


def table(rows: list[dict], length: int) -> str:
    """One line for each cache."""
    lines = [
        ["cache", "longest sequence", f"sequences of {length:,}", "MiB each", "ratio", "host MiB", "keeps"]
    ]
    for x in rows:
        if "refused" in x:
            lines.append([x["cache"], "-", "-", "-", "-", "-", f"not for this model: {x['refused']}"])
            continue
        longest = "any length" if x["any_length"] else f"{x['tokens']:,}"
        host = f"{x['host'] / MIB:,.1f}" if x["host"] else ""
        ratio = "" if x["cache"] == UNCOMPRESSED else f"{x['ratio']:.2f}"
        own = x["bytes"] - x["tables"]
        keeps = "part of the text" if x["forgets"] else "every token"
        lines.append(
            [
                x["cache"],
                longest,
                f"{x['sequences']:,}",
                f"{own / MIB:,.1f}",
                ratio,
                host,
                keeps,
            ]
        )
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * n for n in width])
    side = [str.ljust, *[str.rjust] * 5, str.ljust]
    return "\n".join("  ".join(f(x, n) for f, x, n in zip(side, line, width)).rstrip() for line in lines)


def notes(model, rows: list[dict], configs: dict[str, FadeConfig], length: int, room: int) -> list[str]:
    """What the table cannot say, one line each."""
    said = ["Caches made with max_length, as `cache.memory()` counts them. One that grows: up to 1/8 more."]
    if shared := {x["cache"]: x["tables"] for x in rows[1:] if x.get("tables", 0) > MIB}:
        told = ", ".join(f"{tables / MIB:.1f} MiB of `{name}`" for name, tables in shared.items())
        said.append(f"Tables that all caches of the model share are counted once, not in `MiB each`: {told}.")
    if room <= 0:
        said.append("The weights and the reserve alone are larger than this memory: nothing fits.")
    if model.longest:
        said.append(f"The model was made for {model.longest:,} positions.")
    if any(config.loss_bound is not None for config in configs.values()):
        said.append(
            "`safe` is counted with 4 bits in every layer: `fade check` measures whether some need 8."
        )
    everything = capacity.size(model, FadeConfig.int4(), length).device
    for x in rows[1:]:
        if x.get("forgets") and x["bytes"] >= everything:
            said.append(
                f"`{x['cache']}` forgets tokens and yet holds more bytes at {length:,} tokens than `int4`, "
                f"which keeps all of them: {x['bytes'] / MIB:,.1f} MiB against {everything / MIB:,.1f}."
            )
        elif x.get("ratio", 1.0) < 1:
            said.append(f"`{x['cache']}` is larger than an uncompressed cache at {length:,} tokens.")
    return said
