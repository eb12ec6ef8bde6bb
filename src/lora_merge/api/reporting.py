"""One interactive page about adapters."""

from pathlib import Path

from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.adapters.measured.spectra import adapter_spectra
from lora_merge.analysis.compare import compare
from lora_merge.analysis.report.document import ReportDocument, report_document, shows_modules
from lora_merge.analysis.report.page import page
from lora_merge.api.arguments import looking as takes_of
from lora_merge.arguments import takes
from lora_merge.files.pages.html_page import check_page, write_html
from lora_merge.planning import counted
from lora_merge.printing import short_names


@takes(takes_of.Report)
def report(given: takes_of.Report) -> ReportDocument:
    """Write what `spectra` and `compare` find as one page that opens from a disk.

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
    path = Path(given.out)
    check_page(path)
    opened = open_adapters(given.adapters, **given.opening)
    spectra, comparison = given.spectra, given.comparison
    if spectra is None:
        step = counted(given.progress, "reading", sum(len(adapter.modules) for adapter in opened))
        spectra = [
            adapter_spectra(a, modules=given.modules, jobs=given.jobs, on_module=step)
            for a in opened
        ]
    if comparison is None and given.pairs and len(opened) > 1:
        names = {name for adapter in opened for name in adapter.modules}
        comparison = compare(
            opened,
            modules=given.modules,
            per_module=shows_modules(len(opened), len(names)),
            accept_base_models=given.accept_base_models,
            jobs=given.jobs,
            on_module=counted(given.progress, "comparing", len(names)),
        )
    document = report_document(
        spectra,
        comparison,
        names=short_names([adapter.name for adapter in opened]),
        notes=[adapter.notes for adapter in opened],
    )
    write_html(page(document), path)
    return document
