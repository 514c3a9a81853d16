"""Define what several commands share: options, their values, the console."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import reduce
from inspect import signature
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from ensemble_attacks.data import DATASETS
from ensemble_attacks.errors import plain, unknown_name
from ensemble_attacks.evaluation.engines import ENGINES
from ensemble_attacks.names import literal
from ensemble_attacks.validation import check_choice, check_count, check_device

console = Console() if sys.stdout.isatty() else Console(width=120)


def places(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say where models and data lie."""
    options = [
        click.option("--model-dir", help="Where trained models lie, if not among those that ship."),
        click.option("--data-dir", default="data", help="The folder that holds cifar-10-batches-py and the like."),
        click.option("--download", is_flag=True, help="Let torchvision fetch the dataset into --data-dir."),
    ]
    return reduce(lambda decorated, option: option(decorated), reversed(options), command)


NAMED = (
    "From `ensemble-attacks models`; nets.py:make or package.module:make, with options as ?width=8; a folder of weights; "
    "torchvision:NAME, timm:NAME, hf:FOLDER, robustbench:NAME; ensemble:A+B+C?vote=voting, crossmax:A+B+C, "
    "randomized:A+B+C?probabilities=0.5,0.3,0.2 of any of these."
)
DATA = (
    ", ".join(DATASETS) + ", a .npz or .safetensors file of images and labels, a folder with a folder of pictures for every "
    "class, or file.py:function.  [default: what the model's name implies]"
)


def images(n: int | None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options that say which images are taken, ``n`` (``None``: all) by default."""
    options = [
        click.option("--data", "--dataset", "dataset", help=DATA),
        click.option("--transform", default="", help="Of every image, as resize=256,crop=224."),
        click.option("--n", type=int, default=n, help="Test images, in file order." + ("" if n else "  [default: all]")),
        click.option("--first", type=int, default=0, help="Number of the first of them."),
        click.option("--sample", type=int, help="In place of --n: so many, of every class in its share, drawn by --seed."),
        click.option("--only-correct", is_flag=True, help="Pass images by that the model gets wrong."),
    ]
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


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
        click.option("--engine", default="local", help=", ".join(ENGINES) + "."),
        click.option("--workers", type=int, default=1, help="Processes of the engine local."),
        click.option("--device", default="cpu", help="Comma-separated: the workers take turns."),
        click.option("-O", "--option", "options", multiple=True, metavar="KEY=VALUE", help="Of the engines ray and slurm."),
    ]
    return reduce(lambda decorated, option: option(decorated), reversed(options), command)


def check_machine(engine: str, workers: int, device: str, options: tuple[str, ...]) -> None:
    """Raise on an engine or options that cannot be used; the devices of other machines are not looked at."""
    check_choice("engine", engine, tuple(ENGINES))
    check_count("workers", workers, at_most=10_000)
    known = [name for name, of in signature(ENGINES[engine]).parameters.items() if of.kind is of.KEYWORD_ONLY]
    known = [name for name in known if name not in ("workers", "devices")]
    for key, _ in map(key_value, options):
        if key not in known:
            raise unknown_name(f"option of the engine {engine!r} (-O)", key, known)
    if engine == "local":
        for name in device.split(","):
            check_device(name)


def key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option {text!r}: write KEY=VALUE, as in -O minutes=60")
    return key, literal(value)


def check_out(out: Path | None) -> None:
    """Raise a `ValueError` where a folder to write is named by nothing, or by what no folder can be called."""
    if (out is not None and str(out) in ("", ".")) or "\0" in str(out):
        raise ValueError(f"--out {str(out)!r}: name a folder, such as --out runs/first")


RADIUS = re.compile(r"[0-9.]{1,30}(e[+-]?[0-9]{1,3})?(/[0-9.]{1,30})?", re.IGNORECASE)


def radius(text: object) -> float:
    """Return the number that a text stands for, also as a fraction such as RobustBench's ``8/255``.

    Raises:
        ValueError: Where it is no number, or too long to be one.
    """
    compact = str(text)[:100].replace(" ", "")
    above, _, below = compact.partition("/")
    try:
        if not RADIUS.fullmatch(compact):
            raise ValueError
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"eps {str(text)[:60]!r} is no number: write it as 0.03 or 8/255") from None


WIDE: Any = {"highlight": False, "markup": False, "soft_wrap": True}  # of lines that hold text of others


def shown(text: object) -> str:
    """Return `plain` text that Rich takes for no markup."""
    return escape(plain(text))
