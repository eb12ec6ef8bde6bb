"""Units kept as stored: DyLoRA's prefix, and what AdaLoRA's and SoRA's gates leave."""

import pytest
import torch
from click.testing import CliRunner

from adalora import NAMES, peft_deltas, save_adalora
from builders import adapter_parts, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.measured.spectra import adapter_spectra
from lora_merge.cli.app import cli
from lora_merge.reshape.resize import plan_resize
from lora_merge.reshape.stored_units import nested_plan, prune_plan


def delta(adapter: Adapter, module: str) -> torch.Tensor:
    a, b = adapter.read(module)
    return adapter.modules[module].scaling * b.double() @ a.double()


def command(*arguments: object):
    return CliRunner().invoke(cli, ["resize", *map(str, arguments)], catch_exceptions=False)


def test_nested_truncation_keeps_the_first_stored_units(tmp_path):
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a", r=5))
    spectra = adapter_spectra(adapter, keep_cores=True)
    plan = nested_plan(adapter, spectra, dict.fromkeys(spectra.ranks, 2))
    report = plan_resize(adapter, spectra, plan).run(tmp_path / "out").report
    after = Adapter.from_pretrained(tmp_path / "out")
    for module in report.modules:
        a, b = (half.double() for half in adapter.read(module.name))
        expected = adapter.modules[module.name].scaling * b[:, :2] @ a[:2]
        torch.testing.assert_close(delta(after, module.name), expected, rtol=0, atol=1e-6)
        error = torch.linalg.matrix_norm(delta(adapter, module.name) - expected)
        assert module.truncation == pytest.approx(float(error), rel=1e-6)
        best_error = spectra.by_module[module.name][2:].square().sum().sqrt()
        assert module.truncation >= float(best_error)
        share = 1 - (module.truncation / module.frobenius) ** 2
        assert plan.modules[module.name].energy == pytest.approx(max(share, 0), abs=1e-6)
    assert str(plan.rule) == "nested:2"


@pytest.mark.filterwarnings("ignore:.*rank_pattern")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_pruned_adalora_is_a_lora_that_peft_loads(tmp_path, transposed, uniform, finished):
    pytest.importorskip("peft")
    zeroed = {"up": [1, 4, 5], "down": [0]}
    kept = {"up": [True] * 5 + [False], "down": [True] * 6} if finished else None
    expected = save_adalora(tmp_path / "a", kept, zeroed=zeroed, transposed=transposed)
    layout = ["--uniform"] if uniform else []
    result = command(tmp_path / "a", "-o", tmp_path / "out", "--prune-gates", *layout)
    assert result.exit_code == 0, result.output
    assert "100.00 % of the energy" in result.output
    ranks = {n: s.rank for n, s in Adapter.from_pretrained(tmp_path / "out").modules.items()}
    assert ranks == ({"up": 5, "down": 5} if uniform else {"up": 3, "down": 5})
    for name, found in peft_deltas(tmp_path / "out", transposed).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*rank_pattern")
def test_every_rule_reads_adalora(tmp_path):
    pytest.importorskip("peft")
    expected = save_adalora(tmp_path / "a", zeroed={"up": [2]})
    result = command(tmp_path / "a", "-o", tmp_path / "out", "--rank", 2)
    assert result.exit_code == 0, result.output
    found = peft_deltas(tmp_path / "out")
    for name in NAMES:
        u, s, vh = torch.linalg.svd(expected[name].double(), full_matrices=False)
        best = (u[:, :2] * s[:2]) @ vh[:2]
        torch.testing.assert_close(found[name].double(), best, rtol=0, atol=1e-5)


def test_zero_units_of_a_plain_lora_go_too_and_an_empty_module_only_if_asked(tmp_path):
    config, tensors = adapter_parts(r=4)
    first, second, *_ = sorted({k.rsplit(".lora_", 1)[0] for k in tensors})
    tensors[f"{first}.lora_A.weight"][1] = 0
    tensors[f"{first}.lora_B.weight"][:, 2] = 0
    tensors[f"{second}.lora_B.weight"].zero_()
    adapter = Adapter.from_pretrained(save_parts(tmp_path / "a", config, tensors))
    spectra = adapter_spectra(adapter, keep_cores=True)
    one, two = (key.removeprefix("base_model.model.") for key in (first, second))
    for min_rank, rest in ((1, 1), (0, 0)):
        plan = prune_plan(adapter, spectra, min_rank=min_rank)
        assert plan.ranks == dict.fromkeys(adapter.modules, 4) | {one: 2, two: rest}
        assert plan.energy == 1.0
        out = tmp_path / f"out{min_rank}"
        report = plan_resize(adapter, spectra, plan).run(out).report
        assert report.truncation == 0 and report.cast < 1e-6
        after = Adapter.from_pretrained(out)
        assert set(after.modules) == {n for n, r in plan.ranks.items() if r}
        for name in after.modules:
            torch.testing.assert_close(delta(after, name), delta(adapter, name))


@pytest.mark.parametrize(
    ("limits", "ranks"),
    [
        (["--min-rank", 4], {4}),
        (["--max-rank", 2], {2}),
        (["--round-to", 4], {4}),
        (["--round-to", 4, "--max-rank", 2], {2}),
    ],
)
def test_limits_hold_for_nested_ranks(tmp_path, limits, ranks):
    result = command(
        save_adapter(tmp_path / "a", r=6), "-o", tmp_path / "out", "--rank", 3, "--nested", *limits
    )
    assert result.exit_code == 0, result.output
    after = Adapter.from_pretrained(tmp_path / "out")
    assert {spec.rank for spec in after.modules.values()} == ranks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prune-gates", "--rank", 2], "give one rank rule"),
        (["--prune-gates", "--max-rank", 2], "takes no min_rank"),
        (["--prune-gates", "--nested"], "nested needs a rank"),
        (["--rank", 2, "--exact"], "exact spreads a budget"),
        (["--rank", 2, "--objective", "relative"], "objective is of budget"),
        (["--drop-empty", "--min-rank", 2], "drop_empty allows rank 0"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path, options, message):
    result = command(save_adapter(tmp_path / "a"), "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
