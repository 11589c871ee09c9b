"""`fade parity` and `python -m parity`: test whether fade_fast agrees with fade_ref on this machine.

fade parity                        runs every case; the exit code is 1 if a case fails
fade parity compare A.json B.json  lists the differences between two machines; 1 if bits differ
fade parity mutate                 corrupts one function at a time; 1 if a corruption survives
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence

from fade_fast.saved.files import whole

DTYPES = ("float64", "float32", "float16", "bfloat16")
COMPILED = ("all", "some", "none")  # those of `twins`, which imports torch; a test compares them


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fade parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device of fade_fast")
    top.add_argument("--dtype", choices=DTYPES, help="skip the cases of other dtypes")
    only = "run the cases whose subject/group/name contains PATTERN"
    top.add_argument("--only", default="", metavar="PATTERN", help=only)
    top.add_argument(
        "--compiled",
        default="some",
        choices=COMPILED,
        help="which cases run compiled on a GPU. The default is some: these cases share their shapes. "
        "The other cases run eagerly.",
    )
    jobs = "number of processes that share the cases. The default is 1, and up to 8 on a GPU."
    top.add_argument("--jobs", type=int, metavar="N", help=jobs)
    top.add_argument("--seed", default=0, type=int, help="seed of all inputs, 0 by default")
    top.add_argument("--json", metavar="FILE", help="write the results to FILE, for `compare`")
    top.add_argument("--markdown", metavar="FILE", help="write the tables and the claims to FILE")
    commands = top.add_subparsers(dest="command", metavar="")
    two = commands.add_parser("compare", help="compare two reports")
    two.add_argument("one", metavar="A.json")
    two.add_argument("other", metavar="B.json")
    mutate = commands.add_parser("mutate", help="test whether the cases notice corrupted kernels")
    only = "run the mutants whose name contains PATTERN"
    mutate.add_argument("--only", default="", metavar="PATTERN", help=only)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. The exit code is 0, 1 if a result does not agree, or 2 if the command cannot run."""
    args = parser().parse_args(argv)
    import torch  # takes seconds, as what follows does: not before wrong options are told
    from transformers.utils import logging

    from . import mutants, report

    logging.set_verbosity_error()
    torch.set_num_threads(1)  # the tensors are tiny: threads would wait for each other
    warnings.filterwarnings("ignore", message=".*non-contiguous.*")
    try:
        if args.command == "compare":
            text, differ = report.compare(report.read(args.one), report.read(args.other))
            print(text)
            return int(differ)
        if args.command == "mutate":
            return mutants.main(args.only)
        return run(args)
    except (OSError, ValueError) as error:
        print(f"fade parity: error: {error}", file=sys.stderr)
        return 2


def run(args) -> int:
    """Run every case that the arguments select."""
    import torch
    from tqdm import tqdm

    from . import pool, report, subjects

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    cases = [c for c in subjects.collect(args.dtype and getattr(torch, args.dtype)) if args.only in c.title]
    if not cases:
        raise ValueError(f"--only {args.only}: no case has it in its subject/group/name")
    jobs = (min(8, os.cpu_count()) if args.device == "cuda" else 1) if args.jobs is None else args.jobs
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: at least 1")
    start, busy, graphs = time.perf_counter(), _busy(), 0
    outcomes: list = [None] * len(cases)
    with tqdm(total=len(cases), unit="case", leave=False, disable=None) as bar:
        for index, outcome in pool.performed(cases, args.device, args.seed, args.compiled, jobs):
            outcomes[index] = outcome
            graphs += len(outcome.ran.graphs)
            bar.set_description(cases[index].subject)
            bar.set_postfix(compiled=graphs, refresh=False)
            bar.update()
    where = report.machine(args.device, args.seed) | dict(compiled=args.compiled)
    results = report.record(outcomes, where, time.perf_counter() - start, _busy() - busy)
    print(report.text(results))
    if args.json:
        report.write(results, args.json)
    if args.markdown:
        with whole(args.markdown) as path:
            path.write_text(report.markdown(results), encoding="utf-8")
    return int(bool(report.failures(results)))


def _busy() -> float:
    """CPU seconds of this process and of the child processes that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


if __name__ == "__main__":
    sys.exit(main())
