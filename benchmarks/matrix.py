"""Does every entrance keep every promise? Each cell of entrances x behaviours gives the right value or is one typed error.

    python benchmarks/matrix.py                       # all cells; --only and --behaviour narrow them
    python benchmarks/matrix.py --only judge --verbose

An entrance is a tool of this package as its users call it, with as few steps as can be; a behaviour (`behaviours`) is what
a model, a caller or data may do. Right is: images in ball and box, shaped and typed like the clean ones; flags that a plain
pass of the model confirms; as strong as on the well-behaved twin; and model, caller and random generators left as they were.
Where the twin can be attacked, a typed error is no answer.
"""

from __future__ import annotations

import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
from torch import Tensor, nn

import ensemble_attacks
from benchmarks.behaviours import BEHAVIOURS, EPS, NAMES, PASSES, Case, ModelError
from ensemble_attacks import AutoAttack, as_ensemble, judge
from ensemble_attacks.attacks.careful import CarefulAttack
from ensemble_attacks.attacks.foreign import craft
from ensemble_attacks.attacks.registry import RECORDS, find_maker
from ensemble_attacks.diagnostics import diagnose
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.hosts.robustbench import benchmark, ensure
from ensemble_attacks.models.preserve import private_random_state

PACKAGE = Path(ensemble_attacks.__file__).parent
DRAWS = 20
EARLY = 80  # passes of members before an error
FEW = {"steps": 3, "n_restarts": 2, "refine_steps": 3, "eot_iter": 2, "rounds": 1, "targets": 2, "queries": 2}
HOSTED = ("torchattacks:PGD?steps=3", "torchattacks:FGSM", "torchattacks:APGD?steps=3&n_restarts=1")
VERSIONS = ("standard", "rand", "plus", "ensemble", "adaptive", "auto")
TWINS: dict[tuple[str, str], Any] = {}  # what the twin of a behaviour gave at an entrance


class Wrong(AssertionError):
    """A value that is not the right one."""


@dataclass(frozen=True)
class Cell:
    """What became of one behaviour at one entrance: ``right``, ``typed``, ``raw`` or ``wrong``; and why."""

    entrance: str
    behaviour: str
    outcome: str
    why: str


def fewer(attack: Any) -> Any:
    """Return an attack with the fewest steps that there can be."""
    for name, value in FEW.items():
        if isinstance(getattr(attack, name, None), int):
            setattr(attack, name, min(value, getattr(attack, name)))
    for inner in (getattr(attack, "inner", None), getattr(attack, "refine", None)):
        if inner is not None:
            fewer(inner)
    return attack


@contextmanager
def few_steps() -> Iterator[None]:
    """Let every attack of this package take the fewest steps, also one that is made inside a pipeline."""
    call = CarefulAttack.__call__
    with patch.object(CarefulAttack, "__call__", lambda attack, *args, **named: call(fewer(attack), *args, **named)):
        yield


def right_of(model: Any, case: Case, images: Tensor) -> Tensor:
    """Return the share of right answers on each image (N,), by plain passes of a model that nobody watches."""
    draws = 200 if case.random else 1
    with private_random_state(0), torch.inference_mode(False), torch.no_grad():
        y = case.y.long().clone()
        answers = [model(images.clone()).float() for _ in range(draws)]
        return torch.stack([(scores.argmax(1) == y) & scores.amax(1).isfinite() for scores in answers]).double().mean(0)


def check_images(case: Case, images: Tensor) -> None:
    if images.shape != case.x.shape or images.dtype != case.x.dtype:
        raise Wrong(f"{tuple(images.shape)} {images.dtype} for {tuple(case.x.shape)} {case.x.dtype}")
    delta = (images.double() - case.x.double()).flatten(1)
    size = {"Linf": delta.abs().amax(1), "L2": delta.norm(dim=1), "L1": delta.norm(1, dim=1)}[case.norm].max().item()
    if not size <= EPS[case.norm] * (1 + 1e-6):
        raise Wrong(f"{size:.4f} away from the clean images, eps is {EPS[case.norm]}")
    if not (images.min() >= 0 and images.max() <= 1):
        raise Wrong(f"images in [{images.min():.4f}, {images.max():.4f}]")


def check_share(case: Case, model: Any, images: Tensor, claimed: float) -> None:
    """Raise unless the share of images that are claimed to be robust is that of plain passes."""
    own = right_of(model, case, images).mean().item()
    if abs(own - claimed) > (0.2 if case.random else 1e-6):
        raise Wrong(f"claims {claimed:.3f} right where plain passes give {own:.3f}")


def plain(case: Case) -> nn.Module:
    assert case.twin is not None
    return case.twin


def through_judge(case: Case, model: Any) -> float:
    found = judge(model, case.x, case.y, case.x, eps=EPS[case.norm], norm=case.norm, batch_size=3, draws=draws_of(case))
    if case.twin is not None:
        check_share(case, plain(case), case.x, found.accuracy)
    return found.accuracy


def draws_of(case: Case) -> int:
    return DRAWS if case.random else 1


def through(name: str, *, targeted: bool = False) -> Callable[[Case, Any], float]:
    def run(case: Case, model: Any) -> float:
        attack = find_maker(name)(model, norm=case.norm, eps=EPS[case.norm], seed=0)
        if targeted:
            attack.set_mode_targeted_random(quiet=True)
        images = craft(attack, case.x, case.y, seed=0, batch_size=3)
        check_images(case, images)
        return right_of(plain(case), case, images).mean().item() if case.twin is not None else 0.0

    return run


def quick(adversary: AutoAttack) -> AutoAttack:
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 3
    adversary.apgd.eot_iter = adversary.apgd_targeted.eot_iter = adversary.eot_iter = 2
    adversary.apgd.n_restarts = adversary.fab.n_target_classes = adversary.apgd_targeted.n_target_classes = 2
    adversary.square.n_queries = 10
    return adversary


def through_autoattack(version: str) -> Callable[[Case, Any], float]:
    def run(case: Case, model: Any) -> float:
        adversary = AutoAttack(model, norm=case.norm, eps=EPS[case.norm], seed=0, verbose=False, version=version)
        quick(adversary).draws = DRAWS
        images = adversary.run_standard_evaluation(case.x, case.y, bs=4)
        assert isinstance(images, Tensor)
        check_images(case, images)
        if case.twin is not None and adversary.robust_accuracy is not None:
            check_share(case, plain(case), images, adversary.robust_accuracy)
        return adversary.robust_accuracy

    return run


def through_evaluate(case: Case, model: Any) -> float:
    settings = Settings(eps=EPS[case.norm], norm=case.norm, batch_size=4, draws=draws_of(case), eot_iter=2)
    found = evaluate(model, case.x, case.y, ["ea-apgd-ce", HOSTED[0]], settings)
    if case.twin is not None:
        check_share(case, plain(case), case.x, found["clean"]["accuracy"])
    if found["worst_case"]["accuracy"] > min(row["accuracy"] for row in found["attacks"].values()) + 1e-9:
        raise Wrong("the worst case lies above one attack")
    return found["worst_case"]["accuracy"]


def through_diagnose(case: Case, model: Any) -> float:
    if not diagnose(model, case.x, case.y, eps=EPS[case.norm]).checks:
        raise Wrong("no checks")
    return 0.0


def through_as_ensemble(case: Case, model: Any) -> float:
    names = [name for name in ("members", "nets") if hasattr(model, name)]
    members = [f"{names[0]}.{index}" for index in range(len(getattr(model, names[0])))] if names else list(NAMES)
    adopted = as_ensemble(model, members, "softmax", inputs=case.x)
    if case.twin is not None:
        with torch.no_grad():
            check_share(case, plain(case), case.x, right_of(adopted, case, case.x).mean().item())
    return 0.0


def through_benchmark(case: Case, model: Any) -> float:
    ensure()
    import robustbench.eval as evaluation

    with (
        patch.object(evaluation, "load_clean_dataset", lambda *_: (case.x, case.y)),
        patch.object(evaluation, "get_preprocessing", lambda *_: None),
    ):
        clean, robust = benchmark(
            model, len(case.x), "cifar10", case.norm, eps=EPS[case.norm], batch_size=4, seed=0, attacks_to_run=["ea-apgd-ce"]
        )
    if case.twin is not None:
        check_share(case, plain(case), case.x, clean)
    if robust > clean + 1e-9:
        raise Wrong(f"robust {robust:.3f} above clean {clean:.3f}")
    return robust


UNTARGETED = ("a3", "caa", "front-end-reversal")  # which say so themselves
MADE = [name for name, record in RECORDS.items() if record.make is not None]
ENTRANCES: dict[str, Callable[[Case, Any], float]] = {
    "judge": through_judge,
    **{name: through(name) for name in (*MADE, *HOSTED)},
    **{f"{name}, targeted": through(name, targeted=True) for name in (*MADE, *HOSTED[:1]) if name not in UNTARGETED},
    **{f"AutoAttack {version}": through_autoattack(version) for version in VERSIONS},
    "evaluate": through_evaluate,
    "diagnose": through_diagnose,
    "as_ensemble": through_as_ensemble,
    **({"robustbench.benchmark": through_benchmark} if find_spec("robustbench") else {}),
}


def state_of(case: Case) -> dict[str, Any]:
    """Return what must be left as it was."""
    state: dict[str, Any] = {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "numpy's generator": str(np.random.get_state()),  # noqa: NPY002
        "Python's generator": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "the images": case.x.view(torch.uint8).numpy().tobytes(),
        "the labels": case.y.clone().view(torch.uint8).numpy().tobytes(),
    }
    for model in case.modules:
        if isinstance(model, nn.Module):
            state["modes"] = [part.training for part in model.modules()]
            state["parameters and buffers"] = [
                value.detach().contiguous().view(torch.uint8).numpy().tobytes()
                for value in (*model.parameters(), *(b[None] for b in model.buffers()))
            ]
            state["gradients"] = [None if p.grad is None else p.grad.sum().item() for p in model.parameters()]
            state["what can be trained"] = [p.requires_grad for p in model.parameters()]
    return state


@contextmanager
def unchanged(case: Case) -> Iterator[None]:
    before = state_of(case)
    try:
        yield
    finally:
        after = state_of(case)
        changed = [name for name in before if before[name] != after[name]]
        if changed:
            raise Wrong(f"left changed: {', '.join(changed)}")


def typed(error: BaseException) -> bool:
    """Whether an error was raised by this package, with a text to act on, and not by what it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, (TypeError, ValueError, RuntimeError))
        and len(str(error)) > 20
        and Path(frames[-1].filename).is_relative_to(PACKAGE)
    )


def of_twin(entrance: str, behaviour: str, case: Case) -> Any:
    """Return what an entrance gives of the well-behaved twin: a share, or the error."""
    key = (entrance, behaviour)
    if key not in TWINS:
        try:
            with case.within(), redirect_stdout(StringIO()):
                TWINS[key] = ENTRANCES[entrance](case, case.rival or case.twin)
        except Exception as error:
            TWINS[key] = error
    return TWINS[key]


def cell(entrance: str, behaviour: str) -> Cell:
    """Try one behaviour at one entrance."""
    try:
        case = BEHAVIOURS[behaviour]()
    except Exception as error:
        return Cell(entrance, behaviour, "typed" if typed(error) else "raw", f"{type(error).__name__}: {error}")
    began = PASSES[0]
    try:
        with unchanged(case), case.within(), redirect_stdout(StringIO()):
            value = ENTRANCES[entrance](case, case.model)
    except Wrong as error:
        return Cell(entrance, behaviour, "wrong", str(error))
    except ModelError as error:
        return Cell(entrance, behaviour, "right" if case.breaks else "raw", f"the model's own: {error}")
    except Exception as error:
        passes = PASSES[0] - began
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not typed(error):
            return Cell(entrance, behaviour, "raw", text)
        if passes > EARLY and not case.breaks:
            return Cell(entrance, behaviour, "wrong", f"after {passes} passes: {text}")
        if case.twin is not None and not case.breaks and isinstance(of_twin(entrance, behaviour, case), float):
            return Cell(entrance, behaviour, "wrong", f"refused, its twin is not: {text}")
        return Cell(entrance, behaviour, "typed", text)
    if case.twin is None:
        return Cell(entrance, behaviour, "wrong", f"accepted: {value}")
    if case.twin is not case.model and not case.random and not case.breaks:
        twins = of_twin(entrance, behaviour, case)
        if isinstance(twins, float) and value > twins + (2.01 if case.rival else 1.01) / len(case.x):
            return Cell(entrance, behaviour, "wrong", f"{value:.3f} robust, its twin {twins:.3f}")
    return Cell(entrance, behaviour, "right", f"{value:.3f}")


def cells(entrances: list[str], behaviours: list[str]) -> Iterator[Cell]:
    """Yield every cell."""
    with warnings.catch_warnings(), few_steps():
        warnings.simplefilter("ignore")
        for behaviour in behaviours:
            for entrance in entrances:
                yield cell(entrance, behaviour)


@click.command()
@click.option("--only", default="", help="What entrances must contain.")
@click.option("--behaviour", default="", help="What behaviours must contain.")
@click.option("--verbose", is_flag=True, help="Print the right and the refused cells, too.")
@click.option("--part", default="0/1", show_default=True, help="I/N: every N-th behaviour, from the I-th.")
def main(only: str, behaviour: str, verbose: bool, part: str) -> None:
    torch.set_num_threads(1)
    began, counts = time.perf_counter(), Counter[str]()
    first, step = map(int, part.split("/"))
    entrances = [name for name in ENTRANCES if only in name]
    for found in cells(entrances, [name for name in BEHAVIOURS if behaviour in name][first::step]):
        counts[found.outcome] += 1
        if verbose or found.outcome in ("raw", "wrong"):
            click.echo(f"{found.outcome:5}  {found.entrance} x {found.behaviour}: {found.why[:160]}")
    click.echo(
        f"{sum(counts.values())} cells: {counts['right']} right values, {counts['typed']} typed errors, raw errors: "
        f"{counts['raw']}, silent wrong values: {counts['wrong']}; {time.perf_counter() - began:.0f} s"
    )
    with suppress(BrokenPipeError):
        sys.exit(bool(counts["raw"] or counts["wrong"]))


if __name__ == "__main__":
    main()
