"""Our delta of every PEFT tuner is what PEFT's own layers do to an input."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.base_weights import CheckpointBase
from lora_merge.adapters.config import read_config
from lora_merge.errors import AdapterError
from lora_merge.files.checkpoint import open_checkpoint
from lora_merge.files.tensor_file import SafetensorsFile, TensorDict
from lora_merge.reshape.convert import plan_conversion
from lora_merge.reshape.options import ConvertOptions

WIDTH, HEIGHT = 24, 36


class Model(nn.Module):
    """Two layers of different shapes, so that shared tensors have to be sliced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, HEIGHT)
        self.second = nn.Linear(16, WIDTH, bias=False)
        self.config = {"model_type": "none"}

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.second(x))


# name → (config class, its fields, whether the delta needs the base weight)
TUNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 2}),
    "loha-patterns": (
        "LoHaConfig",
        {"r": 3, "alpha": 2, "rank_pattern": {"first": 2}, "alpha_pattern": {"second": 9}},
    ),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3}),
    "lokr-both": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True}),
    "lokr-whole": ("LoKrConfig", {"r": 16, "alpha": 3}),
    "vera": ("VeraConfig", {"r": 5}),
    "pvera": ("PveraConfig", {"r": 5}),
    "vblora": ("VBLoRAConfig", {"r": 3, "num_vectors": 10, "vector_length": 4, "topk": 3}),
    "vblora-topk": (
        "VBLoRAConfig",
        {
            "r": 3,
            "num_vectors": 10,
            "vector_length": 4,
            "topk": 3,
            "save_only_topk_weights": True,
        },
    ),
    "unilora": ("UniLoraConfig", {"r": 3, "theta_d_length": 40, "save_indices": True}),
    "tinylora": ("TinyLoraConfig", {"r": 2, "u": 4, "save_projection": True}),
    "tinylora-tied": (
        "TinyLoraConfig",
        {"r": 2, "u": 4, "save_projection": True, "weight_tying": 1.0},
    ),
    "delora": ("DeloraConfig", {"r": 3}),
    "miss": ("MissConfig", {"r": 5}),
    "miss-mini": ("MissConfig", {"r": 5, "mini_r": 4, "init_weights": "mini"}),
    "gralora": ("GraloraConfig", {"r": 4, "alpha": 3, "gralora_k": 2}),
    "gralora-hybrid": ("GraloraConfig", {"r": 4, "alpha": 3, "gralora_k": 4, "hybrid_r": 2}),
    "hra": ("HRAConfig", {"r": 4}),
    "hra-gs": ("HRAConfig", {"r": 4, "apply_GS": True}),
    "deft": ("DeftConfig", {"r": 3}),
    "deft-qr": ("DeftConfig", {"r": 3, "decomposition_method": "qr", "alpha": 2}),
    "para": ("DeftConfig", {"r": 3, "para": True}),
    "psoft": ("PsoftConfig", {"r": 4}),
    "psoft-plain": ("PsoftConfig", {"r": 4, "psoft_orth": False, "psoft_mag_a": False}),
    "psoft-neumann": (
        "PsoftConfig",
        {"r": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5, "psoft_alpha": 9},
    ),
    "peanut": ("PeanutConfig", {"r": 3, "depth": 2, "scaling": 0.5}),
    "velora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "velora_config": "VeloraConfig"}),
    "montec": ("LoraConfig", {"r": 4, "lora_alpha": 6, "monteclora_config": "MontecloraConfig"}),
    "kasa": ("LoraConfig", {"r": 4, "lora_alpha": 6, "kasa_config": "KasaConfig"}),
    "pissa": ("LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": "olora"}),
    "mica": ("LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": "mica"}),
    "bdlora": (
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_bdlora": {
                "nblocks": 2,
                "target_modules_bd_a": ["first"],
                "target_modules_bd_b": ["second"],
            },
        },
    ),
}

# Full rank: refused, unless a rank is asked for.
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "ia3": ("IA3Config", {"feedforward_modules": ["first"]}),
    "hira": ("HiraConfig", {"r": 3}),
    "c3a": ("C3AConfig", {"block_size": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 50}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "r": 0}),
    "oft-exact": ("OFTConfig", {"oft_block_size": 4, "r": 0, "use_cayley_neumann": False}),
    "shira": ("ShiraConfig", {"r": 2}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "boft-blocks": ("BOFTConfig", {"boft_block_num": 2, "boft_block_size": 0}),
    "road": ("RoadConfig", {"group_size": 4, "target_modules": ["second"]}),
    "road-2": ("RoadConfig", {"variant": "road_2", "group_size": 8, "target_modules": ["second"]}),
    "road-4": ("RoadConfig", {"variant": "road_4", "group_size": 4, "target_modules": ["second"]}),
    "waveft": ("WaveFTConfig", {"n_frequency": 60}),
    "waveft-sparse": ("WaveFTConfig", {"n_frequency": 60, "use_idwt": False, "scaling": 3}),
    "waveft-db4": ("WaveFTConfig", {"n_frequency": 60, "wavelet_family": "db4"}),
    "waveft-coif": ("WaveFTConfig", {"n_frequency": 60, "wavelet_family": "coif1"}),
    "miss-bat": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "super": ("SupertuningConfig", {"sparsity": 0.9}),
    "supra": ("SupertuningConfig", {"sparsity": 0.9, "r": 3}),
    "glora": ("GloraConfig", {"r": 3, "target_modules": ["second"]}),
    "glora-vector": ("GloraConfig", {"config_A_B": "vector", "target_modules": ["second"]}),
    "glora-constant": ("GloraConfig", {"config_A_B": "constant", "target_modules": ["second"]}),
    "randlora": ("RandLoraConfig", {"r": 5, "randlora_alpha": 9}),
}
FROZEN = (
    "delora_w_norm",
    "tinylora_P",
    "tinylora_A",
    "tinylora_B",
    "bias",
    "_scales_",
    "monteclora",
)


def train(name: str, folder: Path) -> peft.PeftModel:
    """A PEFT model with random trained tensors, saved beside its base."""
    kind, fields = {**TUNERS, **FULL}[name]
    base = Model()
    (folder / "base").mkdir(parents=True, exist_ok=True)
    save_file(base.state_dict(), folder / "base" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = {
            k: getattr(peft, v)() if isinstance(v, str) and v.endswith("Config") else v
            for k, v in fields.items()
        }
        config = getattr(peft, kind)(**{"target_modules": ["first", "second"], **fields})
        model = peft.get_peft_model(base, config)
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if "base_layer" not in key and not any(part in key for part in FROZEN):
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return model.eval()


def their_deltas(model: peft.PeftModel) -> dict[str, Tensor]:
    """What each layer adds to an input: identity and zero through it, the base's part taken off."""
    deltas, original = {}, dict(Model().named_children())
    for name, layer in model.base_model.model.named_children():
        if not hasattr(layer, "get_base_layer"):
            continue
        base = layer.get_base_layer()
        probe = torch.cat([torch.eye(base.in_features), torch.zeros(1, base.in_features)])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SHiRA's sparse tensors
            change = layer(probe) - original[name](probe)
        assert change[-1].abs().max() < 1e-6
        deltas[name] = change[:-1].mT
    return deltas


def opened(folder: Path, *, base: bool = True, rank: int | None = None) -> Adapter:
    path = folder / "adapter" / "adapter_model.safetensors"
    return build_adapter(
        "adapter",
        read_config(folder / "adapter" / "adapter_config.json", "adapter"),
        SafetensorsFile(path, "adapter"),
        base=CheckpointBase(open_checkpoint(folder / "base")) if base else None,
        rank=rank,
    )


def our_deltas(adapter: Adapter) -> dict[str, Tensor]:
    alignment = align([adapter])
    return {m.name: next(read_stacks(alignment, m)).delta() for m in alignment.modules}


@pytest.mark.parametrize("name", TUNERS)
def test_our_delta_is_what_pefts_layer_does(name: str, tmp_path: Path) -> None:
    theirs = their_deltas(train(name, tmp_path))
    ours = our_deltas(opened(tmp_path))
    assert ours.keys() == theirs.keys()
    for module, delta in theirs.items():
        assert delta.abs().max() > 1e-3, "nothing was trained"
        torch.testing.assert_close(ours[module], delta, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", FULL)
def test_full_rank_is_refused_unless_it_is_asked_for(name: str, tmp_path: Path) -> None:
    theirs = their_deltas(train(name, tmp_path))
    with pytest.raises(AdapterError, match="full rank") as refusal:
        opened(tmp_path)
    assert "lora-merge convert" in refusal.value.remedy
    adapter = opened(tmp_path, rank=1 << 30)
    for module, delta in our_deltas(adapter).items():
        torch.testing.assert_close(delta, theirs[module], rtol=1e-4, atol=1e-5)
    report = plan_conversion(adapter, ConvertOptions(rank=3)).run(tmp_path / "out").report
    values = {m: torch.linalg.svdvals(d.double()) for m, d in theirs.items()}
    lost = sum(float(v[3:].square().sum()) for v in values.values())
    total = sum(float(v.square().sum()) for v in values.values())
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-3)


def test_boft_of_several_butterflies_is_that_of_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT puts blocks on a diagonal by a CUDA kernel alone; torch.block_diag stands in for it."""
    from peft.tuners.boft import layer

    kernel = SimpleNamespace(
        forward=lambda blocks: [torch.stack([torch.block_diag(*b) for b in blocks])]
    )
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: kernel)
    fields = {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": ["first"]}
    monkeypatch.setitem(FULL, "x", ("BOFTConfig", fields))
    theirs = their_deltas(train("x", tmp_path))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored["base_model.model.first.boft_R"].shape == (2, 6, 4, 4)
    ours = our_deltas(opened(tmp_path, rank=1 << 30))
    torch.testing.assert_close(ours["first"], theirs["first"], rtol=1e-4, atol=1e-5)


def sparse_file(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    (folder / "base").mkdir(parents=True)
    (folder / "adapter").mkdir()
    save_file(Model().state_dict(), folder / "base" / "model.safetensors")
    stem = "base_model.model.first."
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({stem + key: value for key, value in tensors.items()}, path)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def test_paca_puts_columns_in_the_place_of_the_bases(tmp_path: Path) -> None:
    """Its fork of PEFT assigns: weight[:, indices] = alpha / r * paca_w."""
    torch.manual_seed(2)
    columns, places = torch.randn(HEIGHT, 3), torch.tensor([17, 2, 9])
    config = {"peft_type": "PACA", "r": 3, "paca_alpha": 6}
    sparse_file(tmp_path, config, {"paca_w": columns, "paca_indices": places})
    weight = Model().first.weight.detach()
    tuned = weight.clone()
    tuned[:, places] = 2 * columns
    adapter = opened(tmp_path)
    assert adapter.modules["first"].rank == 3
    torch.testing.assert_close(our_deltas(adapter)["first"], tuned - weight)
    with pytest.raises(AdapterError) as refusal:
        opened(tmp_path, base=False)
    assert "--base" in refusal.value.remedy


def test_few_entries_are_exact_and_unasked(tmp_path: Path) -> None:
    values, places = torch.tensor([2.0, -1.0, 3.0]), torch.tensor([5, 30, 863], dtype=torch.int32)
    config = {"peft_type": "SUPERTUNING", "r": None, "lora_alpha": None}
    tensors = {"supertuning_values": values, "supertuning_indices": places}
    sparse_file(tmp_path, config, tensors)
    wanted = torch.zeros(HEIGHT * WIDTH)
    wanted[places.long()] = values
    adapter = opened(tmp_path)
    assert adapter.modules["first"].recipe.verdict == "exact"
    torch.testing.assert_close(our_deltas(adapter)["first"], wanted.view(HEIGHT, WIDTH))


@pytest.mark.parametrize(
    ("kind", "lost", "word"),
    [
        ("PACA", "paca_indices", "paca_indices"),
        ("PACA", "paca_alpha", "there"),
        ("SUPERTUNING", "supertuning_indices", "save_precomputed_indices=True"),
    ],
)
def test_places_that_are_not_stored_are_refused(
    kind: str, lost: str, word: str, tmp_path: Path
) -> None:
    tensors = {
        "PACA": {"paca_w": torch.ones(HEIGHT, 2), "paca_indices": torch.tensor([0, 1])},
        "SUPERTUNING": {
            "supertuning_values": torch.ones(2),
            "supertuning_indices": torch.tensor([0, 1], dtype=torch.int32),
        },
    }[kind]
    config = {"peft_type": kind, "r": 2, "paca_alpha": 2}
    tensors.pop(lost, None), config.pop(lost, None)
    sparse_file(tmp_path, config, tensors)
    with pytest.raises(AdapterError) as refusal:
        opened(tmp_path)
    assert word in refusal.value.remedy


def test_a_wavelet_whose_filters_are_not_known_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "WAVEFT", "wavelet_family": "coif5"}
    sparse_file(tmp_path, config, {"waveft_spectrum": torch.ones(5)})
    with pytest.raises(AdapterError, match="coif5"):
        opened(tmp_path, rank=1 << 30)


def test_a_glora_that_changes_the_bias_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FULL, "x", ("GloraConfig", {"target_modules": ["first"]}))
    train("x", tmp_path)
    with pytest.raises(AdapterError, match="it changes the bias"):
        opened(tmp_path, rank=1 << 30)


@pytest.mark.parametrize(("name", "field"), [("road", {}), ("ia3", {"feedforward_modules": []})])
def test_a_tuner_that_changes_the_bias_is_refused(name: str, field: Any, tmp_path: Path) -> None:
    kind, fields = FULL[name]
    FULL["x"] = (kind, {**fields, **field, "target_modules": ["first"]})
    train("x", tmp_path)
    del FULL["x"]
    with pytest.raises(AdapterError, match="the bias of the base, too"):
        opened(tmp_path, rank=1 << 30)


@pytest.mark.parametrize(
    "name", ["vera", "miss", "hra", "deft", "psoft", "peanut", "kasa", "pissa", "olora"]
)
def test_what_needs_the_base_says_so(name: str, tmp_path: Path) -> None:
    train(name, tmp_path)
    with pytest.raises(AdapterError) as refusal:
        opened(tmp_path, base=False)
    assert "--base" in refusal.value.remedy


@pytest.mark.parametrize("name", TUNERS)
def test_every_tensor_is_claimed_or_named(name: str, tmp_path: Path) -> None:
    """Each tensor renamed, lost or added: refused, unless a whole module is simply not there."""
    train(name, tmp_path)
    whole = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = read_config(tmp_path / "adapter" / "adapter_config.json", "adapter")
    base = CheckpointBase(open_checkpoint(tmp_path / "base"))

    def modules(tensors: dict[str, Tensor]) -> set[str]:
        return set(build_adapter("adapter", config, TensorDict(tensors), base=base).modules)

    for key in whole:
        if "velora_embed" in key or "monteclora_sampler" in key:
            continue  # state of the training, which changes nothing
        stem = ".".join(key.split(".")[:3])
        lost = {k: t for k, t in whole.items() if k != key}
        shared = not key.startswith("base_model.model.")
        if shared or any(k.startswith(stem + ".") for k in lost):
            with pytest.raises(AdapterError):
                modules(lost)
        else:
            assert modules(lost) == {"first", "second"} - {stem.rpartition(".")[2]}
        for other in (key + "_more", key.replace("base_model.", "base_model.x.", 1)):
            with pytest.raises(AdapterError):
                modules({**lost, other: whole[key]})
        with pytest.raises(AdapterError):
            modules({**whole, key + "_more": whole[key]})


def test_remedies_name_what_to_save(tmp_path: Path) -> None:
    for name, field in (("vera", "save_projection"), ("tinylora", "save_projection")):
        kind, fields = TUNERS[name]
        TUNERS["x"] = (kind, {**fields, "save_projection": False})
        train("x", tmp_path / name)
        del TUNERS["x"]
        with pytest.raises(AdapterError) as refusal:
            opened(tmp_path / name)
        assert field in refusal.value.remedy


@pytest.mark.parametrize("name", ["loha", "lokr", "vblora", "gralora-hybrid", "hra", "miss"])
def test_saved_as_a_lora_it_is_the_same_in_peft(name: str, tmp_path: Path) -> None:
    theirs = their_deltas(train(name, tmp_path))
    opened(tmp_path).save_pretrained(tmp_path / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        again = peft.PeftModel.from_pretrained(Model(), tmp_path / "lora")
    assert again.peft_config["default"].peft_type == "LORA"
    for module, delta in their_deltas(again).items():
        torch.testing.assert_close(delta, theirs[module], rtol=1e-4, atol=2e-6)


def test_qalora_is_what_pefts_forward_does(tmp_path: Path) -> None:
    """PEFT has it for GPTQ layers alone, so its forward runs here on a stand-in for one."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 6, generator=g), torch.randn(10, 4, generator=g)
    stem = "base_model.model.first.lora_"
    (tmp_path / "adapter").mkdir()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({f"{stem}A.weight": a, f"{stem}B.weight": b}, path)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_qalora": True}
    config["qalora_group_size"] = 4
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    layer = SimpleNamespace(
        lora_A={"x": SimpleNamespace(weight=a)},
        lora_B={"x": SimpleNamespace(weight=b)},
        lora_dropout={"x": nn.Identity()},
        scaling={"x": 1.5},
        qalora_group_size={"x": 4},
        training=False,
        in_features=24,
    )
    eye = torch.eye(24)
    theirs = QALoraLinearVariant.forward(layer, "x", eye, torch.zeros(24, 10)).mT
    torch.testing.assert_close(our_deltas(opened(tmp_path, base=False))["first"], theirs)
