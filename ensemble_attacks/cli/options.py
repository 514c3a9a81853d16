"""Define what several commands share: options, their values, the console."""

from __future__ import annotations

import ast
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

from ensemble_attacks.errors import unknown_name
from ensemble_attacks.evaluation.engines import ENGINES
from ensemble_attacks.validation import check_choice, check_count, check_device

console = Console() if sys.stdout.isatty() else Console(width=120)


def places(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say where models and data lie."""
    options = [
        click.option("--model-dir", help="Where trained models lie, if not among those that ship."),
        click.option("--data-dir", default="data", help="The folder that holds cifar-10-batches-py."),
        click.option("--download", is_flag=True, help="Let torchvision fetch CIFAR-10 into --data-dir."),
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
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


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


def plain(text: object) -> str:
    """Return text that others chose so that a terminal shows it: nothing in it moves a cursor, colours, or reorders."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown(text: object) -> str:
    """Return `plain` text that Rich takes for no markup."""
    return escape(plain(text))
