"""The runtime against a float64 loop over experts, PEFT, and its own laws."""

import copy

import pytest
import torch
from oracle import install
from tiny import experts_for, llama, saved_experts, shapes_of, tokens

from lora_merge.errors import AlignmentError, MethodError
from lora_merge.mixture.gates.gate import PRESETS
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

# PEFT 0.21 asks transformers 5.23 for a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LOCAL = ("constant", "meteora", "arrow", "spectr", "phatgoose", "sequence")


def mixture_for(model: torch.nn.Module, preset: str, **settings: object) -> Mixture:
    mixture = Mixture(experts_for(model), preset, **settings)
    random = torch.Generator().manual_seed(7)
    for name, tensor in mixture.gate.items():  # gates that start at zero would prove nothing
        if not bool(tensor.any()):
            mixture.gate[name] = 0.3 * torch.randn(tensor.shape, generator=random)
    return mixture


@pytest.mark.parametrize("preset", LOCAL)
@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"top_k": 2, "temperature": 3.0}])
def test_equals_a_loop_over_experts_in_float64(preset: str, settings: dict[str, float]) -> None:
    model = llama(dtype=torch.float64)
    if preset == "constant":
        settings = {"weights": (0.2, -0.5, 1.3)}
    mixture = mixture_for(model, preset, **settings)
    looped = copy.deepcopy(model)
    install(looped, mixture)
    load_mixture(model, mixture)
    expected, base = looped(tokens()).logits, None
    with model.mixture.disabled():
        base = model(tokens()).logits
    assert (expected - base).abs().max() > 0.05
    # Prototypes and spectra are stored in float32, so a float64 model is not exact to 1e-12.
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


def test_smora_keeps_the_ranks_its_gate_and_bias_choose() -> None:
    model = llama(dtype=torch.float64)
    mixture = mixture_for(model, "smora", top_k=3)
    name = "model.layers.0.mlp.down_proj"
    rows, bias = mixture.gate[f"{name}.weight"].double(), mixture.gate[f"{name}.rank_bias"].double()
    units = [
        (e.adapter.read(name)[0][j].double(), e.adapter.read(name)[1][:, j].double(), s)
        for e in mixture.experts
        for s in [e.adapter.modules[name].scaling]
        for j in range(e.adapter.modules[name].rank)
    ]
    x = torch.randn(5, 48, dtype=torch.float64)
    target = model.get_submodule(name)
    expected = target(x).detach().clone()
    for token, out in zip(x, expected, strict=True):
        scores = rows @ token
        kept = (scores + bias).topk(3).indices.tolist()
        total = sum(scores[j].exp() for j in kept)
        for j in kept:
            a, b, s = units[j]
            out += 3 * scores[j].exp() / total * s * (a @ token) * b
    load_mixture(model, mixture)
    torch.testing.assert_close(target(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_disabled_detached_and_zero_are_the_base_bit_for_bit(preset: str) -> None:
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = tokens()
    base = model(ids).logits
    handle = load_mixture(model, mixture_for(model, preset))
    assert list(model.state_dict()) == list(before)
    with handle.disabled():
        assert torch.equal(model(ids).logits, base)
    handle.set_gate(weights=[0.0, 0.0, 0.0])
    assert torch.equal(model(ids).logits, base)
    handle.set_gate(weights=[0.3, 0.3, 0.4])
    assert not torch.equal(model(ids).logits, base)
    handle.detach()
    assert torch.equal(model(ids).logits, base)
    assert not hasattr(model, "mixture") and not hasattr(model, "lora_mixtures")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_state_dict_loads_while_a_mixture_is_attached() -> None:
    model, other = llama(), llama(seed=5)
    load_mixture(model, mixture_for(model, "arrow"))
    model.load_state_dict(other.state_dict())
    with model.mixture.disabled():
        assert torch.equal(model(tokens()).logits, other(tokens()).logits)


@pytest.mark.parametrize("preset", ["request", "arrow", "xlora"])
def test_one_hot_is_peft_with_that_adapter(preset: str, tmp_path) -> None:
    from peft import PeftModel

    model = llama()
    paths = saved_experts(tmp_path, model, (4, 8, 3))
    load_mixture(model, Mixture(paths, preset))
    model.mixture.set_gate(weights={"expert1": 1.0})
    ours = model(tokens()).logits
    theirs = PeftModel.from_pretrained(llama(), paths[1]).eval()(tokens()).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_take_different_experts(tmp_path) -> None:
    from peft import PeftModel

    model = llama()
    paths = saved_experts(tmp_path, model)
    load_mixture(model, Mixture(paths, "request"))
    ids = tokens(batch=3)
    names = ["expert2", None, "expert0"]
    with model.mixture.requests(*names):
        ours = model(ids).logits
        written = model.generate(ids, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(names):
        alone = llama()
        if name is not None:
            alone = PeftModel.from_pretrained(alone, str(tmp_path / name)).eval()
        torch.testing.assert_close(
            ours[row], alone(ids[row : row + 1]).logits[0], rtol=0, atol=1e-5
        )
        expected = alone.generate(input_ids=ids[row : row + 1], max_new_tokens=6, do_sample=False)
        assert torch.equal(written[row], expected[0])
    with (
        pytest.raises(MethodError, match=r"3 rows.*requests for 2"),
        model.mixture.requests("expert0", None),
    ):
        model(ids)
    with pytest.raises(MethodError, match="no expert is called 'math'"):
        model.mixture.set_gate(requests=["math"])


def test_uniform_is_the_mean_of_outputs_not_of_factors(tmp_path) -> None:
    """One linear layer: the mean of the experts' outputs; averaged factors are far from it."""
    model = llama()
    mixture = Mixture(saved_experts(tmp_path, model), "constant")
    name = "model.layers.1.mlp.gate_proj"
    x = torch.randn(6, 32)
    base = model.get_submodule(name)(x)
    load_mixture(model, mixture)
    delta = model.get_submodule(name)(x) - base
    halves = [e.adapter.read(name) for e in mixture.experts]
    mean = sum(2.0 * x @ a.T @ b.T for a, b in halves) / 3
    torch.testing.assert_close(delta, mean, rtol=1e-4, atol=1e-5)
    factors = 2.0 * x @ (sum(a for a, _ in halves) / 3).T @ (sum(b for _, b in halves) / 3).T
    assert (factors - mean).norm() > 0.3 * mean.norm()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_arrow_is_pefts_arrow(tmp_path, top_k: int) -> None:
    from peft import ArrowConfig, create_arrow_model

    model = llama()
    # PEFT wants experts of one rank on the same modules. Its prototypes come from 15 power
    # iterations, so the experts get a spectrum with one clear direction.
    paths = saved_experts(tmp_path, model)
    sharpen(paths)
    config = ArrowConfig(top_k=top_k, router_temperature=1.7, rng_seed=0)
    theirs = create_arrow_model(llama(), paths, config).eval()(input_ids=tokens()).logits
    load_mixture(model, Mixture(paths, "arrow", top_k=top_k, temperature=1.7))
    ours = model(tokens()).logits
    with model.mixture.disabled():
        assert (ours - model(tokens()).logits).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def sharpen(paths: list[str]) -> None:
    """Make the first unit of every module 10 times the others."""
    from safetensors.torch import load_file, save_file

    for path in paths:
        tensors = load_file(f"{path}/adapter_model.safetensors")
        for name, tensor in tensors.items():
            if "lora_A" in name:
                tensor[0] *= 10
        save_file(tensors, f"{path}/adapter_model.safetensors", metadata={"format": "pt"})


def test_general_knowledge_is_subtracted_from_deltas() -> None:
    model = llama(dtype=torch.float64)
    adapters = experts_for(model, (4, 3, 5, 2))
    mixture = Mixture(adapters[:2], "arrow", general=adapters[2:], top_k=1)
    name = "model.layers.0.self_attn.q_proj"

    def delta(adapter):
        a, b = (t.double() for t in adapter.read(name))
        return adapter.modules[name].scaling * b @ a

    general = (delta(adapters[2]) + delta(adapters[3])) / 2
    tasks = [delta(adapter) - general for adapter in adapters[:2]]
    tops = [torch.linalg.svd(task).Vh[0] for task in tasks]
    x = torch.randn(7, 32, dtype=torch.float64)
    target = model.get_submodule(name)
    base = target(x)
    load_mixture(model, mixture)
    for token, ours, before in zip(x, target(x), base, strict=True):
        best = max(range(2), key=lambda e: float((tops[e] @ token).abs()))
        torch.testing.assert_close(ours, before + tasks[best] @ token, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["arrow", "spectr", "sequence", "xlora", "meteora"])
def test_a_null_expert_can_abstain(preset: str) -> None:
    """Where the null expert's score is far above all others, the module is its base."""
    model = llama(dtype=torch.float64)
    mixture = mixture_for(model, preset, null_expert=True, null_score=1e4, top_k=1)
    if preset == "xlora":
        mixture.gate["classifier.0.bias"].view(-1, 4)[:, 3] = 1e4
    name = "model.layers.0.mlp.up_proj"
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    if preset == "meteora":  # its row is learned: point it at these tokens
        mixture.gate[f"{name}.weight"][-1] = 1e4 * torch.linalg.pinv(x[0].float()).sum(1)
    load_mixture(model, mixture)
    target = model.get_submodule(name)
    if preset == "xlora":
        mixed, base = model(tokens()).logits, None
        with model.mixture.disabled():
            base = model(tokens()).logits
    else:
        mixed = target(x)
        with model.mixture.disabled():
            base = target(x)
        if preset == "meteora":
            assert not torch.equal(target(-x), -mixed)  # elsewhere it does not win
    assert torch.equal(mixed, base)


def test_hilora_keeps_the_ranks_that_act_most() -> None:
    """The strongest rank-one parts sigma (v . x) u of all experts' deltas, at weight 1."""
    model = llama(dtype=torch.float64)
    mixture = Mixture(experts_for(model), "hilora", top_k=3)
    name = "model.layers.0.mlp.down_proj"
    x = torch.randn(7, 48, dtype=torch.float64)
    target = model.get_submodule(name)
    expected = target(x)
    parts = []
    for index in next(m for m in mixture.alignment.modules if m.name == name).specs:
        adapter = mixture.experts[index].adapter
        a, b = (t.double() for t in adapter.read(name))
        u, s, vh = torch.linalg.svd(adapter.modules[name].scaling * b @ a)
        parts += [(s[j], u[:, j], vh[j]) for j in range(len(a))]
    for row, token in enumerate(x):
        acts = [float(s * (v @ token).abs()) for s, _, v in parts]
        for j in sorted(range(len(parts)), key=lambda j: -acts[j])[:3]:
            s, u, v = parts[j]
            expected[row] += s * (v @ token) * u
    load_mixture(model, mixture)
    torch.testing.assert_close(target(x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_kv_cache_changes_nothing(preset: str) -> None:
    model = llama()
    load_mixture(model, mixture_for(model, preset))
    if preset == "request":
        model.mixture.set_gate(requests=["expert0", "expert2"])
    ids = tokens(batch=2, length=8)
    with_cache = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
    steps = model.generate(
        ids,
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(with_cache, steps.sequences)
    if preset == "sequence":  # decided on the prompt: without a cache the prompt keeps growing
        return
    without = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)
    whole = model(with_cache).logits[:, 7:-1]
    torch.testing.assert_close(torch.stack(steps.logits, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_left_padding_does_not_change_a_row(preset: str) -> None:
    model = llama()
    load_mixture(model, mixture_for(model, preset))
    short, long = tokens(1, 5, seed=1), tokens(1, 9, seed=2)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], dim=1)
    batch, mask = torch.cat([padded, long]), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    if preset == "request":
        model.mixture.set_gate(requests=["expert1", "expert0"])
    options = {"max_new_tokens": 7, "do_sample": False}
    both = model.generate(batch, attention_mask=mask, **options)
    if preset == "request":
        model.mixture.set_gate(requests=["expert1"])
    alone = model.generate(short, attention_mask=torch.ones_like(short), **options)
    assert torch.equal(both[0, 9:], alone[0, 5:])


@pytest.mark.parametrize("preset", ["xlora", "sequence", "request", "meteora"])
def test_beam_search_with_and_without_cache_agree(preset: str) -> None:
    model = llama()
    load_mixture(model, mixture_for(model, preset))
    if preset == "request":
        model.mixture.set_gate(requests=["expert0", "expert2"])
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    cached = model.generate(tokens(2, 6), **options)
    if preset == "sequence":
        assert cached.shape == (2, 12)
        return
    assert torch.equal(cached, model.generate(tokens(2, 6), use_cache=False, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["constant", "meteora", "arrow", "smora", "spectr"])
def test_half_precision_is_close_to_full(preset: str, dtype: torch.dtype) -> None:
    full, half = llama(), llama().to(dtype)
    mixture = Mixture(experts_for(full), preset)  # every weight kept: top-k may flip by rounding
    mixture = mixture.with_gate(mixture.gate, top_k=None)
    load_mixture(half, mixture)
    load_mixture(full, mixture)
    x = torch.randn(2, 11, 32)
    outputs = {}
    for model in (full, half):
        target = model.get_submodule("model.layers.0.mlp.up_proj")
        given = x.to(model.dtype)
        mixed = target(given)
        assert mixed.dtype == model.dtype
        with model.mixture.disabled():
            outputs[model] = mixed.float(), target(given).float()
    (exact, exact_base), (close, close_base) = outputs[full], outputs[half]
    rounding = (close_base - exact_base).norm()
    assert (close - exact).norm() <= 2e-2 * (exact - exact_base).norm() + 2 * rounding


def test_several_mixtures_by_name() -> None:
    model = llama()
    ids = tokens()
    first = load_mixture(model, mixture_for(model, "arrow"), name="first")
    one = model(ids).logits
    second = load_mixture(model, mixture_for(model, "meteora"), name="second")
    assert model.mixture is second and not torch.equal(model(ids).logits, one)
    first.activate()
    assert model.mixture is first and torch.equal(model(ids).logits, one)
    with pytest.raises(MethodError, match="called 'first'"):
        load_mixture(model, mixture_for(model, "arrow"), name="first")
    first.detach()
    assert model.mixture is second
    second.detach()
    assert not hasattr(model, "mixture")


def test_a_model_that_lacks_modules_is_refused_whole() -> None:
    model, deeper = llama(), llama(num_hidden_layers=3)
    mixture = mixture_for(deeper, "arrow")
    with pytest.raises(AlignmentError, match=r"no module model\.layers\.2"):
        load_mixture(model, mixture)
    wider = llama(intermediate_size=64)
    with pytest.raises(AlignmentError, match=r"experts 48 x 32, the model 64 x 32"):
        load_mixture(wider, mixture_for(model, "arrow"))
    assert not hasattr(wider, "mixture")
    assert not any(m._forward_hooks for m in wider.modules())


def test_the_body_alone_takes_the_same_mixture() -> None:
    model = llama()
    body = copy.deepcopy(model).model
    mixture = mixture_for(model, "meteora")
    load_mixture(model, mixture)
    load_mixture(body, mixture)
    hidden = model(tokens(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(body(tokens()).last_hidden_state, hidden)


def test_inputs_that_are_not_contiguous() -> None:
    model = llama()
    load_mixture(model, mixture_for(model, "arrow"))
    target = model.get_submodule("model.layers.0.self_attn.k_proj")
    x = torch.randn(32, 5, 3).mT.movedim(1, 2).movedim(0, 2)[:, ::2]
    assert not x.is_contiguous()
    torch.testing.assert_close(target(x), target(x.contiguous()))


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 255, 256, 257, 4096])
def test_every_number_of_tokens(count: int) -> None:
    """A token's output does not depend on how many come with it."""
    model = llama()
    load_mixture(model, mixture_for(model, "meteora"))
    target = model.get_submodule("model.layers.1.mlp.up_proj")
    x = torch.randn(count, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(target(x)[:1], target(x[:1]), rtol=1e-5, atol=1e-5)


def test_siblings_with_different_inputs_are_told_apart() -> None:
    """q on one tensor, k and v on another, as in a cross-attention."""
    model = llama()
    load_mixture(model, mixture_for(model, "meteora"))
    q, k, v = (model.get_submodule(f"model.layers.0.self_attn.{n}_proj") for n in "qkv")
    a, b = torch.randn(2, 4, 32), torch.randn(2, 6, 32)
    expected = [k(b), v(b), q(a)]
    mixed = [q(a), k(b), v(b), q(a)]
    torch.testing.assert_close(mixed[1:], expected)


def test_moving_and_copying_keeps_gate_and_experts_together() -> None:
    model = llama()
    load_mixture(model, mixture_for(model, "meteora"))
    ids = tokens()
    expected = model(ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
    torch.testing.assert_close(model.double()(ids).logits.float(), expected, rtol=1e-4, atol=1e-4)
    group = model.mixture.groups[0]
    assert group.down.dtype == torch.float64 and group.is_packed()


def test_shapes_of_llama_cover_seven_projections() -> None:
    assert len(shapes_of(llama())) == 14


@torch.no_grad()
def test_an_output_that_someone_else_kept_is_not_written_into() -> None:
    model = llama()
    target = model.get_submodule("model.layers.0.mlp.up_proj")
    kept = []
    target.register_forward_hook(lambda m, a, y: kept.append(y))
    x = torch.randn(3, 32)
    base = target(x).clone()
    load_mixture(model, mixture_for(model, "constant"))
    assert not torch.equal(target(x), base)
    assert torch.equal(kept[1], base)
