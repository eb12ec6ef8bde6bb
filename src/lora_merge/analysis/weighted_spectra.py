"""Data-weighted truncation inside the bottleneck: what matters is A x, not x.

For D = s B A only h = A x reaches the output, so the second moments E[h h^T] (r x r) say all that
the input covariance (d_in x d_in) would: the truncation that minimises E||(D - X) x||^2 follows
from the SVD of B L with L L^T = E[h h^T]. That is what SVD-LLM, EoRA and (with output weights)
FWSVD reduce to for a LoRA, without inverting a covariance.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.dialects.spelling import PREFIX
from lora_merge.adapters.forms import to_matrix
from lora_merge.adapters.measured.spectra import AdapterSpectra, ModuleSpectrum
from lora_merge.errors import AdapterError
from lora_merge.files.atomic import atomic_file
from lora_merge.files.targets import MARK
from lora_merge.files.tensor_file import SafetensorsFile, refuse_non_finite
from lora_merge.files.tensor_stream import write_tensors
from lora_merge.linalg.core_svd import CoreSVD

_MOMENT, _FISHER = ".bottleneck_moment", ".output_fisher"


@dataclass(frozen=True, eq=False)
class Moments:
    """What a calibration run recorded.

    Attributes:
        moments: Module → E[h h^T], h = A x, float64, shape (r, r).
        fisher: Module → E[(dL/dy)^2] of each output, float64, shape (d_out,); empty if no
            gradients were computed.
    """

    moments: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]


@contextmanager
def collect_moments(model: Any, path: Path, *, adapter_name: str = "default") -> Iterator[None]:
    """Record moments of a PEFT model while calibration batches run through it.

    Forward passes give the moments; backward passes, if there are any, give the Fisher weights.
    The file is written when the block ends without an error.

    Args:
        model: A model with a PEFT LoRA.
        path: The safetensors file to write.
        adapter_name: PEFT's name of the adapter.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []

    def add(key: str, value: Tensor, rows: int) -> None:
        sums[key] = sums[key] + value if key in sums else value
        counts[key] = counts.get(key, 0) + rows

    def record(name: str, scaling: float) -> tuple[Any, Any]:
        def forward(_module: Any, _inputs: Any, output: Tensor) -> None:
            h = output.detach().reshape(-1, output.shape[-1]).to("cpu", torch.float64)
            add(name + _MOMENT, h.mT @ h, len(h))

        def backward(_module: Any, _inputs: Any, gradients: tuple[Tensor, ...]) -> None:
            g = gradients[0].detach()
            g = g.reshape(-1, g.shape[-1]).to("cpu", torch.float64) / scaling
            add(name + _FISHER, g.square().sum(0), len(g))

        return forward, backward

    for full_name, layer in model.named_modules():
        pair = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
        if pair[0] is None or pair[1] is None or adapter_name not in pair[0]:
            continue
        if not isinstance(pair[0][adapter_name], torch.nn.Module):
            raise AdapterError(
                f"{full_name}: its factors are bare parameters (AdaLoRA), which cannot be observed",
                "resize it with --prune-gates first, and load the result",
            )
        name = full_name.removeprefix(PREFIX)
        forward, backward = record(name, float(layer.scaling[adapter_name]) or 1.0)
        hooks.append(pair[0][adapter_name].register_forward_hook(forward))
        hooks.append(pair[1][adapter_name].register_full_backward_hook(backward))
    if not hooks:
        raise AdapterError(
            f"the model has no LoRA named {adapter_name!r}", "load one with PeftModel first"
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    means = {key: value / counts[key] for key, value in sums.items()}
    with atomic_file(path, mark=MARK.encode()) as staging:
        write_tensors(staging, means, {"format": "pt", "comment": MARK})


def read_moments(path: Path) -> Moments:
    """Read what `collect_moments` wrote.

    Raises:
        AdapterError: If the file holds no moments.
    """
    file = SafetensorsFile(path, str(path))
    names = file.entries()
    found = {
        ending: {n.removesuffix(ending): file.read(n).double() for n in names if n.endswith(ending)}
        for ending in (_MOMENT, _FISHER)
    }
    if not found[_MOMENT]:
        raise AdapterError(
            f"{path}: no bottleneck moments in it", "record them with collect_moments"
        )
    for ending, tensors in found.items():
        for name, tensor in tensors.items():
            square = tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]
            if not (square if ending == _MOMENT else tensor.dim() == 1):
                raise AdapterError(
                    f"{path}: {name}{ending} is {list(tensor.shape)}", "record them again"
                )
            refuse_non_finite(tensor, f"{path}: {name}{ending}")
    return Moments(found[_MOMENT], found[_FISHER])


def weigh_spectra(
    adapter: Adapter, spectra: AdapterSpectra, moments: Moments, *, fisher: bool = False
) -> AdapterSpectra:
    """Spectra whose squared values are output energy on the calibration data.

    Rank rules and `resize` take them as they take plain ones: what they keep is then the largest
    share of E||D x||^2 (weighted by the outputs' Fisher information, if asked for).

    Args:
        adapter: The adapter.
        spectra: Its plain spectra with cores kept.
        moments: Recorded with this adapter.
        fisher: Weigh outputs by E[(dL/dy)^2].

    Raises:
        AdapterError: If a module has no moments, or those of another rank.
    """
    weighted = []
    for module in spectra.modules:
        if module.status == "not finite":
            weighted.append(module)
            continue
        moment = moments.moments.get(module.module)
        rank, d_out = module.spec.rank, module.spec.d_out
        weights = moments.fisher.get(module.module) if fisher else None
        if module.expert is not None or moment is None or moment.shape != (rank, rank):
            raise AdapterError(
                f"{adapter.name}: {module.name}: no moments of rank {rank} were recorded",
                "record them with this very adapter (collect_moments)",
            )
        if fisher and (weights is None or weights.shape != (d_out,)):
            raise AdapterError(
                f"{adapter.name}: {module.name}: no Fisher weights were recorded",
                "run backward passes inside collect_moments",
            )
        weighted.append(_weigh(adapter, module, moment, weights))
    return replace(spectra, modules=tuple(weighted))


def weighted_core(up: Tensor, moment: Tensor, weights: Tensor | None = None) -> CoreSVD:
    """SVD of diag(sqrt(weights)) B L, L L^T = moment, in the form that `CoreSVD` truncates.

    Args:
        up: B, shape (d_out, r), float64.
        moment: E[h h^T], shape (r, r), float64, may be singular.
        weights: Of the outputs, shape (d_out,).
    """
    energies, vectors = torch.linalg.eigh(moment)
    alive = energies > 1e-12 * energies.amax().clamp_min(0)
    root = torch.where(alive, energies.clamp_min(0).sqrt(), 0.0)
    square_root = vectors * root
    if weights is None:
        r_up = torch.linalg.qr(up, mode="r").R
        u, values, vh = torch.linalg.svd(r_up @ square_root, full_matrices=False)
        return CoreSVD(values, square_root @ vh.mT, u.mT @ r_up)
    scaled = weights.clamp_min(0).sqrt()[:, None] * up
    r_up = torch.linalg.qr(scaled, mode="r").R
    _, values, vh = torch.linalg.svd(r_up @ square_root, full_matrices=False)
    # Only L is inverted, on the directions that occur; output weights never are.
    inverse = torch.where(alive, 1 / root.clamp_min(1e-300), 0.0)[:, None] * vectors.mT
    return CoreSVD(values, square_root @ vh.mT, values[:, None] * (vh @ inverse))


def _weigh(
    adapter: Adapter, module: ModuleSpectrum, moment: Tensor, weights: Tensor | None
) -> ModuleSpectrum:
    a, b = adapter.read(module.module)
    _, up = to_matrix(module.spec, a, b, 0)
    core = weighted_core(up.double(), moment, weights)
    norm = float(torch.linalg.vector_norm(module.values))
    values = core.values * abs(module.spec.scaling)
    return replace(module, values=values, core=core, delta_norm=norm)
