"""Pictures and tables of stored results: `python -m benchmarks.figures`.

Every JSON file in benchmarks/results that a quality, needles or memory run wrote becomes a picture of the
same name in docs/figures, and every block of README.md, docs/quality.md and docs/speed.md between
`<!-- results NAME -->` (or `<!-- results NAME short -->`) and `<!-- end -->` is written anew: picture,
circumstances and table. No number there is typed. Needs the extra `docs` (matplotlib).
"""

import argparse
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

from . import decode_attention, generate, memory, needles, quality
from .methods import POLICIES, QUANTIZED

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES = ROOT / "benchmarks/results", ROOT / "docs/figures"
PAGES = (ROOT / "README.md", ROOT / "docs/quality.md", ROOT / "docs/speed.md")
BLOCK = re.compile(r"<!-- results (?P<name>[\w.-]+)(?P<short> short)? -->.*?<!-- end -->", re.DOTALL)

BLUE, GREEN, ORANGE, RED, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#666666"
MANY = 30  # points that are not all named
GROUPS = {  # label, colour and marker of the dots
    "uncompressed": (GREY, "D"),
    "all tokens kept": (BLUE, "o"),
    "position decides": (ORANGE, "s"),
    "attention, keys or a network decide": (GREEN, "^"),
    "transformers' QuantizedCache": (RED, "X"),
}


def group(name: str) -> str:
    """Which of `GROUPS` a method belongs to."""
    base = name.split(":")[0]
    if base in ("dynamic", "off"):
        return "uncompressed"
    if base in QUANTIZED:
        return "transformers' QuantizedCache"
    if base in ("balanced", "aggressive", "streaming", "position"):
        return "position decides"
    return "attention, keys or a network decide" if base in POLICIES else "all tokens kept"


# -- pictures


def pareto(reports: list[dict], path: Path) -> None:
    """Perplexity ratio and mean KL against allocated bytes a token, of the first report with each name."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    rows = {}
    for report in reports:
        results = [quality.Result(**r) for r in report["results"]]
        rows = {name: s for name, s in quality.summaries(results).items() if s.smaller} | rows
    rows = {name: s for name, s in rows.items() if group(name) != "uncompressed"}
    for axes, field, label in (
        (panels[0], "ratio", "perplexity ratio to uncompressed"),
        (panels[1], "kl", "mean KL to uncompressed, nats"),
    ):
        places = {name: (1 / s.smaller, getattr(s, field)) for name, s in rows.items()}
        line = [places[name] for name in quality.front(places)]
        axes.plot(*zip(*line), color="#bbbbbb", lw=1.2, zorder=1, label="Pareto front")
        for name, (colour, marker) in GROUPS.items():
            mine = [p for n, p in places.items() if group(n) == name]
            if mine:
                axes.scatter(*zip(*mine), color=colour, marker=marker, s=30, zorder=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="allocated bytes a token, share of bf16", ylabel=label)
        shares = [1 / n for n in (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)]
        low, high = axes.get_xlim()
        axes.set_xticks([x for x in shares if low <= x <= high])
        axes.set_xticks([], minor=True)
        axes.set_xlim(low, high * 1.15)  # room for a name
        if field == "kl":
            axes.set_ylim(top=axes.get_ylim()[1] * 2)
        axes.xaxis.set_major_formatter(lambda x, _: f"1/{1 / x:.3g}")
        if field == "ratio":
            axes.yaxis.set_major_formatter("{x:.3g}")
            axes.yaxis.set_minor_formatter("{x:.3g}")
    panels[0].legend(fontsize=7, frameon=False)
    figure.canvas.draw()  # lays out; only now points have places
    for axes, field in zip(panels, ("ratio", "kl")):
        _name(axes, {name: (1 / s.smaller, getattr(s, field)) for name, s in rows.items()})
    _save(figure, path)


def _name(axes, places: dict[str, tuple[float, float]]) -> None:
    """Write names beside points, moved where they would lie on each other; of many, only the best."""
    if len(places) > MANY:
        places = {name: places[name] for name in quality.front(places)}
    pixel = axes.figure.dpi / 72
    places = sorted(places.items(), key=lambda item: item[1][1])
    points = [axes.transData.transform(p) for _, p in places]
    at = [y for _, y in points]
    for _ in range(200):  # neighbours that lie on each other push each other away
        for i, j in itertools.combinations(range(len(at)), 2):
            overlap = 9 * pixel - (at[j] - at[i])
            if overlap > 0 and abs(points[i][0] - points[j][0]) < 52 * pixel:
                at[i] -= overlap / 2
                at[j] += overlap / 2
    for (name, p), (_, y), height in zip(places, points, at):
        moved = abs(height - y) > 2 * pixel
        line = dict(arrowstyle="-", lw=0.4, color="#999999", shrinkA=0, shrinkB=2) if moved else None
        offset = (9, (height - y) / pixel - 2.5)
        axes.annotate(
            name, p, xytext=offset, textcoords="offset points", fontsize=7, zorder=4, arrowprops=line
        )


def heat_map(report: dict, path: Path) -> None:
    """Share of examples answered in full, by config and depth; a panel for each task and length."""
    from matplotlib import pyplot as plt

    results = [needles.Result(**r) for r in report["results"] if not r.get("failed")]
    cells = list(dict.fromkeys((r.task, r.length) for r in results))
    names = list(dict.fromkeys(r.method for r in results))
    widths = [max(2, len({r.depth for r in results if (r.task, r.length) == cell})) for cell in cells]
    figure, panels = plt.subplots(
        1, len(cells), figsize=(1.6 + 0.42 * sum(widths), 1.2 + 0.24 * len(names)), sharey=True,
        width_ratios=widths, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes, (task, length) in zip(panels[0], cells):
        mine = {(r.method, r.depth): r.exact for r in results if (r.task, r.length) == (task, length)}
        depths = sorted({depth for _, depth in mine})
        grid = [[mine.get((name, depth), float("nan")) for depth in depths] for name in names]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(depths)), [f"{depth}" for depth in depths], fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_title(f"{task}\n{length}", fontsize=8)
    figure.supxlabel("depth of the fact, percent of the text before it", fontsize=8)
    figure.colorbar(image, ax=panels[0], label="answered exactly", fraction=0.03)
    _save(figure, path)


def memory_curves(report: dict, path: Path) -> None:
    """Bytes held against length."""
    from matplotlib import pyplot as plt

    results = [memory.Result(**r) for r in report["results"] if not r.get("failed")]
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    ends = {}
    for name in dict.fromkeys(r.method for r in results):
        mine = [(r.length, r.grown / 2**20) for r in results if r.method == name]
        colour, marker = GROUPS[group(name)]
        axes.plot(*zip(*mine), color=colour, marker=marker, ms=4, lw=1)
        ends[name] = mine[-1]
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MiB allocated by the cache")
    lengths = sorted({r.length for r in results})
    axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_xlim(right=max(lengths) * 1.9)  # room for names
    figure.canvas.draw()
    _name(axes, ends)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})  # the same bytes for the same numbers
    plt.close(figure)


#: kind of a report -> how it is drawn, the picture's title, and its table
KINDS = {
    "quality": (lambda report, path: pareto([report], path), "Quality against bytes", quality),
    "needles": (heat_map, "Facts asked for again", needles),
    "memory": (memory_curves, "Bytes against length", memory),
}


# -- text

#: Columns of the short table: what ran of these.
SHORT = (
    "int8",
    "int4",
    "int3",
    "k4v2",
    "int2",
    "quanto4",
    "balanced",
    "streaming",
    "position",
    "h2o",
    "learned",
)


def load(name: str) -> dict:
    """The stored report called `name`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def short_table(results: list[quality.Result]) -> str:
    """Of what ran: three numbers a config, which are the columns."""
    rows = quality.summaries(results)
    rows = {name: rows[name] for name in SHORT if name in rows}
    numbers = {
        "allocated": lambda s: "-" if s.smaller is None else f"1/{s.smaller:.1f}",
        "perplexity ratio": lambda s: f"{s.ratio:.3f}",
        "mean KL": lambda s: f"{s.kl:.4f}",
    }
    lines = ["| | " + " | ".join(f"`{name}`" for name in rows) + " |", "|---" * (1 + len(rows)) + "|"]
    for label, number in numbers.items():
        lines.append(f"| {label} | " + " | ".join(map(number, rows.values())) + " |")
    return "\n".join(lines)


def agreement(of: str) -> str:
    """Table: what formats cost a model `of` by an independent simulation, by ours, and through the cache."""
    kinds = [kind for kind in ("independent", "simulation", "quality") if has(kind, of)]
    sources = {kind: load(f"{kind}-{of}") for kind in kinds}
    theirs = sources["independent"]
    columns = {f"independent, {theirs['windows']} windows": {r["format"]: r for r in theirs["results"]}}
    if found := sources.get("simulation"):
        for mask, label in (("last", "simulated, last 64 exact"), ("blocks", "simulated, as the cache")):
            rows = {r["format"]: r for r in found["results"] if r["mask"] == mask}
            columns[f"{label}, {found['windows']} window{'s' * (found['windows'] > 1)}"] = rows
    if found := sources.get("quality"):
        n = min(found["windows"], theirs["windows"])  # the same windows, as far as there are
        results = [quality.Result(**r) for r in found["results"]]
        results = [replace(r, nll=r.nll[:n], kl=r.kl[:n], top1=r.top1[:n]) for r in results]
        rows = {name: dict(ratio=s.ratio, kl=s.kl) for name, s in quality.summaries(results).items()}
        columns[f"cache, {n} window{'s' * (n > 1)}"] = rows
    lines = ["| format | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for r in theirs["results"]:
        found = (rows.get(r["format"]) for rows in columns.values())
        cells = ["-" if x is None else f"{x['ratio']:.4f}, KL {x['kl']:.4f}" for x in found]
        lines.append(f"| {r['format']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def generation(of: str, short: bool) -> str:
    """Table of `benchmarks.generate` on a device `of`; short: milliseconds a step alone."""
    report = load(f"generate-{of}")
    results = [generate.Result(**r) for r in report["results"] if not r["failed"]]
    told = f"{report['device']}, torch {report['torch']}, transformers {report['transformers']}."
    if not short:
        return f"{told}\n\n{generate.tables(results)}"
    cases = generate.LONG, generate.WIDE
    methods = [m for m in generate.METHODS if any(r.method == m and r.case in cases for r in results)]
    head = [f"ms a step, {report['device']}", *(f"`{m}`" for m in methods)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in cases:
        found = {r.method: f"{r.ms:.1f}" for r in results if r.case == case}
        lines.append(f"| {case} | " + " | ".join(found.get(m, "-") for m in methods) + " |")
    return "\n".join(lines)


def attention(of: str) -> str:
    """Table of `benchmarks.decode_attention` on a device `of`, and what else it measured."""
    report = load(f"decode_attention-{of}")
    results = [decode_attention.Result(**r) for r in report["results"]]
    told = [f"{report['device']}, torch {report['torch']}.", decode_attention.table(results)]
    others = [name for name in ("lengths", "encode", "processes") if name in report]
    return "\n\n".join(told + [decode_attention.describe(name, report[name]) for name in others])


def has(kind: str, of: str) -> bool:
    return (RESULTS / f"{kind}-{of}.json").is_file()


def block(name: str, page: Path, short: bool = False) -> str:
    """What stands between the marks of `name` in a page: the name of a report, or agreement-MODEL."""
    kind, _, of = name.partition("-")
    if kind == "agreement":
        return agreement(of)
    if not has(kind, of):
        return "Not measured yet."
    if kind in ("generate", "decode_attention"):
        return generation(of, short) if kind == "generate" else attention(of)
    report = load(name)
    _, title, module = KINDS[report["kind"]]
    picture = os.path.relpath(FIGURES / f"{name}.png", page.parent).replace(os.sep, "/")
    results = [module.Result(**r) for r in report["results"]]
    if report["kind"] == "quality":
        told = quality.headline(report).split(", in chunks")[0] if short else quality.headline(report)
    else:
        told = "{model}, {dtype}, {device}, torch {torch}, transformers {transformers}".format(**report)
    table = short_table(results) if short else module.table(results)
    gap = "" if short else "\n"  # the README has few lines
    if report["kind"] == "quality" and not short:
        table += "\n\n" + quality.best_trades(results)
    return f"![{title}]({picture})\n{gap}{told}.\n\n{table}"


def filled(text: str, page: Path) -> str:
    """A page with all of its blocks as the stored numbers say."""

    def replaced(found: re.Match) -> str:
        short = found["short"] or ""
        told = block(found["name"], page, bool(short))
        return f"<!-- results {found['name']}{short} -->\n{told}\n<!-- end -->"

    return BLOCK.sub(replaced, text)


def stored_reports() -> dict[str, dict]:
    """Every stored report that this draws, by name."""
    found = {path.stem: load(path.stem) for path in sorted(RESULTS.glob("*.json"))}
    return {name: report for name, report in found.items() if report.get("kind") in KINDS}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="write text only")
    args = parser.parse_args(argv)
    for name, report in stored_reports().items() if args.pictures else ():
        draw, _, _ = KINDS[report["kind"]]
        draw(report, FIGURES / f"{name}.png")
        print(f"docs/figures/{name}.png")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text, page), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {len(BLOCK.findall(text))} blocks")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
