"""Work with RobustBench 1.1.1, unforked: importable beside PyPI's ``pyautoattack``, and with this package's pipeline in its
benchmark.

Nothing here imports robustbench before a function is called, and nothing is patched but inside `pipeline`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ensemble_attacks.hosts.autoattack import AutoAttack, Name
from ensemble_attacks.hosts.doctor import BROKEN, examine
from ensemble_attacks.hosts.state import State
from ensemble_attacks.models.ask import as_module

NEEDED = ("robustbench", "robustbench's files", "pkg_resources", "AutoAttack")


def ensure() -> ModuleType:
    """Import robustbench, wherever that is possible, and return it; ``import robustbench`` then works, too.

    It imports ``autoattack``, which is not on PyPI. Where only ``pyautoattack`` is installed, a module of that name with
    `AutoAttack`, which has the interface that robustbench asks for, stands in while it is imported.

    Raises:
        ImportError: Where robustbench, or something that it imports, is missing, or it was overwritten by the copy inside
            torchattacks' wheel; the message names the command that mends it.
    """
    if hasattr(sys.modules.get("robustbench"), "benchmark"):
        return sys.modules["robustbench"]
    broken = [finding for finding in examine() if finding.status == BROKEN and finding.name in NEEDED]
    if broken:
        raise ImportError(f"{broken[0].name}: {broken[0].found}. Run: {broken[0].remedy}")
    stand_in = {} if importlib.util.find_spec("autoattack") else _stand_in()
    sys.modules.update(stand_in)
    try:
        return importlib.import_module("robustbench")
    finally:
        for name in stand_in:
            del sys.modules[name]


class EvaluationState:
    """A stored state that has what robustbench asks of one: the attacks, and which samples are robust."""

    def __init__(self, attacks_to_run: set[str], robust_flags: torch.Tensor) -> None:
        self.attacks_to_run, self.robust_flags = attacks_to_run, robust_flags

    @classmethod
    def from_disk(cls, path: str | Path) -> EvaluationState:
        """Return the state that `AutoAttack` stored in a file."""
        state = State.load(Path(path), {}, torch.device("cpu"))
        return cls(set(state.stages), state.robust.float())  # robustbench takes their mean


def _stand_in() -> dict[str, ModuleType]:
    package, state = ModuleType("autoattack"), ModuleType("autoattack.state")
    vars(package).update(AutoAttack=AutoAttack, state=state)
    vars(state).update(EvaluationState=EvaluationState)
    return {"autoattack": package, "autoattack.state": state}


@contextmanager
def pipeline(
    version: str | None = None, *, seed: int | None = None, attacks_to_run: Sequence[Name] = ()
) -> Iterator[list[AutoAttack]]:
    """Make the unforked ``robustbench.benchmark()`` run this package's pipeline within the context.

    Args:
        version, seed, attacks_to_run: the arguments of `AutoAttack` of these names.

    Yields:
        A list, to which the adversary of every run is added.
    """
    evaluation: Any = importlib.import_module(f"{ensure().__name__}.eval")
    adversaries: list[AutoAttack] = []

    def make(model: nn.Module, **settings: Any) -> AutoAttack:
        settings |= {"version": version, "seed": seed, "attacks_to_run": attacks_to_run}
        adversaries.append(AutoAttack(model, **settings))
        return adversaries[-1]

    before = evaluation.AutoAttack, evaluation.EvaluationState
    evaluation.AutoAttack, evaluation.EvaluationState = make, EvaluationState
    try:
        yield adversaries
    finally:
        evaluation.AutoAttack, evaluation.EvaluationState = before


def benchmark(
    model: nn.Module,
    n_examples: int = 10000,
    dataset: Any = "cifar10",
    threat_model: Any = "Linf",
    to_disk: bool = False,
    model_name: str | None = None,
    data_dir: str = "./data",
    corruptions_data_dir: str | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    eps: float | None = None,
    log_path: str | None = None,
    preprocessing: str | Callable[..., Any] | None = None,
    aa_state_path: str | Path | None = None,
    *,
    version: str | None = None,
    seed: int | None = None,
    attacks_to_run: Sequence[Name] = (),
) -> tuple[float, float]:
    """Run RobustBench's ``benchmark()`` with this package's pipeline.

    Args:
        model: images in [0, 1] -> scores (N, K).
        aa_state_path: the file to which the run is saved, and from which it goes on.
        version: the version of `AutoAttack`; ``None``: ``"custom"`` with ``attacks_to_run``, else ``"ensemble"``.
        seed, attacks_to_run: the arguments of `AutoAttack` of these names.
        others: the arguments of ``robustbench.benchmark``. Corruptions are left to the original.

    Returns:
        Clean and robust accuracy, in [0, 1]; of a random model, the robust accuracy is the mean over fresh draws.

    Raises:
        ImportError: As `ensure` raises it.
        TypeError: Where there are several models or devices.
        ValueError: Where there is no ``eps`` for an Lp threat model, or a version or attack is unknown; nothing has been
            run.
    """
    threat = str(getattr(threat_model, "value", threat_model))
    if threat in ("Linf", "L2") and eps is None:
        raise ValueError(f"eps is None: the threat model {threat} needs a radius, such as eps=8/255")
    if isinstance(model, Sequence) or isinstance(device, (list, tuple)):
        raise TypeError("model and device must be one model and one device: call benchmark() for each")
    model = as_module(model)
    version = version or ("custom" if attacks_to_run else "ensemble")
    AutoAttack(
        model, eps=eps or 1.0, version=version, attacks_to_run=attacks_to_run, verbose=False
    )  # tells a bad argument now
    run = partial(
        ensure().benchmark,
        model,
        n_examples,
        dataset,
        threat_model,
        to_disk,
        model_name,
        data_dir,
        corruptions_data_dir,
        None if device is None else torch.device(device),
        batch_size,
        eps,
        log_path,
        preprocessing,
        None if aa_state_path is None else Path(aa_state_path),
    )
    with pipeline(version, seed=seed, attacks_to_run=attacks_to_run) as adversaries:
        clean, robust = run()
    random = adversaries and adversaries[-1].random
    return clean, adversaries[-1].robust_accuracy if random else robust
