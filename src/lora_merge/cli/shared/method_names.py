"""The methods' names for shells, which want an answer before the table's torch is imported."""

import click

METHOD_NAMES = (
    *("auto", "svd", "cat", "mean", "fedavg", "linear-factors", "np-lora", "slerp"),
    *("multislerp", "karcher", "model-stock", "magnitude", "ties", "dare", "dare-ties"),
    *("della", "breadcrumbs", "sce", "knots-ties", "knots-dare-ties", "core-ties"),
    *("core-dare-ties", "tsv", "dc-merge", "iso-c", "iso-cts", "ctm", "wudi", "wudi-iso"),
    *("regmean", "regmean-iso", "ssr", "esm", "robustmerge", "aligned-mean", "lego", "lego-refit"),
)


def complete_method(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Methods that begin so."""
    return [name for name in METHOD_NAMES if name.startswith(incomplete)]
