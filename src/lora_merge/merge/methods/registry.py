"""The one table of merge methods: every published method is a row of it.

Another package adds a method by an entry point of the group `lora_merge.methods` that names a
`Method`; nothing else is needed.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points

from lora_merge.errors import MethodError
from lora_merge.merge.methods import (
    entrywise,
    least_squares,
    linear,
    matched_units,
    spectral,
    sphere,
    tucker,
)
from lora_merge.merge.methods.lego import lego_units
from lora_merge.merge.methods.lego_options import LegoOptions
from lora_merge.merge.methods.lego_refit import LegoRefitOptions, lego_refit
from lora_merge.merge.methods.method import Job, Method, Outcome
from lora_merge.merge.methods.other_names import CALLED, SAME
from lora_merge.merge.methods.with_statistics import essential, regression

__all__ = ["METHODS", "Job", "Method", "Outcome", "find_method", "methods"]


_TABLE = (
    Method(
        name="svd",
        summary="weighted sum of the deltas (task arithmetic), at its best for a rank",
        paper="Ilharco et al. 2023, arXiv 2212.04089; Eckart & Young 1936; PEFT's svd",
        combine=linear.weighted_sum,
        space="units",
        aliases=("task-arithmetic", "linear"),
        sums=True,
    ),
    Method(
        name="cat",
        summary="weighted sum of the deltas, exactly: ranks add up",
        paper="PEFT's cat; FLoRA, arXiv 2409.05976",
        combine=linear.weighted_sum,
        space="units",
        rank="full",
        cost="(d_in + d_out) R",
        grams=False,
        exact=True,
    ),
    Method(
        name="mean",
        summary="weighted mean of the deltas, cut to the largest input rank",
        paper="Wortsman et al. 2022, arXiv 2203.05482",
        combine=linear.weighted_sum,
        sums=True,
        space="units",
        normalize="sum",
        exact=True,
    ),
    Method(
        name="fedavg",
        summary="exact federated mean; where adapters share A or B the rank does not grow",
        paper="FFA-LoRA 2403.12313, FedEx-LoRA 2410.09432, LoRA-SB 2411.19557",
        combine=linear.weighted_sum,
        space="units",
        rank="units",
        normalize="sum",
        cost="(d_in + d_out) R",
        grams=False,
        exact=True,
    ),
    Method(
        name="linear-factors",
        summary="PEFT's linear: A and B summed apart, with cross terms (for compatibility)",
        paper="PEFT's linear",
        combine=linear.linear_factors,
        space="factors",
        gauge_free=False,
        cost="(d_in + d_out) R",
        grams=False,
        exact=True,
    ),
    Method(
        name="np-lora",
        summary="content and style: the first without the inputs that the second uses, added",
        paper="Chen et al. 2025, arXiv 2511.11051",
        combine=linear.np_lora,
        options=linear.NpLoraOptions,
        space="units",
        adapters=(2, 2),
        ordered=True,
    ),
    Method(
        name="slerp",
        summary="along the great circle from one delta to another",
        paper="Shoemake 1985; mergekit's slerp, on deltas",
        combine=sphere.slerp,
        options=sphere.SlerpOptions,
        space="units",
        adapters=(2, 2),
        ordered=True,
        exact=True,
    ),
    Method(
        name="multislerp",
        summary="weighted mean of directions, at the weighted mean norm",
        paper="mergekit's multislerp, on deltas",
        combine=sphere.multislerp,
        space="units",
        exact=True,
    ),
    Method(
        name="karcher",
        summary="intrinsic mean of directions on the sphere, at the weighted mean norm",
        paper="Karcher 1977; mergekit's karcher, on deltas",
        combine=sphere.karcher,
        options=sphere.KarcherOptions,
        space="units",
        exact=True,
    ),
    Method(
        name="model-stock",
        summary="mean, shortened by the adapters' angle; for adapters of one task",
        paper="Jang et al. 2024, arXiv 2403.19522",
        combine=sphere.model_stock,
        space="units",
        exact=True,
    ),
    *entrywise.ROWS,
    Method(
        name="tsv",
        summary="singular vectors of all adapters, orthogonalised against each other",
        paper="Gargiulo et al., CVPR 2025, arXiv 2412.00081",
        combine=spectral.tsv,
        options=spectral.TsvOptions,
        separates=True,
        aliases=("core-tsv",),  # it always runs in Core Space (arXiv 2509.17786)
    ),
    Method(
        name="dc-merge",
        summary="smoothed spectra, TIES in a common cover space, each adapter in its own block",
        paper="DC-Merge, CVPR 2026, arXiv 2603.06242",
        combine=spectral.dc_merge,
        options=spectral.DcMergeOptions,
        separates=True,
    ),
    Method(
        name="iso-c",
        summary="weighted sum with all singular values made equal",
        paper="Marczak et al., ICML 2025, arXiv 2502.04959",
        combine=spectral.iso_c,
        options=spectral.IsoOptions,
        makes_rank=True,
        separates=True,
        aliases=("core-iso",),  # the same
    ),
    Method(
        name="iso-cts",
        summary="common directions, then each task's own, all singular values equal",
        paper="Marczak et al., ICML 2025, arXiv 2502.04959",
        combine=spectral.iso_cts,
        options=spectral.IsoCtsOptions,
        makes_rank=True,
        separates=True,
    ),
    Method(
        name="ctm",
        summary="subspaces of the rank asked for that hold most of every adapter; merge inside",
        paper="Compress then Merge, ICML 2026",
        combine=tucker.compress_then_merge,
        options=tucker.CtmOptions,
        makes_rank=True,
        cost="(d_in + d_out) R² + iterations · N R³",
    ),
    Method(
        name="wudi",
        summary="least squares: act like each adapter on the subspace it uses (closed form)",
        paper="Cheng et al., ICML 2025, arXiv 2503.08099",
        combine=least_squares.wudi,
        options=least_squares.WudiOptions,
        makes_rank=True,
        searches=True,
    ),
    Method(
        name="wudi-iso",
        summary="wudi on the output side, spectrum flattened in part (our variation, data-free)",
        paper="wudi (arXiv 2503.08099) and iso-c (arXiv 2502.04959) combined",
        combine=least_squares.wudi,
        options=least_squares.WudiOptions,
        presets={"side": "output", "ridge": 0.01, "beta": 0.25},
        makes_rank=True,
        searches=True,
        separates=True,
    ),
    Method(
        name="regmean",
        summary="least squares over collected inputs: act like each adapter on its own",
        paper="Jin et al., ICLR 2023, arXiv 2212.09849",
        combine=regression.regmean,
        options=regression.RegMeanOptions,
        space="units",
        makes_rank=True,
        needs="statistics (collect_statistics with inputs=True)",
        cost="d_in³",
        exact=True,
    ),
    Method(
        name="regmean-iso",
        summary="regmean with a pull to the sum, flattened, outputs at full size (our variation)",
        paper="regmean (arXiv 2212.09849) and iso-c (arXiv 2502.04959) combined",
        combine=regression.regmean,
        options=regression.RegMeanOptions,
        presets={"off_diagonal": 1.0, "ridge": 0.5, "beta": 0.25, "restore": True},
        space="units",
        makes_rank=True,
        exact=True,
        needs="statistics (collect_statistics with inputs=True)",
        cost="d_in³",
    ),
    Method(
        name="ssr",
        summary="route between all A and all B by R-dimensional statistics of inputs",
        paper="SSR-Merge, ICML 2026",
        combine=regression.ssr,
        options=regression.SsrOptions,
        space="units",
        gauge_free=False,  # its ridge is in A's own coordinates
        needs="statistics (collect_statistics)",
        exact=True,
    ),
    Method(
        name="esm",
        summary="directions in which each adapter moves the outputs, orthogonalised, evened out",
        paper="ESM, CVPR 2026, arXiv 2602.20208",
        combine=essential.esm,
        options=essential.EsmOptions,
        prepare=essential.module_factors,
        space="units",
        makes_rank=True,
        separates=True,
        needs="statistics (collect_statistics)",
    ),
    Method(
        name="robustmerge",
        summary="pruned factors, weak directions scaled up",
        paper="Zeng et al., NeurIPS 2025, arXiv 2502.17159",
        combine=matched_units.robustmerge,
        options=matched_units.RobustMergeOptions,
        space="factors",
        gauge_free=False,
        cost="(d_in + d_out) R log R",
    ),
    Method(
        name="aligned-mean",
        summary="average of rank units matched by linear assignment; weights are frequencies",
        paper="after M-SMoE, Li et al., ICLR 2024, arXiv 2310.01334",
        combine=matched_units.aligned_mean,
        space="factors",
        gauge_free=False,
        exact=True,
    ),
    Method(
        name="lego",
        summary="cluster rank-wise units; centroids become the merged adapter, as published",
        paper="Zhao et al., ICLR 2025, arXiv 2409.16167",
        combine=lego_units,
        options=LegoOptions,
        space="units",
        makes_rank=True,
        gauge_free=False,
        exact=True,
    ),
    Method(
        name="lego-refit",
        summary="cluster singular units by direction, refit them to wudi-iso's target",
        paper="our form of LoRA-LEGO (arXiv 2409.16167)",
        combine=lego_refit,
        options=LegoRefitOptions,
        space="units",
        makes_rank=True,
        aliases=("cluster",),
        separates=True,
    ),
)


@cache
def methods() -> Mapping[str, Method]:
    """Every method by name: the built-in ones, then those of installed packages.

    Raises:
        MethodError: If an entry point cannot be loaded or takes a name that is there.
    """
    table = {method.name: method for method in _TABLE}
    for entry in entry_points(group="lora_merge.methods"):
        try:
            method = entry.load()
        except Exception as error:
            raise MethodError(
                f"the method {entry.name!r} ({entry.value}) cannot be loaded: {error}",
                "repair or uninstall the package that brings it",
            ) from error
        if not isinstance(method, Method) or method.name in table:
            raise MethodError(
                f"the entry point {entry.name!r} ({entry.value}) names no new Method",
                "repair or uninstall the package that brings it",
            )
        table[method.name] = method
    return table


METHODS: Mapping[str, Method] = {method.name: method for method in _TABLE}


def find_method(name: str) -> Method:
    """The method of this name or alias, ours or another tool's; `DARE_TIES` is `dare-ties`.

    Raises:
        MethodError: If there is none; says the nearest name.
    """
    wanted = name.lower().replace("_", "-")
    wanted = SAME.get(wanted, wanted)
    if wanted in METHODS:  # looking for installed packages takes 60 ms
        return METHODS[wanted]
    table = methods()
    names = {alias: m.name for m in table.values() for alias in (m.name, *m.aliases)}
    if wanted in names:
        return table[names[wanted]]
    near = get_close_matches(wanted, names, n=1)
    guess = f"did you mean {near[0]!r}?" if near else "`lora-merge methods` lists them"
    raise MethodError(f"there is no method {name!r}", CALLED.get(wanted, guess))
