"""Plan which caches fit on a GPU, from a model's configuration alone.

fade plan --model meta-llama/Llama-3.1-8B --gpu 24GB --length 32768

No weights are loaded or fetched. Bytes of caches are exact: of caches made with max_length.
Weights are counted in --dtype; for quantized ones, give --weights. --reserve is for activations.
"""

import argparse

from fade_ref.config import PRESETS, FadeConfig

from .. import arguments
from ..errors import LoadError
from ..hf.names import DTYPES, HUB_ID
from ..saved.files import write_json
from . import options

GIB = 2**30
SHOWN = tuple(name for name in PRESETS if name != "int4")  # `safe` has the same bytes here


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
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
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
    configs = {name: _config(name) for name in dict.fromkeys(args.config)}
    from ..hf import capacity, loading
    from ..hf.loading import called, configuration, quiet
    from . import planning

    quiet()
    try:
        model = capacity.architecture(configuration(args.model), loading.DTYPES[args.dtype])
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
        planning.row(model, name, config, length, room)
        for name, config in {planning.UNCOMPRESSED: None, **configs}.items()
    ]
    print(planning.table(rows, length))
    print("\n" + "\n".join(planning.notes(model, rows, configs, length, room)))
    if args.json:
        head = dict(model=called(args.model), dtype=args.dtype, gpu=args.gpu, weights=weights)
        write_json(args.json, head | dict(reserve=reserve, room=room, length=length, caches=rows))


def _config(text: str) -> FadeConfig:
    try:
        return options.config(text)
    except argparse.ArgumentTypeError as error:
        raise LoadError(f"--config {error}") from error
