"""Tokens a second where memory limits the batch of the vLLM plugin: `fade bench throughput`. vLLM is not
needed."""

import argparse
from pathlib import Path

from .. import options
from .paged_attention import PREFERRED, STORED


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("fade bench throughput", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write what is measured there as well")
    add("--only", default="", metavar="TEXT", help="of packed formats: those whose name contains TEXT")
    add("--page", type=int, metavar="N", help=f"tokens in a page (default {PREFERRED})")
    add("--gpu-gb", type=float, metavar="N", help="memory of the GPU (default 80)")
    add("--reserve-gb", type=float, metavar="N", help="neither for weights nor for pages (default 4)")
    add("--quick", action="store_true", help="a tiny model, as without a GPU")
    add("--skip-prefill", action="store_true", help="no times of prompts")
    options.add_processor(parser)
    args = parser.parse_args(argv)
    args.formats = [x for x in STORED if args.only in name_of(*x)]
    if not args.formats:
        parser.error(f"--only: no format of {', '.join(name_of(*x) for x in STORED)} contains {args.only}")
    options.fill(args)
    args.quick |= args.device != "cuda"
    usual = dict(page=(PREFERRED, 32), gpu_gb=(80, 0.0025), reserve_gb=(4, 0))
    for name, values in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.quick])
    return args


def name_of(bits: int, codec: str) -> str:
    return f"INT{bits} {codec}"
