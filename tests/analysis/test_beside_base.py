"""Deltas beside base weights, against dense float64 and PEFT's own intruder test."""

import json

import pytest
import torch
from safetensors.torch import save_file

from builders import SHAPES, adapter_parts, make_adapter
from lora_merge.adapters.adapter import build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.measured.spectra import adapter_spectra
from lora_merge.analysis.beside_base import count_intruders, relate_to_base
from lora_merge.errors import AdapterError, SourceError
from lora_merge.files.checkpoint import open_checkpoint
from lora_merge.files.tensor_file import TensorDict
from lora_merge.linalg.range_finder import leading_svd


def base_weights(prefix: str = "", shards: int = 1, *, transposed: bool = False, folder=None):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator)
        weights[f"{prefix}{name}.weight"] = weight.mT.contiguous() if transposed else weight
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        names = list(weights)
        for shard in range(shards):
            part = {n: weights[n] for n in names[shard::shards]}
            save_file(part, folder / f"model-{shard}.safetensors")
        if shards > 1:
            table = {n: f"model-{i % shards}.safetensors" for i, n in enumerate(names)}
            index = folder / "model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": table}))
    return weights


@pytest.mark.parametrize(("prefix", "shards"), [("", 1), ("bert.", 2)])
def test_relations_are_those_of_the_dense_matrices(tmp_path, prefix, shards):
    weights = base_weights(prefix, shards, folder=tmp_path / "base")
    adapter = make_adapter()
    spectra = adapter_spectra(adapter, keep_cores=True)
    report = relate_to_base(
        adapter,
        spectra,
        open_checkpoint(tmp_path / "base"),
        intruders=True,
        cache=tmp_path / "cache" / "norms.json",
    )
    assert report.missing == ()
    for relation in report.relations:
        weight = weights[f"{prefix}{relation.module}.weight"].double()
        a, b = adapter.read(relation.module)
        delta = adapter.modules[relation.module].scaling * b.double() @ a.double()
        norm, spectral = torch.linalg.matrix_norm(weight), torch.linalg.matrix_norm(weight, 2)
        assert relation.base_spectral == pytest.approx(float(spectral), rel=1e-4)
        relative = float(torch.linalg.matrix_norm(delta) / norm)
        assert relation.relative == pytest.approx(relative, rel=1e-6)
        u, _, vh = torch.linalg.svd(delta, full_matrices=False)
        inside = torch.linalg.matrix_norm(u[:, :4].mT @ weight @ vh[:4].mT)
        assert relation.amplification == pytest.approx(
            float(torch.linalg.matrix_norm(delta) / inside), rel=1e-5
        )
        assert relation.intruders is not None
    json.dumps(report.to_dict(), allow_nan=False)


def test_norms_are_remembered_by_content(tmp_path, monkeypatch):
    base_weights(folder=tmp_path / "base")
    adapter = make_adapter()
    spectra = adapter_spectra(adapter, keep_cores=True)
    cache = tmp_path / "norms.json"
    first = relate_to_base(adapter, spectra, open_checkpoint(tmp_path / "base"), cache=cache)
    assert len(json.loads(cache.read_text())) == len(SHAPES)
    monkeypatch.setattr(
        "lora_merge.analysis.beside_base.leading_svd", lambda *a, **k: pytest.fail("again")
    )
    again = relate_to_base(adapter, spectra, open_checkpoint(tmp_path / "base"), cache=cache)
    assert again == first
    cache.write_text("{damaged")
    monkeypatch.undo()
    assert (
        relate_to_base(adapter, spectra, open_checkpoint(tmp_path / "base"), cache=cache) == first
    )


def test_intruders_are_remembered_by_content_of_weight_and_delta(tmp_path, monkeypatch):
    base_weights(folder=tmp_path / "base")
    adapter, other = make_adapter(alpha=4000), make_adapter(alpha=4001)
    base, cache = open_checkpoint(tmp_path / "base"), tmp_path / "norms.json"

    def run(one):
        spectra = adapter_spectra(one, keep_cores=True)
        return relate_to_base(one, spectra, base, intruders=True, cache=cache)

    first = run(adapter)
    assert any(relation.intruders for relation in first.relations)
    calls = []
    monkeypatch.setattr(
        "lora_merge.analysis.beside_base.count_intruders", lambda *a, **k: calls.append(a) or 7
    )
    assert run(adapter) == first and not calls
    assert {r.intruders for r in run(other).relations} == {7} and len(calls) == len(SHAPES)


def test_transposed_weights_are_turned(tmp_path):
    base_weights(transposed=True, folder=tmp_path / "base")
    adapter = make_adapter(fan_in_fan_out=True)
    spectra = adapter_spectra(adapter, keep_cores=True)
    assert relate_to_base(adapter, spectra, open_checkpoint(tmp_path / "base")).missing == ()
    with pytest.raises(AdapterError, match="the adapter's model"):
        plain = make_adapter()
        relate_to_base(
            plain, adapter_spectra(plain, keep_cores=True), open_checkpoint(tmp_path / "base")
        )


def test_missing_and_untrained_modules(tmp_path):
    weights = base_weights()
    gone = next(iter(SHAPES))
    del weights[f"{gone}.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    config, tensors = adapter_parts()
    zero = list(SHAPES)[1]
    key = f"base_model.model.{zero}.lora_B.weight"
    tensors[key] = tensors[key] * 0
    adapter = build_adapter("a", parse_config(config, "a"), TensorDict(tensors))
    spectra = adapter_spectra(adapter, keep_cores=True)
    report = relate_to_base(adapter, spectra, open_checkpoint(tmp_path), intruders=True)
    assert report.missing == (gone,)
    untrained = next(r for r in report.relations if r.module == zero)
    assert untrained.relative == 0 and untrained.amplification is None
    assert untrained.intruders == 0
    with pytest.raises(SourceError):
        open_checkpoint(tmp_path / "nothing")


def test_a_directory_of_two_checkpoints_is_refused_not_mixed(tmp_path):
    base_weights(folder=tmp_path)
    save_file({"model.other.weight": torch.zeros(2, 2)}, tmp_path / "old.safetensors")
    with pytest.raises(SourceError, match=r"several checkpoints: model-0.safetensors, old"):
        open_checkpoint(tmp_path)
    assert set(open_checkpoint(tmp_path / "old.safetensors").tensors) == {"model.other.weight"}


def test_a_checkpoint_reads_what_safetensors_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(2).bfloat16(), "none": torch.zeros(0, 4)}
    save_file({**tensors, "packed": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.read(name).dtype == tensor.dtype
    with pytest.raises(AdapterError, match="packed is U8"):
        checkpoint.read("packed")


def planted(strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(96, 80, generator=generator) @ torch.diag(torch.logspace(0, -2, 80))
    u = torch.linalg.qr(torch.randn(96, 1, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(80, 1, generator=generator)).Q
    return weight, strength * float(torch.linalg.matrix_norm(weight, 2)) * u @ v.mT


@pytest.mark.parametrize(("strength", "intruders"), [(0.01, 0), (1.5, 1), (4.0, 1)])
def test_intruders_are_those_of_the_full_svds(strength, intruders):
    weight, delta = planted(strength)
    assert count_intruders(weight, delta) == intruders
    base = torch.linalg.svd(weight.double(), full_matrices=False).U
    tuned = torch.linalg.svd((weight + delta).double(), full_matrices=False).U[:, :10]
    best = (base.mT @ tuned).abs().amax(0)
    assert int((best < 0.5).sum()) == intruders


def test_leading_svd_against_the_full_one():
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(300, 200, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -3, 200, dtype=torch.float64)
    matrix = (u * values) @ v.mT
    got = leading_svd(matrix, 12)
    torch.testing.assert_close(got.s, values[:12], rtol=1e-6, atol=0)
    assert got.residual == pytest.approx(float(values[12:].square().sum()), rel=1e-6)
    best = torch.linalg.matrix_norm(matrix - (got.u * got.s) @ got.vh)
    assert float(best) == pytest.approx(got.residual**0.5, rel=1e-5)
    again = leading_svd(matrix, 12)
    assert torch.equal(got.u, again.u)
    assert len(leading_svd(matrix[:5], 12).s) == 5
