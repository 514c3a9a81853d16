"""Provide the command line, ``ensemble-attacks``."""

from ensemble_attacks.cli.group import main

__all__ = ["main"]
