"""Pictures: what has to be true before one is drawn, and how it is written."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.errors import LoraMergeError
from lora_merge.files.atomic import atomic_file
from lora_merge.files.pages.html_page import SHOWN
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


def write_pictures(
    draw: "Callable[[], Figure]", *, svg: Path | None = None, png: Path | None = None
) -> None:
    """Write the pictures that are asked for; equal figures give equal bytes.

    Args:
        draw: Makes the figure; called if one is asked for.
        svg: File for it as SVG.
        png: File for it as PNG, at 144 dots per inch.

    Raises:
        LoraMergeError: If matplotlib is not installed.
        OutputError: If a file cannot be written.
    """
    if not (svg or png):
        return
    import matplotlib

    figure = draw()
    if svg:
        text = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": "lora-merge"}):
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": MARK})
        _write(svg, text.getvalue().translate(SHOWN).encode())
    if png:
        pixels = io.BytesIO()
        figure.savefig(pixels, format="png", dpi=144, metadata={"Software": MARK})
        _write(png, pixels.getvalue())


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path, mark=MARK.encode()) as staging:
        staging.write_bytes(data)
