"""A random model's mean over draws has the share that is right in every draw beside it."""

from __future__ import annotations

import torch

from ensemble_attacks.evaluation.report.tables import COLUMNS, WORST, table_rows
from ensemble_attacks.evaluation.summary import row_of
from ensemble_attacks.judge import Judgement


def judged(correct: list[list[int]]) -> Judgement:
    correct_EN = torch.tensor(correct, dtype=torch.bool)
    robust = 2 * correct_EN.sum(0) > len(correct_EN)
    return Judgement(robust, ~robust, torch.zeros_like(robust), correct_EN, torch.zeros(len(robust)))


def test_tables_show_the_worst_of_several_draws() -> None:
    drawn, once = (row_of(judged(c), {}, 40, 40, {}) for c in ([[1, 1, 0, 0], [1, 0, 1, 0]], [[1, 1, 0, 0]]))
    cell = {
        "model": "m",
        "vote": "own",
        "eps": 0.1,
        "seed": 0,
        "n": 4,
        "clean": once,
        "attacks": {"a": drawn},
        "worst_case": once,
    }
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table_rows({"cells": [cell]}, {})]
    assert [row[WORST] for row in rows] == ["", 25.0, ""]
    assert rows[1]["robust %"] == 50.0
