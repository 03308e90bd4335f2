"""Where a run's numbers go beside its own metrics.jsonl: TensorBoard, Weights & Biases, MLflow, or what you pass.

Projects, servers and keys are those services' own settings (WANDB_PROJECT, MLFLOW_TRACKING_URI and so on). How long
they wait for a service that doesn't answer has shorter defaults here (`WAITS`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from smca_kernels.files import naming, write_text
from smca_kernels.tools.arguments import check_packages, first_line

LOG = logging.getLogger(__name__)
IDS = "loggers.json"  # in the folder of a run: the name that a service gave it, by logger
PAUSE = 10  # how many times as long as an attempt that failed took, until the next
SLOW = 0.1  # seconds; an attempt that failed sooner costs a run nothing, and the next line is one again

# Without these, W&B waits without end for its uploads at the end of a run, and MLflow tries a request for 4 minutes.
WAITS = {
    "WANDB_FINISH_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class Logger(Protocol):
    """What takes a run's numbers; only process 0 has any.

    One that has `fail(error)` too is told that in place of `close()` where the run was stopped, or ended with an error.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take numbers by name, such as "train/loss" and "val/AP", after so many steps.

        A resumed run tells the steps after its checkpoint again.
        """

    def close(self) -> None:
        """Take no more."""


class Service(Logger, Protocol):
    """A logger that `Settings.loggers` can name."""

    id: str  # of the run there, "" where it needs none
    place: str  # where the numbers go, as the run's output has it

    def fail(self, error: BaseException) -> None:
        """Take no more of a run that was stopped, or ended with an error."""


class TensorBoard:
    """Event files in the folder tensorboard/ of a run.

    Args:
        folder: of the run.
        settings: of the run; not shown.
        step: of the checkpoint that it goes on from; what follows it is hidden.
        known: not used.
    """

    id = ""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int, known: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _keep_quiet_what_flush_raises()
        self.folder = folder / "tensorboard"
        with naming(self.folder):
            self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        self.place = str(self.folder)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with naming(self.folder):
            for name, number in metrics.items():
                self.writer.add_scalar(name, number, step)
            self.writer.flush()

    def close(self) -> None:
        with naming(self.folder):
            self.writer.close()

    def fail(self, error: BaseException) -> None:
        self.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run goes on with.

    Its own count of steps never goes back: what comes after a resume for steps that it had is ignored, an evaluation
    that was cut off as well. So steps are a number like the others, "step", over which it shows them.

    Args:
        folder: of the run, whose name it has.
        settings: of the run, its config there.
        step: of the checkpoint that it goes on from; not used.
        known: its id, "" for a new one.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int, known: str) -> None:
        import wandb

        again = {"id": known, "resume": "allow"} if known else {}
        self.run: Any = wandb.init(name=folder.name, dir=str(folder), config=dict(settings), **again)
        self.run.define_metric("*", step_metric="step")
        self.id: str = self.run.id
        self.place = str(self.run.url or Path(self.run.dir).parent)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({**metrics, "step": step})

    def close(self) -> None:
        self.run.finish()

    def fail(self, error: BaseException) -> None:
        self.run.finish(exit_code=1)


class MLflow:
    """A run of MLflow, which a resumed run goes on with.

    Args:
        folder: of the run, whose name it has.
        settings: of the run, its parameters there.
        step: of the checkpoint that it goes on from; not used.
        known: its id, "" for a new one.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int, known: str) -> None:
        import mlflow

        self.mlflow: Any = mlflow
        run = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=folder.name)
        self.id: str = run.info.run_id
        if not known:  # parameters can't be changed there
            mlflow.log_params(dict(settings))
        store = re.sub("//[^/]*@", "//", mlflow.get_tracking_uri())  # without a password
        self.place = f"run {self.id} in {store}"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self.mlflow.end_run()

    def fail(self, error: BaseException) -> None:
        self.mlflow.end_run("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any], int, str], Service]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def check_loggers(names: Sequence[str]) -> None:
    """Check that the packages of loggers can be imported, without importing them.

    Raises:
        ValueError: naming what is missing, and what installs it.
    """
    for name in names:
        if name == "tensorboard":
            check_packages(("tensorboard",), "model")
        elif importlib.util.find_spec(name) is None:
            raise ValueError(f"loggers with {name} needs {name}: pip install {name}")


def open_loggers(names: Sequence[str], folder: Path, settings: Mapping[str, Any], step: int) -> dict[str, Service]:
    """The loggers of those names, on a run in a folder, after so many steps; after none, as new runs of the services.

    Sets the environment's `WAITS` that are not set.

    Raises:
        ValueError: naming a logger that can't start, without a login for instance, and why.
        OSError: naming the file, for one that can't be written.
    """
    path = folder / IDS
    try:
        ids = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if not isinstance(ids, dict):
            raise ValueError(f"must be an object, got {type(ids).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} must be JSON, the runs' ids by logger ({error}); move it away for new runs"
        ) from error
    if not step:  # the ids are of a run that was here before
        ids = {}
    for name, seconds in WAITS.items():
        os.environ.setdefault(name, seconds)
    opened: dict[str, Service] = {}
    with contextlib.ExitStack() as stack:
        stack.push(Loggers(opened))
        for name in names:
            try:
                opened[name] = LOGGERS[name](folder, settings, step, str(ids.get(name, "")))
            except Exception as error:  # each service has classes of its own
                if isinstance(error, OSError) and error.filename is not None:
                    raise
                raise ValueError(f"loggers can't start {name} ({first_line(error)})") from error
            if opened[name].id and ids.get(name) != opened[name].id:
                ids[name] = opened[name].id
                write_text(path, json.dumps(ids) + "\n")
        stack.pop_all()
    return opened


class Loggers:
    """Several loggers, none of which can end a run: what fails is warned of once, by its name.

    As a context, it closes them at its end.

    Args:
        loggers: by name.
    """

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self.loggers = loggers
        self._warned: set[str] = set()
        self._paused: dict[str, float] = {}  # until when, by name

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass numbers on to all of them.

        One that failed is tried again; where that took long, after a pause, so that a run loses a tenth of its time
        at most.
        """
        for name, logger in self.loggers.items():
            if time.monotonic() >= self._paused.get(name, 0.0):
                with self._warning(name):
                    logger.log(step, metrics)

    def close(self, error: BaseException | None = None) -> None:
        """Close all of them.

        Args:
            error: what ended the run before its end.
        """
        for name, logger in self.loggers.items():
            with self._warning(name):
                fail = getattr(logger, "fail", None)
                if error is None or fail is None:
                    logger.close()
                else:
                    fail(error)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    @contextlib.contextmanager
    def _warning(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except Exception as error:  # a network's, a service's, a disk's
            now = time.monotonic()
            if now - began > SLOW:
                self._paused[name] = now + PAUSE * (now - began)
            if name not in self._warned:
                self._warned.add(name)
                LOG.warning("%s failed and may lack numbers, which metrics.jsonl has: %s", name, first_line(error))


@functools.cache
def _keep_quiet_what_flush_raises() -> None:
    """Print no traceback for an OSError in the thread that writes TensorBoard's files: `flush` raises it again."""
    print_traceback = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            print_traceback(args)

    threading.excepthook = hook
