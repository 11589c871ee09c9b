"""`python -m parity`: proves on this machine that fade_fast is fade_ref.

python -m parity                      every case; exit code 1 if one fails
python -m parity compare A.json B.json  which cases differ between two machines; 1 if bits do
python -m parity mutate               corrupts the kernels in turn; 1 if a corruption goes unnoticed
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers.utils import logging

from fade_fast.saved.files import whole

from . import mutants, pool, report, subjects, twins

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where fade_fast runs")
    top.add_argument("--dtype", choices=DTYPES, help="of the cases of one dtype, only those of this one")
    top.add_argument("--only", default="", metavar="PATTERN", help="cases whose subject/group/name has it")
    top.add_argument(
        "--compiled",
        default="some",
        choices=twins.CHOICES,
        help="cases that run compiled where fade_fast compiles, on a GPU: by default some, which share "
        "their shapes; the others run eagerly there",
    )
    jobs = "processes that share the cases: 1, on a GPU up to 8, unless you say otherwise"
    top.add_argument("--jobs", type=int, metavar="N", help=jobs)
    top.add_argument("--seed", default=0, type=int, help="of all inputs; 0 unless you say otherwise")
    top.add_argument("--json", metavar="FILE", help="write what was found, for `compare`")
    top.add_argument("--markdown", metavar="FILE", help="write the tables and the claims")
    commands = top.add_subparsers(dest="command", metavar="")
    two = commands.add_parser("compare", help="compare two reports")
    two.add_argument("one", metavar="A.json")
    two.add_argument("other", metavar="B.json")
    mutate = commands.add_parser("mutate", help="show that corrupted kernels are noticed")
    mutate.add_argument("--only", default="", metavar="PATTERN", help="mutants whose name has it")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, 1 if something does not agree, 2 if it cannot run."""
    args = parser().parse_args(argv)
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # tensors are tiny here: threads would wait for each other
    warnings.filterwarnings("ignore", message=".*non-contiguous.*")
    try:
        if args.command == "compare":
            said, differ = report.compare(report.read(args.one), report.read(args.other))
            print(said)
            return int(differ)
        if args.command == "mutate":
            return mutants.main(args.only)
        return run(args)
    except (OSError, ValueError) as error:
        print(f"python -m parity: error: {error}", file=sys.stderr)
        return 2


def run(args) -> int:
    """Every case that was asked for."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    cases = [c for c in subjects.collect(DTYPES.get(args.dtype)) if args.only in c.title]
    if not cases:
        raise ValueError(f"--only {args.only}: no case has it in its subject/group/name")
    jobs = (min(8, os.cpu_count()) if args.device == "cuda" else 1) if args.jobs is None else args.jobs
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: at least 1")
    start, busy, graphs = time.perf_counter(), _busy(), 0
    outcomes: list = [None] * len(cases)
    with tqdm(total=len(cases), unit="case", leave=False, disable=None) as bar:
        for place, outcome in pool.performed(cases, args.device, args.seed, args.compiled, jobs):
            outcomes[place] = outcome
            graphs += len(outcome.ran.graphs)
            bar.set_description(cases[place].subject)
            bar.set_postfix(compiled=graphs, refresh=False)
            bar.update()
    where = report.machine(args.device, args.seed) | dict(compiled=args.compiled)
    found = report.record(outcomes, where, time.perf_counter() - start, _busy() - busy)
    print(report.text(found))
    if args.json:
        report.write(found, args.json)
    if args.markdown:
        with whole(args.markdown) as path:
            path.write_text(report.markdown(found), encoding="utf-8")
    return int(bool(report.failures(found)))


def _busy() -> float:
    """Seconds that the processor has worked for this process and for those that it started and saw end."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


if __name__ == "__main__":
    sys.exit(main())
