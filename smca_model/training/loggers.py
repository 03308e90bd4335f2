"""Where a run's numbers go beside its own metrics.jsonl: TensorBoard, Weights & Biases, MLflow, or what you pass.

Projects, servers and keys are those services' own settings (WANDB_PROJECT, MLFLOW_TRACKING_URI and so on).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from smca_kernels.files import naming, write_text
from smca_kernels.tools.arguments import check_packages

LOG = logging.getLogger(__name__)
IDS = "loggers.json"  # in the folder of a run: the name that a service gave it, by logger


class Logger(Protocol):
    """What takes a run's numbers; only process 0 has any."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take numbers by name, such as "train/loss" and "val/AP", after so many steps.

        A resumed run tells the steps after its checkpoint again.
        """

    def close(self) -> None:
        """Take no more."""


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

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with naming(self.folder):
            for name, number in metrics.items():
                self.writer.add_scalar(name, number, step)
            self.writer.flush()

    def close(self) -> None:
        with naming(self.folder):
            self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run goes on with.

    Args:
        folder: of the run, whose name it has.
        settings: of the run, its config there.
        step: of the checkpoint that it goes on from; not used: steps told again are ignored there.
        known: its id, "" for a new one.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int, known: str) -> None:
        import wandb

        again = {"id": known, "resume": "allow"} if known else {}
        self.run: Any = wandb.init(name=folder.name, dir=str(folder), config=dict(settings), **again)
        self.id: str = self.run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


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

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any], int, str], Any]] = {
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


def open_loggers(names: Sequence[str], folder: Path, settings: Mapping[str, Any], step: int) -> dict[str, Logger]:
    """The loggers of those names, on a run in a folder, after so many steps.

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
    opened: dict[str, Logger] = {}
    for name in names:
        try:
            logger = LOGGERS[name](folder, settings, step, str(ids.get(name, "")))
        except OSError as error:
            Loggers(opened).close()
            if error.filename is not None:
                raise
            raise ValueError(f"loggers can't start {name} ({error})") from error
        except Exception as error:  # each service has classes of its own
            Loggers(opened).close()
            raise ValueError(f"loggers can't start {name} ({_reason(error)})") from error
        opened[name] = logger
        if logger.id and ids.get(name) != logger.id:
            ids[name] = logger.id
            write_text(path, json.dumps(ids) + "\n")
    return opened


class Loggers:
    """Several loggers, none of which can end a run: what fails is warned of once, by its name.

    Args:
        loggers: by name.
    """

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self.loggers = loggers
        self.warned: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass numbers on to all of them; one that failed is tried again."""
        for name, logger in self.loggers.items():
            with self._warning(name):
                logger.log(step, metrics)

    def close(self) -> None:
        """Close all of them."""
        for name, logger in self.loggers.items():
            with self._warning(name):
                logger.close()

    @contextlib.contextmanager
    def _warning(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a network's, a service's, a disk's
            if name not in self.warned:
                self.warned.add(name)
                LOG.warning("%s failed and may lack numbers, which metrics.jsonl has: %s", name, _reason(error))


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@functools.cache
def _keep_quiet_what_flush_raises() -> None:
    """Print no traceback for an OSError in the thread that writes TensorBoard's files: `flush` raises it again."""
    print_traceback = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            print_traceback(args)

    threading.excepthook = hook
