"""The options of `fade train-policy`. Importing this module imports nothing slow."""

import argparse
from pathlib import Path

from .names import DTYPES

TOLD = "Train the weights of the `learned` policy: `fade train-policy --text FILE --out FILE`."


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse them."""
    parser = argparse.ArgumentParser(prog="fade train-policy", description=TOLD)
    parser.add_argument("--model", help="hub id or folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, required=True, help="file of text to learn from")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--test", type=Path, help="file of text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=16, help="number of windows of --text; default: 16")
    parser.add_argument("--test-windows", type=int, default=4, help="number of windows of --test; default: 4")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window; default: 1024")
    parser.add_argument(
        "--policies", default="position,h2o", help="policies to compare with; default: position,h2o"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda if available, else cpu")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="fp32", help="default: fp32")
    return parser.parse_args(argv)
