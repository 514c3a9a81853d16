"""How gaps between attacks grow and close with the radius (MORA, Figure 3c).

    python -m benchmarks.radii --dataset digits --out benchmarks/results/radii
    python -m benchmarks.radii --models gal_resnet20_3,trs_resnet20_3 --radii 0.005,0.01,0.02,0.03 --data-dir DIR

Every attack is run anew at each radius; robust accuracy (%), the judge's, and passes (forward + backward) per image. *lead*
is by how many points MORA leaves fewer than the best of the others, with the 95% interval, and *p* McNemar's exact p. A
figure draws the curves of every vote. Goes on where it stopped: every attack at every radius has a record, with each
image's flag.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
from matplotlib.figure import Figure

from benchmarks.options import EPS, Benchmark, file_name, image_options, weights_of
from benchmarks.records import Record, lead_of, measured, paired, passes_of, robust_of
from benchmarks.tables import save_table
from ensemble_attacks.attacks.registry import find_maker
from ensemble_attacks.data import load_dataset
from ensemble_attacks.models.providers import load_model
from ensemble_attacks.names import outermost

OURS = "mora"
ATTACKS = ("pgd", "soft-apgd", "votes-apgd", OURS)
MODELS = "standard_convnet_3,gal_convnet_3,trs_convnet_3,adp_convnet_3"
RADII = "0.03,0.06,0.09,0.12,0.15,0.18,0.24"


class Key(NamedTuple):
    """What a record is of."""

    model: str
    vote: str
    eps: float
    attack: str


def row_of(cell: tuple[str, str, float], found: dict[str, Record]) -> dict[str, Any]:
    """Return a row of the table from the records of all attacks on a vote at a radius."""
    model, vote, eps = cell
    first = next(iter(found.values()))
    row: dict[str, Any] = {"model": model, "vote": vote, "eps": eps, "n": first["n"]}
    row["clean"] = robust_of([{"flags": first["clean"]}])
    row |= {attack: robust_of([record]) for attack, record in found.items()}
    row |= {f"{attack} passes": passes_of([record]) for attack, record in found.items()}
    others = [record for attack, record in found.items() if attack != OURS]
    if OURS in found and others:
        best = min(others, key=lambda record: robust_of([record]))
        ours, theirs, p = paired(found[OURS]["flags"], best["flags"])
        row |= {"lead": lead_of(ours, theirs, first["n"]), "p": f"{p:.2g}"}
    return row


def draw(rows: list[dict[str, Any]], attacks: list[str], path: Path) -> None:
    """Write the curves of every model and vote, and the clean accuracy at radius 0, as a PNG."""
    cells = list(dict.fromkeys((row["model"], row["vote"]) for row in rows))
    votes = list(dict.fromkeys(vote for _, vote in cells))
    models = list(dict.fromkeys(model for model, _ in cells))
    figure = Figure(figsize=(2.6 * len(models), 2.3 * len(votes) + 0.5), layout="constrained")
    grid = figure.subplots(len(votes), len(models), sharex=True, sharey=True, squeeze=False)
    for (line, vote), (column, model) in product(enumerate(votes), enumerate(models)):
        axes, own = grid[line][column], [row for row in rows if (row["model"], row["vote"]) == (model, vote)]
        for attack in attacks:
            points = [(row["eps"], row[attack]) for row in own if attack in row]
            axes.plot(*zip((0.0, own[0]["clean"]), *points, strict=True), marker=".", label=attack)
        axes.set_title(f"{model}, {vote}", fontsize=8)
    figure.supxlabel("radius (Linf)")
    figure.supylabel("robust accuracy (%)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(attacks))
    figure.savefig(path, dpi=100)


@click.command(cls=Benchmark)
@click.option("--models", default=MODELS, show_default=True, help="Comma-separated.")
@click.option("--votes", default="voting,softmax", show_default=True, help="Comma-separated.")
@click.option("--attacks", default=",".join(ATTACKS), show_default=True, help="Comma-separated, by name.")
@click.option("--radii", default=RADII, show_default=True, help="Comma-separated, in place of --eps.")
@click.option("--table-only", is_flag=True, help="Run nothing, print what is there.")
@image_options("runs/radii")
def main(
    models: str,
    votes: str,
    attacks: str,
    radii: str,
    table_only: bool,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    eps: float,
    n: int,
    seed: int,
    out: Path,
) -> None:
    del eps  # --radii stands in its place
    folder, names = out / file_name(dataset), attacks.split(",")
    sizes = [EPS.convert(radius, None, None) for radius in radii.split(",")]
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    makers = {name: find_maker(name) for name in names}
    rows = []
    for model, vote in product(outermost(models, ","), votes.split(",")):
        net = load_model(model, model_dir, dataset, vote=vote)
        told = {"dataset": dataset, "weights": weights_of(model, model_dir, dataset)}
        for size in sizes:
            found: dict[str, Record] = {}
            for key in (Key(model, vote, size, name) for name in names):
                path = folder / file_name("_".join(f"{p:g}" if isinstance(p, float) else p for p in key) + ".json")
                if path.exists() or not table_only:
                    make = partial(makers[key.attack], norm="Linf", eps=size, seed=seed)
                    about = told | {"model": model, "vote": vote, "attack": key.attack}
                    found[key.attack] = measured(path, net, x, y, make, eps=size, seed=seed, about=about)
            if found:
                rows.append(row_of((model, vote, size), found))
    if not rows:
        raise click.UsageError(f"{folder} holds nothing yet")
    click.echo(save_table(rows, out / file_name(dataset)))
    draw(rows, names, out / f"{file_name(dataset)}.png")


if __name__ == "__main__":
    main()
