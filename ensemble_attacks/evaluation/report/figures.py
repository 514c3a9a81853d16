"""Draw what a run's records say: robust shares, convergence, curves over the radius; each with the data behind it."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ensemble_attacks.evaluation.curves import curves_of
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.report.picture import HUES, INK, Picture
from ensemble_attacks.evaluation.summary import called
from ensemble_attacks.evaluation.units import CLEAN, Unit, by_cell, seed_said

WORST_CASE = "worst case"
GREY = "#8a8b92"
JUDGED = ", judged"  # behind an attack's name, beside the figures of its last point


def of_cells(ledger: Ledger, summary: dict[str, Any]) -> list[list[Picture]]:
    """Return of every cell what its records give: the robust shares, and how they fell."""
    found = []
    for index, ((cell, chains), shown) in enumerate(zip(by_cell(ledger.manifest), summary["cells"], strict=True)):
        parts = _bars(shown, cell.title, index), _convergence(ledger, chains, shown, cell.title, index)
        found.append([picture for picture in parts if picture])
    return found


def _bars(cell: dict[str, Any], title: str, index: int) -> Picture:
    """Draw the robust share under each attack, with its interval."""
    shown = {CLEAN: cell["clean"], **cell["attacks"], WORST_CASE: cell.get("worst_case")}
    there = {name: row for name, row in shown.items() if row is not None}
    rows: list[tuple[Any, ...]] = []
    axes = (figure := Figure(figsize=(7, 0.8 + 0.36 * len(there)))).subplots()
    for name, row in there.items():
        robust, low, high = (100 * value for value in (row["accuracy"], *row["interval"]))
        label, colour = called(name, row, cell["n"]), {CLEAN: GREY, WORST_CASE: HUES[1]}.get(name, HUES[0])
        axes.barh(len(rows), robust, 0.62, color=colour)
        off = [[max(0.0, robust - low)], [max(0.0, high - robust)]]
        axes.errorbar(robust, len(rows), xerr=off, color=INK, capsize=3, linestyle="none")
        axes.text(102, len(rows), f"{robust:.1f}", va="center", fontsize=9)
        rows.append((label, *(round(value, 1) for value in (robust, low, high))))
    axes.set(xlim=(0, 101), xlabel="robust images (%)", yticks=range(len(rows)), yticklabels=[row[0] for row in rows])
    axes.invert_yaxis()
    caption = f"{title}: robust accuracy under each attack, with its 95% interval"
    return Picture(f"robust_{index}", caption, figure, ("attack", "robust %", "low", "high"), rows)


def _convergence(ledger: Ledger, chains: list[list[Unit]], cell: dict[str, Any], title: str, index: int) -> Picture | None:
    """Draw robust images against passes, all attacks of a cell on one axis (MORA, figure 4)."""
    axes = (figure := Figure(figsize=(7, 4))).subplots()
    rows: list[tuple[Any, ...]] = []
    for units in list(zip(*chains, strict=True))[1:]:
        name = units[0].attack
        if (row := cell["attacks"].get(name)) is None:
            continue
        points = _points(ledger, units) or _parts(row)
        end = (row["forwards_per_image"] + row["backwards_per_image"], 100 * row["accuracy"])
        if not points and not end[0]:
            continue
        (line,) = axes.step(*zip(*(points or [end]), strict=True), where="post", label=name)
        axes.plot(*end, marker="o", linestyle="none", color=line.get_color())
        rows += [(name, *point) for point in points] + [(f"{name}{JUDGED}", *end)]
    if all(name.endswith(JUDGED) for name, *_ in rows):
        return None
    axes.set(xscale="log", xlabel="passes (forward + backward) per image", ylabel="robust images (%)", ylim=(0, 101))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8)
    caption = (
        f"{title}: what is left robust, against the passes spent; a dot is the judge's verdict, and all there is of "
        "attacks of one pass, and of others' on a random model"
    )
    return Picture(f"convergence_{index}", caption, figure, ("attack", "passes", "robust %"), rows)


def _points(ledger: Ledger, units: tuple[Unit, ...]) -> list[tuple[float, float]]:
    """Return points (passes per image, robust %) of an attack over all ranges, step by step; none without a trace."""
    there = [(unit, info) for unit in units if (info := ledger.info(unit))]
    n = sum(unit.range[1] - unit.range[0] for unit, _ in there)
    attacked = [info for _, info in there if info["forwards"] or info["backwards"]]  # of a cascade, those that had any left
    if not attacked or not all(info["trace"] for info in attacked):
        return []
    moments: dict[tuple[int, int], tuple[float, float]] = {}
    for info in attacked:
        for row in info["trace"]:
            spent, fooled = moments.get((row["stage"], row["step"]), (0.0, 0.0))
            moments[row["stage"], row["step"]] = spent + row["forwards"] + row["backwards"], fooled + row["fooled"]
    if len(moments) < 2:  # of one pass, nothing converges
        return []
    first = [info["trace"][0] for info in attacked]
    points, spent, robust = [], 0.0, float(sum(row["robust"] + row["fooled"] for row in first))
    for _, (more, fooled) in sorted(moments.items()):
        spent, robust = spent + more, robust - fooled
        points.append((spent / n, 100 * robust / n))
    return points


def _parts(row: dict[str, Any]) -> list[tuple[float, float]]:
    """Return points (passes per image, robust %) after each part of a suite; none of what has no parts."""
    parts = row.get("stages", {}).values()
    return [(part["forwards_per_image"] + part["backwards_per_image"], 100 * part["robust"] / row["n"]) for part in parts]


def by_eps(summary: dict[str, Any]) -> list[Picture]:
    """Draw the worst case against the radius, where a run has several, with its interval."""
    lines: dict[str, list[tuple[float, ...]]] = {}
    for cell in summary["cells"]:
        if cell["clean"] is None or "worst_case" not in cell:
            continue
        name = f"{cell['model']}, {cell['vote']}{seed_said(cell['seed'])}"
        start = (0.0, *_shares(cell["clean"]))
        lines.setdefault(name, [start]).append((cell["eps"], *_shares(cell["worst_case"])))
    if all(len(points) < 3 for points in lines.values()):
        return []
    axes = (figure := Figure(figsize=(7, 4))).subplots()
    for name, points in lines.items():
        eps, robust, low, high = zip(*sorted(points), strict=True)
        (line,) = axes.plot(eps, robust, marker="o", label=name)
        axes.fill_between(eps, low, high, alpha=0.15, color=line.get_color())
    axes.set(xlabel="eps", ylabel="robust accuracy, worst case (%)", ylim=(0, 101))
    axes.legend(fontsize=8)
    rows = [(name, *point) for name, points in lines.items() for point in sorted(points)]
    caption = "Robust accuracy, worst case, against the radius, with its 95% interval"
    return [Picture("eps", caption, figure, ("model", "eps", "robust %", "low", "high"), rows)]


def _shares(row: dict[str, Any]) -> tuple[float, ...]:
    return tuple(100 * value for value in (row["accuracy"], *row["interval"]))


def by_distance(ledger: Ledger) -> list[Picture]:
    """Draw robust accuracy against the radius, image by image, of searches for the smallest one, down to chance."""
    pictures = []
    for index, (cell, curves, classes) in enumerate(curves_of(ledger)):
        axes = (figure := Figure(figsize=(7, 4))).subplots()
        rows: list[tuple[Any, ...]] = []
        for curve in curves:
            points = [(radius, *(100 * share for share in shares)) for radius, *shares in curve.points()]
            radii, robust, low, high = zip(*points, strict=True)
            (line,) = axes.step(radii, robust, where="post", label=curve.attack)
            axes.fill_between(radii, low, high, step="post", alpha=0.15, color=line.get_color())
            rows += [(curve.attack, *point) for point in points]
        axes.axhline(100 / classes, linestyle=":", color="grey", label=f"chance, {classes} classes")
        axes.set(xlabel=f"radius ({cell.norm})", ylabel="robust accuracy (%)", ylim=(0, 101), xlim=(0, None))
        axes.legend()
        caption = f"{cell.title}: robust accuracy against the radius, up to {cell.eps:g}, with its 95% interval"
        columns = ("attack", "radius", "robust %", "low", "high")
        pictures.append(Picture(f"curve_{index}", caption, figure, columns, rows))
    return pictures
