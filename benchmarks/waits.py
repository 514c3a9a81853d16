"""How often the host waits for a device in an attack: counted on the simulated device (`tests.simulated_device`).

    python benchmarks/waits.py
    python benchmarks/waits.py --attacks mora,pgd --places 8

Every attack of this package runs as ``evaluate`` runs it, on digits in a ball so small that most hold out to the last step.
A step is a look at iterates, however many draws and chunks it takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
from torch import Tensor

from benchmarks.tables import save_table
from defenses import load_model
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks.attacks.registry import RECORDS
from ensemble_attacks.data import load_dataset
from ensemble_attacks.descent import loop
from ensemble_attacks.evaluation.suite import Settings, crafting
from ensemble_attacks.models.passes import count_passes
from tests.simulated_device import DEVICE, Waits, simulated

FRONTED, DRAWN = ("bpda", "bpda-mora", "front-end-reversal"), ("arc", "lca")


def ours() -> list[str]:
    return [name for name, record in RECORDS.items() if record.make is not None]


def model_for(name: str) -> Any:
    """A model with what the attack needs, trained on digits."""
    model: Any = load_model("frontend_convnet_3" if name in FRONTED else "gal_convnet_3", dataset="digits")
    if name == "front-end-reversal":
        return model.members[0]
    return RandomizedEnsemble(list(model.members), seed=0).eval() if name in DRAWN else model


@contextmanager
def counted_looks() -> Iterator[Counter[str]]:
    """Count the looks of the loop within the context, as ``steps``."""
    counts: Counter[str] = Counter()
    plain = loop.look

    def look(*args: Any, **options: Any) -> Any:
        counts["steps"] += 1
        return plain(*args, **options)

    with patch.object(loop, "look", look):
        yield counts


def measured(name: str, x: Tensor, y: Tensor, eps: float) -> tuple[Waits, int]:
    """The waits of a call of an attack, and its steps."""
    random: dict[str, Any] = {"draws": 2, "eot_iter": 2} if name in ("eot-apgd", "expected-apgd") else {}
    with simulated() as device, counted_looks() as counts:
        model = count_passes(model_for(name).to(DEVICE))
        here = x.to(DEVICE), y.to(DEVICE)
        device.waits = 0
        device.places.clear()
        crafting(name)(model, *here, Settings(eps, **random))
        return device, counts["steps"]


@click.command()
@click.option("--attacks", default="", help="Comma-separated.  [default: all of this package]")
@click.option("--n", default=16, show_default=True)
@click.option("--eps", default=0.02, show_default=True)
@click.option("--places", default=0, show_default=True, help="Tell so many places where the host waits most.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/waits"), show_default=True)
def main(attacks: str, n: int, eps: float, places: int, out: Path) -> None:
    x, y = load_dataset("digits", n=n)
    rows = []
    for name in attacks.split(",") if attacks else ours():
        device, steps = measured(name, x, y, eps)
        rows.append({"attack": name, "steps": steps, "waits": device.waits, "waits / step": f"{device.waits / steps:.2f}"})
        click.echo(rows[-1], err=True)
        for place, count in device.places.most_common(places):
            click.echo(f"    {count} {place}", err=True)
    click.echo(save_table(rows, out / "waits"))


if __name__ == "__main__":
    main()
