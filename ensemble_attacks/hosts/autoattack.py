"""Run AutoAttack's own pipeline (Croce & Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks", ICML 2020), with any attack in it.

The attacks of the standard suite are those of the installed package. What is done with their images is done here, since the
original books a NaN as a success, believes images outside the ball, and cannot resume.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import click
import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks.attacks.base import craft
from ensemble_attacks.attacks.registry import EOT_ITER, find_attack, find_maker
from ensemble_attacks.diagnostics import FEWEST_DIAGNOSED, diagnose
from ensemble_attacks.diagnostics.advice import adaptive_attacks
from ensemble_attacks.files import digest
from ensemble_attacks.hosts.boxes import carried_back, from_unit_box, needs_no_box
from ensemble_attacks.hosts.original import STANDARD, installed_autoattack
from ensemble_attacks.hosts.state import State
from ensemble_attacks.judge import judge, outside
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.preserve import evaluating, in_training, private_random_state
from ensemble_attacks.models.structure import Structure, structure_of
from ensemble_attacks.models.twins import prepare
from ensemble_attacks.norms import NORMS, UNIT, Box
from ensemble_attacks.scores import are_probabilities, decided, margin
from ensemble_attacks.validation import (
    check_choice,
    check_count,
    check_eps,
    check_images,
    check_label_range,
    check_labels,
    check_radius,
)
from ensemble_attacks.version import __version__

logger = logging.getLogger(__name__)
Original: Any = installed_autoattack().AutoAttack
ORIGINAL_PACKAGE = Original.__module__.partition(".")[0]
ORIGINAL = ("standard", "plus", "rand")
VERSIONS = (*ORIGINAL, "ensemble", "adaptive", "auto", "custom")
LOOKING = ("adaptive", "auto")  # versions that look at the model before they choose
ENSEMBLE = ("mora-mt", *STANDARD)
SEEN = 8  # images whose scores tell models apart
SLOTS: dict[str, tuple[str, dict[str, Any]]] = {  # the original's attribute, and what its loop sets before every use
    "apgd-ce": ("apgd", {"loss": "ce"}),
    "apgd-dlr": ("apgd", {"loss": "dlr"}),
    "apgd-t": ("apgd_targeted", {}),
    "fab": ("fab", {"targeted": False}),
    "fab-t": ("fab", {"targeted": True, "n_restarts": 1}),
    "square": ("square", {}),
}
SQUARE_HELPED = 0.002  # of the accuracy (the original's check_square_sr)
DIAGNOSED = 64  # images that a diagnosis looks at
DRAWS = 20  # by which the images of a random model are judged
JUDGING_SEED = 2**31 - 2  # of those draws
Name: TypeAlias = str | Attack


@dataclass(frozen=True)
class Flag:
    """A reason to read the result with care.

    Attributes:
        name: ``random``, ``probabilities``, ``zero_gradients``, ``square_helped``, ``outside_ball``, ``non_finite``,
            ``few_classes`` or ``training_mode``.
        value: how much, or how many samples.
        message: what it means, and what to do.
    """

    name: str
    value: float
    message: str


class Function(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class AutoAttack(Original):  # type: ignore[misc, valid-type]
    r"""An AutoAttack that has the arguments and results of the original (Croce & Hein, ICML 2020), and can run any attack.

    The versions ``"standard"``, ``"plus"`` and ``"rand"`` are the original's. ``"ensemble"`` runs MORA, its targeted stage,
    then the standard suite on what is left; ``"adaptive"`` runs what the model's structure asks for (`adaptive_attacks`);
    ``"auto"`` runs what a diagnosis asks for (`diagnostics.diagnose`), until two attacks in a row have moved nothing; in
    another norm than Linf, or on fewer than four images, it chooses as ``"adaptive"`` does. ``attacks_to_run`` mixes any:
    names of the original or of the registry (`ensemble_attacks.registry`, also ``"torchattacks:PGD?steps=50"``), and
    instances of any torchattacks ``Attack``.

    Unlike the original: an image outside the ball, or not finite, or with a NaN score or an infinite best one, is no
    success; a random model is judged by the majority of ``draws`` fresh predictions; fewer than ten classes are fine;
    ``state_path`` resumes, images included; the model's mode, the caller's random state and ``sys.settrace`` are left as
    they were.

    Arguments:
        model (nn.Module): images (N, C, H, W) in [0, 1] -> scores (N, K); any function will do for the original's attacks.
        norm (str): ``"Linf"``, ``"L2"`` or, for the original's attacks, ``"L1"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 0.3)
        seed (int): seed of all attacks; ``None``: taken from the clock, as in the original. (Default: None)
        verbose (bool): whether to print what happens. (Default: True)
        attacks_to_run (sequence): names and attacks; only with the version ``"custom"``. (Default: ())
        version (str): one of the above, or ``"custom"``; ``None``: ``"custom"`` with ``attacks_to_run``, else
            ``"standard"``. (Default: None)
        is_tf_model (bool): must be False, as TensorFlow models are not supported. (Default: False)
        device (str or torch.device): where the attacks run; ``None``: the model's. (Default: None)
        log_path (str): a file to which what is printed is added. (Default: None)
        box (Box): the values that images can take; eps is the same share of every feature's width. (Default: [0, 1])

    Attributes:
        flags (list of Flag): after a run, what speaks against its result.
        stages (dict): after a run, by attack, which samples (N,) were robust when it had finished.
        robust (Tensor): after a run, which samples (N,) are robust.
        robust_accuracy (float): after a run, the robust accuracy, in [0, 1]; of a random model, the mean over its draws.
        draws (int): number of predictions by which a random model is judged. (Default: 20)
        eot_iter (int): draws of every iterate of this package's attacks on a random model. (Default: 20)

    Raises:
        TypeError, ValueError: Where an argument cannot be used; for an unknown version or attack the message names the
            nearest one.

    Examples::
        >>> from ensemble_attacks import AutoAttack
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
        >>> x, y = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
        >>> adversary = AutoAttack(model, eps=0.1, seed=0, verbose=False, attacks_to_run=["apgd-ce", "torchattacks:PGD"])
        >>> adversary.run_standard_evaluation(x, y).shape
        torch.Size([4, 3, 2, 2])
    """

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Tensor],
        norm: str = "Linf",
        eps: float | Tensor = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[Name] = (),
        version: str | None = None,
        is_tf_model: bool = False,
        device: str | torch.device | None = None,
        log_path: str | Path | None = None,
        *,
        box: Box = UNIT,
    ) -> None:
        if is_tf_model:
            raise ValueError("is_tf_model=True: TensorFlow models are not supported, wrap the model in a torch.nn.Module")
        version = version or ("custom" if attacks_to_run else "standard")
        check_choice("version", version, VERSIONS)
        if attacks_to_run and version != "custom":
            raise ValueError(f"attacks_to_run goes with version='custom', not {version!r}: leave one of them out")
        check_eps(eps)
        check_choice("norm", norm, tuple(NORMS))
        self._ready = False
        self.box = box
        self.verbose, self.log_path = verbose, log_path
        model = model if isinstance(model, nn.Module) else Function(model)
        device = device or next(model.parameters(), torch.zeros(())).device
        base = version if version in (*ORIGINAL, "custom") else "standard"
        quiet = {"verbose": False} if ORIGINAL_PACKAGE == "autoattack" else {}
        super().__init__(model, norm=norm, eps=eps, seed=seed, version=base, device=device, **quiet)
        self.version, self.verbose = version, verbose
        self.attacks_to_run: list[Name] = {
            "custom": [*attacks_to_run],
            "ensemble": [*ENSEMBLE],
            **{key: [] for key in LOOKING},
        }.get(version, self.attacks_to_run)
        for name in self.attacks_to_run:
            if isinstance(name, str) and name not in SLOTS:
                find_maker(name)
        self.draws, self.eot_iter = DRAWS, EOT_ITER
        self.on_attack: Callable[[str], object] = lambda name: None
        self.flags: list[Flag] = []
        self.stages: dict[str, Tensor] = {}
        self._ready = True

    def set_version(self, version: str = "standard") -> None:
        """Switch to another version and its attacks, and keep all other settings."""
        if not self._ready:  # fra31's constructor calls it
            Original.set_version(self, version)
            return
        own = {name: getattr(self, name) for name in ("draws", "eot_iter", "on_attack", "box")}
        self.__init__(  # type: ignore[misc]
            self.model, self.norm, self.epsilon, self.seed, self.verbose, (), version, False, self.device, self.log_path
        )
        for name, value in own.items():
            setattr(self, name, value)

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the attacks in order, each on the samples that the ones before left robust.

        Args:
            x_orig, y_orig: images (N, C, H, W), or other inputs (N, ...), in the box, and classes (N,).
            bs: the number of samples per batch.
            return_labels: whether to return also what the model predicts, (N,).
            state_path: a file to which the run is saved, images included, and from which the same run goes on.

        Returns:
            The images (N, C, H, W), clean where none succeeded; with ``return_labels``, a pair of these and the predictions.

        Raises:
            TypeError, ValueError: Where arguments are unusable, or the state is of another run (the message says what
                differs); nothing has been run.
            FileNotFoundError: Where the folder of ``state_path`` does not exist.
        """
        if not needs_no_box(self, x_orig):
            inner, seen = from_unit_box(self, x_orig, y_orig)
            found, predicted = inner.run_standard_evaluation(seen, y_orig, bs, True, state_path)
            images = carried_back(self, inner, x_orig, y_orig, seen, found)
            return (images, predicted) if return_labels else images
        path = None if state_path is None else Path(state_path)
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"state_path {str(path)!r}: there is no folder {str(path.parent)!r}, make it first")
        with self._untouched():
            chosen = self._prepare(x_orig, y_orig, bs)
            y_orig = y_orig.long()
            state = self._begin(x_orig, y_orig, bs, chosen, path)
            try:
                for called, name in chosen.items():
                    if called not in state.stages and not self._settled(state):
                        self._run(called, name, x_orig, y_orig, bs, state)
            finally:
                state.save(now=True)
            self._conclude(state, x_orig, y_orig, bs)
        return (state.x_adv, state.predicted) if return_labels else state.x_adv

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Run each attack by itself, on all samples; return by name what `run_standard_evaluation` returns of it."""
        if not needs_no_box(self, x_orig):
            inner, seen = from_unit_box(self, x_orig, y_orig)
            each = inner.run_standard_evaluation_individual(seen, y_orig, bs, True).items()
            back = {called: carried_back(self, inner, x_orig, y_orig, seen, found) for called, (found, _) in each}
            return {called: (back[called], labels) if return_labels else back[called] for called, (_, labels) in each}
        version, names, results = self.version, self.attacks_to_run, {}
        with self._untouched():
            chosen = self._prepare(x_orig, y_orig, bs)
        try:
            self.version = "custom"
            for called, name in chosen.items():
                self.attacks_to_run = [name]
                results[called] = self.run_standard_evaluation(x_orig, y_orig, bs, return_labels)
        finally:
            self.version, self.attacks_to_run = version, names
        return results

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """Return the share of right predictions, in [0, 1]."""
        room = self.box.diameter("Linf", x_orig[0]) if isinstance(x_orig, Tensor) and len(x_orig) else 1.0
        with self._untouched():
            accuracy = judge(self.model, x_orig, y_orig, x_orig, eps=room, batch_size=bs, box=self.box).accuracy
        self._say(f"clean accuracy: {accuracy:.2%}")
        return accuracy

    def _prepare(self, x: Tensor, y: Tensor, bs: int) -> dict[str, Name]:
        """Look at the model, and return the attacks that will run, by what they are called."""
        check_images(x, "x_orig")
        if len(x):
            check_radius(self.epsilon, self.norm, x[0])
        check_labels(y, x, "y_orig")
        y = y.long()
        check_count("bs", bs)
        if not len(x):
            raise ValueError("x_orig holds no images")
        if self.version == "custom" and not self.attacks_to_run:
            raise ValueError("version='custom' needs attacks_to_run, such as ['apgd-ce', 'mora']")
        self.flags, self.stages = [], {}
        if in_training(self.model):
            self._flag("training_mode", 1, "the model was in training mode: it is attacked in eval mode")
        evaluating(self.model)
        images, labels = x[:bs].to(self.device), y[:bs].to(self.device)
        structure = structure_of(self.model, images, seed=self.seed or 0)
        check_label_range(y, structure.classes, "y_orig")
        self.random = structure.random or structure.known_draws
        if structure.random and self.version not in ("rand", *LOOKING):
            self._flag("random", 1, "the model is random: use version='adaptive' or, as the original has it, 'rand'")
        self._look_at_scores(images, labels)
        self._twin = prepare(self.model, images[:8])
        self.apgd_targeted.n_target_classes = min(self.apgd_targeted.n_target_classes, structure.classes - 1)
        self.fab.n_target_classes = min(self.fab.n_target_classes, structure.classes - 1)
        chosen: dict[str, Name] = {}
        for name in self._choose(structure, x, y):
            if isinstance(name, str) and name in SLOTS and structure.classes < find_attack(name).fewest_classes:
                self._flag("few_classes", structure.classes, f"{name} is left out: DLR is not defined for so few classes")
                continue
            if isinstance(name, str) and name not in SLOTS:
                record = find_attack(name)
                if self.norm not in record.norms:
                    raise ValueError(f"attack {name!r} knows the norms {', '.join(record.norms)}, not {self.norm}")
                record.check(self.model, name)
                self._make(name, len(images))
            called = name.attack if isinstance(name, Attack) else name
            twins = sum(other.partition("#")[0] == called for other in chosen)
            chosen[f"{called}#{twins + 1}" if twins else called] = name
        self._say(f"using {self.version} version including {', '.join(chosen)}.")
        return chosen

    def _choose(self, structure: Structure, x: Tensor, y: Tensor) -> Sequence[Name]:
        """Return the attacks of this version."""
        if self.version not in LOOKING:
            return self.attacks_to_run
        if self.version == "adaptive" or self.norm != "Linf" or len(x) < FEWEST_DIAGNOSED:
            return adaptive_attacks(structure)
        diagnosis = diagnose(self.model, x[:DIAGNOSED], y[:DIAGNOSED], eps=self.epsilon, seed=self.seed or 0)
        self.diagnosis = diagnosis
        for check in diagnosis.checks:
            if check.verdict == "flag":
                self._say(
                    f"{check.name} ({check.figure:.2f}): {check.meaning}" + (f" -> {check.next}" if check.next else "")
                )
        self._say(f"so these are run: {', '.join(diagnosis.attacks)}")
        return diagnosis.attacks

    def _look_at_scores(self, x: Tensor, y: Tensor) -> None:
        """Flag scores that are probabilities, and gradients of the margin that are exactly zero."""
        images = x.detach().clone().requires_grad_()
        with private_random_state(self.seed or 0, self.model):
            try:
                scores_NK = ask(self.model, images)
            except RuntimeError:  # of an operation that has no gradient, such as numpy's
                scores_NK = ask(self.model, images.detach())
        if are_probabilities(scores_NK):
            self._flag("probabilities", len(x), "the scores are probabilities: return logits, lest gradients vanish")
        gradient = None
        if scores_NK.requires_grad:
            (gradient,) = torch.autograd.grad(margin(scores_NK, y).sum(), images, allow_unused=True)
        vanished = len(x) if gradient is None else int((gradient.flatten(1) == 0).all(1).sum())
        if vanished:
            message = "of so many images the gradient is zero: attack a surrogate (BPDAIdentity, CrossMaxTransfer)"
            self._flag("zero_gradients", vanished, message)

    def _begin(self, x: Tensor, y: Tensor, bs: int, chosen: dict[str, Name], path: Path | None) -> State:
        """Return the state of this run: as stored, or as it is before the first attack."""
        identity = {
            "version": self.version,
            "attacks": {called: _without_addresses(str(name)) for called, name in chosen.items()},
            "norm": self.norm,
            "eps": self.epsilon,
            "seed": self.seed,
            "bs": bs,
            "images": digest(x, y),
            "draws": self.draws,
            "eot_iter": self.eot_iter,
            "model": digest(*self.model.state_dict().values(), self._scores(x[:SEEN])),
            "package": __version__,
        }
        if path is not None and path.exists():
            state = State.load(path, identity, x.device)
            self.flags = [Flag(*flag) for flag in state.flags]
            self._say(f"going on from {path}: {', '.join(state.stages) or 'no attack'} done")
            return state
        right, predicted, finite = (
            torch.cat(part) for part in zip(*map(self._verdict, x.split(bs), y.split(bs)), strict=True)
        )
        if not finite.all():
            count = int((~finite).sum())
            self._flag("non_finite", count, "so many clean images have NaN or infinite scores: they count as not robust")
        state = State(x.detach().clone(), right * finite, predicted, torch.zeros_like(finite), identity=identity, path=path)
        self._say(f"initial accuracy: {state.robust.double().mean():.2%}")
        state.flags = [astuple(flag) for flag in self.flags]
        return state

    @torch.no_grad()
    def _scores(self, x: Tensor) -> Tensor:
        with private_random_state(0, self.model):
            return ask(self.model, x.to(self.device)).cpu()

    def _run(self, called: str, name: Name, x: Tensor, y: Tensor, bs: int, state: State) -> None:
        if called != state.current:
            state.current, state.pending = called, state.robust
        began, rejected = time.perf_counter(), 0
        for rows in torch.nonzero(state.pending).squeeze(-1).split(bs) if state.pending.any() else ():
            clean, labels = x[rows], y[rows]
            images = self._craft(name, clean.to(self.device), labels.to(self.device)).detach().to(clean)
            left = outside(clean, images, eps=self.epsilon, norm=self.norm)
            right, predicted, finite = self._verdict(images, labels)
            worse = (right < state.right[rows]) & finite & ~left
            state.x_adv[rows[worse]], state.predicted[rows[worse]] = images[worse], predicted[worse]
            state.right[rows[worse]] = right[worse]
            state.pending[rows] = False
            state.save()
            rejected += int(left.sum())
            self._say(f"{called}: {int((~state.robust[rows]).sum())} of {len(rows)} fooled")
        state.stages[called] = state.robust
        if rejected:
            self._flag("outside_ball", rejected, f"so many images of {called} left the ball or the box, and do not count")
        state.flags = [astuple(flag) for flag in self.flags]
        state.save(now=True)
        self.on_attack(called)
        spent = time.perf_counter() - began
        self._say(f"robust accuracy after {called.upper()}: {state.robust.double().mean():.2%} ({spent:.1f} s)")

    def _settled(self, state: State) -> bool:
        """Tell whether, in version ``"auto"``, the last two of at least three attacks moved nothing."""
        counts = [int(robust.sum()) for robust in state.stages.values()]
        if self.version != "auto" or len(counts) < 3 or counts[-1] < counts[-3]:
            return False
        self._say("the last two attacks moved nothing: the others are left out")
        return True

    def _craft(self, name: Name, x: Tensor, y: Tensor) -> Tensor:
        """Return what one attack makes of one batch."""
        seed = int(self.get_seed())
        if isinstance(name, Attack):
            return craft(name, x, y, seed=seed, batch_size=len(x))
        if name not in SLOTS:
            return craft(self._make(name, len(x), seed), x, y, seed=seed, batch_size=len(x))
        slot, loops_own = SLOTS[name]
        attack = getattr(self, slot)
        for key, value in (loops_own | {"seed": seed}).items():
            setattr(attack, key, value)
        return attack.perturb(x.clone(), y.clone())

    def _make(self, name: str, batch_size: int, seed: int = 0) -> Attack:
        """Return an attack of the registry, made for the twin."""
        draws = self.eot_iter if self.random else None
        settings = dict(norm=self.norm, eps=self.epsilon, seed=seed, batch_size=batch_size, eot_iter=draws)
        return find_maker(name)(self._twin, **settings)

    @torch.no_grad()
    def _verdict(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the share of right draws, the last prediction, and whether the scores decide (`decided`); each (N,)."""
        if not self.random:
            scores_NK = ask(self.model, images.to(self.device)).to(labels.device)
            return (scores_NK.argmax(1) == labels).double(), scores_NK.argmax(1), decided(scores_NK)
        with private_random_state(JUDGING_SEED, self.model):  # no draw that an attack saw
            scores_DNK = torch.stack([ask(self.model, images.to(self.device)).to(labels.device) for _ in range(self.draws)])
        right_DN = scores_DNK.argmax(-1) == labels
        return (
            right_DN.double().mean(0),
            scores_DNK[-1].argmax(1),
            decided(scores_DNK.flatten(0, 1)).view_as(right_DN).all(0),
        )

    def _conclude(self, state: State, x: Tensor, y: Tensor, bs: int) -> None:
        self.stages, self.robust = dict(state.stages), state.robust
        order = list(self.stages)
        if "square" in order[1:]:
            before = self.stages[order[order.index("square") - 1]]
            helped = (before.sum() - self.stages["square"].sum()).item() / len(x)
            if helped > SQUARE_HELPED:
                message = "Square, which needs no gradient, lowered the accuracy: the gradients mislead, attack adaptively"
                self._flag("square_helped", helped, message)
        self.robust_accuracy = self.robust.double().mean().item()
        if self.random and NORMS[self.norm].attacked:
            settings = dict(eps=self.epsilon, norm=self.norm, draws=self.draws, batch_size=bs)
            self.robust_accuracy = judge(self.model, x, y, state.x_adv, **settings).accuracy
        self._say(f"robust accuracy: {self.robust_accuracy:.2%}")

    def _flag(self, name: str, value: float, message: str) -> None:
        self.flags.append(Flag(name, value, message))
        logger.warning("%s: %g: %s", name, value, message)

    def _say(self, message: str) -> None:
        if self.verbose:
            click.echo(message)
        if self.log_path is not None:
            with Path(self.log_path).open("a") as log:
                log.write(message + "\n")

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        tracer = sys.gettrace()
        try:
            with guarded(self.model, seed=self.seed or 0, evaluate=False):
                yield
        finally:
            sys.settrace(tracer)


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)
