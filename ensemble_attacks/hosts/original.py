"""Run AutoAttack, versions ``standard`` and ``rand``, from whichever package is installed: fra31's ``autoattack`` or PyPI's
``pyautoattack``.

The two are the same mathematics behind different interfaces. Each attack of the standard suite is run as a segment of its
own, on the samples that the ones before left robust; that is what the original's loop does, with the same batches and seeds,
and it lets a caller see what each attack contributes. ``rand`` runs whole, as each segment would draw the clean images'
predictions anew.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.attacks.foreign import rounded
from ensemble_attacks.attacks.registry import find_attack
from ensemble_attacks.errors import none_completed, out_of_memory, reason
from ensemble_attacks.hosts.slots import shorten
from ensemble_attacks.models.ask import Asked, as_module, ask, classes_of, device_of
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.passes import uncounted
from ensemble_attacks.models.preserve import ordinary, private_random_state
from ensemble_attacks.validation import check_choice

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
RAND = ("apgd-ce", "apgd-dlr")
SUITES = {"standard": STANDARD, "rand": RAND}


def installed_autoattack() -> ModuleType:
    """Import the package that provides AutoAttack, and return it.

    Raises:
        ImportError: Where neither is installed; the message says which command installs one.
    """
    for name in ("autoattack", "pyautoattack"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("no AutoAttack is installed: pip install pyautoattack==0.2.0")


def make_adversary(
    model: nn.Module, version: str, *, norm: str, eps: float, seed: int, device: torch.device, num_classes: int
) -> Any:
    """Return an AutoAttack object: one restart, nine targets (or as many as there are), 20 draws (``"rand"``)."""
    package = installed_autoattack()
    arguments: dict[str, Any] = dict(norm=norm, eps=eps, seed=seed, version=version, device=device)
    if package.__name__ == "autoattack":
        arguments["verbose"] = False
    adversary = package.AutoAttack(model, **arguments)
    targets = min(9, num_classes - 1)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
    return adversary


def run_segment(adversary: Any, names: Sequence[str], x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Run some of the suite's attacks on all of ``x``; return the images, clean where none succeeded, and robust flags."""
    adversary.attacks_to_run = list(names)
    if type(adversary).__module__.partition(".")[0] == "autoattack":
        images, predicted = adversary.run_standard_evaluation(x, y, bs=batch_size, return_labels=True)
    else:
        images, predicted = adversary.run_standard_evaluation(x, y, batch_size=batch_size)
    return images.to(x.device), predicted.to(y.device) == y


def run_autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "Linf",
    seed: int = 0,
    batch_size: int = 250,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    steps: int | None = None,
    on_attack: Callable[[str], object] = lambda name: None,
    on_failure: Callable[[str, str], object] = lambda name, why: None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the suite, or some of its attacks, in order; each on what its own flags say is left robust.

    An attack that raises is left out, and so is one that cannot attack images of this shape.

    Args:
        model: images in [0, 1] -> scores (N, K).
        x, y: images (N, C, H, W) and labels (N,).
        eps, norm: the radius and norm of the ball; eps in pixel units of [0, 1].
        seed: the seed of the attacks, and of the model's own randomness.
        batch_size: the number of samples per batch.
        version: ``"standard"`` or ``"rand"``.
        attacks: which of the version's attacks to run; ``None``: all.
        steps: the number of steps of each (`shorten`); ``None``: its own.
        on_attack: called with each attack's name when it has finished.
        on_failure: called with the name of each attack that is left out, and why.

    Returns:
        The images, and by attack name the suite's own robust flags (N,) after it; of ``"rand"`` after its last.

    Raises:
        ValueError: Where the version or an attack is unknown, or the model has too few classes for one of them; where none
            of them can attack images of this shape.
        AttackFailedError: Where none was run to its end.
    """
    check_choice("version of AutoAttack", version, tuple(SUITES))
    attacks = SUITES[version] if attacks is None else attacks
    for name in attacks:
        check_choice(f"attack of AutoAttack's version {version!r}", name, SUITES[version])
    model = as_module(model)
    device = device_of(model, x.device)
    tracer = sys.gettrace()
    flags: dict[str, Tensor] = {}
    errors: dict[str, Exception] = {}
    try:
        with guarded(model, seed=seed):
            x, y = ordinary(x), ordinary(y).long()
            x_adv = x.clone()
            with uncounted(model), private_random_state(seed, model):
                classes = classes_of(model, x[:2].to(device))
            attacks = _fitting(attacks, classes, norm, x, on_failure)
            with torch.no_grad():
                scores_NK = torch.cat([ask(model, b.to(device)).to(x.device) for b in x.split(batch_size)])
            robust = scores_NK.argmax(1) == y
            arguments: dict[str, Any] = dict(norm=norm, eps=eps, seed=seed, device=device, num_classes=classes)
            adversary = make_adversary(Asked(model), version, **arguments)
            if steps is not None:
                shorten(adversary, steps)
            if version == "rand":
                robust = torch.ones_like(robust)  # it decides by draws of its own which clean images are right
            for names in [attacks] if version == "rand" else [[name] for name in attacks]:
                rows = torch.nonzero(robust).squeeze(-1)
                if len(rows):
                    try:
                        images, still = run_segment(adversary, names, x[rows].float(), y[rows], batch_size)
                    except Exception as error:  # whatever an attack raises: it costs that attack
                        if out_of_memory(error):
                            raise
                        errors[names[-1]] = error
                        on_failure(names[-1], reason(error))
                        continue
                    x_adv[rows] = rounded(x[rows], images, eps=eps, norm=norm)
                    robust = robust.clone()
                    robust[rows] = still
                flags[names[-1]] = robust
                on_attack(names[-1])
    finally:
        sys.settrace(tracer)  # AutoAttack's check for dynamic defenses ends with settrace(None)
    if errors and not flags:
        raise none_completed(errors)
    return x_adv, flags


def _fitting(
    attacks: Sequence[str], classes: int, norm: str, x: Tensor, on_failure: Callable[[str, str], object]
) -> list[str]:
    """Return those of the suite's attacks that can attack images like ``x``, and tell of the others."""
    left = {name: why for name in attacks if (why := find_attack(name).misfit(classes, norm, x.shape[1:]))}
    for name, why in left.items():
        if classes < find_attack(name).fewest_classes or len(left) == len(attacks):
            raise ValueError(f"AutoAttack's {name}: {why}: run its others by name (apgd-ce, fab-t, square)")
        on_failure(name, why)
    return [name for name in attacks if name not in left]
