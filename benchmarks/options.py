"""Command-line options that several benchmarks share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import click
from torch import nn

from defenses import list_models, model_card
from ensemble_attacks.cli.group import told_in_one_line
from ensemble_attacks.data import DATASETS
from ensemble_attacks.files import digest
from ensemble_attacks.models.providers import load_model
from ensemble_attacks.names import outermost
from ensemble_attacks.threat import number


class Benchmark(click.Command):
    """A command that shows what its user can mend as one line and exits with 2; ``--debug`` shows the traceback."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show tracebacks."))

    def invoke(self, ctx: click.Context) -> Any:
        with told_in_one_line(ctx.params.pop("debug")):  # which is no parameter of the benchmark's own function
            return super().invoke(ctx)


class Radius(click.ParamType):
    """A number, also as a fraction such as 8/255."""

    name = "radius"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return number(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


EPS = Radius()
DATA = "As of `ensemble-attacks evaluate`: a dataset, a file, a folder, or file.py:function."


def named(names: str, known: Iterable[str], option: str, between: str = ",") -> list[str]:
    """The names that an option was given, with a comma ``between``; `click.BadParameter` for one that is not known."""
    chosen, known = names.split(between), list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r}: choose from {', '.join(known)}", param_hint=option)
    return chosen


def members_of(names: str, model_dir: str | None, dataset: str, option: str = "--models") -> list[nn.Module]:
    """The members of all the ensembles of these comma-separated names, as of `ensemble-attacks evaluate`."""
    found: list[nn.Module] = []
    for name in outermost(names, ","):
        model: Any = load_model(name, model_dir, dataset)
        if not isinstance(getattr(model, "members", None), nn.ModuleList):
            raise click.BadParameter(f"{name!r} is no ensemble of several networks", param_hint=option)
        found += model.members
    return found


def weights_of(name: str, model_dir: str | None, dataset: str) -> str:
    """The digest of a model's weights: its card's where there is one, else that of its parameters and buffers."""
    if dataset in DATASETS and name in list_models(dataset, model_dir):
        return model_card(name, model_dir, dataset)["sha256"]
    return digest(*chain.from_iterable(load_model(name, model_dir, dataset).state_dict().items()))


def file_name(text: str) -> str:
    """A name of a model or of data as one of a file."""
    return re.sub(r"[^\w.-]+", "_", Path(text).name if Path(text).exists() else text)


def data_option(default: str = "cifar10") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option that says which images."""
    return click.option("--data", "--dataset", "dataset", default=default, show_default=True, help=DATA)


def image_options(out: str, numerator: int = 8) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Which images in which ball (of ``numerator`` / 255), where models and images are, and where the tables go."""
    eps: dict[str, Any] = {"type": EPS, "default": numerator / 255, "show_default": f"{numerator}/255"}
    options: list[Callable[[Callable[..., None]], Callable[..., None]]] = [
        click.option("--model-dir"),
        data_option(),
        click.option("--data-dir", default="data", show_default=True),
        click.option("--eps", **eps, help="Linf radius in pixel units of [0, 1], such as 8/255."),
        click.option("--n", default=100, show_default=True, help="Test images."),
        click.option("--seed", default=0, show_default=True),
        click.option("--out", type=click.Path(path_type=Path), default=Path(out), show_default=True),
    ]
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)
