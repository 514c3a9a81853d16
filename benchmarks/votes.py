"""What an attack on one vote is worth under another, and how many members it fools (MORA, Figures 1c and 3).

    python -m benchmarks.votes --dataset digits --eps 0.12 --out benchmarks/results/votes
    python -m benchmarks.votes --models gal_resnet20_3,trs_resnet20_3 --eps 0.01 --data-dir DIR

Every attack is run on every vote of every model, once for each seed, and its images are judged under all the votes: robust
accuracy (%), mean and standard deviation over seeds. ``own - best other`` is what the attack on the vote itself leaves, less
what the best attack on another vote does: above 0, its own gradient leads it astray. A second table, ``members``, says of
how many images (%) no member, one, two, ... are fooled. Goes on where it stopped: every attack on every vote has a record
for each seed, with one flag for each image and vote.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product, starmap
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn

from benchmarks.options import Benchmark, file_name, image_options
from benchmarks.records import Record, as_flags, measured, passes_of, robust_of
from benchmarks.tables import save_table
from defenses import load_model, model_card
from ensemble_attacks.attacks.registry import find_maker
from ensemble_attacks.data import load_dataset
from ensemble_attacks.judge import judge
from ensemble_attacks.models.ensembles import Ensemble
from ensemble_attacks.models.votes import VOTES

ATTACKS = "pgd", "soft-apgd", "votes-apgd", "mora"
MODELS = "standard_convnet_3,gal_convnet_3,trs_convnet_3,adp_convnet_3"


class Key(NamedTuple):
    """What a record is of; ``vote`` is the one that is attacked."""

    model: str
    attack: str
    vote: str
    seed: int


def seen_by(models: dict[str, Ensemble], x: Tensor, y: Tensor, eps: float) -> Callable[[Tensor], dict[str, Any]]:
    """Return what stores of adversarial images: the flags under every vote, and how many members each image fools."""

    def score(images: Tensor) -> dict[str, Any]:
        flags = {vote: as_flags(judge(model, x, y, images, eps=eps).robust) for vote, model in models.items()}
        with torch.no_grad():
            members: list[nn.Module] = list(next(iter(models.values())).members)
            fooled_N = torch.stack([member(images).argmax(-1) != y for member in members]).sum(0)
        return {"judged": flags, "fooled": fooled_N.tolist()}

    return score


def transfers(records: dict[Key, Record]) -> list[dict[str, Any]]:
    """Return a row for each model, attack and vote that judges, with columns for each vote that is attacked."""
    rows = []
    for model, attack in dict.fromkeys(key[:2] for key in records):
        own = {key: record for key, record in records.items() if key[:2] == (model, attack)}
        for judge_by in VOTES:
            row: dict[str, Any] = {"model": model, "attack": attack, "judged on": judge_by}
            means = {}
            for vote in dict.fromkeys(key.vote for key in own):
                left = [
                    robust_of([{"flags": record["judged"][judge_by]}]) for key, record in own.items() if key.vote == vote
                ]
                means[vote] = row[f"on {vote}"] = fmean(left)
                row[f"sd, {vote}"] = stdev(left) if len(left) > 1 else None
            others = [mean for vote, mean in means.items() if vote != judge_by]
            row["own - best other"] = means[judge_by] - min(others) if judge_by in means and others else None
            rows.append(row)
    return rows


def members_fooled(records: dict[Key, Record]) -> list[dict[str, Any]]:
    """Return a row for each model, attack and attacked vote: of how many images (%) so many members are fooled."""
    rows = []
    for of in dict.fromkeys(key[:3] for key in records):
        found = [record for key, record in records.items() if key[:3] == of]
        fooled = [count for record in found for count in record["fooled"]]
        row: dict[str, Any] = dict(zip(("model", "attack", "on"), of, strict=True)) | {"passes": passes_of(found)}
        row |= {f"{count} fooled": 100 * fooled.count(count) / len(fooled) for count in range(found[0]["members"] + 1)}
        rows.append(row)
    return rows


@click.command(cls=Benchmark)
@click.option("--models", default=MODELS, show_default=True, help="Comma-separated.")
@click.option("--attacks", default=",".join(ATTACKS), show_default=True, help="Comma-separated, by name.")
@click.option("--seeds", default=5, show_default=True, help="How many seeds, from --seed on.")
@click.option("--table-only", is_flag=True, help="Run nothing, print what is there.")
@image_options("runs/votes")
def main(
    models: str,
    attacks: str,
    seeds: int,
    table_only: bool,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    eps: float,
    n: int,
    seed: int,
    out: Path,
) -> None:
    folder = out / file_name(dataset)
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    records: dict[Key, Record] = {}
    for name in models.split(","):
        nets = {vote: load_model(name, model_dir, dataset, vote=vote) for vote in VOTES}
        score = seen_by(nets, x, y, eps)
        for key in starmap(Key, product([name], attacks.split(","), VOTES, range(seed, seed + seeds))):
            about = {"dataset": dataset, "members": len(nets[key.vote].members), **key._asdict()}
            about["weights"] = model_card(name, model_dir, dataset)["sha256"]
            path = folder / ("_".join(map(str, key)) + ".json")
            make = partial(find_maker(key.attack), norm="Linf", eps=eps, seed=key.seed)
            if path.exists() or not table_only:
                told: dict[str, Any] = {"eps": eps, "seed": key.seed, "score": score, "about": about}
                records[key] = measured(path, nets[key.vote], x, y, make, **told)
    if not records:
        raise click.UsageError(f"{folder} holds nothing yet")
    click.echo(save_table(transfers(records), out / f"{file_name(dataset)}_transfers") + "\n")
    click.echo(save_table(members_fooled(records), out / f"{file_name(dataset)}_members"))


if __name__ == "__main__":
    main()
