"""A study: the file of a search, which processes share and a killed search goes on from."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from lora_merge.errors import LoraMergeError, SourceError

if TYPE_CHECKING:
    from optuna import Study

_PATIENCE = 100.0  # seconds until another process has written
STUDY = "lora-merge"  # its name in the file


def optuna_module() -> Any:
    """Optuna, quiet.

    Raises:
        LoraMergeError: If it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise LoraMergeError(
            "a search needs Optuna, which is not installed", "pip install 'lora-merge[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(
    path: str | os.PathLike[str] | None, wanted: dict[str, Any], count: int, higher: bool
) -> "Study":
    """The study in a file, made if it is not there; refused if it is of something else."""
    optuna = optuna_module()
    direction = "maximize" if higher else "minimize"
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with of_file(path):
        study: Study = optuna.create_study(
            storage=None if path is None else storage_of(path),
            study_name=STUDY,
            directions=[direction] * count,
            load_if_exists=True,
        )
        before = study.user_attrs.get("wanted")
        changed = before and sorted(key for key in wanted if before.get(key) != wanted[key])
        if changed:
            raise LoraMergeError(
                f"the study in {path} is of another search ({', '.join(changed)} differ)",
                "name another file, or ask for the same",
            )
        if [one.name.lower() for one in study.directions] != [direction] * count:
            raise LoraMergeError(
                f"{path} holds no study that can be read: what it optimises is not there",
                "name another file",
            )
        study.set_user_attr("wanted", wanted)
    return study


def storage_of(path: str | os.PathLike[str]) -> Any:
    """Optuna's storage in a file, which has no address: there ?, % and {} mean something else."""
    from sqlalchemy.pool import NullPool

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=_PATIENCE, check_same_thread=False)

    how = {"creator": connect, "poolclass": NullPool}
    return optuna_module().storages.RDBStorage("sqlite://", engine_kwargs=how)


@contextmanager
def of_file(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """What Optuna, SQLAlchemy and sqlite3 make of a damaged file, in a line.

    Raises:
        LoraMergeError: Naming the file.
    """
    try:
        yield
    except Exception as error:
        told = isinstance(error, LoraMergeError) and not isinstance(error, SourceError)
        if path is None or told:
            raise
        reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise LoraMergeError(
            f"{path} holds no study that can be read: {reason}", "name another file"
        ) from error


def ended(study: "Study") -> list[Any]:
    """Trials that have a score, or cannot have one."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return study.get_trials(deepcopy=False, states=states)


def waiting(study: "Study") -> list[Any]:
    """Trials that were asked for and that nobody has begun."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.WAITING,))


def sampler_of(name: str, seed: int) -> Any:
    """A sampler of its own for every trial, so that a resumed study goes the same way."""
    samplers = optuna_module().samplers
    if name == "cmaes":
        return samplers.CmaEsSampler(seed=seed)
    if name == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(seed=seed)
