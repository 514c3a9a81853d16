"""Define the group of commands, which shows errors as one line, and with ``--debug`` as tracebacks.

A command's module is imported when the command is called: help and completion answer without torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from ensemble_attacks.errors import LedgerError, plain
from ensemble_attacks.version import __version__

COMMANDS = {  # by name: the module under `cli`, and what it does
    "evaluate": ("run", "Attack a model, judge the images, print the comparison."),
    "diagnose": ("inspect", "Is a model masking its gradients?"),
    "sweep": ("run", "Evaluate what a TOML file describes: models x votes x eps x seeds."),
    "status": ("run", "How far a run is, and what failed."),
    "resume": ("run", "Go on with a run; units that were given up are tried again."),
    "verify": ("verify", "Compute anew, from stored images, the model and the data alone, what a run or a bundle says."),
    "report": ("inspect", "Write a finished run as one HTML page, Markdown, CSV and figures."),
    "export": ("inspect", "Write a finished run in another project's format."),
    "demo": ("demo", "Handwritten digits: AutoAttack beside MORA, in about a minute."),
    "train": ("models", "Train a defense, with one command, resumable."),
    "convert": ("models", "Make a model of published checkpoints."),
    "attacks": ("catalogue", "List the attacks: what each does, needs and costs."),
    "models": ("models", "List the models that can be loaded."),
    "tune": ("tuning", "Measure how a model's gradient passes are computed the soonest here."),
    "doctor": ("models", "Check the installation."),
}


@contextmanager
def told_in_one_line(debug: bool) -> Iterator[None]:
    """Show an error that a user can mend as one line, and exit with 2; with ``debug`` let it be."""
    try:
        yield
    except (ValueError, TypeError, ImportError, LedgerError, OSError, FloatingPointError, OverflowError) as error:
        if debug:
            raise
        raise click.UsageError(_one_line(error), ctx=None) from error


class Commands(click.Group):
    """A group that shows an error as one line and exits with 2, or 130 after SIGINT; ``--debug`` shows the traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"ensemble_attacks.cli.{COMMANDS[cmd_name][0]}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, meaning) for name, (_, meaning) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with told_in_one_line(bool(ctx.params.get("debug"))):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def _one_line(error: Exception) -> str:
    """Return an error's message in one line, without what a terminal would obey, at a length that is read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in text)[:2000]


class Plain(logging.Formatter):
    """A formatter whose lines hold nothing that a terminal would obey: models and attacks of others are quoted in them."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(plain, super().format(record).splitlines()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
def main(debug: bool) -> None:
    """Evaluate ensemble defenses with attacks that tell the truth."""
    handler = logging.StreamHandler()
    handler.setFormatter(Plain("%(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])
    # AutoAttack's own, of its settings
    logging.getLogger("auto-attack").setLevel(logging.DEBUG if debug else logging.WARNING)
