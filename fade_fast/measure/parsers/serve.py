"""What the server costs: `fade bench serve`."""

import argparse

from fade_fast.arguments import Parser, positive, writable


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = Parser("fade bench serve", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--config", default="safe", help="preset (default: safe)")
    parser.add_argument("--new", type=positive, default=160, help="tokens that are timed (default: 160)")
    parser.add_argument("--rounds", type=positive, default=5, help="default: 5")
    parser.add_argument(
        "--prompt", type=positive, default=3000, help="tokens of the first turn (default: 3000)"
    )
    parser.add_argument(
        "--only", choices=("tokens", "turns", "all"), default="all", help="what to measure (default: all)"
    )
    parser.add_argument(
        "--ways", nargs="+", choices=("exact", "longest"), default=["exact", "longest"], help="of --reuse"
    )
    parser.add_argument("--json", type=writable, help="write the results there as well")
    return parser.parse_args(argv)
