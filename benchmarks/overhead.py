"""What the loop costs beside the network: wall time of MORA over the time of the bare passes it made.

    python benchmarks/overhead.py

3 x ResNet-20 (untrained: the arithmetic is the same), batch 64. Each round runs one beta of MORA and then, in the same
process, the same forward and backward passes of the same batch sizes on their own. Prints the median ratio of the rounds.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
import torch
from torch import Tensor

from defenses.zoo.cards import make_ensemble
from ensemble_attacks import MORA
from ensemble_attacks.models.ensembles import Ensemble
from ensemble_attacks.models.twins import prepare


class Recorder(Ensemble):
    """An ensemble that notes the size of every pass, and whether it had a gradient."""

    log: list[tuple[int, bool]]

    def member_logits(self, x: Tensor) -> Tensor:
        self.log.append((len(x), x.requires_grad))
        return super().member_logits(x)


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--eps", default=1e-4, show_default=True, help="Small, so that the batch stays full; larger ones shrink it.")
def main(rounds: int, steps: int, batch: int, eps: float) -> None:
    torch.manual_seed(0)
    images = torch.rand(batch, 3, 32, 32)
    twin: Any = prepare(make_ensemble("resnet20", 3).eval(), images[:8])
    model = Recorder(list(twin.members), "softmax").eval()
    labels = twin(images).argmax(1)
    ratios = []
    for round_ in range(rounds + 1):
        model.log = []
        attack = MORA(model, eps=eps, steps=steps, betas=(0.5,), aimed=False, seed=round_)
        began = time.perf_counter()
        attack(images, labels)
        attacked = time.perf_counter() - began
        began = time.perf_counter()
        for size, with_gradient in model.log:
            x = images[:size].clone().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                logits = torch.stack([member(x) for member in model.members])
            if with_gradient:
                torch.autograd.grad(logits.sum(), x)
        bare = time.perf_counter() - began
        if round_:  # the first warms up
            ratios.append(attacked / bare)
            click.echo(
                f"round {round_}: {len(model.log)} passes, {attacked:.2f} s, bare {bare:.2f} s, ratio {ratios[-1]:.3f}"
            )
    click.echo(f"median overhead ratio {statistics.median(ratios):.3f} (batch {batch}, {torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
