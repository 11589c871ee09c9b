"""Pictures of measured records. Drawing needs the extra `plot` (matplotlib).

The functions take records, not reports. So this module imports none of the benchmarks that make the
records; those benchmarks and `figures` import it.
"""

import itertools
import math
from pathlib import Path

from fade_fast.errors import require

from .names import POLICIES, QUANTIZED

BLUE, GREEN, ORANGE, RED, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#666666"
MANY = 30  # points that are not all named
GROUPS = {  # label, color and marker of the dots
    "uncompressed": (GREY, "D"),
    "all tokens kept": (BLUE, "o"),
    "position decides": (ORANGE, "s"),
    "attention, keys or a network decide": (GREEN, "^"),
    "transformers' QuantizedCache": (RED, "X"),
}


def path(text: str) -> Path:
    """The type of an option that names a picture. Raises `MissingPackage` before anything is measured."""
    require("drawing", "plot", "matplotlib")
    return Path(text)


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


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other point beats in both numbers. Smaller is better. Sorted by the first
    number.

    >>> front({"a": (1, 3), "b": (2, 2), "c": (3, 2.5), "d": (4, 1)})
    ['a', 'b', 'd']
    """
    best, found = math.inf, []
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if y < best:
            best = y
            found.append(name)
    return found


def pareto(rows: dict, path: Path) -> None:
    """Perplexity ratio and mean KL against allocated bytes per token. `rows` are `quality.Summary`, by name.

    Rows without bytes, and uncompressed rows, are left out.
    """
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    rows = {name: s for name, s in rows.items() if s.smaller and group(name) != "uncompressed"}
    for axes, field, label in (
        (panels[0], "ratio", "perplexity ratio to uncompressed"),
        (panels[1], "kl", "mean KL to uncompressed, nats"),
    ):
        places = {name: (1 / s.smaller, getattr(s, field)) for name, s in rows.items()}
        line = [places[name] for name in front(places)]
        axes.plot(*zip(*line), color="#bbbbbb", lw=1.2, zorder=1, label="Pareto front")
        for name, (color, marker) in GROUPS.items():
            mine = [p for n, p in places.items() if group(n) == name]
            if mine:
                axes.scatter(*zip(*mine), color=color, marker=marker, s=30, zorder=3, label=name)
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
    """Write names beside points, and move names that would overlap. If there are many points, name only the
    front.
    """
    if len(places) > MANY:
        places = {name: places[name] for name in front(places)}
    pixel = axes.figure.dpi / 72
    places = sorted(places.items(), key=lambda item: item[1][1])
    points = [axes.transData.transform(p) for _, p in places]
    at = [y for _, y in points]
    for _ in range(200):  # neighbors that lie on each other push each other away
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


def heat_map(results: list, path: Path) -> None:
    """Share of examples answered in full, by config and depth, with a panel for each task and length.

    `results` are `needles.Result`. Failed ones are left out.
    """
    from matplotlib import pyplot as plt

    results = [r for r in results if not r.failed]
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


def memory_curves(results: list, path: Path) -> None:
    """Bytes of a cache against length. `results` are `memory.Result`. Failed ones are left out."""
    from matplotlib import pyplot as plt

    results = [r for r in results if not r.failed]
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    ends = {}
    for name in dict.fromkeys(r.method for r in results):
        mine = [(r.length, r.grown / 2**20) for r in results if r.method == name]
        color, marker = GROUPS[group(name)]
        axes.plot(*zip(*mine), color=color, marker=marker, ms=4, lw=1)
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
