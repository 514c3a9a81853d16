"""The exact robust accuracy of small ensembles, and how far every attack is from it.

    python -m benchmarks.truth --n 50

Three networks 64-32-10 with a ReLU, on digits, trained plainly or by PGD (Linf 0.1); mean logits, hard votes, the mean
probability, and members drawn at random. What is exact, and what is left undecided, says `benchmarks.exact`. Every attack
runs on the same images, in float32 as ever; its images are put into the ball, and judged, in float64. An image that nothing
decides is fooled where an attack shows it. ``gap`` is an attack's robust accuracy minus the exact one, in points, and an
interval where images are undecided; ``gap at 1/20`` is the one after a twentieth of AutoAttack's passes.

Of drawn members the accuracy is the expected one, and the exact one is the least that an image of the ball can make it.

Goes on where it stopped. One thread: ``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.exact import FOOLED, LIMIT, LOGITS, ROBUST, SOFTMAX, VOTING, Array, Image, Net, exact_version
from benchmarks.milp import SLACK
from benchmarks.options import Benchmark, named
from benchmarks.tables import save_table
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import ARC, EOTAPGD, MORA, PGD, Ensemble, Surrogate, judge
from ensemble_attacks.data import load_dataset
from ensemble_attacks.descent.balls import make_ball
from ensemble_attacks.descent.stages import Trace
from ensemble_attacks.evaluation.identity import code_version
from ensemble_attacks.evaluation.settings import Settings
from ensemble_attacks.evaluation.suite import Craft, Crafted, crafting
from ensemble_attacks.files import digest, load_tensors, write_whole
from ensemble_attacks.models import votes
from ensemble_attacks.models.passes import count_passes

MEMBERS, HIDDEN, EPOCHS = 3, 32, 60
TRAINED_AT = {"plain": 0.0, "trained": 0.1}  # within which radius the members' training images move
EPS = {"plain": (0.04, 0.06, 0.08, 0.1), "trained": (0.06, 0.1, 0.14)}
DRAWN = "drawn"  # members, each with probability 1/3
VOTES = (LOGITS, VOTING, SOFTMAX)
ON_VOTES = ("apgd-ce", "soft-vote-pgd", "cw", "pma", "malt", "mora", "mora-mt", "autoattack")
ON_DRAWN: dict[str, Callable[..., Any]] = {
    "adaptive-pgd": lambda model, **kw: PGD(Surrogate(model, "probability"), **kw),
    "arc": ARC,
    "eot-apgd": EOTAPGD,
    "mora": MORA,
    "mora-mt": lambda model, **kw: MORA(model, targets=9, **kw),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def train(eps: float, seed: int) -> nn.Module:
    """Return a network trained on the digits within ``eps``: Adam, and 7 steps of PGD."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network()
    images, labels = load_dataset("digits", "train")
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            x, y = images[rows], labels[rows]
            if eps:
                ball = make_ball("Linf", x, eps)
                x = ball.project(x + eps * (2 * torch.rand(x.shape, generator=generator) - 1))
                for _ in range(7):
                    x.requires_grad_()
                    (slope,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
                    x = ball.project(x.detach() + eps / 4 * slope.sign())
            adam.zero_grad()
            F.cross_entropy(net(x), y).backward()
            adam.step()
    return net


def soft_votes(logits_MNK: Tensor) -> Tensor:
    """Return the log of the mean probability, each member's logits divided by its own gap."""
    return votes.SOFTMAX.aggregate(logits_MNK / votes.VOTING.temperature(logits_MNK.detach()))


def soft_vote_pgd(name: str) -> Craft:
    """Return PGD, 5 x 100 steps, on the margin of `soft_votes`."""

    def run(model: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> Crafted:
        attack = PGD(Surrogate(model, soft_votes), eps=settings.eps, seed=settings.seed, loss="margin")
        attack.trace = Trace()
        return Crafted(attack(x, y), trace=attack.trace.rows())

    return run


OWN = {"soft-vote-pgd": soft_vote_pgd}


def curve_of(crafted: Crafted, n: int) -> list[tuple[float, int]]:
    """Return how many images were robust after how many passes per image, where that changed, as far as the attack tells."""
    if crafted.stages and not crafted.trace:
        return [((forwards + backwards) / n, int(flags.sum())) for flags, forwards, backwards in crafted.stages.values()]
    curve, spent = [], 0.0
    for row in crafted.trace:
        spent += (row["forwards"] + row["backwards"]) / n
        if row["fooled"]:
            curve.append((round(spent, 2), int(row["robust"])))
    return curve


@dataclass(frozen=True)
class Cell:
    """Members at one eps, and the folder that keeps what is found of them."""

    out: Path
    kind: str
    eps: float
    seed: int
    limit: float = LIMIT

    @property
    def folder(self) -> Path:
        return self.out / f"{self.kind}_{self.eps:g}_seed{self.seed}"

    @cached_property
    def members(self) -> list[nn.Module]:
        """Return the members, which are trained once and kept."""
        path = self.out / f"{self.kind}_seed{self.seed}.safetensors"
        nets = nn.ModuleList(network() for _ in range(MEMBERS))
        if path.exists():
            nets.load_state_dict(load_tensors(path))
        else:
            nets = nn.ModuleList(train(TRAINED_AT[self.kind], MEMBERS * self.seed + m) for m in range(MEMBERS))
            self.out.mkdir(parents=True, exist_ok=True)
            write_whole(path, save(nets.state_dict()))
        return list(nets.requires_grad_(False).eval())

    def doubles(self) -> list[nn.Module]:
        """Return the members in float64."""
        copies = nn.ModuleList(network() for _ in range(MEMBERS)).double()
        copies.load_state_dict(nn.ModuleList(self.members).state_dict())
        return list(copies.requires_grad_(False).eval())

    @cached_property
    def about(self) -> dict[str, Any]:
        """Return what a record has to agree with, to be gone on from."""
        weights = digest(*nn.ModuleList(self.members).state_dict().values())
        return {"members": self.kind, "eps": self.eps, "seed": self.seed, "weights": weights}

    def stored(self, name: str) -> dict[str, Any] | None:
        """Return a record, if there is one; `click.UsageError` for one of other members."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        if other := next((key for key, value in self.about.items() if record[key] != value), None):
            raise click.UsageError(f"{path} was made with another {other}: choose another --out")
        return record

    def store(self, name: str, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.about, **content}).replace('{"image"', '\n{"image"')
        write_whole(self.folder / f"{name}.json", text.encode() + b"\n")

    def prove(self, x: Tensor, y: Tensor) -> None:
        """Decide of those images that there are no records of yet."""
        known = (self.stored("exact") or {"images": []})["images"]
        nets, ensembles = [Net.of(net) for net in self.members], {v: Ensemble(self.doubles(), vote=v) for v in VOTES}
        for row in range(len(known), len(x)):
            image, label = x[row : row + 1].double(), y[row : row + 1]

            def fools(vote: str, x_D: Array, image: Tensor = image, label: Tensor = label) -> bool:
                adversarial = torch.from_numpy(x_D).view_as(image)
                return bool(judge(ensembles[vote], image, label, adversarial, eps=self.eps).fooled)

            settled = Image(nets, image.flatten().numpy(), int(label), self.eps, fools, self.limit).settle()
            known.append({"image": row, **settled})
            self.store("exact", {"slack": SLACK, "limit": self.limit, "code": exact_version(), "images": known})
            click.echo(f"{self.folder.name} {known[-1]}", err=True)

    def attack(self, vote: str, name: str, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return what an attack leaves of the images, and what it spends."""
        record = self.stored(f"{vote}_{name}")
        if record and record["n"] == len(x):
            return record
        model = RandomizedEnsemble(self.members, [1 / MEMBERS] * MEMBERS) if vote == DRAWN else Ensemble(self.members, vote)
        counted, settings, began = count_passes(model.eval()), Settings(self.eps, seed=self.seed), time.perf_counter()
        if vote == DRAWN:
            crafted = Crafted(ON_DRAWN[name](counted, eps=self.eps, seed=self.seed)(x, y))
        else:
            crafted = OWN.get(name, crafting)(name)(counted, x, y, settings)
        images = make_ball("Linf", x.double(), self.eps).project(crafted.images.double())  # float32 steps out by 2e-8
        passes, seconds = (counted.forwards + counted.backwards) / len(x), time.perf_counter() - began
        doubles = self.doubles()
        verdict = judge(Ensemble(doubles, LOGITS if vote == DRAWN else vote), x.double(), y, images, eps=self.eps)
        wrong_N = torch.stack([net(images).argmax(1) != y for net in doubles]).sum(0)
        content = {
            **{"vote": vote, "attack": name, "n": len(x), "code": code_version()},
            **{"passes": passes, "seconds": round(seconds, 2), "curve": curve_of(crafted, len(x))},
            "flags": "" if vote == DRAWN else "".join("01"[robust] for robust in verdict.robust.tolist()),
            "fooled members": "".join(map(str, wrong_N.tolist())),
        }
        self.store(f"{vote}_{name}", content)
        return {**self.about, **content}


def decided(cell: Cell, vote: str, n: int) -> list[bool | None]:
    """Return of each image whether it is robust, ``None`` where neither a proof nor any attack so far says.

    Raises:
        AssertionError: Where an attack fooled an image that is proved robust.
    """
    record = cell.stored("exact")
    assert record is not None
    known: list[bool | None] = [{ROBUST: True, FOOLED: False}.get(image[vote]) for image in record["images"][:n]]
    for name in ON_VOTES:
        found = cell.stored(f"{vote}_{name}")
        for row, flag in enumerate(found["flags"][:n] if found else ""):
            if flag == "0":
                assert known[row] is not True, f"{name} fools image {row} of {cell.folder.name}, which is proved robust"
                known[row] = False
    return known


def rows_on_votes(cell: Cell, vote: str, n: int) -> list[dict[str, Any]]:
    """Return a row for each attack that has run under a vote."""
    known = decided(cell, vote, n)
    least, most = (100 * sum(flag is not False if high else flag is True for flag in known) / n for high in (0, 1))
    found = {name: record for name in ON_VOTES if (record := cell.stored(f"{vote}_{name}")) and record["n"] == n}
    reference = found.get("autoattack")
    rows = []
    for name, record in found.items():
        robust = 100 * record["flags"].count("1") / n
        missed = [row for row, flag in enumerate(record["flags"]) if flag == "1" and known[row] is False]
        rows.append(
            {
                **{"members": cell.kind, "eps": cell.eps, "vote": vote, "n": n, "attack": name},
                **{"exact": spread(least, most), "robust": robust, "gap": spread(robust - most, robust - least)},
                "passes": record["passes"],
                "of AutoAttack's": f"1/{reference['passes'] / record['passes']:.0f}" if reference else "",
                "gap at 1/20": gap_at(record, reference["passes"] / 20, n, least, most) if reference else "",
                "missed images": " ".join(map(str, missed)),
            }
        )
    return rows


def gap_at(record: dict[str, Any], passes: float, n: int, least: float, most: float) -> str:
    """Return the gap after so many passes per image; empty of an attack that does not tell."""
    curve = [(0.0, n), *record["curve"], (record["passes"], record["flags"].count("1"))]
    if len(curve) == 2 and record["passes"] > passes:
        return ""
    robust = 100 * [left for spent, left in curve if spent <= passes][-1] / n
    return spread(robust - most, robust - least)


def rows_on_drawn(cell: Cell, n: int) -> list[dict[str, Any]]:
    """Return a row for each attack that has run on drawn members: the expected accuracy, and the worst that is exact."""
    record = cell.stored("exact")
    assert record is not None
    worst = [image["fooled members"] for image in record["images"][:n]]
    least, most = (100 * (1 - sum(ends[high] for ends in worst) / (MEMBERS * n)) for high in (1, 0))
    rows = []
    for name in ON_DRAWN:
        found = cell.stored(f"{DRAWN}_{name}")
        if not found or found["n"] != n:
            continue
        counts = [int(count) for count in found["fooled members"]]
        beaten = [row for row, (count, ends) in enumerate(zip(counts, worst, strict=True)) if count > ends[1]]
        assert not beaten, f"{name} fools more members of images {beaten} of {cell.folder.name} than is proved possible"
        accuracy = 100 * (1 - sum(counts) / (MEMBERS * n))
        missed = [row for row, (count, ends) in enumerate(zip(counts, worst, strict=True)) if count < ends[0]]
        rows.append(
            {
                **{"members": cell.kind, "eps": cell.eps, "vote": DRAWN, "n": n, "attack": name},
                **{"exact": spread(least, most), "robust": accuracy, "gap": spread(accuracy - most, accuracy - least)},
                **{
                    "passes": found["passes"],
                    "of AutoAttack's": "",
                    "gap at 1/20": "",
                    "missed images": " ".join(map(str, missed)),
                },
            }
        )
    return rows


def spread(low: float, high: float) -> str:
    return f"{low:.1f}" if abs(high - low) < 0.05 else f"{low:.1f} to {high:.1f}"


def proofs(cell: Cell, n: int) -> dict[str, Any]:
    """Return a row of what was proved by what, and what it took."""
    record = cell.stored("exact")
    assert record is not None
    images = record["images"][:n]
    row: dict[str, Any] = {"members": cell.kind, "eps": cell.eps, "n": n}
    for by in ("intervals", "linear programmes", "mixed-integer programmes"):
        row[f"robust by {by}"] = sum(image[LOGITS] == ROBUST and image["by"][LOGITS] == by for image in images)
    for vote in VOTES:
        for status in (ROBUST, FOOLED):
            row[f"{vote}: {status}"] = sum(image[vote] == status for image in images)
    row["fooled members, mean"] = spread(*(sum(image["fooled members"][end] for image in images) / n for end in (0, 1)))
    row["unstable units, mean"] = sum(image["unstable units"] for image in images) / n
    row["seconds, median"] = sorted(sum(image["seconds"].values()) for image in images)[n // 2]
    return row


@click.command(cls=Benchmark)
@click.option("--members", default=",".join(EPS), show_default=True)
@click.option("--eps", help="Comma-separated Linf radii in pixel units of [0, 1].  [default: some for each]")
@click.option("--votes", "chosen", default=",".join((*VOTES, DRAWN)), show_default=True)
@click.option("--attacks", default=",".join(ON_VOTES), show_default=True, help="On votes; on drawn members all are run.")
@click.option("--n", default=50, show_default=True, help="Test images.")
@click.option("--seed", default=0, show_default=True)
@click.option("--limit", default=LIMIT, show_default=True, help="Seconds for one programme.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/truth"), show_default=True)
@click.option("--table-only", is_flag=True, help="Run nothing, print what is there.")
def main(
    members: str, eps: str | None, chosen: str, attacks: str, n: int, seed: int, limit: float, out: Path, table_only: bool
) -> None:
    torch.set_num_threads(1)
    x, y = load_dataset("digits", n=n)
    radii = {kind: tuple(map(float, eps.split(","))) if eps else EPS[kind] for kind in named(members, EPS, "--members")}
    cells = [Cell(out, kind, radius, seed, limit) for kind in radii for radius in radii[kind]]
    for cell in cells if not table_only else ():
        for vote in named(chosen, (*VOTES, DRAWN), "--votes"):
            for name in ON_DRAWN if vote == DRAWN else named(attacks, ON_VOTES, "--attacks"):
                cell.attack(vote, name, x, y)
        cell.prove(x, y)
    done = [cell for cell in cells if len((cell.stored("exact") or {"images": []})["images"]) >= n]
    if not done:
        raise click.UsageError(f"nothing in {out} has been proved of {n} images yet")
    rows = [row for cell in done for vote in VOTES for row in rows_on_votes(cell, vote, n)]
    rows += [row for cell in done for row in rows_on_drawn(cell, n)]
    click.echo(save_table([proofs(cell, n) for cell in done], out / "proofs"))
    click.echo(save_table(rows, out / "truth"))


if __name__ == "__main__":
    main()
