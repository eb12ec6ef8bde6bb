"""Pictures of a search, by Optuna and matplotlib (the `plot` extra)."""

import warnings
from pathlib import Path
from typing import Any

from lora_merge.evaluation.study import STUDY, optuna_module, storage_of
from lora_merge.files.atomic import atomic_file
from lora_merge.files.pages.pictures import check_pictures
from lora_merge.files.targets import MARK

_DPI = 120


def check_drawings(folder: Path) -> list[Path]:
    """The files that `draw_study` makes in a directory.

    Raises:
        LoraMergeError: If matplotlib is not installed, or one must not be replaced.
    """
    files = [folder / "history.png", folder / "values.png"]
    check_pictures(*files)
    return files


def draw_study(study: Path, folder: Path) -> list[Path]:
    """The scores in the order of the trials, and each score over every value that varied.

    Args:
        study: SQLite file of a search.
        folder: Where `history.png` and `values.png` are put; those of an earlier run are replaced.

    Returns:
        The files.

    Raises:
        LoraMergeError: If matplotlib is not installed.
        OutputError: If they cannot be written.
    """
    files = check_drawings(folder)
    from optuna.visualization import matplotlib as drawing

    opened = optuna_module().load_study(study_name=STUDY, storage=storage_of(study))
    # Of several objectives their mean, which also decides between the trials of the front.
    several = len(opened.directions) > 1
    shown = {"target_name": opened.user_attrs["wanted"]["metric"]}
    if several:
        shown["target"] = lambda trial: sum(trial.values) / len(trial.values)
    draws: tuple[Any, ...] = (drawing.plot_optimization_history, drawing.plot_slice)
    for file, draw in zip(files, draws, strict=True):
        with warnings.catch_warnings():  # that the drawing is experimental
            warnings.simplefilter("ignore")
            axes = draw(opened, **shown)
        figure = axes.figure if hasattr(axes, "figure") else axes[0].figure
        with atomic_file(file, mark=MARK.encode()) as staging:
            figure.savefig(staging, dpi=_DPI, bbox_inches="tight", metadata={"Description": MARK})
        figure.clear()
    return files
