"""Work with RobustBench 1.1.1, unforked: importable beside PyPI's ``pyautoattack``, and with this package's pipeline in its
benchmark.

Nothing here imports robustbench before a function is called, and nothing is patched but inside `pipeline`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.attacks.registry import find_attack
from ensemble_attacks.errors import MissingExtraError
from ensemble_attacks.extras import extra, import_timm, silenced
from ensemble_attacks.files import write_whole
from ensemble_attacks.hosts.autoattack import DRAWS, AutoAttack
from ensemble_attacks.hosts.choice import Name
from ensemble_attacks.hosts.doctor import ABSENT, BROKEN, examine
from ensemble_attacks.hosts.flags import INCOMPLETE
from ensemble_attacks.hosts.state import State
from ensemble_attacks.hosts.verdict import clean_accuracy
from ensemble_attacks.models.ask import as_module, device_of
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.schema import About, read_json
from ensemble_attacks.validation import check_choice, check_count, check_device, check_folder_of, check_radius


def ensure() -> ModuleType:
    """Import robustbench, wherever that is possible, and return it; ``import robustbench`` then works, too.

    It imports ``autoattack``, which is not on PyPI. Where only ``pyautoattack`` is installed, a module of that name with
    `AutoAttack`, which has the interface that robustbench asks for, stands in while it is imported.

    Raises:
        MissingExtraError: Where robustbench, or something that it imports, is missing.
        ImportError: Where it was overwritten by the copy inside torchattacks' wheel; the message names the command that
            mends it.
    """
    if hasattr(sys.modules.get("robustbench"), "benchmark"):
        return sys.modules["robustbench"]
    for finding in examine():
        if finding.status == ABSENT:
            raise MissingExtraError(f"robustbench is not installed: {finding.remedy}")
        if finding.status == BROKEN:
            raise ImportError(f"{finding.name}: {finding.found}. Run: {finding.remedy}")
    import_timm("robustbench", "robustbench")
    stand_in = {} if importlib.util.find_spec("autoattack") else _stand_in()
    sys.modules.update(stand_in)
    try:
        with extra("robustbench", "robustbench"), silenced():
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

    What it returns, prints and stores is what the pipeline judged; it is stored as ``autoattack_acc`` only where it is that
    of the whole standard AutoAttack on a model that is not random, else as ``external``.

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

    class Stored(EvaluationState):
        """A stored state whose mean of robust flags is the figure that was judged."""

        @classmethod
        def from_disk(cls, path: str | Path) -> EvaluationState:
            state = EvaluationState.from_disk(path)
            return cls(state.attacks_to_run, torch.tensor([adversaries[-1].robust_accuracy], dtype=torch.double))

    def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 100, device: torch.device | None = None) -> float:
        if adversaries:
            return adversaries[-1].robust_accuracy
        where = device_of(model, x.device)
        return clean_accuracy(model, x, y, device=where, seed=seed or 0, draws=DRAWS, batch_size=batch_size)

    def book(dataset: Any, threat_model: Any, model_name: str, *figures: Any) -> None:
        whole = adversaries and adversaries[-1].version == "standard" and not adversaries[-1].random
        incomplete = adversaries and any(flag.name in INCOMPLETE for flag in adversaries[-1].flags)
        if not adversaries or (whole and not incomplete):
            store(dataset, threat_model, model_name, *figures)
        else:
            _book_external(dataset, threat_model, model_name, *figures)

    store = evaluation.update_json
    ours = {"AutoAttack": make, "EvaluationState": Stored, "clean_accuracy": accuracy, "update_json": book}
    before = {name: getattr(evaluation, name) for name in ours}
    try:
        vars(evaluation).update(ours)
        yield adversaries
    finally:
        vars(evaluation).update(before)


def _book_external(
    dataset: Any, threat_model: Any, name: str, clean: float, robust: float, eps: float, extra: object = None
) -> None:
    """Write a model's file of RobustBench's ``model_info``, as it does itself, with the figure as an external evaluation."""
    utils: Any = importlib.import_module("robustbench.utils")
    path = Path("model_info") / dataset.value / threat_model.value / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = read_json(path, About) if path.exists() else asdict(utils.ModelInfo())
    about |= {"dataset": dataset.value, "eps": eps, "clean_acc": str(round(100 * clean, 2))}
    about |= {"external": str(round(100 * robust, 2))}
    write_whole(path, json.dumps(about, indent=2).encode())


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
    """Run RobustBench's ``benchmark()`` with this package's pipeline, and leave the model and the process as they were.

    Args:
        model: images in [0, 1] -> scores (N, K).
        device: where it runs; ``None``: the model's.
        aa_state_path: the file to which the run is saved, and from which it goes on.
        version: the version of `AutoAttack`; ``None``: ``"custom"`` with ``attacks_to_run``, else ``"ensemble"``.
        seed, attacks_to_run: the arguments of `AutoAttack` of these names.
        others: the arguments of ``robustbench.benchmark``. Corruptions are left to the original.

    Returns:
        Clean and robust accuracy, in [0, 1], as they are printed and stored; of a random model, the means over fresh draws.

    Raises:
        ImportError: As `ensure` raises it.
        TypeError: Where there are several models or devices, or an attack needs members that the model does not show.
        ValueError: Where there is no ``eps`` for an Lp threat model, or an argument cannot be used; nothing has been run.
        FileNotFoundError: Where the folder of ``aa_state_path`` or ``log_path`` does not exist.
    """
    if isinstance(model, Sequence) or isinstance(device, (list, tuple)):
        raise TypeError("model and device must be one model and one device: call benchmark() for each")
    module = as_module(model)
    dataset, threat_model = _known(dataset, threat_model)
    lp = threat_model.value in ("Linf", "L2")
    if lp and eps is None:
        raise ValueError(f"eps is None: the threat model {threat_model.value} needs a radius, such as eps=8/255")
    check_count("n_examples", n_examples)
    check_count("batch_size", batch_size)
    if to_disk and model_name is None:
        raise ValueError("to_disk=True needs a model_name, under which the result is stored")
    check_folder_of("aa_state_path", aa_state_path)
    check_folder_of("log_path", log_path)
    if device is not None:
        check_device(str(device))
    home = device_of(module, torch.device("cpu"))
    version = version or ("custom" if attacks_to_run else "ensemble")
    norm = threat_model.value if lp else "Linf"
    size = eps if lp and eps is not None else 1.0
    check_radius(size, norm, torch.empty(3, *((224, 224) if dataset.value == "imagenet" else (32, 32))))
    asked = AutoAttack(module, norm, size, seed, False, attacks_to_run, version)  # tells a bad argument now
    for name in asked.attacks_to_run if lp else ():
        if isinstance(name, str):
            find_attack(name).check(module, name)
    run = partial(
        ensure().benchmark,
        module,
        n_examples,
        dataset,
        threat_model,
        to_disk,
        model_name,
        data_dir,
        corruptions_data_dir,
        home if device is None else torch.device(device),
        batch_size,
        eps,
        log_path,
        preprocessing,
        None if aa_state_path is None else Path(aa_state_path),
    )
    with guarded(module, seed=seed or 0, evaluate=False), pipeline(version, seed=seed, attacks_to_run=attacks_to_run):
        try:
            clean, robust = run()
        finally:
            if device is not None and torch.device(device) != home:
                module.to(home)
    return clean, robust


def _known(dataset: Any, threat_model: Any) -> tuple[Any, Any]:
    """Return a dataset and a threat model as RobustBench's own, or raise a `ValueError` that names what there is."""
    ensure()
    enums: Any = importlib.import_module("robustbench.model_zoo.enums")
    found = []
    for kind, given, known in (
        ("dataset", dataset, enums.BenchmarkDataset),
        ("threat_model", threat_model, enums.ThreatModel),
    ):
        value = getattr(given, "value", given)
        check_choice(kind, value, [one.value for one in known])
        found.append(known(value))
    return found[0], found[1]
