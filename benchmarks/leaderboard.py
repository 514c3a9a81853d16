"""What every defense that ships is worth: clean accuracy, the standard suite's verdict, the best attack known, the flags.

    python benchmarks/leaderboard.py --datasets digits,cifar10 --data-dir DIR --out runs/leaderboard

Goes on where it stopped (see `cells`). Writes ``leaderboard.json``, from which all else is made, ``leaderboard.html`` (one
page that needs nothing else), and the table as Markdown and CSV. ``--page-only`` makes the page from the JSON alone. Of a
cell that was not run here, the records of `table1` beside the board are taken, and where there are none, its row stays as it
is in the JSON: ``--table-only --datasets digits,cifar10 --out benchmarks/results/leaderboard`` makes the board that ships.

The page links a defense's card and paper, the records of its attacks where they lie beside the page, and a report
(``ensemble-attacks report RUN --out CELL/report``) where one was written among them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.cells import Cell, Run, summary
from benchmarks.options import Benchmark, named
from benchmarks.tables import save_table
from defenses import list_models, load_model
from ensemble_attacks.data import load_dataset
from ensemble_attacks.diagnostics import diagnose
from ensemble_attacks.evaluation.report.pages import render_page
from ensemble_attacks.files import write_whole
from ensemble_attacks.models.passes import passes_per_image
from ensemble_attacks.models.votes import VOTES

RANDOM = ("multiresolution", "purified")  # defenses that draw at random
FRONT_ENDED = ("frontend", "purified")
AUTO = "auto"
SUITES = {False: "autoattack", True: "autoattack-rand"}
SOFT = "soft-apgd"  # the plain baseline: a soft vote in place of the real one
SOFT_VOTES = "votes-apgd"  # the same of soft votes, each member's at its own gap
MEAN = "crossmax-transfer?refine=None"  # the same of the mean logits
SURROGATES = (SOFT, SOFT_VOTES, MEAN)  # APGD on one stand-in for the vote, whose images are judged on the vote
ATTACKS = {False: ("cw", *SURROGATES, "crossmax-transfer", "mora-mt"), True: ("eot-apgd", "crossmax-transfer", "mora")}
KEY = ("dataset", "defense", "vote", "eps")  # of a row
DRAWS, EOT_ITER = 10, 5
DIAGNOSED = 64
WEIGHTS = Path(__file__).resolve().parents[1] / "defenses" / "weights"
PAPERS = {  # of the defenses, by the beginning of their names
    "adp": "https://arxiv.org/abs/1901.08846",
    "dverge": "https://arxiv.org/abs/2009.14720",
    "frontend": "https://arxiv.org/abs/2402.17018",
    "gal": "https://arxiv.org/abs/1901.09981",
    "multiresolution": "https://arxiv.org/abs/2408.05446",
    "purified": "https://arxiv.org/abs/2205.07460",
    "trs": "https://arxiv.org/abs/2104.00671",
}
RULES = (
    "Every figure is the judge's, from stored images and fresh forward passes; NaN is no success, images outside the "
    "ball are refused. The standard suite is AutoAttack's, of random models that for them. The best plain surrogate "
    "is the lowest of APGD on the margin of the members' mean probability, of soft votes, each member's at its own gap, "
    "and of the mean logits, judged on the vote itself. The best known is the single attack that leaves the lowest "
    "accuracy, the cheapest of several, with Wilson's 95% interval over images; the gap is how far it lies below the "
    f"standard suite; auto is what --attacks auto leaves, which is not told which attack that is. Randomized defenses "
    f"are judged by {DRAWS} fresh draws of each image, none of which an attack saw: their accuracy is the share of right "
    "draws, and one lucky draw is no success; worst of draws is the share of images that are right in all of them. An "
    "empty field was not run."
)


@dataclass(frozen=True)
class Entry:
    """A defense on the board."""

    cell: Cell
    run: Run
    random: bool

    @property
    def place(self) -> Path:
        """The folder of the cell's records."""
        return place_of(self.run.folder(self.cell, 0, "").parent, self.run.out.parent)

    @property
    def attacks(self) -> tuple[str, ...]:
        past_frontend = ("bpda-mora",) if self.cell.model.startswith(FRONT_ENDED) else ()
        return (SUITES[self.random], *ATTACKS[self.random], *past_frontend, AUTO)

    def records(self) -> list[Path]:
        """The folders of the attacks that have been run."""
        return [path.parent for path in sorted(self.place.glob("0_*/summary.json"))]

    @property
    def key(self) -> tuple[str, str, str, float]:
        return self.run.dataset, self.cell.model, "own" if self.random else self.cell.vote, self.cell.eps

    def flags_file(self) -> Path:
        return self.place / "flags.json"


def place_of(own: Path, board: Path) -> Path:
    """The folder of a cell's records: its own, or, where that has none, `table1`'s beside the board."""
    beside = board.parent / "table1" / own.name
    return beside if beside.is_dir() and not any(own.glob("*/summary.json")) else own


def entries(run: Run, eps: dict[str, float]) -> list[Entry]:
    """Every model that ships for the run's dataset, in every vote that it has."""
    found = []
    for name in list_models(run.dataset, run.model_dir):
        random = name.startswith(RANDOM)
        own = replace(run, draws=DRAWS, eot_iter=EOT_ITER) if random else run
        size = eps["random" if random else "trained" if "_at_" in name else "plain"]
        found += [Entry(Cell(name, vote, size), own, random) for vote in (("softmax",) if random else VOTES)]
    return found


def examine(entry: Entry) -> None:
    """Store the flags of a defense."""
    path, run, cell = entry.flags_file(), entry.run, entry.cell
    if path.exists():
        return
    x, y = load_dataset(run.dataset, data_dir=run.data_dir, n=DIAGNOSED)
    model = load_model(cell.model, run.model_dir, run.dataset, vote=cell.vote)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(diagnose(model, x, y, eps=cell.eps, seed=run.seed).flags) + "\n")


def row_of(entry: Entry) -> dict[str, Any] | None:
    """The row of a defense, from what has been run; ``None`` where fewer than two attacks have been."""
    done = {name: found for path in entry.records() for found in [summary(path)] for name in found["attacks"]}
    if len(done) < 2:
        return None
    rows = {name: found["attacks"][name] for name, found in done.items()}
    best = min(rows, key=lambda name: (rows[name]["accuracy"], passes_per_image(rows[name])))
    first, suite = done[best], SUITES[entry.random]
    low, high = rows[best]["interval"]
    return dict(zip(KEY, entry.key, strict=True)) | {
        "n": first["n"],
        "clean": 100 * first["clean"]["accuracy"],
        "AutoAttack": 100 * rows[suite]["accuracy"] if suite in rows else None,
        "soft APGD": 100 * rows[SOFT]["accuracy"] if SOFT in rows else None,
        "best plain surrogate": min((100 * rows[name]["accuracy"] for name in SURROGATES if name in rows), default=None),
        "best known": 100 * rows[best]["accuracy"],
        "low": 100 * low,
        "high": 100 * high,
        "worst of draws": 100 * rows[best]["worst_of_draws"] if "worst_of_draws" in rows[best] else None,
        "found by": best,
        "passes / image": passes_per_image(rows[best]),
        "auto": 100 * rows[AUTO]["accuracy"] if AUTO in rows else None,
        "auto's passes": passes_per_image(rows[AUTO]) if AUTO in rows else None,
        "flags": ", ".join(json.loads(entry.flags_file().read_text())) or "none" if entry.flags_file().exists() else None,
        "seed": entry.run.seed,
        "weights": first["weights"][:12],
    }


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


COLUMNS = (
    *(*KEY, "n", "clean", "standard suite", "best plain surrogate", "best known"),
    *("95% interval", "gap", "found by", "flags", "links", "passes / image", "worst of draws", "auto"),
)
OPTIONAL = ("best plain surrogate", "worst of draws", "auto")  # columns that are left out where nothing of them was run


def cells_of(row: dict[str, Any], folder: Path) -> list[Any]:
    """A row of the board in the order of `COLUMNS`; ``folder`` is that of the page."""
    suite, best = row.get("AutoAttack"), row["best known"]
    gap = None if suite is None else suite - best
    found = row | {
        "standard suite": suite,
        "gap": gap and {"text": f"{gap:.1f}", "bar": round(max(0.0, min(100.0, gap)), 1)},
    }
    found |= {"gap": 0.0} if gap == 0 else {}
    found |= {"95% interval": f"{row['low']:.1f} to {row['high']:.1f}"}
    found |= {"links": {"links": list(links(row, folder))}}
    return [_rounded(found.get(column), 3 if column == "eps" else 1) for column in COLUMNS]


def _rounded(value: Any, digits: int) -> Any:
    if value is None:
        return ""
    return round(value, digits) if isinstance(value, float) else value


def links(row: dict[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    """What stands behind a row, as texts and addresses relative to the page."""
    card = next(WEIGHTS.glob(f"{row['dataset']}/*/{row['defense']}.json"), None)
    if card is not None and folder.resolve().is_relative_to(WEIGHTS.parents[1]):
        yield "card", os.path.relpath(card, folder.resolve())
    for name, address in PAPERS.items():
        if row["defense"].startswith(name):
            yield "paper", address
    vote = "softmax" if row["vote"] == "own" else row["vote"]
    cell = f"{row['defense']}_{vote}_{row['eps']:g}_seed{row.get('seed', 0)}"
    place = place_of(folder / row["dataset"] / cell, folder)
    records = place if place.is_dir() else None
    yield "records", os.path.relpath(records or folder / "leaderboard.json", folder)
    if records is not None and (page := records / "report" / "report.html").is_file():
        yield "report", os.path.relpath(page, folder)


def write_page(board: list[dict[str, Any]], folder: Path) -> None:
    """Write ``leaderboard.html``."""
    template = Path(__file__).with_name("leaderboard.html.jinja")
    rows = [cells_of(row, folder) for row in board]
    told = [i for i, column in enumerate(COLUMNS) if column not in OPTIONAL or any(row[i] != "" for row in rows)]
    rows, columns = [[row[i] for i in told] for row in rows], [COLUMNS[i] for i in told]
    page = render_page(template, title="What ensemble defenses are worth", rules=RULES, columns=columns, rows=rows)
    write_whole(folder / "leaderboard.html", page.encode())


@click.command(cls=Benchmark)
@click.option("--datasets", default="digits", show_default=True, help="Comma-separated: digits, cifar10.")
@click.option("--data-dir", default="data", show_default=True)
@click.option("--model-dir", help="Where models are looked for, before those that ship.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/leaderboard"), show_default=True)
@click.option("--n", default=100, show_default=True, help="Test images.")
@click.option("--seed", default=0, show_default=True)
@click.option("--models", help="Comma-separated names.  [default: all that ship]")
@click.option("--table-only", is_flag=True, help="Run nothing, write the page from what is there.")
@click.option("--page-only", is_flag=True, help="Run nothing, write the page from --out's leaderboard.json.")
def main(
    datasets: str,
    data_dir: str,
    model_dir: str | None,
    out: Path,
    n: int,
    seed: int,
    models: str | None,
    table_only: bool,
    page_only: bool,
) -> None:
    if page_only:
        return write_page(json.loads((out / "leaderboard.json").read_text()), out)
    board: list[dict[str, Any]] = []
    stored = out / "leaderboard.json"
    earlier = {key_of(row): row for row in json.loads(stored.read_text())} if stored.exists() else {}
    radii = {
        "digits": {"plain": 0.12, "trained": 0.12, "random": 0.1},
        "cifar10": {"plain": 0.01, "trained": 0.03, "random": 8 / 255},
    }
    chosen = named(datasets, radii, "--datasets")
    known = [name for dataset in chosen for name in list_models(dataset, model_dir)]
    wanted = named(models, known, "--models") if models else known
    for dataset in chosen:
        run = Run(out / dataset, n, seed, data_dir, model_dir, dataset, shard=n)
        for entry in entries(run, radii[dataset]):
            if not table_only and entry.cell.model in wanted:
                entry.run.attack([entry.cell], entry.attacks)
                examine(entry)
            if row := row_of(entry) or earlier.get(entry.key):
                board.append(row)
    if not board:
        raise click.UsageError(f"{out} holds nothing yet")
    click.echo(save_table(board, out / "leaderboard"))
    write_page(board, out)


if __name__ == "__main__":
    main()
