"""Train the three small adapters in `examples/adapters`: a tiny Llama, three tasks, PEFT.

    pip install 'lora-merge[peft]' && python examples/train_adapters.py

The base model is a two-layer Llama over bytes that learns to copy words in either case.
Each adapter then learns one small task on top of it: upper case, reversed words, or repeated
letters. Everything is seeded; the adapters are saved in float16.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
WORDS = ["one", "two", "three", "four", "five", "six", "red", "blue", "green", "cat", "dog", "bird"]
TASKS: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "reverse": lambda text: " ".join(word[::-1] for word in text.split()),
    "double": lambda text: "".join(letter * 2 if letter != " " else " " for letter in text),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model() -> LlamaForCausalLM:
    """A byte-level Llama of 0.2 million parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )


def copy_in_any_case(text: str) -> str:
    """The base model's task: some lines in upper case, all of them copied."""
    return text.upper() if len(text) % 2 else text


def batches(task: Callable[[str], str], steps: int, seed: int) -> Iterator[Tensor]:
    """Batches of "text > task(text)" as byte ids, shape (32, 64), padded with newlines."""
    rng = random.Random(seed)
    for _ in range(steps):
        rows = []
        for _ in range(32):
            text = " ".join(rng.choices(WORDS, k=3))
            line = f"{text} > {task(text)}".ljust(64, "\n")[:96]
            rows.append(list(line.encode()))
        yield torch.tensor(rows)


def train(model: torch.nn.Module, task: Callable[[str], str], steps: int, rate: float) -> float:
    """Train what requires a gradient; returns the loss of the last batch."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    loss = torch.zeros(())
    for ids in batches(task, steps, seed=1):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def main() -> None:
    """Train the base model, then one adapter per task."""
    base = base_model()
    print(f"base: loss {train(base, copy_in_any_case, 300, 3e-3):.3f}")
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for index, (name, task) in enumerate(TASKS.items()):
        fresh = base_model()
        fresh.load_state_dict(weights)
        torch.manual_seed(index + 1)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        adapter = get_peft_model(fresh, config)
        print(f"{name}: loss {train(adapter, task, 300, 3e-3):.3f}")
        adapter.peft_config["default"].base_model_name_or_path = "tiny-bytes-llama"
        adapter.half().save_pretrained(HERE / "adapters" / name, save_embedding_layers=False)
        (HERE / "adapters" / name / "README.md").unlink()


if __name__ == "__main__":
    main()
