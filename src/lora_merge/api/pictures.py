"""Spectra and comparisons as files: pictures, and a table of singular values."""

from pathlib import Path

from lora_merge.adapters.measured.spectra import AdapterSpectra
from lora_merge.analysis.compare import Comparison
from lora_merge.analysis.comparison_figure import draw_comparison
from lora_merge.analysis.export import write_csv as write_table
from lora_merge.analysis.figures import draw as draw_spectra
from lora_merge.api.arguments import looking as takes_of
from lora_merge.arguments import takes
from lora_merge.errors import ArgumentError, OutputError
from lora_merge.files.pages.pictures import check_pictures, write_pictures


@takes(takes_of.Draw)
def draw(given: takes_of.Draw) -> Path:
    """Draw what `spectra` or `compare` found: heat map and curves, or cosines and tree.

    Needs matplotlib. Equal results give equal bytes.

    Returns:
        The picture.

    Raises:
        ArgumentError: If it is neither.
        OutputError: If the file is neither `.svg` nor `.png`, or cannot be written.
        LoraMergeError: If matplotlib is not installed.

    Examples:
        >>> import lora_merge
        >>> lora_merge.draw(lora_merge.compare("examples/adapters/*"), "pairs.svg").name
        'pairs.svg'
    """
    path, found = Path(given.path), given.found
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise OutputError(f"{path} is no name of a picture", "end it in .svg or .png")
    check_pictures(path)
    if isinstance(found, Comparison):
        figure = draw_comparison(found)
    else:
        figure = draw_spectra(_several(found), given.metric)
    write_pictures(lambda: figure, **{kind[1:]: path})
    return path


@takes(takes_of.WriteCsv)
def write_csv(given: takes_of.WriteCsv) -> Path:
    """Write spectra as a table: adapter, module, i, singular value, energy up to i.

    Returns:
        The table.

    Raises:
        ArgumentError: If they are no spectra.
        OutputError: If the file cannot be written.

    Examples:
        >>> import lora_merge
        >>> found = lora_merge.spectra("examples/adapters/upper")
        >>> lora_merge.write_csv(found, "upper.csv").read_text().split()[0]
        'adapter,module,i,sigma,energy'
    """
    path = Path(given.path)
    write_table(_several(given.found), path)
    return path


def _several(found: object) -> list[AdapterSpectra]:
    several = list(found) if isinstance(found, list | tuple) else [found]
    spectra = [one for one in several if isinstance(one, AdapterSpectra)]
    if not spectra or len(spectra) != len(several):
        kinds = ", ".join(sorted({type(one).__name__ for one in several})) or "nothing"
        raise ArgumentError(f"{kinds}: no spectra and no comparison", "give what `spectra` returns")
    return spectra
