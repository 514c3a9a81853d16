"""Hold a figure of a report: as SVG that follows the page's colours, as PNG and PDF, and with the data behind it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ensemble_attacks.evaluation.report.tables import write_csv

INK = "#23242a"  # of text and lines
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe & Ito's, told apart by all eyes
DASHES = ("-", "--", "-.", ":")
STYLE: dict[str, Any] = {
    "axes.prop_cycle": cycler(linestyle=DASHES) * cycler(color=HUES),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "text.parse_math": False,  # a name with dollars in it is a name
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same report has the same bytes
    "font.family": "sans-serif",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    ),
}
DARK = {INK: "#d9dae0", HUES[0]: "#3d97dc"}  # what the SVG has in their place on a dark page


def _adapting(drawing: str) -> str:
    """Return an SVG whose colours follow the page's."""
    light = dark = ""
    for index, (colour, instead) in enumerate(DARK.items()):
        drawing = drawing.replace(colour, f"var(--c{index})")
        light, dark = f"{light}--c{index}: {colour}; ", f"{dark}--c{index}: {instead}; "
    rule = f"<style>svg {{ {light}}} @media (prefers-color-scheme: dark) {{ svg {{ {dark}}} }}</style>"
    return drawing.replace("<defs>", f"{rule}<defs>", 1)


@contextmanager
def drawn_alike() -> Iterator[None]:
    """Let figures look alike within the context, whatever the caller's settings of matplotlib are."""
    with style.context(["default", STYLE]):
        yield


@dataclass
class Picture:
    """A figure that has a name, a caption, and the data behind it."""

    name: str
    caption: str
    figure: Figure
    columns: Sequence[str] = ()
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    @cached_property
    def _box(self) -> Bbox:
        """Return what is drawn on, in inches, with a margin: looked at once, not for every file."""
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine(None)  # what it has laid out stays: it would draw all of it once more for every file
        return self.figure.get_tightbbox().padded(0.1)

    def svg(self) -> bytes:
        """Return the figure as SVG whose ink is dark on a light page, and light on a dark one."""
        metadata = {"Date": None, "Creator": f"matplotlib {matplotlib.__version__}"}
        self.figure.savefig(buffer := io.BytesIO(), format="svg", bbox_inches=self._box, transparent=True, metadata=metadata)
        return _adapting(buffer.getvalue().decode()).encode()

    def address(self) -> str:
        """Return the SVG as an address that holds all of it, for an ``img``, in which nothing can be run."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg()).decode()}"

    def save(self, folder: Path) -> None:
        """Write the figure and the data behind it into a folder."""
        for kind in ("pdf", "png"):
            dated = {"CreationDate": None} if kind == "pdf" else None
            self.figure.savefig(folder / f"{self.name}.{kind}", bbox_inches=self._box, metadata=dated, facecolor="white")
        if self.rows:
            write_csv(folder / f"{self.name}.csv", self.columns, self.rows)
