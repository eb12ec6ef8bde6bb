"""Descriptors: PCA against scikit-learn, growing, and texts nobody knows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from tiny import experts_for, llama, saved_experts

from builders import make_adapter
from lora_merge.errors import AdapterError, MethodError
from lora_merge.mixture.append import append_experts
from lora_merge.mixture.insight.descriptors import Descriptors
from lora_merge.mixture.insight.novelty import default_modules, describe, novelty
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.training.data import Example


def texts(low: int, expert: int, count: int = 12, seed: int = 0) -> list[Example]:
    """Texts of a kind: tokens from a range of their own, of different lengths."""
    random = torch.Generator().manual_seed(seed * 100 + low)
    return [
        Example(
            tuple(torch.randint(low, low + 12, (8 + i % 5,), generator=random).tolist()), 0, expert
        )
        for i in range(count)
    ]


def inputs(model: torch.nn.Module, module: str, rows: list[Example]) -> list[np.ndarray]:
    """Each text's inputs to a module, one text at a time."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].double().numpy())
    )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row.ids]))
    handle.remove()
    return seen


def test_errors_are_those_of_pca() -> None:
    model = llama()
    mixture = Mixture(experts_for(model), "request")
    rows = texts(2, 0) + texts(20, 1)
    module = default_modules(mixture)[1]
    known = describe(model, mixture, rows, rank=5, batch_size=5)
    assert known.experts == ("expert0", "expert1")
    assert known.modules == default_modules(mixture) and len(known.modules) == 2
    probe = inputs(model, module, texts(30, -1))[0]
    got = known.errors(module, torch.from_numpy(probe))
    for expert in range(2):
        own = inputs(model, module, rows[12 * expert : 12 * expert + 12])
        pca = PCA(5).fit(np.concatenate(own[:6]))

        def error(x: np.ndarray, pca: PCA = pca) -> float:
            return float(((x - pca.inverse_transform(pca.transform(x))) ** 2).sum(1).mean())

        assert float(got[expert]) == pytest.approx(error(probe), rel=1e-4)
        measured = [error(x) for x in own[6:]]
        expected = [np.mean(measured), np.std(measured, ddof=1)]
        assert known.tensors[f"{module}.error"][expert].tolist() == pytest.approx(
            expected, rel=1e-3
        )


def test_a_new_kind_of_text_is_noticed_and_learned(tmp_path: Path) -> None:
    model = llama()
    mixture = Mixture(saved_experts(tmp_path, model)[:2], "meteora")
    mixture.descriptors = describe(model, mixture, texts(2, 0, 30) + texts(20, 1, 30))
    own, strange = texts(2, -1, 20, seed=1), texts(45, -1, 20, seed=1)
    assert not novelty(model, mixture, own).is_new
    with pytest.raises(MethodError, match="threshold is nan"):
        novelty(model, mixture, own, threshold=float("nan"))
    found = novelty(model, mixture, strange)
    assert found.is_new and found.strangest in found.modules
    mixed = novelty(model, mixture, [own[0], strange[0], own[1], strange[1]])
    for number, text in enumerate((own[0], strange[0], own[1], strange[1])):
        alone = novelty(model, mixture, [text])
        torch.testing.assert_close(torch.tensor(mixed.texts[number]), torch.tensor(alone.scores))
        assert (number in mixed.new_rows) == alone.is_new == (number % 2 == 1)
    assert mixed.nearest(0) == mixed.nearest(2) == "expert0"
    folder = mixture.save_pretrained(tmp_path / "mix")
    again = Mixture.from_pretrained(folder)
    assert novelty(model, again, strange) == found
    grown = append_experts(again, [str(tmp_path / "expert2")])
    before = grown.descriptors
    grown.descriptors = describe(model, grown, texts(45, 2, 30))
    assert grown.descriptors.experts == (*before.experts, "expert2")
    for name, rows in before.tensors.items():
        assert torch.equal(grown.descriptors.tensors[name][:2], rows)
    assert not novelty(model, grown, strange).is_new
    (folder / "descriptors.safetensors").write_bytes(b"other")
    with pytest.raises(AdapterError, match="not the file that was saved"):
        Mixture.from_pretrained(folder)


def test_a_score_counts_in_shares_of_the_inputs_variance_at_least() -> None:
    model = llama()
    mixture = Mixture(experts_for(model), "request")
    row = texts(2, 0, 1)
    mixture.descriptors = describe(model, mixture, row * 6, rank=12)
    known, other = novelty(model, mixture, row), novelty(model, mixture, texts(40, -1, 4))
    assert not known.is_new and other.is_new
    assert max(max(scores) for scores in other.scores) < 1000


def test_describing_again_replaces(tmp_path: Path) -> None:
    model = llama()
    mixture = Mixture(experts_for(model), "request")
    both = describe(model, mixture, texts(2, 0) + texts(20, 1))
    mixture.descriptors = both
    again = describe(model, mixture, texts(40, 0))
    assert again.experts == ("expert1", "expert0")
    name = f"{both.modules[0]}.mean"
    assert torch.equal(again.tensors[name][0], both.tensors[name][1])
    assert not torch.equal(again.tensors[name][1], both.tensors[name][0])


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (texts(2, 0, 3), {}, "expert0 has 3 rows"),
        (texts(2, -1), {}, "no row names its expert"),
        (texts(2, 0), {"modules": ["head"]}, "no module head"),
        (texts(2, 0), {"rank": 4096}, "rank 4096 keeps all of"),
    ],
)
def test_what_cannot_be_described_is_said(rows: list, options: dict, said: str) -> None:
    model = llama()
    mixture = Mixture(experts_for(model), "request")
    with pytest.raises(MethodError, match=said):
        describe(model, mixture, rows, **options)
    with pytest.raises(MethodError, match="no expert is described"):
        novelty(model, mixture, rows)


def test_one_expert_missing_from_a_module_is_described_there_too() -> None:
    """Descriptors belong to texts, so it does not matter what an expert adapts."""
    model = llama()
    mixture = Mixture([make_adapter(shapes={"model.layers.1.mlp.up_proj": (48, 32)})], "request")
    known = describe(model, mixture, texts(2, 0))
    assert isinstance(known, Descriptors) and known.modules == ["model.layers.1.mlp.up_proj"]
