"""Define the command ``tune``."""

from __future__ import annotations

import math
from typing import Any

import click

from ensemble_attacks.cli import choices
from ensemble_attacks.cli.options import NAMED, images, places


@click.command()
@click.option("--model", required=True, help=NAMED, shell_complete=choices.models)
@click.option("--vote", default="softmax", help="softmax, voting or logits.", shell_complete=choices.votes)
@images(250)
@click.option("--attacks", default="autoattack,mora", help="Whose passes are counted.", shell_complete=choices.attacks)
@click.option("--batch-size", type=int, default=250)
@click.option("--device", default="cpu")
@places
def tune(
    model: str, vote: str, attacks: str, device: str, model_dir: str | None, data_dir: str, download: bool, **chosen: Any
) -> None:
    """Measure how a model's gradient passes are computed the soonest here, and what pays after how many of them."""
    from rich.table import Table

    from ensemble_attacks.cli.console import console, shown
    from ensemble_attacks.evaluation.estimate import batches_of
    from ensemble_attacks.evaluation.manifest import subjects_of, vote_said
    from ensemble_attacks.evaluation.settings import Sweep
    from ensemble_attacks.models.ask import beside, moved
    from ensemble_attacks.models.tuning import best_of, ways_to_craft
    from ensemble_attacks.validation import check_count, check_device

    check_device(device)
    check_count("batch_size", chosen["batch_size"])
    names = [name.strip() for name in attacks.split(",") if name.strip()]
    given = {"models": model, "votes": vote, "eps": 0.1, "attacks": names, **chosen}  # nothing is attacked: any eps
    sweep = Sweep.of(given, "the command")
    subjects = subjects_of(sweep, model_dir=model_dir, data_dir=data_dir, download=download)
    x, _ = subjects.opened.take(subjects.numbers)
    net = moved(subjects.models[model], device)
    few, passes = beside(net, x[: sweep.batch_size]), batches_of(names, len(x), sweep)
    with console.status("Measuring; compiling takes minutes ..."):
        ways = ways_to_craft(net, few)
    usual = [way for way in ways if not way.options and way.net is not None][-1]
    table = Table(title=f"{shown(model)}, {shown(vote_said(net))}, {device}: a gradient pass of {len(few)} images")
    for column in ("passes", "once, s", "each, s", "pays after", f"{passes:,} passes, s", "asked for by"):
        table.add_column(column, justify="left" if column in ("passes", "asked for by") else "right", overflow="fold")
    for way in ways:
        if way.net is None:
            table.add_row(way.name, "", "", "", "", f"cannot be used: {shown(way.why)}")
            continue
        pays = math.ceil(way.once / (usual.each - way.each)) if way.each < usual.each else None
        after = "" if way is usual else "never" if pays is None else f"{pays:,}"
        figures = (f"{way.once:.3g}", f"{way.each:.3g}", after, f"{way.total(passes):.3g}")
        table.add_row(way.name, *figures, way.options or ("what is usual" if way is usual else ""))
    console.print(table)
    best = best_of([usual, *ways], passes)
    console.print(f"Of {passes:,} passes ({len(x)} images, {', '.join(map(shown, names))}): {best.name} {best.options}")
