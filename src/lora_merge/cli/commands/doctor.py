"""`lora-merge doctor`: what a bug report has to say of the machine."""

from typing import Any

import click

from lora_merge.cli.shared.options import json_option

_LIBRARIES = (
    *("torch", "safetensors", "huggingface-hub", "scipy", "scikit-learn", "numpy", "click", "rich"),
    *("pydantic", "pyyaml"),
)
_KERNELS = 1  # launches to compile: enough to see a broken installation
# Library → what it is for.
_OPTIONAL = {
    "transformers": "running models: evaluate, train, usage",
    "peft": "live PEFT models, X-LoRA's layout",
    "triton": "GPU kernels",
    "matplotlib": "--svg, --png, --html, --plot",
    "accelerate": "bases larger than one device",
    "optuna": "search",
    "diffusers": "convert --pipeline",
    "gguf": "adapters of llama.cpp",
    "PyWavelets": "WaveFT but Haar's",
    "ray": "--engine ray",
    "pandas": "to_frame()",
}


@click.command
@json_option
def command(as_json: bool) -> None:
    """Say what is installed and what works here, ready to paste into a bug report.

    Names no file of yours but the cache directories, and asks no network.
    """
    from lora_merge.cli.shared.output import Output

    facts = _facts()
    lines = [
        f"lora-merge {facts['version']}, Python {facts['python']}, {facts['system']}",
        "libraries   " + ", ".join(f"{k} {v}" for k, v in facts["libraries"].items()),
        *_optional(facts["optional"]),
        f"processors  {facts['processors']}, {facts['threads']} torch threads",
        *(f"device      {d}" for d in facts["devices"] or ["cpu alone"]),
        f"kernels     {facts['kernels']}",
        *(f"cache       {name}: {where}" for name, where in facts["caches"].items()),
    ]
    Output(as_json).data({"schema": 1, **facts}, *lines)


def _optional(found: dict[str, str | None]) -> list[str]:
    here = [f"{name} {version}" for name, version in found.items() if version]
    missing = [f"{name} ({_OPTIONAL[name]})" for name, version in found.items() if not version]
    return [f"optional    {', '.join(here) or 'none'}", *(f"missing     {m}" for m in missing)]


def _facts() -> dict[str, Any]:
    import platform

    import torch

    from lora_merge._version import __version__
    from lora_merge.adapters.references import derived_data
    from lora_merge.evaluation.score_cache import score_directory
    from lora_merge.files.hub import hub_cache
    from lora_merge.machine.parallel import default_jobs

    return {
        "version": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libraries": {name: _version_of(name) for name in _LIBRARIES},
        "optional": {name: _version_of(name) for name in _OPTIONAL},
        "processors": default_jobs(),
        "threads": torch.get_num_threads(),
        "devices": [
            f"cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}"
            for i in range(torch.cuda.device_count())
            for p in [torch.cuda.get_device_properties(i)]
        ],
        "kernels": _kernels(),
        "caches": {
            "hub": str(hub_cache()),
            "derived": str(derived_data("base-norms").parent),
            "scores": str(score_directory()),
        },
    }


def _version_of(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _kernels() -> str:
    """Whether kernels compile: for the GPU that is here, else for an H100."""
    if _version_of("triton") is None:
        return "triton is not installed: mixtures run on PyTorch's operations"
    import torch

    from lora_merge.kernels.gated_stack.gpu.compile_check import chosen, compile_all, refusal

    if reason := refusal():
        return reason
    here = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if here else (9, 0)
    capability = 10 * major + minor
    found = list(compile_all(chosen(capability)[:_KERNELS], capability))
    broken = [one for one in found if one.error]
    where = f"capability {major}.{minor}" + ("" if here else " (no GPU here to run them)")
    if broken:
        return f"{len(broken)} of {len(found)} do not compile for {where}: {broken[0].error}"
    return f"they compile for {where}: tried {len(found)}, tune --check tries all"
