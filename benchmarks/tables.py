"""Tables of the benchmarks: printed as Markdown, kept as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its figures as they are printed."""
    return {key: f"{value:.1f}" if isinstance(value, float) and key != "eps" else value for key, value in row.items()}


def save_table(rows: list[dict[str, Any]], stem: Path) -> str:
    """Write ``rows``, dicts with the same keys, to ``<stem>.md``, ``.json`` and ``.csv``; returns the Markdown."""
    text = tabulate([shown(row) for row in rows], headers="keys", tablefmt="github", disable_numparse=True) + "\n"
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return text
