"""Run AutoAttack's own pipeline (Croce & Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks", ICML 2020), with any attack in it.

The attacks of the standard suite are those of the installed package. What is done with their images is done here, since the
original books a NaN as a success, believes images outside the ball, and cannot resume.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks.attacks.base import tracing
from ensemble_attacks.attacks.foreign import craft
from ensemble_attacks.attacks.options import takes_steps
from ensemble_attacks.attacks.registry import EOT_ITER, find_maker
from ensemble_attacks.data import as_tensors
from ensemble_attacks.errors import none_completed, out_of_memory, plain, reason
from ensemble_attacks.hosts.boxes import carried_back, from_unit_box, needs_no_box
from ensemble_attacks.hosts.choice import ENSEMBLE, LOOKING, ORIGINAL, VERSIONS, Name, check_needs, choose, fitting
from ensemble_attacks.hosts.flags import Flag, of_claim, of_scores
from ensemble_attacks.hosts.original import installed_autoattack
from ensemble_attacks.hosts.run import Run
from ensemble_attacks.hosts.slots import SLOTS, is_original, moved, perturb, shorten
from ensemble_attacks.hosts.verdict import clean_accuracy
from ensemble_attacks.models.ask import Asked, as_module, ask, check_dtype, device_of
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.preserve import evaluating, in_training, ordinary
from ensemble_attacks.models.structure import structure_of
from ensemble_attacks.models.twins import prepare
from ensemble_attacks.norms import NORMS, UNIT, Box
from ensemble_attacks.validation import (
    check_choice,
    check_count,
    check_eps,
    check_folder_of,
    check_images,
    check_label_range,
    check_labels,
    check_radius,
    check_seed,
)

logger = logging.getLogger(__name__)
Original: Any = installed_autoattack().AutoAttack
ORIGINAL_PACKAGE = Original.__module__.partition(".")[0]
DRAWS = 20  # by which the images of a random model are judged


class AutoAttack(Original):  # type: ignore[misc, valid-type]
    r"""An AutoAttack that has the arguments and results of the original (Croce & Hein, ICML 2020), and can run any attack.

    The versions ``"standard"``, ``"plus"`` and ``"rand"`` are the original's. ``"ensemble"`` runs MORA, its targeted stage,
    then the standard suite on what is left; ``"adaptive"`` runs what the model's structure asks for (`adaptive_attacks`);
    ``"auto"`` runs what a diagnosis asks for (`diagnostics.diagnose`), until two attacks in a row have moved nothing; in
    another norm than Linf, or on fewer than four images, it chooses as ``"adaptive"`` does. ``attacks_to_run`` mixes any:
    names of the original or of the registry (`ensemble_attacks.registry`, also ``"torchattacks:PGD?steps=50"``), and
    instances of any torchattacks ``Attack``.

    Unlike the original: an image outside the ball, or not finite, or with a NaN score or an infinite best one, is no
    success; a random model is judged by the majority of ``draws`` fresh predictions; fewer than ten classes are fine; an
    attack that cannot attack such images, or raises, is left out with a flag, and what the others find is kept;
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
        failed (dict): after a run, by attack that raised, why; what it had found before is kept.
        disagreement (Tensor): after a run, of which of the robust samples (N,) the model says otherwise to an attack, with a
            gradient, or one by one, than when it is judged.
        robust (Tensor): after a run, which samples (N,) are robust.
        robust_accuracy (float): after a run, the robust accuracy, in [0, 1]; of a random model, the mean over its draws.
        draws (int): number of predictions by which a random model is judged. (Default: 20)
        eot_iter (int): draws of every iterate of this package's attacks on a random model. (Default: 20)
        steps (int): the number of steps of every attack that is chosen by name, Square's queries in proportion. (Default:
            None: each its own)

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
        if seed is not None:
            check_seed(seed)
        check_folder_of("log_path", log_path)
        for name in attacks_to_run:
            if not isinstance(name, (str, Attack)):
                raise TypeError(f"attacks_to_run holds {name!r}: expected names, or instances of torchattacks.Attack")
        eps, seed = eps if isinstance(eps, Tensor) else float(eps), None if seed is None else int(seed)
        self.box = box
        self.verbose, self.log_path = verbose, log_path
        module = as_module(model)
        device = device or device_of(module, torch.device("cpu"))
        base = version if version in (*ORIGINAL, "custom") else "standard"
        quiet = {"verbose": False} if ORIGINAL_PACKAGE == "autoattack" else {}
        super().__init__(Asked(module), norm=norm, eps=eps, seed=seed, version=base, device=device, **quiet)
        self.model, self.version, self.verbose = module, version, verbose
        self.attacks_to_run: list[Name] = {
            "custom": [*attacks_to_run],
            "ensemble": [*ENSEMBLE],
            **{key: [] for key in LOOKING},
        }.get(version, self.attacks_to_run)
        for name in self.attacks_to_run:
            if isinstance(name, str) and name not in SLOTS:
                find_maker(name)
        self.draws, self.eot_iter = DRAWS, EOT_ITER
        self.steps: int | None = None
        self.on_attack: Callable[[str], object] = lambda name: None
        self.flags: list[Flag] = []
        self.stages: dict[str, Tensor] = {}
        self.failed: dict[str, str] = {}
        self.disagreement = torch.zeros(0, dtype=torch.bool)
        self._ready = True

    def get_logits(self, x: Tensor) -> Tensor:
        """Return the model's scores (N, K) of images (N, C, H, W) in [0, 1]."""
        return ask(self.model, x)

    def set_version(self, version: str = "standard") -> None:
        """Switch to another version and its attacks, and keep all other settings."""
        if not self._ready:  # fra31's constructor calls it
            Original.set_version(self, version)
            return
        own = {name: getattr(self, name) for name in ("draws", "eot_iter", "steps", "on_attack", "box")}
        self.__init__(  # type: ignore[misc]
            self.model, self.norm, self.epsilon, self.seed, self.verbose, (), version, False, self.device, self.log_path
        )
        for name, value in own.items():
            setattr(self, name, value)

    def run_standard_evaluation(
        self,
        x_orig: Any,
        y_orig: Tensor | None = None,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the attacks in order, each on the samples that the ones before left robust.

        Args:
            x_orig, y_orig: images (N, C, H, W), or other inputs (N, ...), in the box, and classes (N,); or, without
                ``y_orig``, a pair of both, a ``Dataset``, or a ``DataLoader``, which is read once.
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
        x_orig, y_orig = as_tensors(x_orig, y_orig, "x_orig")
        check_folder_of("state_path", state_path)
        if not needs_no_box(self, x_orig):
            inner, seen = from_unit_box(self, x_orig, y_orig)
            found, predicted = inner.run_standard_evaluation(seen, y_orig, bs, True, state_path)
            images = carried_back(self, inner, x_orig, y_orig, seen, found)
            return (images, predicted) if return_labels else images
        path = None if state_path is None else Path(state_path)
        with self._untouched():
            x, y = self._checked(x_orig, y_orig, bs)
            chosen = self._prepare(x, y, bs)
            state = Run(self, x, y, int(bs), chosen, path).finished()
        return (state.x_adv, state.predicted) if return_labels else state.x_adv

    def run_standard_evaluation_individual(
        self, x_orig: Any, y_orig: Tensor | None = None, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Run each attack by itself, on all samples; return by name what `run_standard_evaluation` returns of it."""
        x_orig, y_orig = as_tensors(x_orig, y_orig, "x_orig")
        if not needs_no_box(self, x_orig):
            inner, seen = from_unit_box(self, x_orig, y_orig)
            each = inner.run_standard_evaluation_individual(seen, y_orig, bs, True).items()
            back = {called: carried_back(self, inner, x_orig, y_orig, seen, found) for called, (found, _) in each}
            return {called: (back[called], labels) if return_labels else back[called] for called, (_, labels) in each}
        version, names, results = self.version, self.attacks_to_run, {}
        errors: dict[str, Exception] = {}
        with self._untouched():
            chosen = self._prepare(*self._checked(x_orig, y_orig, bs), bs)
        flags = self.flags
        try:
            self.version = "custom"
            for called, name in chosen.items():
                self.attacks_to_run = [name]
                try:
                    results[called] = self.run_standard_evaluation(x_orig, y_orig, bs, return_labels)
                except Exception as error:  # whatever an attack raises: the others go on
                    if out_of_memory(error):
                        raise
                    errors[called] = error
                flags += [flag for flag in self.flags if flag not in flags]
        finally:
            self.version, self.attacks_to_run = version, names
        if errors and not results:
            raise none_completed(errors)
        self.flags, self.failed = flags, {called: reason(error) for called, error in errors.items()}
        return results

    def clean_accuracy(self, x_orig: Any, y_orig: Tensor | None = None, bs: int = 250) -> float:
        """Return the share of right predictions, in [0, 1]; of a random model, the mean over its draws."""
        x_orig, y_orig = as_tensors(x_orig, y_orig, "x_orig")
        check_images(x_orig, "x_orig", box=self.box)
        check_labels(y_orig, x_orig, "y_orig")
        with self._untouched():
            given: dict[str, Any] = {
                "device": self.device,
                "seed": self.seed or 0,
                "draws": self.draws,
                "batch_size": bs,
                "box": self.box,
            }
            accuracy = clean_accuracy(self.model, ordinary(x_orig), ordinary(y_orig).long(), **given)
        self._say(f"clean accuracy: {accuracy:.2%}")
        return accuracy

    def _checked(self, x: Tensor, y: Tensor, bs: int) -> tuple[Tensor, Tensor]:
        """Return images and labels (N,), int64, which gradients can be had through, or raise where they are unusable."""
        check_images(x, "x_orig")
        if len(x):
            check_radius(self.epsilon, self.norm, x[0])
        check_labels(y, x, "y_orig")
        check_count("bs", bs)
        check_count("draws", self.draws)
        check_count("eot_iter", self.eot_iter)
        if self.steps is not None:
            check_count("steps", self.steps)
            shorten(self, self.steps)
        if not len(x):
            raise ValueError("x_orig holds no images")
        if self.version == "custom" and not self.attacks_to_run:
            raise ValueError("version='custom' needs attacks_to_run, such as ['apgd-ce', 'mora']")
        return ordinary(x), ordinary(y).long()

    def _prepare(self, x: Tensor, y: Tensor, bs: int) -> dict[str, Name]:
        """Look at the model, and return the attacks that will run, by what they are called."""
        self.flags, self.stages, self.failed = [], {}, {}
        if in_training(self.model):
            self._flag("training_mode", 1, "the model was in training mode: it is attacked in eval mode")
        evaluating(self.model)
        images, labels = x[:bs].to(self.device), y[:bs].to(self.device)
        check_dtype(self.model, images, "x_orig")
        structure = structure_of(self.model, images, seed=self.seed or 0)
        check_label_range(y, structure.classes, "y_orig")
        check_needs(self)
        self.random = structure.random or structure.known_draws
        if structure.random and self.version not in ("rand", *LOOKING):
            self._flag("random", 1, "the model is random: use version='adaptive' or, as the original has it, 'rand'")
        for flag in (*of_claim(self.model, x, bs, "images"), *of_scores(self.model, images, labels, self.seed or 0)):
            self._flag(*astuple(flag))
        self._twin = prepare(self.model, images[:8])
        self.apgd_targeted.n_target_classes = min(self.apgd_targeted.n_target_classes, structure.classes - 1)
        self.fab.n_target_classes = min(self.fab.n_target_classes, structure.classes - 1)
        chosen = fitting(self, choose(self, structure, x, y), structure, images)
        self._say(f"using {self.version} version including {', '.join(chosen)}.")
        return chosen

    def _craft(self, name: Name, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what one attack makes of one batch, and which samples (N,) it saw fooled itself, where it says so."""
        seed = int(self.get_seed())
        if name in SLOTS:
            images = perturb(self, str(name), x, y, seed)
            return images, moved(x, images) if is_original(getattr(self, SLOTS[str(name)][0])) else None
        attack = name if isinstance(name, Attack) else self._make(name, len(x), seed)
        with tracing(attack) as trace:
            images = craft(attack, x, y, seed=seed, batch_size=len(x), eps=self.epsilon, norm=self.norm)
        return images, None if trace is None else trace.fooled(len(x))

    def _make(self, name: str, batch_size: int, seed: int = 0) -> Attack:
        """Return an attack of the registry, made for the twin."""
        draws = self.eot_iter if self.random else None
        settings = dict(norm=self.norm, eps=self.epsilon, seed=seed, batch_size=batch_size, eot_iter=draws)
        make = find_maker(name)
        if self.steps is not None and "?" not in name and takes_steps(make):
            settings["steps"] = self.steps
        return make(self._twin, **settings)

    def _flag(self, name: str, value: float, message: str) -> None:
        self.flags.append(Flag(name, value, message))
        logger.warning("%s: %g: %s", name, value, message)

    def _say(self, message: str) -> None:
        message = plain(message)
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
