"""Every figure in a table of the READMEs or docs is the one that its record holds, or is listed as one without a record."""

from __future__ import annotations

import json

import pytest

from benchmarks import ablation, printed, randomized
from benchmarks.records import lead_of, paired, passes_of, robust_of

TABLES = [table for table in printed.tables() if not printed.known(table.head, printed.NO_FIGURES)]
RECORDED = [table for table in TABLES if printed.known(table.head, printed.SOURCES)]


def test_every_table_has_a_source_or_is_said_to_have_none() -> None:
    for table in TABLES:
        sources = [printed.known(table.head, known) for known in (printed.SOURCES, printed.NO_RECORD)]
        assert sum(source is not None for source in sources) == 1, table.head
    for kept in (printed.SOURCES, printed.NO_RECORD, printed.NO_FIGURES):
        for key in kept:
            assert any(table.head[: len(key)] == key for table in printed.tables()), f"no table {key}"


@pytest.mark.parametrize("table", RECORDED, ids=lambda table: table.head[0] + table.head[2])
def test_printed_figures_are_those_of_the_records(table: printed.Table) -> None:
    key = printed.known(table.head, printed.SOURCES)
    assert key is not None
    computed = [(row, printed.SOURCES[key](table, row)) for row in table.rows]
    for row, found in computed:
        assert found is None or found == row
    assert sum(found is not None for _, found in computed) >= len(computed) / 2


def test_tables_that_ship_are_those_of_their_records() -> None:
    results = printed.ROOT / "benchmarks" / "results"
    folder = results / "ablation" / "digits"
    cells = [(model, vote) for model in ablation.MODELS.split(",") for vote in ("voting", "softmax")]
    for name, variants in (("digits", ablation.VARIANTS), ("digits_decomposition", ablation.DECOMPOSITION)):
        stored = json.loads((results / "ablation" / f"{name}.json").read_text())
        assert ablation.rows_of(folder, cells, list(variants)) == stored
        assert ablation.pooled(stored) == json.loads((results / "ablation" / f"{name}_pooled.json").read_text())
    found = {}
    for path in (results / "randomized" / "digits").glob("*.json"):
        record = json.loads(path.read_text())
        found[record["ensemble"], record["attack"]] = randomized.row_of(record["ensemble"], record["attack"], record)
    table = json.loads((results / "randomized" / "digits.json").read_text())
    assert [found.pop((row["ensemble"], row["attack"])) for row in table] == table
    assert not found
    for shipped in (folder, results / "randomized" / "digits"):
        records = [json.loads(path.read_text()) for path in shipped.glob("*.json")]
        assert len({(record["code"], record["seed"], record["n"], record["eps"]) for record in records}) == 1
        assert all(len(record["flags"]) == len(record["clean"]) == record["n"] for record in records)


def test_a_lead_has_an_interval() -> None:
    assert lead_of(0, 0, 100) == "0.0 [-1.9, 1.9]"
    assert lead_of(1, 11, 100) == "10.0 [3.1, 16.5]"
    assert lead_of(11, 1, 100) == "-10.0 [-16.5, -3.1]"


def test_records_are_paired_image_by_image() -> None:
    assert paired("1100", "1010") == (1, 1, 1.0)
    ours, theirs, p = paired("0" * 12, "1" * 10 + "00")
    assert (ours, theirs) == (0, 10)
    assert p == pytest.approx(2 * 0.5**10)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired("11", "1")
    records = [{"flags": "1100", "forwards": 4, "backwards": 4}, {"flags": "10", "forwards": 8, "backwards": 2}]
    assert robust_of(records) == 50
    assert passes_of(records) == 3
