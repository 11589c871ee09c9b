"""The report of a run as a table, JSON and Markdown, and the comparison of two reports."""

import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from fade_fast.saved.files import whole

from .case import Outcome
from .tolerances import CLAIMS

SCHEMA = 1
COLUMNS = ("group", "cases", "compiled", "bit for bit", "worst tolerance", "error", "allowed", "result")


def machine(device: str, seed: int) -> dict:
    """The machine, the versions and the seed of a run."""
    result = {
        "device": platform.processor() or platform.machine(),
        "driver": None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "commit": _commit(),
        "seed": seed,
    }
    if device != "cpu":
        result |= {"device": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
    else:
        result["device"] = f"CPU, {result['device']}, {torch.backends.cpu.get_cpu_capability()}"
    return result


def _output_of(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def _commit() -> str | None:
    """The commit of the working tree. A plus at the end: tracked files outside docs have changes."""
    commit = _output_of("git", "rev-parse", "HEAD")
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no", "--", "..", ":!../docs")
    return commit and commit + ("+" if changed else "")


def _driver() -> str | None:
    output = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return output and output.splitlines()[0]


def record(outcomes: list[Outcome], where: dict, seconds: float, busy: float) -> dict:
    """The JSON object of a run. `busy`: the CPU seconds of the run."""
    cases, graphs = [], set()
    for outcome in outcomes:
        case = outcome.case
        graphs |= outcome.ran.graphs
        row = {"subject": case.subject, "group": case.group, "name": case.name, "passed": outcome.passed}
        if case.known:
            row["known"] = case.known
        if outcome.ran.graphs:
            row["compiled"] = len(outcome.ran.graphs)
        if outcome.raised:
            row["raised"] = outcome.raised
        row["checks"] = [_check(check) for check in outcome.checks]
        cases.append(row)
    result = {"schema": SCHEMA, "machine": where, "seconds": round(seconds, 1)}
    result["seconds busy"] = round(busy, 1)
    if graphs:
        compiling = sum(outcome.ran.seconds for outcome in outcomes)
        result |= {"twins": len(graphs), "seconds compiling": round(compiling, 1)}
    return result | {"cases": cases}


def _check(check) -> dict:
    row = {
        "claim": check.claim,
        "error": float(f"{check.error:.3g}"),
        "allowed": float(f"{check.allowed:.3g}"),
    }
    if not check.passed:
        row["where"] = check.where
    elif check.digest:
        row["digest"] = check.digest
    return row


def write(report: dict, path: str) -> None:
    """Write JSON with one case per line, so that a diff of two reports is readable."""
    head = {name: value for name, value in report.items() if name != "cases"}
    lines = [json.dumps(head)[:-1] + ', "cases": [']
    lines += [",\n".join(json.dumps(case) for case in report["cases"]), "]}", ""]
    with whole(path) as written:
        written.write_text("\n".join(lines), encoding="utf-8")


def read(path: str) -> dict:
    """Read a report. Raises `ValueError` if the file contains none."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        if report["schema"] == SCHEMA and isinstance(report["cases"], list):
            return report
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no report of fade parity --json") from error
    raise ValueError(f"{path}: a report of schema {report['schema']}, not {SCHEMA}")


def status(case: dict) -> str:
    if case["passed"]:
        return "fixed" if case.get("known") else "ok"
    return "known bug" if case.get("known") else "FAILED"


def failures(report: dict) -> list[dict]:
    return [case for case in report["cases"] if status(case) == "FAILED"]


def title(case: dict) -> str:
    return f"{case['subject']}/{case['group']}/{case['name']}"


def rows(report: dict) -> dict[str, list[tuple]]:
    """For each subject, one row per group with the fields of `COLUMNS`."""
    groups: dict[tuple, list[dict]] = {}
    for case in report["cases"]:
        groups.setdefault((case["subject"], case["group"]), []).append(case)
    table: dict[str, list[tuple]] = {}
    for (subject, group), cases in groups.items():
        checks = [check for case in cases if status(case) != "known bug" for check in case["checks"]]
        bits = [c for c in checks if CLAIMS[c["claim"]].is_bits]
        near = [c for c in checks if not CLAIMS[c["claim"]].is_bits]
        worst = max(near, key=lambda c: c["error"] / (c["allowed"] or 1e-300), default=None)
        equal = sum(c["error"] == 0 for c in bits)
        counts = {status(case): 0 for case in cases}
        for case in cases:
            counts[status(case)] += 1
        result = "ok" if set(counts) == {"ok"} else ", ".join(f"{n} {name}" for name, n in counts.items())
        table.setdefault(subject, []).append(
            (
                group,
                str(len(cases)),
                str(sum("compiled" in case for case in cases) or ""),
                f"{equal} of {len(bits)}" if bits else "",
                worst["claim"] if worst else "",
                f"{worst['error']:.1e}" if worst else "",
                f"{worst['allowed']:.1e}" if worst else "",
                result,
            )
        )
    return table


def _laid_out(header: Iterable[str], lines: list[tuple]) -> list[str]:
    """Pad the fields of each line, so that the columns are aligned."""
    every = [tuple(header), *lines]
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))]
    return ["  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in every]


def text(report: dict) -> str:
    """The table that the command prints."""
    table, lines = rows(report), []
    laid = iter(_laid_out(COLUMNS, [row for part in table.values() for row in part]))
    lines += [f"  {next(laid)}"]
    for subject, part in table.items():
        lines += [subject, *(f"  {next(laid)}" for _ in part)]
    return "\n".join([*lines, "", *_remarks(report), summary(report)])


def _remarks(report: dict) -> list[str]:
    """One line for each failed case and each known bug."""
    lines = []
    for case in report["cases"]:
        if status(case) == "FAILED":
            wrong = [case["raised"]] if "raised" in case else []
            wrong += [
                f"{c['claim']}: {c['error']:.3g} > {c['allowed']:.3g} ({c['where']})"
                for c in case["checks"]
                if "where" in c
            ]
            lines.append(f"FAILED {title(case)}: " + ("; ".join(wrong) or "it checked nothing"))
        elif status(case) == "known bug":
            lines.append(f"known bug {title(case)}: {case['known']}")
        elif status(case) == "fixed":
            lines.append(f"fixed {title(case)}: no longer so, remove the mark: {case['known']}")
    return lines


def summary(report: dict) -> str:
    where, failed = report["machine"], len(failures(report))
    known = sum(status(case) == "known bug" for case in report["cases"])
    busy = report.get("seconds busy", report["seconds"])
    said = f"{len(report['cases'])} cases in {report['seconds']:.0f} s ({busy:.0f} s busy): "
    said += f"{failed} failed" if failed else "none failed"
    said += f", {known} known bugs" if known else ""
    if "twins" in report:
        ran = sum("compiled" in case for case in report["cases"])
        said += f"; {ran} cases ran compiled, {report['twins']} kernels in "
        said += f"{report['seconds compiling']:.0f} s"
    return f"{said}; torch {where['torch']}, transformers {where['transformers']}, {where['device']}"


def markdown(report: dict) -> str:
    """The report in Markdown, with the claims and their reasons."""
    where = report["machine"]
    out = ["# Parity of fade_fast with fade_ref", "", summary(report) + ".", ""]
    out += ["| | |", "|---|---|"]
    out += [f"| {name} | {value} |" for name, value in where.items() if value is not None]
    for subject, part in rows(report).items():
        out += ["", f"## {subject}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        out += ["| " + " | ".join(row) + " |" for row in part]
    remarks = _remarks(report)
    if remarks:
        out += ["", "## Remarks", "", *(f"- {line}" for line in remarks)]
    out += ["", "## Claims", "", "| claim | kind | why |", "|---|---|---|"]
    used = {check["claim"] for case in report["cases"] for check in case["checks"]}
    for name, claim in CLAIMS.items():
        if name in used:
            kind = "bit for bit" if claim.is_bits else "within " + _allowed(claim.allowed)
            out.append(f"| {name} | {kind} | {claim.reason.replace('|', chr(92) + '|')} |")
    return "\n".join([*out, ""])


def _allowed(allowed) -> str:
    if not isinstance(allowed, dict):
        return f"{allowed:.1e}"
    return ", ".join(f"{x:.1e} ({str(d).removeprefix('torch.')})" for d, x in allowed.items())


def compare(one: dict, other: dict) -> tuple[str, bool]:
    """The differences between two runs as text, and whether one of them is not allowed.

    The bits, the results and the lists of cases must agree. Errors within their tolerances may differ. The
    text lists an error if it is more than twice the other one. The largest ratio to the tolerance is first.
    """
    left, right = ({title(case): case for case in report["cases"]} for report in (one, other))
    lines = [f"A: {summary(one)}", f"B: {summary(other)}", ""]
    bits, near, results = [], [], []
    # A set of names, since an older report may contain a claim that no longer exists.
    exact = {name for name, claim in CLAIMS.items() if claim.is_bits}
    for name in [n for n in left if n in right]:
        a, b = left[name], right[name]
        if a["passed"] != b["passed"]:
            results.append(f"  {name}: A {status(a)}, B {status(b)}")
        checks = [{check["claim"]: check for check in case["checks"]} for case in (a, b)]
        for claim in [c for c in checks[0] if c in checks[1]]:
            x, y = checks[0][claim], checks[1][claim]
            if x.get("digest") != y.get("digest") and "digest" in x and "digest" in y:
                bits.append(f"  {name}: {claim}: {x['digest'][:16]} in A, {y['digest'][:16]} in B")
            elif claim not in exact and max(x["error"], y["error"]) > 2 * min(x["error"], y["error"]):
                size = max(x["error"], y["error"]) / max(x["allowed"], y["allowed"], 1e-300)
                line = f"  {name}: {claim}: {x['error']:.2e} in A, {y['error']:.2e} in B"
                near.append((size, f"{line}, allowed {x['allowed']:.1e}"))
    lonely = [f"  {name}: only in A" for name in left if name not in right]
    lonely += [f"  {name}: only in B" for name in right if name not in left]
    near = [line for _, line in sorted(near, reverse=True)]
    for heading, part in (
        ("Bits that differ", bits),
        ("Results that differ", results),
        ("Cases that only one has", lonely),
        ("Errors of which one is over twice the other (allowed)", near),
    ):
        lines.append(f"{heading}: {len(part) or 'none'}")
        lines += part[:40] + ([f"  and {len(part) - 40} more"] if len(part) > 40 else [])
    return "\n".join(lines), bool(bits or results or lonely)
