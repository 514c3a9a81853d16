"""Hold the console that commands print to, and make text of others fit to be shown there."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape

console = Console() if sys.stdout.isatty() else Console(width=120)


def plain(text: object) -> str:
    """Return text that others chose so that a terminal shows it: nothing in it moves a cursor, colours, or reorders."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown(text: object) -> str:
    """Return `plain` text that Rich takes for no markup."""
    return escape(plain(text))
