"""Hold the console that commands print to, and make text of others fit to be shown there."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

from ensemble_attacks.errors import plain

WIDE: Any = {"highlight": False, "markup": False, "soft_wrap": True}  # of lines that hold text of others
console = Console() if sys.stdout.isatty() else Console(width=120)


def shown(text: object) -> str:
    """Return `plain` text that Rich takes for no markup."""
    return escape(plain(text))
