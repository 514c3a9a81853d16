"""Is a change of the code one of the results? Everything that is random is seeded, so that nothing may differ.

    python benchmarks/same.py write before.json      # with the code before
    python benchmarks/same.py compare before.json    # with the code after

Runs every attack, on ensembles of every vote, in every norm, untargeted and targeted, on digits, and MORA and MORA-mt on two
cells of CIFAR-10 where ``--data-dir`` has it; keeps of each the robust flags, the passes, and a digest of the adversarial
images, which are compared to the last bit.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from defenses import load_model
from defenses.crossmax import CrossMax
from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import APGD, ARC, CAA, LAFEAT, MORA, PGD, Ensemble, as_ensemble, judge
from ensemble_attacks.data import load_dataset
from ensemble_attacks.evaluation.runner import attack
from ensemble_attacks.evaluation.suite import Settings, attack_names

VOTES = ("softmax", "voting", "logits")
EPS = {"Linf": 0.12, "L2": 0.8}
ALONE = ("frontend", "bpda", "reversal", "arc")  # parts of the names of attacks that need models of their own
HOSTED = ("torchattacks:PGD?steps=5", "torchattacks:EOTPGD?steps=3")


def cases(n: int, data_dir: str) -> Iterator[tuple[str, Any, str, Any, Any, dict[str, Any]]]:
    """Label, model, attack, images, labels, settings."""
    x, y = load_dataset("digits", n=n)

    def digits(name: str, **options: Any) -> Any:
        return load_model(name, dataset="digits", **options)

    plain = [name for name in attack_names() if not any(part in name for part in ALONE)]
    for norm in EPS:
        for vote in VOTES:
            for name in [*plain, *HOSTED]:
                if norm == "L2" and name in ("caa", "torchattacks:EOTPGD?steps=3"):
                    continue
                yield f"gal {vote} {norm} {name}", digits("gal_convnet_3", vote=vote), name, x, y, {"norm": norm}
            for model in ("standard_convnet_3", "trs_convnet_3", "dverge_convnet_3"):
                for name in ("mora-mt", "pgd", "cw", "ea-apgd-t", "a3"):
                    yield f"{model} {vote} {norm} {name}", digits(model, vote=vote), name, x, y, {"norm": norm}
        fronted = digits("frontend_convnet_3", vote="voting")
        for name in ("bpda", "bpda-mora", "front-end-reversal", "autoattack-adaptive"):
            yield f"frontend {norm} {name}", fronted, name, x, y, {"norm": norm}
        random = {"draws": 2, "eot_iter": 2, "norm": norm}
        members = list(digits("gal_convnet_3").members)
        randomized = {
            per: RandomizedEnsemble(members, [0.5, 0.3, 0.2], per=per, seed=0).eval() for per in ("image", "batch")
        }
        for name in ("arc", "mora", "eot-apgd", "pgd", "autoattack-rand", "crossmax-transfer", "bpda-mora"):
            if name != "bpda-mora":
                for per, drawn in randomized.items():
                    yield f"randomized {per} {norm} {name}", drawn, name, x, y, random
        fronts = RandomizedEnsemble(list(fronted.members), seed=0).eval()
        for name in ("bpda", "bpda-mora", "eot-apgd"):
            yield f"randomized frontends {norm} {name}", fronts, name, x[: n // 2], y[: n // 2], random
        crossmax = CrossMax([*members, *digits("trs_convnet_3").members]).eval()
        for name in ("crossmax-transfer", "mora", "ea-apgd-ce", "auto"):
            yield f"crossmax {norm} {name}", crossmax, name, x, y, {"norm": norm}
    everything = digits("multiresolution_convnet_1")
    for name in ("eot-apgd", "mora", "crossmax-transfer", "eot-square"):
        yield f"multiresolution {name}", everything, name, x[: n // 4], y[: n // 4], {"draws": 2, "eot_iter": 2}
    try:
        x, y = load_dataset("cifar10", data_dir=data_dir, n=n)
    except FileNotFoundError:
        return
    for vote in ("softmax", "voting"):
        for name in ("mora", "mora-mt"):
            model = load_model("gal_resnet20_3" if vote == "softmax" else "dverge_resnet20_3", vote=vote)
            yield f"cifar10 {vote} {name}", model, name, x, y, {"eps": 0.01}


def targeted(n: int) -> Iterator[tuple[str, Any, Any, Any]]:
    """Label, attack, images, labels, of attacks that aim at classes, or run as a caller runs them."""
    x, y = load_dataset("digits", n=n)
    for vote in VOTES:
        model: Any = load_model("gal_convnet_3", dataset="digits", vote=vote)
        adopted = as_ensemble(Ensemble(list(model.members), vote).eval(), ["members.0", "members.1", "members.2"], vote)
        for label, net in (("", model), ("adopted ", adopted)):
            made = {
                "mora": MORA(net, eps=0.12, steps=20, targets=2),
                "unaimed": MORA(net, eps=0.12, steps=20, aimed=False, batch_size=5),
                "apgd": APGD(net, eps=0.12, steps=20),
                "dlr": APGD(net, eps=0.8, steps=20, norm="L2", loss="dlr"),
                "pgd": PGD(net, eps=0.12, steps=10, n_restarts=2),
            }
            for name, instance in made.items():
                for mode in ("default", "random", "least", "label"):
                    if mode == "random":
                        instance.set_mode_targeted_random(quiet=True)
                    elif mode == "least":
                        instance.set_mode_targeted_least_likely(2, quiet=True)
                    elif mode == "label":
                        instance.set_mode_targeted_by_label(quiet=True)
                    yield f"{label}{vote} {name} {mode}", instance, x, (y + 1) % 10 if mode == "label" else y
    model = load_model("gal_convnet_3", dataset="digits")
    yield "caa", CAA(model, eps=0.12), x, y
    yield (
        "lafeat",
        LAFEAT(load_model("multiresolution_convnet_1", dataset="digits"), eps=0.1, steps=10, eot_iter=2),
        x[:4],
        y[:4],
    )
    yield "arc", ARC(RandomizedEnsemble(list(model.members), seed=0).eval(), eps=0.12, n_restarts=2), x, y


def digest(images: Any) -> str:
    return hashlib.sha256(images.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def measured(n: int, data_dir: str, only: str) -> dict[str, list[Any]]:
    twins = "models.twins" if importlib.util.find_spec("ensemble_attacks.models") else "prepare"  # of older code
    prepare = importlib.import_module(f"ensemble_attacks.{twins}").prepare
    found: dict[str, list[Any]] = {}
    for label, model, name, x, y, options in cases(n, data_dir):
        if not label.startswith(only):
            continue
        settings = Settings(**{"eps": EPS[options.get("norm", "Linf")], **options})
        try:
            done = attack(model, prepare(model, x[:8]), x, y, name, settings)
        except Exception as error:
            found[label] = [type(error).__name__]
            continue
        flags = "".join(str(int(flag)) for flag in done.judgement.robust)
        found[label] = [flags, done.forwards, done.backwards, digest(done.images)]
        click.echo(f"{label} {found[label]}", err=True)
    for label, instance, x, y in targeted(n):
        if not label.startswith(only):
            continue
        try:
            found[label] = [digest(instance(x, y))]
        except Exception as error:
            found[label] = [type(error).__name__]
    model = load_model("gal_convnet_3", dataset="digits")
    x, y = load_dataset("digits", n=n)
    found["judge"] = [judge(model, x, y, x, eps=0.1).summary()]
    return json.loads(json.dumps(found))


@click.command()
@click.argument("task", type=click.Choice(["write", "compare"]))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--n", default=12, show_default=True)
@click.option("--data-dir", default="data", show_default=True)
@click.option("--only", default="", help="What labels must begin with.")
def main(task: str, file: Path, n: int, data_dir: str, only: str) -> None:
    torch.set_num_threads(1)  # sums in one order
    found = measured(n, data_dir, only)
    if task == "write":
        file.write_text(json.dumps(found, indent=0) + "\n")
        click.echo(f"{len(found)} results")
        return
    before = {
        label: found for label, found in json.loads(file.read_text()).items() if label.startswith(only) or label == "judge"
    }
    differ = [label for label in sorted(before.keys() | found.keys()) if before.get(label) != found.get(label)]
    for label in differ:
        click.echo(f"{label}: {before.get(label)} -> {found.get(label)}")
    click.echo(f"{len(before)} results, {len(differ)} differ")
    raise SystemExit(bool(differ))


if __name__ == "__main__":
    main()
