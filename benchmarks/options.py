"""Command-line options that several benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import click


def named(names: str, known: Iterable[str], option: str, between: str = ",") -> list[str]:
    """The names that an option was given, with a comma ``between``; `click.BadParameter` for one that is not known."""
    chosen, known = names.split(between), list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r}: choose from {', '.join(known)}", param_hint=option)
    return chosen


def image_options(out: str, numerator: int = 8) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Which images in which ball (of ``numerator`` / 255), where models and images are, and where the tables go."""
    eps: dict[str, Any] = {"default": numerator / 255, "show_default": f"{numerator}/255"}
    options = [
        click.option("--model-dir"),
        click.option("--dataset", default="cifar10", show_default=True),
        click.option("--data-dir", default="data", show_default=True),
        click.option("--eps", **eps, help="Linf radius in pixel units of [0, 1]."),
        click.option("--n", default=100, show_default=True, help="Test images."),
        click.option("--seed", default=0, show_default=True),
        click.option("--out", type=click.Path(path_type=Path), default=Path(out), show_default=True),
    ]
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)
