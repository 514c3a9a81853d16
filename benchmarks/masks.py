"""Does a front end mask its gradient? Training one before a frozen backbone, step by step, and attacking it on the way.

    python benchmarks/masks.py --rates 3e-6,1e-5,3e-5 --data-dir DIR

The published setting (Boytsov et al., arXiv:2402.17018): a DnCNN of 17 layers and 64 planes before a plain, frozen
backbone, adversarial training at a small, constant rate, about one epoch. At every checkpoint: the cosine of the gradient
through the front end and past it, the ratio of their lengths, clean accuracy, and what the attacks leave robust. A rate is
given up where clean accuracy has lost more than ``--lost`` points. Records go to ``<out>/<setting>.json``, the weights
beside them; a setting that is there is not run again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from defenses import load_model
from defenses.architectures import NORMALIZATIONS
from defenses.frontend import DnCNN, FrontEnded, adamw
from defenses.recipes import SETTINGS, hardware
from defenses.training.ascent import sign_ascent
from defenses.training.trainer import augment
from defenses.zoo.cards import halved
from ensemble_attacks import Ensemble
from ensemble_attacks.data import load_dataset
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.models.parts import premise

EPS = 8 / 255
ON_THE_WAY = ("apgd-ce", "bpda")
AT_THE_END = ("apgd-ce", "apgd-t", "fab-t", "square", "bpda", "bpda-mora", "front-end-reversal", "zero-order-pgd")


class Tempered(nn.Module):
    """A network whose logits are divided by a temperature: below 1, it is confident."""

    def __init__(self, net: nn.Module, temperature: float) -> None:
        super().__init__()
        self.net, self.temperature = net, temperature

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) / self.temperature


def without_norm(frontend: DnCNN) -> DnCNN:
    """The same front end without its batch norms."""
    frontend.residual = nn.Sequential(*(m for m in frontend.residual if not isinstance(m, nn.BatchNorm2d)))
    return frontend


class Trajectory:
    """One front end on its way."""

    def __init__(self, net: FrontEnded, rate: float, pgd_steps: int, amp: bool) -> None:
        self.net, self.pgd_steps, self.amp = net, pgd_steps, amp
        self.optimizer = adamw([parameter for parameter in net.parameters() if parameter.requires_grad])
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def scores(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            return self.net(x).float()

    def crafted(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """PGD from a random start, with batch norm in eval mode, (N, C, H, W)."""
        noise = 2 * torch.rand(x.shape, generator=generator) - 1
        start = (x + EPS * noise.to(x)).clamp(0, 1)
        self.net.eval()
        loss = lambda images: F.cross_entropy(self.scores(images), y, reduction="none")  # noqa: E731
        adversarial = sign_ascent(loss, x, eps=EPS, step=EPS / 2, start=start, steps=self.pgd_steps)
        self.net.train()
        return adversarial

    def step(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        loss = F.cross_entropy(self.scores(self.crafted(x, y, generator)), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def settled(self, x: Tensor) -> None:
        """Batch norm's statistics as the mean over these images, not as the last few batches left them."""
        norms = [m for m in self.net.frontend.modules() if isinstance(m, nn.BatchNorm2d)]
        before = [m.momentum for m in norms]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None
        self.net.train()
        for part in x.split(250):
            self.net(part)
        for m, momentum in zip(norms, before, strict=True):
            m.momentum = momentum
        self.net.eval()


def examined(net: FrontEnded, x: Tensor, y: Tensor, attacks: tuple[str, ...], seed: int) -> dict[str, Any]:
    """What a checkpoint is worth."""
    figures: Any = premise(net, "frontend", x, y)
    record = {
        "cosine": figures["gradient_cosine"],
        "ratio": figures["gradient_ratio"],
        "change": figures["frontend"]["largest"],
    }
    robust: dict[str, int] = {}
    for attack in attacks:  # each from the clean images: what each finds by itself
        model = Ensemble([net]).eval() if attack.endswith("mora") else net
        summary = evaluate(model, x, y, [attack], Settings(EPS, seed=seed))
        robust[attack] = summary["attacks"][attack]["robust"]
        record["clean"] = summary["clean"]["robust"]
    return record | {"robust": robust}


@click.command()
@click.option("--backbone", default="standard_resnet20_3", show_default=True)
@click.option("--member", default=0, show_default=True, help="Which of its networks.")
@click.option("--rates", default="3e-6,1e-5,3e-5", show_default=True)
@click.option("--temperature", default=1.0, show_default=True, help="By which the backbone's logits are divided.")
@click.option("--no-norm", is_flag=True, help="A front end without batch norm.")
@click.option("--depth", default=17, show_default=True)
@click.option("--width", default=64, show_default=True)
@click.option("--pgd-steps", default=4, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--checkpoints", default="50,100,200,300,390", show_default=True)
@click.option("--lost", default=3.0, show_default=True, help="Points of clean accuracy after which a rate is given up.")
@click.option("--n", default=100, show_default=True, help="Test images.")
@click.option("--model-dir")
@click.option("--dataset", default="cifar10", show_default=True)
@click.option("--data-dir", default="data", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--amp", is_flag=True, help="Train in bfloat16 autocast.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/masks"), show_default=True)
def main(
    backbone: str,
    member: int,
    rates: str,
    temperature: float,
    no_norm: bool,
    depth: int,
    width: int,
    pgd_steps: int,
    batch_size: int,
    checkpoints: str,
    lost: float,
    n: int,
    model_dir: str | None,
    dataset: str,
    data_dir: str,
    device: str,
    amp: bool,
    seed: int,
    out: Path,
) -> None:
    images, labels = (t.to(device) for t in load_dataset(dataset, "train", data_dir=data_dir))
    x, y = (t.to(device) for t in load_dataset(dataset, data_dir=data_dir, n=n))
    data, at = SETTINGS[dataset], [int(step) for step in checkpoints.split(",")]
    normalization = NORMALIZATIONS["cifar10"] if images.shape[1] == 3 else ((0.5,), (0.5,))
    out.mkdir(parents=True, exist_ok=True)
    for rate in map(float, rates.split(",")):
        name = f"{backbone}.{member}_{depth}x{width}_{rate:g}_t{temperature:g}" + ("_nonorm" if no_norm else "")
        path = out / f"{name}.json"
        if path.exists() and json.loads(path.read_text())["complete"]:
            continue
        began = time.monotonic()
        torch.manual_seed(seed)
        net = load_model(backbone, model_dir, dataset).members[member]
        frontend = DnCNN(images.shape[1], depth, width)
        net = FrontEnded(Tempered(net, temperature), without_norm(frontend) if no_norm else frontend, normalization)
        net = net.to(device).to(memory_format=torch.channels_last)
        trajectory = Trajectory(net, rate, pgd_steps, amp)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)
        clean = (net.eval().backbone(x).argmax(1) == y).sum().item()
        setting: dict[str, Any] = dict(
            backbone=backbone, member=member, rate=rate, temperature=temperature, norm=not no_norm
        )
        setting |= dict(depth=depth, width=width, pgd_steps=pgd_steps, batch_size=batch_size, n=n)
        setting |= dict(seed=seed, eps=EPS, hardware=hardware(device), amp=amp)
        records: list[dict[str, Any]] = []
        net.train()
        for step in range(1, at[-1] + 1):
            rows = order[torch.arange((step - 1) * batch_size, step * batch_size) % len(order)]
            batch = augment(images[rows.to(device)], pad=data.pad, flip=data.flip, generator=generator)
            trajectory.step(batch.contiguous(memory_format=torch.channels_last), labels[rows.to(device)], generator)
            if step not in at:
                continue
            trajectory.settled(images[:2000])
            right = (net(x).argmax(1) == y).sum().item()
            given_up = 100 * (clean - right) / n > lost
            record = examined(net, x, y, AT_THE_END if given_up or step == at[-1] else ON_THE_WAY, seed)
            records.append({"step": step, **record, "seconds": round(time.monotonic() - began, 1)})
            click.echo(f"{name} {json.dumps(records[-1])}", err=True)
            state = {key: value.contiguous() for key, value in halved(net.frontend.state_dict()).items()}
            save_file(state, out / f"{name}_{step}.safetensors")
            content = {**setting, "backbone_clean": clean, "complete": given_up or step == at[-1], "checkpoints": records}
            path.write_text(json.dumps(content, indent=1) + "\n")
            if given_up:
                break
            net.train()


if __name__ == "__main__":
    main()
