"""Layouts "rows" and "border": the same mixture within rounding, and no trace afterwards."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import experts_for, llama, tokens

from lora_merge.errors import MethodError
from lora_merge.kernels.gated_stack import base_matrix
from lora_merge.mixture.gates.gate import PRESETS
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def mixture_of(model: torch.nn.Module, preset: str) -> Mixture:
    mixture = Mixture(experts_for(model), preset)
    random = torch.Generator().manual_seed(7)
    for name, tensor in mixture.gate.items():
        if not bool(tensor.any()):
            mixture.gate[name] = 0.3 * torch.randn(tensor.shape, generator=random)
    return mixture


def pair(
    preset: str, layout: str = "border", dtype: torch.dtype = torch.float32, **config: object
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(model in the plain layout, the same model joined)."""
    stacked, joined = llama(dtype=dtype, **config), llama(dtype=dtype, **config)
    mixture = mixture_of(stacked, preset)
    load_mixture(stacked, mixture)
    load_mixture(joined, mixture, layout=layout)
    if preset == "request":
        for model in (stacked, joined):
            model.mixture.set_gate(requests=["expert0", "expert2"])
    return stacked, joined


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the joined products that ran."""
    ran: list[str] = []
    for name in ("shrink_with_base", "expand_with_base"):
        original = getattr(base_matrix, name)

        def spy(*args, name=name, original=original):
            ran.append(name)
            return original(*args)

        monkeypatch.setattr(base_matrix, name, spy)
    return ran


@torch.no_grad()
@pytest.mark.parametrize("layout", ["rows", "border"])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_it_is_the_same_mixture(preset: str, layout: str, products: list[str]) -> None:
    stacked, joined = pair(preset, layout, torch.float64, attention_bias=True)
    few, many = tokens(2, 5), tokens(2, 15)
    prefill = ["expand_with_base"] if layout == "border" else []
    for ids, product in ((few, ["shrink_with_base"]), (many, prefill)):
        products.clear()
        got = joined(ids).logits
        assert products == product * 8  # q with k and v, o, gate with up, down, twice
        torch.testing.assert_close(got, stacked(ids).logits, rtol=1e-9, atol=1e-9)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(joined.generate(many, **options), stacked.generate(many, **options))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["rows", "border"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_its_float32_gate(dtype: torch.dtype, layout: str) -> None:
    stacked, joined = pair("meteora", layout, dtype)
    target = "model.layers.0.mlp.up_proj"
    x = torch.randn(3, 32).to(dtype)
    got, expected = (m.get_submodule(target)(x) for m in (joined, stacked))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("preset", ["xlora", "meteora", "smora"])
def test_gradients_take_the_plain_path(preset: str, products: list[str]) -> None:
    gradients = []
    for model in pair(preset):
        model.mixture.train_gate_only()
        ids = tokens()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.mixture.named_parameters()})
    assert not products
    plain, joined = gradients
    assert any(g is not None and bool(g.any()) for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(joined[name], gradient)


def test_a_trained_gate_is_what_runs_next() -> None:
    stacked, joined = pair("meteora")
    for model in (stacked, joined):
        for parameter in model.mixture.train_gate_only():
            parameter.data.mul_(-3.0)
    with torch.no_grad():
        torch.testing.assert_close(joined(tokens()).logits, stacked(tokens()).logits)
    for name, tensor in stacked.mixture.gate_tensors().items():
        assert torch.equal(joined.mixture.gate_tensors()[name], tensor)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["rows", "border"])
def test_detached_it_is_the_base_bit_for_bit(layout: str, tmp_path: Path) -> None:
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    base = model(tokens()).logits
    handle = load_mixture(model, mixture_of(model, "arrow"), layout=layout)
    assert not torch.equal(model(tokens()).logits, base)
    with handle.disabled():
        torch.testing.assert_close(model(tokens()).logits, base, rtol=1e-6, atol=1e-6)
    state = model.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[k], before[k]) for k in before)
    model.save_pretrained(tmp_path)  # views of one matrix are saved like any other weight
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens()).logits, base)
    handle.detach()
    assert torch.equal(model(tokens()).logits, base)
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__, name
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous() and torch.equal(parameter, before[name])
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


@torch.no_grad()
def test_moves_copies_and_new_weights(products: list[str]) -> None:
    stacked, joined = pair("meteora")
    ids = tokens()
    expected = stacked(ids).logits
    copied = copy.deepcopy(joined)
    torch.testing.assert_close(copied(ids).logits, expected)
    torch.testing.assert_close(joined(ids).logits, expected)
    joined.double(), stacked.double()
    products.clear()
    torch.testing.assert_close(joined(ids).logits, stacked(ids).logits)
    assert products  # joined again in float64
    for model in (stacked, joined):
        linear = model.model.layers[0].mlp.down_proj
        linear.weight = torch.nn.Parameter(linear.weight.neg())
    torch.testing.assert_close(joined(ids).logits, stacked(ids).logits)
    other = llama(seed=5)
    for model in (stacked, joined):
        model.load_state_dict(other.state_dict())
    torch.testing.assert_close(joined(ids).logits, stacked(ids).logits)


@torch.no_grad()
def test_siblings_with_different_inputs_are_told_apart() -> None:
    stacked, joined = pair("meteora")
    a, b = torch.randn(2, 4, 32), torch.randn(2, 6, 32)
    found = []
    for model in (stacked, joined):
        q, k, v = (model.get_submodule(f"model.layers.0.self_attn.{n}_proj") for n in "qkv")
        found.append([q(a), k(b), v(b), q(a)])
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_compiles_as_one_graph() -> None:
    _, model = pair("meteora", num_hidden_layers=1)
    with torch.no_grad():
        expected = model(tokens(), use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected)


def test_what_cannot_be_moved_is_refused_before_anything_is() -> None:
    def attach(model: torch.nn.Module, **options: object) -> None:
        load_mixture(model, Mixture(experts_for(llama()), "arrow"), layout="rows", **options)

    tied = llama()
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[1].mlp.gate_proj.weight
    other = llama()
    other.model.layers[1].mlp.up_proj.forward = other.model.layers[1].mlp.up_proj.forward
    subclass = llama()
    subclass.model.layers[1].mlp.up_proj.__class__ = type("Linear4bit", (torch.nn.Linear,), {})
    for model, message in (
        (tied, r"layers\.1\.mlp\.gate_proj shares its weight: .*up_proj"),
        (other, "something else"),
        (subclass, "is a Linear4bit"),
    ):
        with pytest.raises(MethodError, match=message):
            attach(model)
        assert model.model.layers[0].mlp.up_proj.weight.is_contiguous()
        assert "forward" not in model.model.layers[0].mlp.up_proj.__dict__
        assert not hasattr(model, "mixture")
    with pytest.raises(MethodError, match=r"float32 on cpu, its experts torch\.float64"):
        attach(llama(), dtype=torch.float64)


@torch.no_grad()
def test_several_mixtures_of_which_one_is_joined() -> None:
    model = llama()
    first = load_mixture(model, mixture_of(model, "arrow"), name="first")
    one = model(tokens()).logits
    second = load_mixture(model, mixture_of(model, "meteora"), name="second", layout="rows")
    two = model(tokens()).logits
    first.activate()
    torch.testing.assert_close(model(tokens()).logits, one)
    second.activate()
    assert torch.equal(model(tokens()).logits, two)
    with pytest.raises(MethodError, match="something else"):
        load_mixture(model, mixture_of(model, "arrow"), name="third", layout="rows")
    second.detach()
    assert torch.equal(model(tokens()).logits, one)
