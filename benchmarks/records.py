"""What all benchmarks store of a measurement, so that every figure that is printed can be computed anew from it.

A record is one attack on one range of images of one model: which images stayed robust, one by one, the passes spent, the
seed, and the hash of the code that ran.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from ensemble_attacks.evaluation.identity import code_version
from ensemble_attacks.files import write_whole
from ensemble_attacks.judge import Judgement, judge
from ensemble_attacks.models.passes import count_passes
from ensemble_attacks.models.twins import prepare

Record = dict[str, Any]
Make = Callable[[nn.Module], Any]  # a model that counts its passes -> an attack on it


def as_flags(robust: Tensor) -> str:
    """Return one character for each image: 1 where it is robust."""
    return "".join("01"[flag] for flag in robust.tolist())


def shares_of(judgement: Judgement) -> list[float]:
    """Return for each image the share of draws that are right."""
    return [round(share, 6) for share in judgement.correct.double().mean(0).tolist()]


def robust_of(records: Sequence[Record]) -> float:
    """Return the share of robust images, in %, over the ranges of one attack."""
    flags = "".join(record["flags"] for record in records)
    return 100 * flags.count("1") / len(flags)


def passes_of(records: Sequence[Record]) -> float:
    """Return the passes (forward + backward) per image over the ranges of one attack."""
    spent = sum(record["forwards"] + record["backwards"] for record in records)
    return spent / sum(len(record["flags"]) for record in records)


def paired(ours: str, theirs: str) -> tuple[int, int, float]:
    """Return how many images stayed robust to the first alone, how many to the second alone, and McNemar's exact p."""
    if len(ours) != len(theirs):
        raise ValueError(f"flags of {len(ours)} and of {len(theirs)} images cannot be paired")
    first = sum(a > b for a, b in zip(ours, theirs, strict=True))
    second = sum(a < b for a, b in zip(ours, theirs, strict=True))
    return first, second, exact_p(first, second)


def exact_p(first: int, second: int) -> float:
    """Return McNemar's exact p of so many images that stayed robust to one alone, and to the other alone."""
    return binomtest(first, first + second).pvalue if first + second else 1.0


def save(path: Path, record: Record) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1).encode() + b"\n")


def lead_of(ours: int, theirs: int, n: int) -> str:
    """Return by how many points we leave fewer of ``n`` images robust, with its 95% interval, as text.

    ``ours`` and ``theirs`` are what either alone leaves robust; the interval is Wald's after half an image is added to each
    of the four cells (Agresti and Min, Statistics in Medicine 2005).
    """
    total, only_ours, only_theirs = n + 2, ours + 0.5, theirs + 0.5
    centre = (only_theirs - only_ours) / total
    half = 1.959964 * ((only_ours + only_theirs - total * centre**2) ** 0.5) / total
    low, high = (100 * max(-1.0, min(1.0, centre + side * half)) for side in (-1, 1))
    return f"{100 * (theirs - ours) / n:.1f} [{low:.1f}, {high:.1f}]"


def load(path: Path, **expected: Any) -> Record:
    """Return a stored record; `click.UsageError` where it is of other weights, images or settings."""
    record = json.loads(path.read_text())
    if other := next((key for key, value in expected.items() if record.get(key) != value), None):
        raise click.UsageError(f"{path} has another {other} ({record.get(other)}): choose another --out")
    return record


def measured(
    path: Path,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    make: Make,
    *,
    eps: float,
    seed: int,
    batch_size: int = 250,
    draws: int = 1,
    score: Callable[[Tensor], dict[str, Any]] | None = None,
    about: Record,
) -> Record:
    """Return the record of an attack, from ``path`` where it was measured before, else measured, judged and stored there.

    Of several draws, each image's share of right ones is stored, too: ``right`` of adversarial images, ``clean_right``.

    Args:
        path: the record's file.
        model: what is attacked (on its twin with batch norm folded) and judged.
        x, y: images and labels.
        make: the maker of the attack, which is given a model that counts its passes.
        eps, seed, batch_size, draws: the radius in Linf, the attack's seed, images per pass, and draws of the judge.
        score: what else to store of the adversarial images.
        about: what else says which measurement this is; a stored record that says otherwise is an error.
    """
    about = about | {"eps": eps, "seed": seed, "n": len(x)}
    if path.exists():
        return load(path, **about)
    counted = count_passes(prepare(model, x[:8]))
    began = time.perf_counter()
    images = torch.cat([make(counted)(*part) for part in zip(x.split(batch_size), y.split(batch_size), strict=True)])
    seconds = time.perf_counter() - began
    clean, judged = (_judged(model, x, y, seen, eps, draws) for seen in (x, images))
    record = about | {
        "code": code_version(),
        "clean": as_flags(clean.robust),
        "flags": as_flags(judged.robust),
        **({"clean_right": shares_of(clean), "right": shares_of(judged)} if draws > 1 else {}),
        "forwards": counted.forwards,
        "backwards": counted.backwards,
        "seconds": round(seconds, 1),
        **(score(images) if score else {}),
    }
    save(path, record)
    return record


def _judged(model: nn.Module, x: Tensor, y: Tensor, images: Tensor, eps: float, draws: int) -> Judgement:
    return judge(model, x, y, images, eps=eps, draws=draws)
