"""The usage of a mixture as a picture."""

from collections.abc import Callable
from pathlib import Path

from lora_merge.adapters import atomic_file
from lora_merge.errors import LoraMergeError
from lora_merge.mixture.usage import Usage, natural


def draw_usage(usage: Usage, path: Path, key: Callable[[str], str]) -> None:
    """Draw each expert's mean weight, place by place, as a heat map.

    Args:
        usage: What was watched.
        path: Picture to write; its suffix decides the format.
        key: From a module's name to its place (`layer_of`, `kind_of` or `str`).

    Raises:
        LoraMergeError: If matplotlib is not installed or cannot write the picture.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LoraMergeError("drawing needs matplotlib", "pip install matplotlib") from error
    weights = usage.by(key)
    names = natural(weights)
    width, height = 2.5 + 1.0 * len(usage.experts), 1.2 + 0.22 * len(names)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow([weights[n].tolist() for n in names], aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(usage.experts)), usage.experts, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title("mean weight of each expert", fontsize=10)
    figure.colorbar(image)
    try:
        with atomic_file(path) as staging:
            figure.savefig(staging, dpi=150)
    except ValueError as error:
        raise LoraMergeError(f"{path} cannot be drawn: {error}", "name a .png") from error
