"""Choose the images of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from ensemble_attacks.data import Opened, numbers_of, open_dataset
from ensemble_attacks.data.choice import stratified
from ensemble_attacks.evaluation.origins import images_of, placed
from ensemble_attacks.evaluation.runner import judged
from ensemble_attacks.evaluation.settings import Sweep
from ensemble_attacks.evaluation.units import threat_of
from ensemble_attacks.models import providers

PIECE = 500  # images that are read at once


def chosen(sweep: Sweep, opened: Opened, models: Sequence[nn.Module]) -> Sequence[int]:
    """Return the numbers of the images that a sweep takes of a dataset.

    Raises:
        ValueError: Where there are fewer than it asks for.
    """
    if sweep.sample is not None and sweep.n is not None:
        raise ValueError(f"n is {sweep.n} and sample {sweep.sample}: name one of them")
    numbers = numbers_of(opened, range(len(opened)), None, sweep.first)
    if sweep.only_correct:
        numbers = _right(sweep, opened, models, numbers)
    if sweep.sample is None:
        return numbers_of(opened, numbers, sweep.n)
    return [numbers[index] for index in stratified(opened.labels[list(numbers)], sweep.sample, sweep.seeds[0])]


def _right(sweep: Sweep, opened: Opened, models: Sequence[nn.Module], numbers: Sequence[int]) -> list[int]:
    """Return the numbers of images that all models get right, as the judge finds; no more than are needed."""
    settings = sweep.settings(sweep.eps[0], sweep.seeds[0], sweep.threat)
    found: list[int] = []
    for start in range(0, len(numbers), PIECE):
        piece = numbers[start : start + PIECE]
        x, y = opened.take(piece)
        right = torch.stack([judged(model, x, y, x, settings).robust for model in models]).all(0)
        found += [number for number, keep in zip(piece, right.tolist(), strict=True) if keep]
        if sweep.sample is None and sweep.n is not None and len(found) >= sweep.n:
            break
    return found


def rows_said(numbers: Sequence[int]) -> list[int] | None:
    """Return the numbers of the images taken as a manifest has them: ``None`` where they are the first."""
    return None if isinstance(numbers, range) and numbers.start == 0 else list(numbers)


def choice_of(manifest: dict[str, Any]) -> tuple[list[int] | None, int]:
    """Return the ``rows`` and ``images`` of a manifest, chosen anew.

    Raises:
        ValueError: Where there are fewer images than it says.
    """
    stored, places, images = manifest["sweep"], manifest["places"], images_of(manifest)
    n = stored["n"] if stored["sample"] is None else None  # which the manifest has in either case
    names = [known.name for known in fields(Sweep) if known.name in stored]
    sweep = Sweep.of({**{name: stored[name] for name in names}, "n": n}, "the manifest")
    sweep = replace(sweep, threat=threat_of(manifest))
    opened = open_dataset(**{key: value for key, value in images.items() if key != "rows"})
    models = [
        providers.load_model(placed(manifest, name), places["model_dir"], stored["dataset"], vote=sweep.votes[0])
        for name in (sweep.models if sweep.only_correct else ())
    ]
    return rows_said(chosen(sweep, opened, models)), len(opened)
