"""Learn codebooks of product quantization from a model and a text.

Caches with `FadeConfig(quant_backend="product")` use them.
"""

import argparse

from .. import arguments
from ..errors import LoadError
from ..saved.units import size
from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fade train-codebook`."""
    options.add_model(parser)
    parser.add_argument("--text", type=arguments.text_file, required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--out", type=arguments.writable, required=True, metavar="FILE", help="safetensors")
    parser.add_argument(
        "--tokens",
        type=arguments.positive,
        default=4096,
        metavar="N",
        help="tokens of the text (default: 4096)",
    )
    parser.add_argument(
        "--subspace-width",
        type=arguments.positive,
        default=4,
        metavar="N",
        help="elements per code (default: 4)",
    )
    parser.add_argument(
        "--centroids", type=arguments.positive, default=256, metavar="N", help="per subspace (default: 256)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def run(args: argparse.Namespace) -> None:
    """Learn the codebooks and write the file."""
    from ..hf import codebooks
    from ..hf.loading import load, quiet

    quiet()
    model, tokenizer = load(args.model, args.device, args.dtype)
    text = args.text[: args.tokens * 16]  # enough characters for every tokenizer; a long text takes long
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : args.tokens]
    try:
        learned = codebooks.train(
            model, ids, subspace_width=args.subspace_width, centroids=args.centroids, seed=args.seed
        )
    except ValueError as error:
        raise LoadError(str(error)) from error
    learned.save(args.out)
    for side in codebooks.SIDES:
        errors = [x for name, x in learned.provenance["errors"].items() if name.endswith(side)]
        print(f"{side}s: relative error {sum(errors) / len(errors):.3f}, mean over {len(errors)} layers")
    print(f"{args.out}: {size(args.out.stat().st_size)}, from {ids.shape[1]} tokens")
