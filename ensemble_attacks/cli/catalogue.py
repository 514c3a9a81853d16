"""Define the command ``attacks``, which lists the records of the registry, also as the page of the documentation."""

from __future__ import annotations

import click

from ensemble_attacks.attacks.peers import PEER
from ensemble_attacks.attacks.record import PAPERS, NamedAttack
from ensemble_attacks.attacks.registry import MINIMAL, RECORDS, registered

SEARCH = "for each image the smallest radius up to eps at which another attack succeeds: minimal:mora (`evaluate --curve`)"
PEERS = "any of torchattacks', with options: torchattacks:PGD?steps=50&alpha=0.002"
PAGE = """# Attacks

<!-- Written by `ensemble-attacks attacks --markdown > docs/attacks.md`: edit the records, not this page. -->

Names for `--attacks`, `evaluate(attacks=...)` and `AutoAttack(attacks_to_run=...)`, in the order in which it pays to run
them. *Members* are the networks that an ensemble is made of. *Passes* counts the forward and backward passes of an image
that holds out to the end, at the most; of a random model, times its draws. Images that are fooled cost less. Options follow
the name, as in `mora?steps=10&targets=3`: of this package's attacks their arguments, of AutoAttack's and pipelines `steps`.

| name | what it does | norms | needs | passes | paper |
|---|---|---|---|---|---|
"""


@click.command()
@click.option("--markdown", is_flag=True, help="As the page docs/attacks.md, without the attacks of other packages.")
def attacks(markdown: bool) -> None:
    """List the attacks: what each does, needs and costs.

    The cost is the number of forward and backward passes of an image that holds out; of a random model, times its draws.
    """
    if markdown:
        click.echo(page(), nl=False)
        return
    from rich.markup import escape
    from rich.table import Column, Table

    from ensemble_attacks.cli.console import console

    table = Table(Column("name", no_wrap=True), "what it does", "norms", "needs", Column("passes", justify="right"))
    for name, record in registered().items():
        meaning = record.summary + (f" ({record.source})" if record.source else "")
        table.add_row(name, escape(meaning), *_facts(record))
    table.add_row(f"{MINIMAL}NAME", SEARCH)
    table.add_row(f"{PEER}NAME", PEERS)
    console.print(table)


def _facts(record: NamedAttack) -> tuple[str, str, str]:
    """Return an attack's norms, what it needs of a model, and its cost, for people."""
    needs = [*record.needs, *([f"{record.fewest_classes} classes"] if record.fewest_classes > 2 else [])]
    return ", ".join(record.norms), ", ".join(needs), "" if record.cost is None else f"{record.cost:,}"


def page() -> str:
    """Return the page of the documentation that lists the attacks of this package and of its hosts."""
    rows = []
    for name, record in RECORDS.items():
        link = PAPERS.get(record.source)
        paper = f"[{record.source}]({link})" if link else record.source
        rows.append(" | ".join((f"| `{name}`", record.summary, *_facts(record), f"{paper} |")))
    rows.append(f"| `{MINIMAL}NAME` | {SEARCH} | Linf, L2 | | | |")
    rows.append(f"| `{PEER}NAME` | {PEERS} | | | | [Kim, 2020](https://arxiv.org/abs/2010.01950) |")
    return PAGE + "\n".join(rows) + "\n"
