"""Gates over experts and routers of MoE models: a float64 loop over tokens, experts, adapters."""

import copy
import io
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from moe import MOE, ROUTER, MoeLoop, adapters, moe
from tiny import in_threads, tokens
from torch import Tensor, nn

from builders import make_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.identity.expert_layout import one_by_one
from lora_merge.errors import AlignmentError, MethodError
from lora_merge.mixture.append import append_experts
from lora_merge.mixture.formats.plain import export_static
from lora_merge.mixture.formats.xlora import export_xlora
from lora_merge.mixture.gates.gate import PRESETS
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.runtime.moe.router import is_router, refusal_of
from lora_merge.mixture.training.data import Example
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.train import train_gate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
IDS = tokens(2, 6)
# Every gate for one kind of model, and for the others those that differ most.
CASES = [("qwen3_moe", preset) for preset in PRESETS if preset != "sequence"]
CASES += [
    (kind, preset) for kind in MOE if kind != "qwen3_moe" for preset in ("meteora", "request")
]
CASES += [("gpt_oss", "xlora"), ("olmoe", "smora"), ("mixtral", "spectr")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda kind: adapters(kind, tmp_path_factory.mktemp(kind)))


def sharp(experts: Any, preset: str, scale: float = 1.0, **settings: Any) -> Mixture:
    """A mixture whose gate says something else for every token."""
    mixture = Mixture(experts, preset, hidden_size=32, **settings)
    random = torch.Generator().manual_seed(7)
    for name, tensor in mixture.gate.items():
        if not name.endswith("prototype"):
            mixture.gate[name] = torch.randn(tensor.shape, generator=random) * scale
    return mixture


def looped(kind: str, mixture: Mixture) -> nn.Module:
    model = copy.deepcopy(moe(kind))
    model.loop = MoeLoop(kind, model, moe(kind), mixture)
    model.loop.requests = [0, 2]
    return model


def attached(kind: str, mixture: Mixture, dtype: torch.dtype = torch.float64) -> Any:
    model = copy.deepcopy(moe(kind)).to(dtype)
    load_mixture(model, mixture)
    if mixture.spec.preset == "request":
        model.mixture.set_gate(requests=["expert0", "expert2"])
    return model


@torch.no_grad()
@pytest.mark.parametrize(("kind", "preset"), CASES)
def test_every_gate_over_the_bases_own_experts(kind: str, preset: str, folders: Any) -> None:
    settings = {"weights": (0.7, -0.4, 1.1)} if preset == "constant" else {}
    mixture = sharp(folders(kind), preset, **settings)
    model, base = attached(kind, mixture), moe(kind)(IDS).logits
    expected = looped(kind, mixture)(IDS).logits
    far = (expected - base).norm()
    assert far > 0.1 * base.norm()
    assert (model(IDS).logits - expected).norm() < 1e-4 * far
    with model.mixture.disabled():
        assert torch.equal(model(IDS).logits, base)
    model.mixture.detach()
    assert torch.equal(model(IDS).logits, base)
    assert not any("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("kind", MOE)
def test_one_expert_alone_is_peft(kind: str, folders: Any) -> None:
    from peft import PeftModel

    paths = folders(kind)
    model = attached(kind, Mixture(paths, "request"))
    theirs = PeftModel.from_pretrained(copy.deepcopy(moe(kind)), paths[2])
    model.mixture.set_gate(weights={"expert2": 1.0})
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["meteora", "xlora", "request"])
def test_generation_with_padding_caches_and_threads(preset: str, folders: Any) -> None:
    """Each row as the loop writes it alone, without padding and without a cache."""
    mixture = sharp(folders("qwen3_moe"), preset)
    model, loop = attached("qwen3_moe", mixture), looped("qwen3_moe", mixture)
    rows, options = [tokens(1, 3, 1), tokens(1, 5, 2)], {"max_new_tokens": 4, "do_sample": False}
    expected = []
    for number, row in enumerate(rows):
        loop.loop.requests = [(0, 2)[number]]
        expected.append(loop.generate(row, use_cache=False, **options)[0, row.shape[1] :])
    both = torch.cat([nn.functional.pad(rows[0], (2, 0)), rows[1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for more in ({}, {"cache_implementation": "static", "disable_compile": True}):
        out = model.generate(both, attention_mask=mask, **options, **more)
        assert torch.equal(out[:, 5:], torch.stack(expected))

    def alone(number: int) -> Any:
        def run() -> Tensor:
            with torch.no_grad():
                if preset != "request":
                    return model.generate(rows[number], **options)
                with model.mixture.requests(f"expert{2 * number}"):
                    return model.generate(rows[number], **options)

        return run

    for place, found in enumerate(in_threads([alone(0), alone(1)] * 2)):
        assert isinstance(found, Tensor), found
        assert torch.equal(found[0, rows[place % 2].shape[1] :], expected[place % 2])


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_whatever_runs_the_base_and_in_half_precision(implementation: str, folders: Any) -> None:
    mixture = sharp(folders("qwen3_moe"), "meteora", 0.1, top_k=None)
    exact, base = attached("qwen3_moe", mixture)(IDS).logits, moe("qwen3_moe")(IDS).logits
    far = (exact - base).norm()
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(moe("qwen3_moe")).to(dtype)
        model.set_experts_implementation(implementation)
        before = model(IDS).logits
        load_mixture(model, mixture)
        mixed = model(IDS).logits
        assert mixed.dtype == dtype
        rounding = (before - base).norm()
        assert rounding < (1e-5 if dtype == torch.float32 else 0.3) * far
        assert (mixed - exact).norm() < 1e-5 * far + 2 * rounding
        model.mixture.detach()
        assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_offloaded_copied_and_saved(folders: Any) -> None:
    from accelerate import cpu_offload

    mixture = sharp(folders("gpt_oss"), "meteora")
    plain, then = (attached("gpt_oss", mixture, torch.float32) for _ in range(2))
    first = copy.deepcopy(moe("gpt_oss")).float()
    base, expected = first(IDS).logits, plain(IDS).logits
    for model in (first, then):
        cpu_offload(model, execution_device=torch.device("cpu"))
    load_mixture(first, mixture)
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    others = [copy.deepcopy(plain), torch.load(file, weights_only=False)]
    for model in (first, then, *others):
        assert torch.equal(model(IDS).logits, expected)
        model.mixture.detach()
        assert torch.equal(model(IDS).logits, base)
    assert first.model.layers[0].mlp.experts.down_proj.is_meta
    assert torch.equal(plain(IDS).logits, expected)


@torch.no_grad()
def test_adapters_of_transformers_4_run_in_the_stack() -> None:
    """A module for each expert, of which some lack some: gate and up are gated apart."""
    old = {"w1": (16, 32), "w3": (16, 32), "w2": (32, 16)}
    new = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
    found = []
    for stem, leaves in (("block_sparse_moe", old), ("mlp", new)):
        shapes = {
            f"model.layers.{layer}.{stem}.experts.{e}.{leaf}": shape
            for layer in range(2)
            for e in range(4)
            for leaf, shape in leaves.items()
        }
        some = {name: shape for name, shape in shapes.items() if ".experts.1." not in name}
        experts = [make_adapter(f"e{i}", seed=i, shapes=s) for i, s in enumerate((shapes, some))]
        mixture = Mixture(experts, "arrow", top_k=1)
        model = attached("mixtral", mixture)
        found.append(model(IDS).logits)
    expected = looped("mixtral", mixture)(IDS).logits
    far = (expected - moe("mixtral")(IDS).logits).norm()
    assert (found[1] - expected).norm() < 1e-4 * far and far > 0
    # Factors are drawn in the order of the names' dictionary, which is the same for both.
    assert torch.allclose(found[0], found[1])


@torch.no_grad()
def test_both_layouts_compete_in_one_gate(folders: Any) -> None:
    """Whichever comes first, and also where the second is added later."""
    shapes = {
        f"model.layers.0.mlp.experts.{e}.{leaf}": shape
        for e in range(4)
        for leaf, shape in (("gate_proj", (16, 32)), ("up_proj", (16, 32)), ("down_proj", (32, 16)))
    }
    old, new = make_adapter("old", shapes=shapes), folders("qwen3_moe")[1]
    for experts in ([old, new], [new, old]):
        whole = Mixture(experts, "arrow", top_k=1)
        grown = append_experts(Mixture(experts[:1], "arrow", top_k=1), experts[1:])
        expected = looped("qwen3_moe", whole)(IDS).logits
        far = (expected - moe("qwen3_moe")(IDS).logits).norm()
        assert (attached("qwen3_moe", whole)(IDS).logits - expected).norm() < 1e-4 * far
        if experts[0] is not old:
            assert grown.modules == whole.modules
            for module in grown.alignment.modules:
                assert len(module.specs) == (2 if ".0.mlp.experts" in module.name else 1)


def test_a_gate_over_experts_trains_and_comes_back(tmp_path: Path, folders: Any) -> None:
    from peft import PeftModel

    examples = [Example(tuple(r.tolist()), 0, i % 3) for i, r in enumerate(tokens(9, 7, seed=3))]
    model = copy.deepcopy(moe("olmoe")).float()
    ways = (("meteora", {"task_loss": 20.0}), ("smora", {"bias_rate": 0.01, "train_experts": True}))
    for preset, options in ways:
        history: list[Any] = []
        settings = TrainSettings(
            steps=12, batch_size=9, lr=0.01, warmup=1, expert_lr=5e-3, **options
        )
        start = sharp(folders("olmoe"), preset, 0.01)
        trained = train_gate(model, start, examples, settings, on_step=history.append)
        if preset == "meteora":  # the gates of the base's experts know whose tokens they got
            assert history[-1]["task"] < history[0]["task"] - 0.2
        else:
            assert history[-1]["loss"] < history[0]["loss"] - 0.2
        trained.save_pretrained(tmp_path / preset)
        logits = []
        for each in (trained, Mixture.from_pretrained(tmp_path / preset)):
            handle = load_mixture(model, each)
            with handle.watch() as usage, torch.no_grad():
                logits.append(model(IDS).logits)
            handle.detach()
        torch.testing.assert_close(*logits)
        seen = [m.tokens for n, m in usage.modules.items() if "layers.1.mlp.experts" in n]
        assert sum(seen) == 2 * IDS.numel() * 2  # experts per token, projections
    one = sorted((tmp_path / "smora/experts").iterdir())[1]  # plain PEFT, also what was trained
    handle = load_mixture(model, trained)
    handle.set_gate(weights=[0.0, 1.0, 0.0])
    expected = model(IDS).logits
    handle.detach()
    torch.testing.assert_close(
        PeftModel.from_pretrained(model, str(one))(IDS).logits, expected, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_experts_come_and_go_in_the_stack(folders: Any) -> None:
    paths = folders("qwen3_moe")
    model = attached("qwen3_moe", Mixture(paths[:1], "arrow", top_k=1))
    before = model(IDS).logits
    model.mixture.add(paths[1:2])
    both = attached("qwen3_moe", Mixture(paths[:2], "arrow", top_k=1))(IDS).logits
    assert torch.equal(model(IDS).logits, both) and not torch.equal(before, both)
    model.mixture.remove("expert1")
    assert torch.equal(model(IDS).logits, before)


def test_experts_one_by_one_are_the_stack(folders: Any) -> None:
    adapter = Adapter.from_pretrained(folders("gpt_oss")[1])
    single, seen = one_by_one(adapter), 0
    for name, spec in adapter.modules.items():
        if spec.form != "experts":
            assert single.modules[name] is spec
            continue
        stem, _, leaf = name.rpartition(".")
        for expert, stack in enumerate(adapter.stacks(name)):
            (own,) = single.stacks(f"{stem}.{expert}.{leaf}")
            assert torch.equal(own.down, stack.down) and torch.equal(own.up, stack.up)
            seen += 1
    assert seen == 2 * 2 * 4
    assert one_by_one(single) is single


@torch.no_grad()
def test_the_mean_is_written_as_peft_has_it(tmp_path: Path, folders: Any) -> None:
    from peft import PeftModel

    model = copy.deepcopy(moe("gpt_oss")).float()
    mixture = sharp(folders("gpt_oss"), "xlora")
    export_static(mixture, tmp_path / "static", weights=(0.5, 0.0, 0.25))
    handle = load_mixture(model, mixture)
    handle.set_gate(weights=(0.5, 0.0, 0.25))
    expected = model(IDS).logits
    handle.detach()
    theirs = PeftModel.from_pretrained(model, str(tmp_path / "static"))(IDS).logits
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    order = [n for n, _ in model.named_modules() if n in mixture.modules]
    with pytest.raises(MethodError, match="weighs modules of the base alone"):
        export_xlora(mixture, tmp_path / "xlora", order)


@torch.no_grad()
def test_padding_is_not_counted(folders: Any) -> None:
    model = attached("qwen3_moe", sharp(folders("qwen3_moe"), "meteora"))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with model.mixture.watch() as usage:
        model(IDS, attention_mask=mask)
    seen = [m.tokens for n, m in usage.modules.items() if "layers.0.mlp.experts" in n]
    assert sum(seen) == int(mask.sum()) * 2 * 2


class HashRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 32))

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight)


class TwiceRouter(HashRouter):
    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        return nn.functional.linear(
            nn.functional.linear(hidden, self.weight) @ self.weight, self.weight
        )


def test_what_cannot_be_right_is_refused(folders: Any) -> None:
    model = copy.deepcopy(moe("qwen3_moe")).float()
    for preset, more in (("meteora", {"memory": 0.9}), ("sequence", {})):
        with pytest.raises(MethodError, match="sees only those that were sent to it"):
            load_mixture(model, sharp(folders("qwen3_moe"), preset, **more))
    name = f"model.layers.0.{ROUTER.get('qwen3_moe', 'mlp.gate')}"
    for router in (HashRouter(), TwiceRouter()):
        model.model.layers[0].mlp.gate = router
        assert is_router(router)
        with pytest.raises(AlignmentError, match=r"(?s)router of a MoE.*the routers"):
            load_mixture(model, Mixture([make_adapter("e", shapes={name: (4, 32)})], "arrow"))
    model.model.layers[0].mlp.experts = nn.ModuleList()
    shapes = {"model.layers.0.mlp.experts.1.up_proj": (16, 32)}
    with pytest.raises(AlignmentError, match="in a stack that cannot be entered"):
        load_mixture(model, Mixture([make_adapter("e", shapes=shapes)], "arrow"))
    assert not any(m._forward_hooks for m in model.modules())
    assert not hasattr(model, "mixture")
    fine = copy.deepcopy(moe("gpt_oss")).model.layers[0].mlp.router
    assert refusal_of(fine) == ""
