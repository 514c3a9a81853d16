"""Evaluate a program's own model on its own data, as a run that ``status``, ``report``, ``verify`` and ``export`` read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import device as Device
from torch import nn

from ensemble_attacks.data import Opened, from_python
from ensemble_attacks.data.transforms import transform_of
from ensemble_attacks.evaluation import audit
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.manifest import manifest_of, run_identity
from ensemble_attacks.evaluation.origins import given
from ensemble_attacks.evaluation.report.tables import COLUMNS, table_rows
from ensemble_attacks.evaluation.settings import Sweep
from ensemble_attacks.evaluation.summary import seconds_of
from ensemble_attacks.evaluation.tracking import check_tracker, log_run
from ensemble_attacks.extras import extra
from ensemble_attacks.models.ask import as_module, device_of
from ensemble_attacks.validation import check_count

Given = tuple[str, Any] | None  # something of the program's, and the name that the run knows it by


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found, and the folder that holds all of it.

    Attributes:
        folder: the run's folder.
        summary: ``cells``, each with ``clean``, ``attacks`` by name and ``worst_case``, as ``summary.json`` has it.
    """

    folder: Path
    summary: dict[str, Any]
    _model: Given = field(repr=False)
    _images: Given = field(repr=False)
    _device: str = field(repr=False)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Return the table, a dictionary for each attack: robust accuracy with its 95% interval in %, passes, seconds."""
        return [dict(zip(COLUMNS, row, strict=True)) for row in table_rows(self.summary, seconds_of(Ledger(self.folder)))]

    @property
    def table(self) -> str:
        """Return the table as text."""
        told = [column for column in COLUMNS if any(row[column] != "" for row in self.rows)]
        return tabulate([[row[column] for column in told] for row in self.rows], told, tablefmt="github")

    def __str__(self) -> str:
        return self.table

    def to_pandas(self) -> Any:
        """Return the table as a ``pandas.DataFrame``.

        Raises:
            ImportError: Where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.rows, columns=list(COLUMNS))

    def report(self, out: str | PathLike[str] | None = None) -> Path:
        """Write ``report.html``, Markdown, CSV and figures into a new folder; return the page's path.

        Args:
            out: the folder; ``None``: ``report``, in the run's.

        Raises:
            FileExistsError: Where it is there already.
            MissingExtraError: Where what draws and renders it is not installed.
        """
        with extra("report", "a report"):
            from ensemble_attacks.evaluation.report.pages import write_report
        with given(self._model, self._images):
            return write_report(self.folder, Path(out or self.folder / "report"), device=self._device)

    def verify(self) -> list[dict[str, Any]]:
        """Compute anew what the run says; see `ensemble_attacks.evaluation.own.verify`."""
        with given(self._model, self._images):
            return audit.verify(Ledger(self.folder), self._device)


def evaluate(
    model: nn.Module | str | PathLike[str],
    data: Any,
    *,
    eps: Any,
    attacks: str | Sequence[str] = "auto",
    norm: str = "Linf",
    box: Any = None,
    movable: Any = None,
    out: str | PathLike[str] | None = None,
    name: str | None = None,
    transform: str = "",
    device: str | None = None,
    workers: int | None = None,
    model_dir: str | None = None,
    data_dir: str = "data",
    download: bool = False,
    log: str | None = None,
    **settings: Any,
) -> Evaluation:
    """Attack a model, judge the images that the attacks return, and store all of it as a run.

    The same call again goes on where it was stopped, and computes nothing twice. The folder is a run as the command line's:
    ``ensemble-attacks status``, ``report``, ``verify`` and ``export`` read it, given ``--model`` and ``--data`` where model
    or data are the program's own. The model is left as it was.

    Args:
        model: a module, inputs (N, ...) in the box, such as images (N, C, H, W), -> scores (N, K), which is attacked where
            it lies; or the name of one, as ``evaluate --model`` takes it. Attacks that look inside want an `Ensemble`, or
            `as_ensemble`'s.
        data: inputs (N, ...) in the box, or bytes, and labels (N,), as a pair of tensors or arrays; a torch ``Dataset``
            or ``DataLoader``; or the name of a dataset, file, folder or function, as ``evaluate --data`` takes it.
        eps: the radius of the ball, in the inputs' own units: a number, ``"8/255"``, an array or file with a radius for each
            feature; or a list of several of these.
        attacks: names (``ensemble-attacks attacks``), as a list or separated by commas; ``"auto"`` looks at the model first.
        norm: the norm of the ball.
        box: the values that inputs can take: a `Box`, a pair of numbers or arrays, or a file of ``low`` and ``high``;
            ``None``: [0, 1]. Bytes span it.
        movable: which features may move: an array of truth values, of one input, or a file of one; ``None``: all.
        out: the run's folder; ``None``: one of its own in ``runs``.
        name: what the run calls the model; ``None``: its class's name.
        transform: what is done to every image, as ``"resize=256,crop=224"``.
        device: where a model that is named is put, ``None``: the CPU; several, separated by commas, among which workers, or
            the batches of one, are shared.
        workers: the number of processes, ``None``: one for each device where model and data are names, else one.
        model_dir, data_dir, download: where named models and datasets lie, and whether the latter may be fetched.
        log: the tracker that is told the figures when done: ``"wandb"``, ``"tensorboard"`` or ``"mlflow"``; ``None``: none.
        settings: the attributes of `Sweep`: ``n``, ``first``, ``sample``, ``only_correct``, ``seeds``, ``votes`` (of named
            models), ``cascade``, ``batch_size``, ``shard_size``, ``draws`` and ``eot_iter`` (of random models), ``amp``,
            ``tune``.

    Returns:
        What was found: print it, or take its ``table``, ``rows``, ``to_pandas()`` or ``report()``.

    Raises:
        ValueError, TypeError, FileNotFoundError: Where something cannot be used; nothing has been run.
        LedgerError: Where ``out`` holds another run, or other things; it says what differs.
    """
    own_model, own_images = _own_model(model, name), _own_images(data, transform)
    model_name = own_model[0] if own_model else fspath(model)  # type: ignore[arg-type]
    data_name = own_images[0] if own_images else fspath(data)
    places = str(device or (device_of(own_model[1], Device("cpu")) if own_model else "cpu")).split(",")
    if workers is not None:
        check_count("workers", workers)
    if log is not None:
        check_tracker(log)
    if own_model or own_images:
        if workers is not None and workers > 1:
            raise ValueError(
                f"workers is {workers}, but {'the model' if own_model else 'the data'} cannot go to other processes: name a "
                "function that makes it, as evaluate('nets.py:make', 'images.npz', ...)"
            )
        workers = 1
    sweep = {"models": model_name, "dataset": data_name, "eps": eps, "attacks": _names(attacks), "norm": norm, **settings}
    sweep |= {"box": box, "movable": movable}
    with given(own_model, own_images):
        manifest = manifest_of(
            Sweep.of(sweep | {"transform": transform}, "evaluate"), model_dir=model_dir, data_dir=data_dir, download=download
        )
        ledger = Ledger(Path(out or Path("runs") / run_identity(manifest)), manifest)
        summary = run(ledger, workers=workers, devices=places)
    if log is not None:
        log_run(ledger, summary, log)
    return Evaluation(ledger.folder, summary, own_model, own_images, places[0])


def verify(
    folder: str | PathLike[str],
    *,
    model: nn.Module | str | None = None,
    data: Any = None,
    device: str = "cpu",
    model_dir: str | None = None,
    data_dir: str | None = None,
) -> list[dict[str, Any]]:
    """Compute anew, from stored images, the model and the data alone, all that a run says that follows from them.

    Args:
        folder: the run's folder.
        model, data: as of `evaluate`; ``None``: what the run names.
        device: where a model that is named is put.
        model_dir, data_dir: where named models and datasets lie by now; ``None``: where they lay.

    Returns:
        For each unit, the choice of images, and the summary: ``unit``, its name, ``n``, the number of its images, how many
        are ``robust`` now, how many values ``differ`` (``None`` where it is missing or damaged), and ``what`` they are.

    Raises:
        LedgerError: Where the model's source, its weights or the images are not those that the run began with.
    """
    ledger = Ledger(Path(folder))
    sweep = ledger.manifest["sweep"]
    own_model = _own_model(model, sweep["models"][0]) if model is not None else None
    own_images = _own_images(data, sweep.get("transform", ""), sweep["dataset"]) if data is not None else None
    names = {
        "model": own_model[0] if own_model else None if model is None else fspath(model),  # type: ignore[arg-type]
        "dataset": own_images[0] if own_images else None if data is None else fspath(data),
    }
    where = str(device_of(own_model[1], Device(device))) if own_model else device
    with given(own_model, own_images):
        return audit.verify(
            ledger, where, model_dir=model_dir, data_dir=data_dir, model=names["model"], dataset=names["dataset"]
        )


def _names(attacks: Any) -> list[str]:
    """Return the names of attacks, of a list or separated by commas.

    Raises:
        TypeError: Where one is no name.
    """
    if isinstance(attacks, str):
        return [part.strip() for part in attacks.split(",") if part.strip()]
    given = list(attacks) if isinstance(attacks, Iterable) else [attacks]
    for one in given:
        if not isinstance(one, str):
            kind = one if isinstance(one, type) else type(one)
            raise TypeError(
                f"attacks holds {kind.__name__}, no name: a run makes its attacks anew, in any process, by names such as "
                "'mora' or 'torchattacks:PGD?steps=50'; AutoAttack(attacks_to_run=[...]) takes instances"
            )
    return given


def _own_model(model: Any, name: str | None) -> Given:
    """Return a module and its name; ``None`` where it is a name."""
    if isinstance(model, (str, PathLike)):
        return None
    module = as_module(model)
    return name or type(module).__name__, module


def _own_images(data: Any, transform: str, name: str | None = None) -> tuple[str, Opened] | None:
    """Return the images of a program and their name; ``None`` where they are a name."""
    transform_of(transform)
    if isinstance(data, (str, PathLike)):
        return None
    called = name or ("images" if isinstance(data, (tuple, list)) else type(data).__name__)
    return called, from_python(data, called)
