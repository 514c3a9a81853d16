"""Define what several commands share: options, and their values; nothing here imports torch before a command is run."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from inspect import signature
from pathlib import Path
from typing import Any

import click

from ensemble_attacks.cli import choices
from ensemble_attacks.cli.choices import DATASETS, ENGINES, TRACKERS
from ensemble_attacks.errors import unknown_name
from ensemble_attacks.names import literal


def places(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say where models and data lie."""
    options = [
        click.option("--model-dir", help="Where trained models lie, if not among those that ship."),
        click.option("--data-dir", default="data", help="The folder that holds cifar-10-batches-py and the like."),
        click.option("--download", is_flag=True, help="Let torchvision fetch the dataset into --data-dir."),
    ]
    return reduce(lambda decorated, option: option(decorated), reversed(options), command)


RECRAFTED = 20  # units of a bundle that verify crafts anew, unless told otherwise
NAMED = (
    "From `ensemble-attacks models`; nets.py:make or package.module:make, with options as ?width=8; a folder of weights; "
    "torchvision:NAME, timm:NAME, hf:FOLDER, robustbench:NAME; ensemble:A+B+C?vote=voting, crossmax:A+B+C, "
    "randomized:A+B+C?probabilities=0.5,0.3,0.2 of any of these."
)
DATA = (
    ", ".join(DATASETS) + ", a .npz, .safetensors or .pt file of images and labels, a folder with a folder of pictures for "
    "every class, or file.py:function.  [default: what the model's name implies]"
)


def images(n: int | None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options that say which images are taken, ``n`` (``None``: all) by default."""
    options = [
        click.option("--data", "--dataset", "dataset", help=DATA, shell_complete=choices.datasets),
        click.option("--transform", default="", help="Of every image, as resize=256,crop=224."),
        click.option("--n", type=int, default=n, help="Test images, in file order." + ("" if n else "  [default: all]")),
        click.option("--first", type=int, default=0, help="Number of the first of them."),
        click.option("--sample", type=int, help="In place of --n: so many, of every class in its share, drawn by --seed."),
        click.option("--only-correct", is_flag=True, help="Pass images by that the model gets wrong."),
    ]
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


EPS = "Radius of the ball, in the inputs' own units: 0.03, 8/255, or a .npy file with one for each feature."


def within(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say where inputs may go, beside the ball."""
    options = [
        click.option(
            "--box", help="The values that inputs can take: -1,1, or an .npz file of low and high.  [default: 0,1]"
        ),
        click.option("--movable", help="A .npy file of truth values: which features may move.  [default: all]"),
    ]
    return reduce(lambda decorated, option: option(decorated), reversed(options), command)


def planned(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option that asks for the plan alone."""
    return click.option("--dry-run", is_flag=True, help="Check everything, print the plan and what it may cost, and stop.")(
        command
    )


LOG = "When done, tell wandb, tensorboard or mlflow the figures, the settings and the digest; it has to be installed."


def tracked(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option that names a tracker of experiments."""
    return click.option("--log", type=click.Choice(TRACKERS), help=LOG)(command)


THREADS = (
    "Of torch, shared by the workers.  [default: $OMP_NUM_THREADS, else 1 for images of up to 64 pixels, whose networks "
    "are slower with more on a busy machine, else torch's]"
)


def elsewhere(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what a run's model and data are called by now."""
    options = [
        click.option("--model", help="Where the run's model is by now, as of evaluate.  [default: where it was]"),
        click.option("--data", "--dataset", "dataset", help="Where its images are by now.  [default: where they were]"),
    ]
    return reduce(lambda decorated, option: option(decorated), reversed(options), command)


def machines(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say who does the work."""
    options = [
        click.option("--engine", default="local", help=", ".join(ENGINES) + ".", shell_complete=choices.engines),
        click.option("--workers", type=int, help="Processes of the engine local.  [default: one for each device]"),
        click.option("--device", default="cpu", help="Comma-separated: shared among the workers, or the batches of one."),
        click.option("--threads", type=int, help=THREADS),
        click.option("-O", "--option", "options", multiple=True, metavar="KEY=VALUE", help="Of the engines ray and slurm."),
    ]
    return reduce(lambda decorated, option: option(decorated), reversed(options), command)


def check_machine(
    engine: str, workers: int | None, device: str, options: tuple[str, ...], threads: int | None = None
) -> None:
    """Raise on an engine or options that cannot be used; the devices of other machines are not looked at."""
    from ensemble_attacks.evaluation import engines
    from ensemble_attacks.validation import check_choice, check_count, check_device

    check_choice("engine", engine, tuple(engines.ENGINES))
    if workers is not None:
        check_count("workers", workers, at_most=10_000)
    if threads is not None:
        check_count("threads", threads, at_most=10_000)
    known = [name for name, of in signature(engines.ENGINES[engine]).parameters.items() if of.kind is of.KEYWORD_ONLY]
    known = [name for name in known if name not in ("workers", "devices")]
    for key, _ in map(key_value, options):
        if key not in known:
            raise unknown_name(f"option of the engine {engine!r} (-O)", key, known)
    if engine == "local":
        for name in device.split(","):
            check_device(name)


def check_log(log: str | None) -> None:
    """Raise where a tracker is not installed."""
    if log is not None:
        from ensemble_attacks.evaluation.tracking import check_tracker

        check_tracker(log)


def key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option {text!r}: write KEY=VALUE, as in -O minutes=60")
    return key, literal(value)


def check_out(out: Path | None) -> None:
    """Raise a `ValueError` where a folder to write is named by nothing, or by what no folder can be called."""
    if (out is not None and str(out) in ("", ".")) or "\0" in str(out):
        raise ValueError(f"--out {str(out)!r}: name a folder, such as --out runs/first")
