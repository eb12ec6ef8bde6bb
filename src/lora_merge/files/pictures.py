"""Pictures: what has to be true before one is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.errors import LoraMergeError
from lora_merge.files.targets import MARK, check_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_pictures(*files: Path | None) -> None:
    """Refuse pictures that could not be drawn or written, before anything is measured for them.

    Raises:
        LoraMergeError: If matplotlib is not installed.
        OutputError: If a file's directory cannot be written.
    """
    for file in files:
        if file is not None:
            figure_class()
            check_file(file, MARK.encode())


def figure_class() -> "type[Figure]":
    """Matplotlib's figure.

    Raises:
        LoraMergeError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LoraMergeError(
            "pictures need matplotlib, which is not installed", "pip install 'lora-merge[plot]'"
        ) from error
    return Figure
