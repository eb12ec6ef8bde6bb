"""Bases in which a mixture would not be heard, or would be mixed up: refused."""

import threading

import pytest
import torch
from tiny import shapes_of, tokens
from transformers import LongcatFlashConfig, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

from builders import make_adapter
from lora_merge.errors import AlignmentError, MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.runtime.moe.router import reads_weight_of


def router() -> LongcatFlashTopkRouter:
    config = LongcatFlashConfig(
        hidden_size=32, n_routed_experts=4, zero_expert_num=2, moe_topk=2, num_hidden_layers=1
    )
    return LongcatFlashTopkRouter(config)


def test_a_router_that_reads_its_layers_weight_is_refused() -> None:
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"router": router()})})
    mixture = Mixture([make_adapter("e", shapes={"mlp.router.classifier": (6, 32)})], "arrow")
    with pytest.raises(AlignmentError, match=r"(?s)reads its weight and does not call it.*routers"):
        load_mixture(model, mixture)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_router_that_calls_its_layer_is_none_of_those() -> None:
    class CallingRouter(LongcatFlashTopkRouter):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.classifier(hidden)

    calling = router()
    calling.__class__ = CallingRouter
    assert not reads_weight_of(calling, calling.classifier)


def test_state_in_modules_is_one_texts_at_a_time() -> None:
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        lru_width=32, vocab_size=61, attention_window_size=16, eos_token_id=None,
    )  # fmt: skip
    model = RecurrentGemmaForCausalLM(config).eval()
    shapes = {n: s for n, s in shapes_of(model).items() if n.endswith("down_proj")}
    load_mixture(model, Mixture([make_adapter("e", shapes=shapes)], "arrow"))
    told: list[str] = []

    def other(*_: object) -> bool:
        def run() -> None:
            try:
                model.generate(tokens(1, 4), max_new_tokens=2)
            except MethodError as error:
                told.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return False

    options = {"max_new_tokens": 3, "do_sample": False}
    alone = model.generate(tokens(1, 5), **options)
    disturbed = model.generate(tokens(1, 5), stopping_criteria=[other], **options)
    assert len(told) == 3 and "keeps the state of a text in its modules" in told[0]
    assert torch.equal(alone, disturbed)
    assert torch.equal(alone, model.generate(tokens(1, 5), **options))  # free again
