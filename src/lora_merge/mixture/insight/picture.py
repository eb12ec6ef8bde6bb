"""The usage of a mixture as a picture."""

from collections.abc import Callable
from pathlib import Path

from lora_merge.adapters.module_names import natural
from lora_merge.errors import OutputError
from lora_merge.files.atomic import atomic_file
from lora_merge.files.pages.pictures import check_pictures, figure_class
from lora_merge.files.targets import MARK
from lora_merge.mixture.insight.usage import Usage

FORMATS = ("png", "svg", "pdf")


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be drawn, before a model runs for it.

    Raises:
        LoraMergeError: If matplotlib is not installed.
        OutputError: If its format is unknown, or its directory cannot be written.
    """
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise OutputError(f"{path}: no known format of pictures", f"one of: {', '.join(FORMATS)}")
    check_pictures(path)


def draw_usage(usage: Usage, path: Path, key: Callable[[str], str]) -> None:
    """Draw each expert's mean weight, place by place and label by label, as heat maps.

    Args:
        usage: What was watched.
        path: Picture to write; its suffix decides the format.
        key: From a module's name to its place (`layer_of`, `kind_of` or `str`).

    Raises:
        LoraMergeError: If matplotlib is not installed.
        OutputError: If the picture cannot be written.
    """
    check_picture(path)
    weights = usage.by(key)
    tables = {"mean weight of each expert": {name: weights[name] for name in natural(weights)}}
    if usage.labels:
        of_label = {f"text of {n}": u.by(lambda _: "all")["all"] for n, u in usage.labels.items()}
        tables["by the row's expert"] = of_label
    heights = [0.9 + 0.22 * len(rows) for rows in tables.values()]
    size = (2.5 + 1.0 * len(usage.experts), 0.3 + sum(heights))
    figure = figure_class()(figsize=size, layout="constrained")
    plots = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(plots, tables.items(), strict=True):
        image = axes.imshow([r.tolist() for r in rows.values()], aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(usage.experts)), usage.experts, rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axes.set_title(title, fontsize=10)
        figure.colorbar(image)
    said = {"png": "Software"}.get(path.suffix.lower()[1:], "Creator")
    with atomic_file(path, mark=MARK.encode()) as staging:
        figure.savefig(staging, dpi=150, metadata={said: MARK})
