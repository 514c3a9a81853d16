"""Run the chains in this process, in several, on a Ray cluster, or by Slurm.

Each engine takes a run's folder and the numbers of its chains; paths travel, never models.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ensemble_attacks.errors import LedgerError, said
from ensemble_attacks.evaluation.chains import run_chain
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.summary import summarise
from ensemble_attacks.evaluation.units import Unit, chain_of, count_chains
from ensemble_attacks.extras import extra
from ensemble_attacks.files import machine
from ensemble_attacks.validation import check_choice

logger = logging.getLogger(__name__)
Report = Callable[[int], object]  # called with the number of every chain that has ended


def run(ledger: Ledger, *, engine: str = "local", report: Report = lambda chain: None, **options: Any) -> dict[str, Any]:
    """Run what is not done, and return the summary.

    Args:
        ledger: the run's folder.
        engine: the name of an engine, a key of `ENGINES`.
        report: called with the number of every chain that has ended.
        options: further arguments of the engine.

    Raises:
        ValueError: Where the engine is unknown.
        LedgerError: Where code, models or images are not those that the run began with; nothing is counted as a failure.
        KeyboardInterrupt, SystemExit(143): Where it is stopped by SIGINT or SIGTERM; what was finished is kept.
    """
    check_choice("engine", engine, tuple(ENGINES))
    chains = range(count_chains(ledger.manifest))
    ledger.go_on().forget_dead()
    with terminable(), ledger.driving():
        while True:
            left = [index for index in chains if unfinished(ledger, chain_of(ledger.manifest, index))]
            if left:
                ENGINES[engine](ledger, left, report, **options)
            summary = summarise(ledger)
            if not any(unfinished(ledger, chain_of(ledger.manifest, index)) for index in chains):
                return summary
            # else what was found damaged when it was read is run again


def unfinished(ledger: Ledger, units: Sequence[Unit]) -> bool:
    """Tell whether there is work left in a chain; with ``cascade``, there is none behind a unit that was given up."""
    for unit in units:
        if ledger.open(unit):
            return True
        if unit.cell.cascade and not ledger.done(unit):
            return False
    return False


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the process as SIGINT does, within the context: at once, with what was finished kept.

    The exit code is 143.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def local(
    ledger: Ledger, chains: Sequence[int], report: Report, *, workers: int | None = None, devices: Sequence[str] = ("cpu",)
) -> None:
    """Run chains in processes of this machine, each with its share of the threads; with one worker, in this process.

    Args:
        workers: the number of processes; ``None``: one for each device, where there are as many chains.
        devices: where they ask the model. Each worker keeps one, or its share of them where there are more, among which it
            shares its batches; it halves its own where memory runs out.
    """
    workers = workers or min(len(devices), len(chains))
    if workers == 1:
        for index in chains:
            run_chain(str(ledger.folder), index, ",".join(devices))
            report(index)
        return
    left, suspects = list(chains), set[int]()
    threads = max(1, torch.get_num_threads() // workers)
    others = multiprocessing.active_children()
    while left:
        now = sorted(suspects)[:1] or left
        context = multiprocessing.get_context("spawn")
        places = context.SimpleQueue()
        for turn in range(workers):
            places.put(",".join(devices[turn::workers]) or devices[turn % len(devices)])
        pool = ProcessPoolExecutor(workers, context, _worker, (threads, os.getpid(), places))
        try:
            tasks = {pool.submit(_run_chain, str(ledger.folder), index): index for index in now}
            for task in as_completed(tasks):
                task.result()
                left.remove(tasks[task])
                suspects.discard(tasks[task])
                report(tasks[task])
        except BrokenProcessPool as error:  # a worker was killed, by lack of memory or a crash of its own
            own = [mark for mark in ledger.in_work() if (mark["machine"], mark["parent"]) == (machine(), os.getpid())]
            running = [unit for mark in own if not ledger.done(unit := Unit.of(mark["unit"]))]
            if len(now) == 1:
                for unit in running:
                    logger.warning("the process died while it ran %s", unit.name)
                    ledger.fail(unit, "the process died (killed, or out of memory)")
                if not running:  # before it had begun: while the model was loaded, or prepared
                    _lost(ledger, now[0], error)
            else:  # each by itself, to tell which it was
                identities = {unit.identity for unit in running}
                held = {index: {unit.identity for unit in chain_of(ledger.manifest, index)} for index in left}
                suspects = {index for index in left if identities & held[index]} or set(left)
        finally:
            for child in multiprocessing.active_children():
                if child not in others:
                    child.kill()
            pool.shutdown(wait=True, cancel_futures=True)
            ledger.forget_dead()


def _run_chain(folder: str, index: int) -> list[str]:
    return run_chain(folder, index, _places[0])


def _lost(ledger: Ledger, index: int, error: Exception) -> None:
    """Book a task that did not come back as a failure of the first open unit of its chain, at which it must have been."""
    unit = next((unit for unit in chain_of(ledger.manifest, index) if ledger.open(unit)), None)
    if unit is not None:
        logger.warning("%s: %s", unit.name, error)
        ledger.fail(unit, f"{type(error).__name__}: {str(error).splitlines()[0]}")


_places: list[str] = []  # the devices of this process, where it is a worker


def _worker(threads: int, parent: int, places: Any) -> None:
    """Prepare a worker: take one of the ``places`` to keep, leave interrupts to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _places[:] = [places.get()]

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def refusal(folder: str, index: int, device: str) -> str | None:
    """Run a chain, as a task of Ray's or Slurm's; return why the run is refused, ``None`` where it is not.

    A refusal is no failure of the chain's units, as a task that raises would be.
    """
    try:
        run_chain(folder, index, device)
    except LedgerError as error:
        return str(error)
    return None


def ray(
    ledger: Ledger,
    chains: Sequence[int],
    report: Report,
    *,
    address: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
    devices: Sequence[str] = ("cpu",),
) -> None:
    """Run chains on a Ray cluster at ``address``, or on one started on the spot; the folder must be the same on every node.

    Args:
        cpus, gpus: what every task takes; fractions share a GPU.
    """
    with extra("ray", "the engine 'ray'"):
        library: Any = importlib.import_module("ray")
    started = not library.is_initialized()
    if started:
        try:
            library.init(address=address, log_to_driver=False, configure_logging=False)
        except Exception as error:  # Ray raises it as it is
            where = f"reached at {address!r}" if address else "started"
            raise ConnectionError(f"Ray cannot be {where} ({said(error)}): what is done is kept, run it again") from error
    try:
        task = library.remote(num_cpus=cpus, num_gpus=gpus, max_retries=10, retry_exceptions=False)(refusal)
        folder = str(ledger.folder.resolve())
        waiting = {task.remote(folder, index, devices[0]): index for index in chains}
        while waiting:
            (ready,), _ = library.wait(list(waiting), num_returns=1)
            index = waiting.pop(ready)
            try:
                if refused := library.get(ready):
                    raise LedgerError(refused)
            except library.exceptions.RayError as error:
                _lost(ledger, index, error)
            report(index)
    finally:
        if started:
            library.shutdown()


def slurm(
    ledger: Ledger,
    chains: Sequence[int],
    report: Report,
    *,
    cluster: str | None = None,
    partition: str | None = None,
    minutes: int = 240,
    cpus: int = 2,
    gpus: int = 0,
    at_once: int = 64,
    devices: Sequence[str] = ("cpu",),
) -> None:
    """Run chains as a Slurm job array, through submitit.

    Preempted or timed-out jobs are requeued, and go on where they were.

    Args:
        cluster: ``None``: Slurm where there is one, else processes of this machine; ``"local"``: processes of this machine.
        minutes, cpus, gpus: what every job takes.
        at_once: the number of jobs of the array that may run at the same time.
    """
    with extra("slurm", "the engine 'slurm'"):
        import submitit
    folder = ledger.folder.resolve()
    executor = submitit.AutoExecutor(folder / "slurm", cluster=cluster, slurm_max_num_timeout=20)
    settings: dict[str, Any] = dict(timeout_min=minutes, cpus_per_task=cpus, name="ensemble-attacks")
    settings |= dict(slurm_array_parallelism=at_once, slurm_partition=partition, slurm_gpus_per_node=gpus or None)
    executor.update_parameters(**{key: value for key, value in settings.items() if value is not None})
    tasks = [Chain(folder, index, devices[0]) for index in chains]
    for job, index in zip(executor.map_array(_call, tasks), chains, strict=True):
        try:
            if refused := job.result():
                raise LedgerError(refused)
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            _lost(ledger, index, error)
        report(index)


class Chain:
    """A chain as submitit's task, which is sent again as it is when its job is preempted or out of time."""

    def __init__(self, folder: Path, index: int, device: str) -> None:
        self.folder, self.index, self.device = str(folder), index, device

    def __call__(self) -> str | None:
        return refusal(self.folder, self.index, self.device)

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(_call, self)


def _call(chain: Chain) -> str | None:
    return chain()


ENGINES: dict[str, Callable[..., None]] = {"local": local, "ray": ray, "slurm": slurm}
