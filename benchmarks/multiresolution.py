"""'Ensemble everything everywhere': what its randomness and its CrossMax are worth, and steps against draws.

    python benchmarks/multiresolution.py --model multiresolution_resnet20_1 --data-dir DIR --n 100

First table: APGD on the defense as it is, with its draws frozen, with the mean of the logits instead of CrossMax, and with
both; attacked and judged as such. Second table: APGD on the mean, judged on the defense, at equal numbers of gradients.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from torch import Tensor, nn

from benchmarks.options import Benchmark, image_options
from benchmarks.tables import save_table
from ensemble_attacks import EOTAPGD, CrossMaxTransfer, Surrogate, judge
from ensemble_attacks.data import load_dataset
from ensemble_attacks.models.providers import load_model
from ensemble_attacks.models.twins import prepare

LOOKS = (1, 2, 5, 10)  # draws of each step, in the second table


class Mean(nn.Module):
    """The mean of the members' logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.surrogate = Surrogate(model, "mean")
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.surrogate(x)


@click.command(cls=Benchmark)
@click.option("--model", "name", required=True)
@click.option("--steps", default=50, show_default=True, help="Of the first table.")
@click.option("--eot-iter", default=5, show_default=True, help="Of the first table.")
@click.option("--gradients", default=200, show_default=True, help="Steps x draws of the second table.")
@click.option("--draws", default=10, show_default=True, help="By which the judge decides.")
@image_options("runs/multiresolution")
def main(
    name: str,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    eps: float,
    n: int,
    steps: int,
    eot_iter: int,
    gradients: int,
    draws: int,
    seed: int,
    out: Path,
) -> None:
    x, y = load_dataset(dataset, data_dir=data_dir, n=n)
    model: Any = load_model(name, model_dir, dataset)
    if not hasattr(model, "frozen_noise"):
        raise click.BadParameter(f"{name!r} is no self-ensemble of random resolutions", param_hint="--model")
    if gradients < max(LOOKS):
        raise click.BadParameter(f"{gradients} is below the {max(LOOKS)} draws of one step", param_hint="--gradients")
    twin: Any = prepare(model, x[:8])
    rows: list[dict[str, Any]] = []
    for crossmax in (True, False):
        for random in (True, False):
            with ExitStack() as stack:
                if not random:
                    stack.enter_context(model.frozen_noise(seed))
                    stack.enter_context(twin.frozen_noise(seed))
                defended, crafted = (model, twin) if crossmax else (Mean(model), Mean(twin))
                looks = eot_iter if random else 1
                attack = EOTAPGD(crafted, eps=eps, steps=steps, eot_iter=looks, seed=seed, batch_size=100)
                verdicts = [
                    100 * judge(defended, x, y, images, eps=eps, draws=draws if random else 1).accuracy
                    for images in (x, attack(x, y))
                ]
            rows.append({"CrossMax": crossmax, "random": random, "clean": verdicts[0], "APGD": verdicts[1]})
            click.echo(rows[-1], err=True)
    click.echo(save_table(rows, out / "ablation"))
    costs: list[dict[str, Any]] = []
    for looks in LOOKS:
        attack = CrossMaxTransfer(
            twin, refine=None, eps=eps, steps=gradients // looks, eot_iter=looks, seed=seed, batch_size=100
        )
        robust = 100 * judge(model, x, y, attack(x, y), eps=eps, draws=draws).accuracy
        costs.append({"steps": gradients // looks, "draws": looks, "robust": robust})
        click.echo(costs[-1], err=True)
    click.echo(save_table(costs, out / "steps_and_draws"))


if __name__ == "__main__":
    main()
