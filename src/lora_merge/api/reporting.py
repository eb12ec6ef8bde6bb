"""One interactive page about adapters."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_merge.adapters.access.adapter_like import AdaptersLike
from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.adapters.measured.spectra import adapter_spectra
from lora_merge.analysis.compare import compare
from lora_merge.analysis.report.document import ReportDocument, report_document
from lora_merge.analysis.report.page import write_page
from lora_merge.arguments import checked
from lora_merge.files.targets import MARK, check_file
from lora_merge.printing import short_names


@checked()
def report(
    adapters: AdaptersLike,
    out: str | Path,
    *,
    modules: Sequence[str] = (),
    accept_base_models: bool = False,
    on_module: Callable[[str, int], None] | None = None,
) -> ReportDocument:
    """Write what `spectra` and `compare` find as one page that opens from a disk.

    Args:
        adapters: What `open_adapters` takes.
        out: The .html file to make; only a page that lora-merge wrote is replaced.
        modules: Patterns of the modules to show; default: all.
        accept_base_models: Compare adapters of different base models.
        on_module: Called after each module with what is going on and how many steps that has.

    Returns:
        All that the page says.

    Raises:
        LoraMergeError: If the adapters do not fit together, or the file cannot be written; nothing
            is left behind.

    Examples:
        >>> import tempfile
        >>> import lora_merge
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = lora_merge.report("examples/adapters/*", f"{folder}/report.html")
        >>> page.names
        ('double', 'reverse', 'upper')
    """
    path = Path(out)
    check_file(path, MARK.encode())
    opened = open_adapters(adapters)

    def step(what: str, total: int) -> Callable[[], None]:
        return lambda: on_module(what, total) if on_module is not None else None

    steps = sum(len(adapter.modules) for adapter in opened)
    spectra = [
        adapter_spectra(a, modules=modules, on_module=step("reading", steps)) for a in opened
    ]
    comparison = None
    if len(opened) > 1:
        names = {name for adapter in opened for name in adapter.modules}
        comparison = compare(
            opened,
            modules=modules,
            accept_base_models=accept_base_models,
            on_module=step("comparing", len(names)),
        )
    document = report_document(
        spectra,
        comparison,
        names=short_names([adapter.name for adapter in opened]),
        notes=[adapter.notes for adapter in opened],
    )
    write_page(document, path)
    return document
