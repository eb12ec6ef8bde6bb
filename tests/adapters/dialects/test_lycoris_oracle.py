"""Our delta of a kohya or LyCORIS file is LyCORIS's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.errors import AdapterError
from lora_merge.reshape.convert import plan_conversion
from lora_merge.reshape.options import ConvertOptions

pytest.importorskip("lycoris", reason="pip install 'lora-merge[oracles]'")
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

LINEAR, CONV = (lambda: nn.Linear(24, 36)), (lambda: nn.Conv2d(8, 12, 3))
FORMS: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "lora": (LoConModule, LINEAR, {}),
    "alpha-0": (LoConModule, LINEAR, {"alpha": 0}),
    "rs-lora": (LoConModule, LINEAR, {"rs_lora": True}),
    "scalar": (LoConModule, LINEAR, {"use_scalar": True}),
    "locon": (LoConModule, CONV, {}),
    "locon-1x1": (LoConModule, lambda: nn.Conv2d(8, 12, 1), {}),
    "locon-1d": (LoConModule, lambda: nn.Conv1d(8, 12, 5), {}),
    "locon-3d": (LoConModule, lambda: nn.Conv3d(4, 6, (1, 2, 2)), {}),
    "locon-mid": (LoConModule, CONV, {"use_tucker": True}),
    "loha": (LohaModule, LINEAR, {}),
    "loha-rs": (LohaModule, LINEAR, {"rs_lora": True}),
    "loha-conv": (LohaModule, CONV, {}),
    "loha-tucker": (LohaModule, CONV, {"use_tucker": True}),
    "lokr": (LokrModule, LINEAR, {"factor": 4, "lora_dim": 2}),
    "lokr-both": (LokrModule, LINEAR, {"decompose_both": True, "lora_dim": 2}),
    "lokr-full": (LokrModule, LINEAR, {"full_matrix": True, "alpha": 3}),
    "lokr-unbalanced": (LokrModule, LINEAR, {"unbalanced_factorization": True, "lora_dim": 1}),
    "lokr-conv": (LokrModule, CONV, {"lora_dim": 1}),
    "lokr-conv-full": (LokrModule, CONV, {"full_matrix": True}),
    "lokr-tucker": (LokrModule, CONV, {"use_tucker": True, "lora_dim": 1}),
}


def trained(form: str) -> Any:
    """A LyCORIS module with random weights in double precision."""
    kind, layer, options = FORMS[form]
    torch.manual_seed(3)
    module = kind("lora_unet_one", layer().double(), **{"lora_dim": 4, "alpha": 2, **options})
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def file_of(module: Any, path: Path, metadata: dict[str, str] | None = None) -> Path:
    state = {f"lora_unet_one.{k}": v.detach().contiguous() for k, v in module.state_dict().items()}
    save_file(state, path, metadata=metadata)
    return path


def merged_delta(module: Any) -> Tensor:
    """What LyCORIS's own forward adds: the probe knows nothing of its tensors."""
    base = module.org_module[0]
    shape = base.weight.shape
    dtype = base.weight.dtype
    if isinstance(base, nn.Linear):
        eye = torch.eye(shape[1], dtype=dtype)
        return (module(eye) - base(eye)).detach().mT
    width = shape[2:].numel() * shape[1]
    unit = torch.eye(width, dtype=dtype).reshape(width, *shape[1:])
    return (module(unit) - base(unit)).detach().flatten(1).mT


def our_delta(adapter: Adapter) -> Tensor:
    (module,) = align([adapter]).modules
    (stack,) = read_stacks(align([adapter]), module, dtype=torch.float64)
    return stack.delta()


@pytest.mark.parametrize("form", FORMS)
def test_our_delta_is_that_of_lycoris(form: str, tmp_path: Path) -> None:
    module = trained(form)
    adapter = Adapter.from_pretrained(file_of(module, tmp_path / "a.safetensors"))
    assert adapter.dialect == "kohya"
    torch.testing.assert_close(our_delta(adapter), merged_delta(module), rtol=1e-6, atol=1e-8)


def test_a_missing_alpha_means_the_rank(tmp_path: Path) -> None:
    module = trained("lora")
    state = {f"lora_unet_one.{k}": v.detach() for k, v in module.state_dict().items()}
    del state["lora_unet_one.alpha"]
    save_file(state, tmp_path / "a.safetensors")
    adapter = Adapter.from_pretrained(tmp_path / "a.safetensors")
    # alpha is 2 and the rank 4
    torch.testing.assert_close(our_delta(adapter), 2 * merged_delta(module))


def test_a_dylora_file_is_read_as_the_lora_that_every_loader_makes_of_it(tmp_path: Path) -> None:
    """Its own forward draws a rank at random, even when it is evaluated."""
    module = DyLoraModule("lora_unet_one", LINEAR().double(), lora_dim=4, alpha=2, block_size=2)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    state = module.state_dict()
    up, down, alpha = state["lora_up.weight"], state["lora_down.weight"], state["alpha"]
    layer = module.org_module[0]
    loaded = LoConModule.make_module_from_state_dict("x", layer, up, down, None, alpha, None)
    adapter = Adapter.from_pretrained(file_of(module, tmp_path / "a.safetensors"))
    torch.testing.assert_close(our_delta(adapter), merged_delta(loaded.double()))


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("form", ["lora", "loha", "lokr", "locon", "locon-mid"])
def test_dora_with_its_base_is_that_of_lycoris(form: str, outputs: bool, tmp_path: Path) -> None:
    kind, layer, options = FORMS[form]
    torch.manual_seed(3)
    more = {**options, "lora_dim": 2, "weight_decompose": True, "wd_on_out": outputs}
    module = kind("lora_unet_one", layer().double(), alpha=1, **more).double().eval()
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "dora" in name else 0.0, std=0.3)
    path = file_of(module, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="lora_unet_one: DoRA") as refusal:
        Adapter.from_pretrained(path)
    assert "--energy" in refusal.value.remedy
    base = tmp_path / "base.safetensors"
    save_file({"one.weight": module.org_module[0].weight.detach()}, base)
    adapter = Adapter.from_pretrained(path, base=base, rank=1 << 30)
    (aligned,) = align([adapter]).modules
    delta = next(read_stacks(align([adapter]), aligned)).delta()
    torch.testing.assert_close(delta, merged_delta(module).float(), rtol=1e-4, atol=1e-4)


TURNED: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "oft": (DiagOFTModule, LINEAR, {"lora_dim": 4}),
    "oft-rescaled": (DiagOFTModule, LINEAR, {"lora_dim": 4, "rescaled": True}),
    "oft-constrained": (DiagOFTModule, LINEAR, {"lora_dim": 4, "constraint": 0.01}),
    "oft-conv": (DiagOFTModule, CONV, {"lora_dim": 4, "rescaled": True}),
    "boft": (ButterflyOFTModule, lambda: nn.Linear(24, 48), {"lora_dim": 6}),
    "boft-conv": (ButterflyOFTModule, lambda: nn.Conv2d(8, 16, 3), {"lora_dim": 4}),
    "boft-rescaled": (ButterflyOFTModule, LINEAR, {"lora_dim": 18, "rescaled": True}),
    "ia3": (IA3Module, LINEAR, {}),
    "ia3-inputs": (IA3Module, LINEAR, {"train_on_input": True}),
    "ia3-conv": (IA3Module, CONV, {}),
    "ia3-conv-inputs": (IA3Module, CONV, {"train_on_input": True}),
}  # fmt: skip


@pytest.mark.parametrize("form", TURNED)
def test_what_turns_or_rescales_the_base_is_that_of_lycoris(form: str, tmp_path: Path) -> None:
    kind, layer, options = TURNED[form]
    torch.manual_seed(3)
    module = kind("lora_unet_one", layer(), **options).eval()
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "rescale" in name else 0.0, std=0.3)
    path, base = file_of(module, tmp_path / "a.safetensors"), tmp_path / "base.safetensors"
    save_file({"one.weight": module.org_module[0].weight.detach()}, base)
    with pytest.raises(AdapterError, match=r"lora_unet_one: .* full rank") as refusal:
        Adapter.from_pretrained(path, base=base)
    assert "lora-merge convert" in refusal.value.remedy
    with pytest.raises(AdapterError, match="--base"):
        Adapter.from_pretrained(path, rank=1 << 30)
    adapter = Adapter.from_pretrained(path, base=base, rank=1 << 30)
    theirs = merged_delta(module)
    assert theirs.norm() > 0.1
    (stack,) = adapter.stacks("lora_unet_one")
    torch.testing.assert_close(stack.delta(), theirs, rtol=1e-4, atol=1e-5)


def test_an_oft_that_sd_scripts_holds_to_nothing_is_refused(tmp_path: Path) -> None:
    """LyCORIS takes a constraint of 0 for none, sd-scripts for a bound of 0."""
    tensors = {
        "oft_unet_one.oft_blocks": torch.ones(6, 6, 6),
        "oft_unet_one.alpha": torch.zeros(()),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"ss_network_module": "networks.oft"})
    save_file({"one.weight": torch.ones(36, 24)}, tmp_path / "base.safetensors")
    with pytest.raises(AdapterError, match="oft_unet_one: its constraint is 0"):
        Adapter.from_pretrained(
            tmp_path / "a.safetensors", base=tmp_path / "base.safetensors", rank=1 << 30
        )


def test_a_dense_difference_is_cut_on_request(tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = {
        "lora_unet_one.diff": torch.randn(12, 8, 3, 3),
        "lora_unet_two.diff": torch.randn(9, 7),
    }
    save_file(whole, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="dense difference") as refusal:
        Adapter.from_pretrained(tmp_path / "a.safetensors")
    assert "--energy" in refusal.value.remedy
    adapter = Adapter.from_pretrained(tmp_path / "a.safetensors", rank=1 << 30)
    for name, diff in whole.items():
        (stack,) = adapter.stacks(name.removesuffix(".diff"))
        torch.testing.assert_close(stack.delta(), diff.flatten(1), rtol=1e-4, atol=1e-4)
    report = plan_conversion(adapter, ConvertOptions(rank=2)).run(tmp_path / "out").report
    values = [torch.linalg.svdvals(d.flatten(1)) for d in whole.values()]
    lost, total = (sum(float(v[i:].square().sum()) for v in values) for i in (2, 0))
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-3)


def test_glora_with_its_base_is_that_of_lycoris(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = GLoRAModule("lora_unet_one", nn.Linear(24, 36), lora_dim=3, alpha=2).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    save_file({"one.weight": module.org_module[0].weight.detach()}, tmp_path / "base.safetensors")
    path = file_of(module, tmp_path / "a.safetensors")
    adapter = Adapter.from_pretrained(path, base=tmp_path / "base.safetensors")
    assert adapter.modules["lora_unet_one"].rank == 6
    (module_spec,) = align([adapter]).modules
    delta = next(read_stacks(align([adapter]), module_spec)).delta()
    eye = torch.eye(24)
    theirs = (module(eye) - module.org_module[0](eye)).detach().mT
    torch.testing.assert_close(delta, theirs, rtol=1e-4, atol=1e-4)


def test_a_lokr_cut_as_it_is_read_tells_what_it_lost(tmp_path: Path) -> None:
    module = trained("lokr-full")
    path = file_of(module, tmp_path / "a.safetensors")
    adapter = Adapter.from_pretrained(path, rank=5)
    assert adapter.modules["lora_unet_one"].recipe.verdict == "approximate"
    report = plan_conversion(adapter, ConvertOptions(rank=5)).run(tmp_path / "out").report
    values = torch.linalg.svdvals(merged_delta(module))
    assert report.error == pytest.approx(float(values[5:].norm() / values.norm()), rel=1e-5)
    best = our_delta(Adapter.from_pretrained(tmp_path / "out"))
    error = (best - merged_delta(module)).norm()
    assert float(error) == pytest.approx(float(values[5:].norm()), rel=1e-5)


def test_glora_needs_the_base(tmp_path: Path) -> None:
    module = GLoRAModule("lora_unet_one", nn.Linear(24, 36), lora_dim=3)
    with pytest.raises(AdapterError, match="--base"):
        Adapter.from_pretrained(file_of(module, tmp_path / "a.safetensors"))
