"""Run attacks on the same images, judge what they return, and keep it: summary, times, adversarial images."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ensemble_attacks.ensembles import check_members
from ensemble_attacks.evaluation.passes import CountingModel, count_passes
from ensemble_attacks.evaluation.suite import Crafted, Entry, Settings, find_attack
from ensemble_attacks.judge import Judgement, judge, wilson_interval
from ensemble_attacks.prepare import prepare
from ensemble_attacks.preserve import private_random_state
from ensemble_attacks.validation import check_count, check_images, check_labels, check_norm, check_positive

logger = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[str],
    settings: Settings,
    *,
    describe: dict[str, Any] | None = None,
    out: Path | None = None,
    report: Callable[[str, dict[str, Any]], object] = lambda name, row: None,
) -> dict[str, Any]:
    """Attack, judge, and summarise.

    Args:
        model: images in [0, 1] -> scores (N, K); an ensemble for attacks that look inside.
        x, y: images (N, C, H, W) and labels (N,).
        attacks: names, as listed in `suite.attack_names`.
        describe: what else to store in the summary: the model's name, the dataset, and so on.
        out: a new folder for ``summary.json`` (the same for the same run), ``times.json`` and the images; ``None``: nowhere.
        report: called with each attack's name and row as soon as it is judged.

    Returns:
        The summary: ``clean``, ``attacks`` by name, and ``worst_case`` over all attacks per sample.

    Raises:
        ValueError, TypeError: unusable arguments; nothing has been run.
        FileExistsError: ``out`` already holds a run.
        OutOfBallError: an attack returned an image outside the ball.
    """
    entries = {name: find_attack(name) for name in attacks}
    for name, entry in entries.items():
        if entry.needs_members:
            check_members(model, name)
        entry.check(model)
    check_positive("eps", settings.eps)
    check_norm(settings.norm)
    check_count("batch_size", settings.batch_size)
    check_images(x, "x")
    check_labels(y, x, "y")
    check_count("seed", settings.seed, at_least=0)
    check_count("draws", settings.draws)
    if settings.eot_iter is not None:
        check_count("eot_iter", settings.eot_iter)
    y = y.long()
    if out is not None:
        if (out / "summary.json").exists():
            raise FileExistsError(f"{out} already holds a run: choose another folder (--out)")
        out.mkdir(parents=True, exist_ok=True)

    verdict = lambda x_adv: judge(  # noqa: E731
        model, x, y, x_adv, eps=settings.eps, norm=settings.norm, draws=settings.draws, batch_size=settings.batch_size
    )
    clean = verdict(x)
    report("clean", clean.summary())
    twin = prepare(model, x[:8].to(next(model.parameters(), x).device))
    rows: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    right = clean.correct.double().mean(0)  # of every sample, the share of right draws under the worst attack so far
    for name, entry in entries.items():
        logger.info("running %s on %d images", name, len(x))
        with tqdm(desc=name, unit=" passes", unit_scale=True, disable=None, leave=False) as bar:
            counted = count_passes(twin, bar.update)
            began = time.perf_counter()
            crafted = entry.craft(counted, x, y, settings)
            if twin is not model:
                crafted = _recraft(model, counted, x, y, crafted, entry, settings)
            seconds[name] = time.perf_counter() - began
        judgement = verdict(crafted.images)
        right = right.minimum(judgement.correct.double().mean(0))
        rows[name] = judgement.summary() | {
            "forwards_per_image": counted.forwards / len(x),
            "backwards_per_image": counted.backwards / len(x),
        }
        if crafted.stages:
            rows[name]["stages"] = _stages(crafted, judgement)
        report(name, rows[name] | {"seconds": seconds[name]})
        if out is not None:
            _save_images(out / f"{name}.safetensors", crafted.images, y, judgement, settings, name)
            if crafted.trace:
                (out / f"{name}.trace.json").write_text(json.dumps(crafted.trace) + "\n")

    low, high = wilson_interval(right.sum().item(), len(x))
    worst = {"n": len(x), "robust": int((right > 0.5).sum()), "accuracy": right.mean().item(), "interval": [low, high]}
    report("worst case", worst)
    summary = {
        **(describe or {}),
        **asdict(settings),
        "n": len(x),
        "clean": clean.summary(),
        "attacks": rows,
        "worst_case": worst,
    }
    if out is not None:
        (out / "times.json").write_text(
            json.dumps({"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": seconds}, indent=2) + "\n"
        )
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


@torch.no_grad()
def _recraft(
    model: nn.Module, counted: CountingModel, x: Tensor, y: Tensor, crafted: Crafted, entry: Entry, settings: Settings
) -> Crafted:
    """Craft again, on the model itself, the few images that fool its twin but, by a rounding error, not the model."""
    device = next(model.parameters(), x).device

    def predict(net: nn.Module) -> Tensor:
        with private_random_state(settings.seed, net):
            return torch.cat([net(batch.to(device)).argmax(1).cpu() for batch in crafted.images.split(settings.batch_size)])

    rows = torch.nonzero((predict(counted.counted) != y.cpu()) & (predict(model) == y.cpu())).squeeze(-1)
    if not len(rows):
        return crafted
    counted.counted = model
    images = crafted.images.clone()
    images[rows] = entry.craft(counted, x[rows], y[rows], settings).images
    return replace(crafted, images=images)


def _stages(crafted: Crafted, judgement: Judgement) -> dict[str, dict[str, float]]:
    """After each part of a suite: passes so far, and samples left robust, which are those not fooled by its own flags or
    whose image the judge does not find fooled.
    """
    n = len(judgement.robust)
    return {
        name: {
            "robust": int((flags | ~judgement.fooled).sum()),
            "forwards_per_image": forwards / n,
            "backwards_per_image": backwards / n,
        }
        for name, (flags, forwards, backwards) in crafted.stages.items()
    }


def _save_images(path: Path, images: Tensor, y: Tensor, judgement: Judgement, settings: Settings, name: str) -> None:
    tensors = {"x_adv": images.cpu().contiguous(), "labels": y.cpu(), "robust": judgement.robust.to(torch.uint8)}
    metadata = json.dumps({**asdict(settings), "attack": name})  # under one key: safetensors does not keep their order
    save_file(tensors, path, metadata={"settings": metadata})
