"""Define the command ``demo``."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import click

DEMO_MODELS = ("gal_convnet_3", "trs_convnet_3")
DEMO_VOTES = ("softmax", "voting")
DEMO_EPS, DEMO_N = 0.12, 50
COLUMNS = ("defense", "vote", "clean", "AutoAttack", "MORA", "passes / image: AutoAttack", "MORA")


@click.command()
@click.option("--n", type=int, default=DEMO_N, help="Test images of each ensemble.")
@click.option("--seed", type=int, default=0)
def demo(n: int, seed: int) -> None:
    """Handwritten digits: print what the standard AutoAttack and MORA say of two ensembles, in about a minute."""
    import torch
    from tqdm import tqdm

    from ensemble_attacks.data import load_dataset

    load_dataset("digits", n=n)
    began = time.perf_counter()
    click.echo(f"Robust accuracy (%) of three-member ensembles: digits, Linf {DEMO_EPS}, {n} images; a row when it is done")
    click.echo(_line(COLUMNS))
    cells = [(model, vote, n, seed) for model in DEMO_MODELS for vote in DEMO_VOTES]
    workers = min(len(cells), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        rows = pool.map(demo_row, *zip(*cells, strict=True))
        for row in tqdm(rows, total=len(cells), unit="row", disable=None, leave=False):
            tqdm.write(_line(row))
    click.echo(f"Judged anew from the images. {time.perf_counter() - began:.0f} seconds.")


def _line(row: tuple[str, ...] | list[str]) -> str:
    """Return a row as wide as the headings: two names, then figures."""
    widths = [max(len(name), 7) for name in COLUMNS]
    left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
    return "  ".join([*left, *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))])


def demo_row(model: str, vote: str, n: int, seed: int) -> list[str]:
    """Return one row of the demo's table."""
    from ensemble_attacks.data import load_dataset
    from ensemble_attacks.evaluation.runner import evaluate as run_evaluation
    from ensemble_attacks.evaluation.settings import Settings
    from ensemble_attacks.models import providers
    from ensemble_attacks.models.passes import passes_per_image

    x, y = load_dataset("digits", n=n)
    ensemble = providers.load_model(model, dataset="digits", vote=vote)
    summary = run_evaluation(ensemble, x, y, ["autoattack", "mora"], Settings(eps=DEMO_EPS, seed=seed))
    rows = [summary["attacks"][name] for name in ("autoattack", "mora")]
    spent = [f"{passes_per_image(row):,.0f}" for row in rows]
    accuracies = [f"{100 * row['accuracy']:.1f}" for row in (summary["clean"], *rows)]
    return [model.partition("_")[0], vote, *accuracies, *spent]
