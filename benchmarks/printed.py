"""Every table of the pages that print figures (`PAGES`), and where its figures come from.

    python -m benchmarks.printed

Prints, for each table, how many of its rows follow from records, and lists the tables and rows that no record is left of.
`tests/test_printed.py` computes all others anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import click

from benchmarks import recorded
from benchmarks.claims import of_claims
from benchmarks.recorded import ROOT, Table

PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
NO_RECORD = {  # by the first cells of a table's head: why nothing is left to compute it from
    ("model", "vote", "eps", "seed", "attack"): "what the page's ten lines print: run them (tests/test_docs.py)",
    ("defense", "vote", "clean", "AutoAttack", "MORA"): "what `make demo` prints: run it",
    ("model", "clean", "AutoAttack rand, by its own flags"): "measured before records were kept: run the command above it",
    ("model", "transfer (%)"): "measured before records were kept: run benchmarks/transfer.py",
    ("backbone", "DnCNN"): "throw-away trainings, of which benchmarks/results/masks has a part",
    ("", "3 x ResNet-20"): "times, which no other machine repeats: run benchmarks/speed.py",
}
NO_FIGURES = (  # tables of words
    ("name", "what it does"),
    ("recipe", "defense"),
    ("flag", "what was seen"),
    ("`--model`",),
    ("`--data`",),
    ("", "on the command line, in TOML, in Python"),
    ("", "what you see"),
)


def tables() -> Iterator[Table]:
    """Yield the tables of the pages."""
    for page in PAGES:
        lines = page.read_text().splitlines()
        starts = [n for n, line in enumerate(lines) if line.startswith("|") and not lines[n - 1].startswith("|")]
        for start in starts:
            end = next((n for n in range(start, len(lines)) if not lines[n].startswith("|")), len(lines))
            head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]
            yield Table(page.relative_to(ROOT).as_posix(), tuple(head), rows)


SOURCES: dict[tuple[str, ...], Callable[[Table, list[str]], list[str] | None]] = {  # by the first cells of a table's head
    ("defense (3 members)", "vote", "eps", "clean"): recorded.of_table1,
    ("defense (3 members)", "vote", "APGD-CE leaves"): recorded.of_reach,
    ("dataset", "model", "clean accuracy of the members (%)"): recorded.of_cards,
    ("claim", "theirs", "ours"): of_claims,
    ("defense (3 members)", "beside"): recorded.of_pairs,
    ("vote", "eps x 255"): recorded.of_imagenet,
    ("attack", "steps", "waits"): recorded.of_waits,
    ("attack", "vote", "cells", "largest gap"): recorded.of_truth,
    ("ensemble", "attack", "on mean probability"): recorded.of_votes,
    ("ensemble", "vote", "radius"): recorded.of_radii,
    ("instead of MORA", "hard votes: MORA's lead"): recorded.of_ablation,
    ("defense", "vote", "clean, 3 / 5 / 8 members"): recorded.of_sizes,
    ("ensemble", "vote", "eps", "clean"): recorded.of_larger,
    ("model", "own (%)", "transfer (%)"): recorded.of_transfer,
    ("attack", "draws of a step"): recorded.of_purified,
    ("rate", "temperature", "batch norm", "step"): recorded.of_masks,
    **{(head,): recorded.of_everywhere for head in recorded.EVERYWHERE},
}


def known(head: tuple[str, ...], among: Any) -> tuple[str, ...] | None:
    """Return the key that a table's head begins with."""
    return next((key for key in among if head[: len(key)] == key), None)


@click.command()
def main() -> None:
    for table in tables():
        if known(table.head, NO_FIGURES):
            continue
        source = known(table.head, SOURCES)
        if source is None:
            why = NO_RECORD.get(known(table.head, NO_RECORD) or (), "unknown")
            click.echo(f"{table.page}: {' | '.join(table.head[:3])} ...: no record ({why})")
            continue
        computed = [(row, SOURCES[source](table, row)) for row in table.rows]
        same = sum(row == found for row, found in computed)
        click.echo(f"{table.page}: {' | '.join(table.head[:3])} ...: {same} of {len(computed)} rows are as recorded")
        for row, found in computed:
            if found != row:
                click.echo(f"    {row[0]}: " + ("no record" if found is None else f"printed {row}, recorded {found}"))


if __name__ == "__main__":
    main()
