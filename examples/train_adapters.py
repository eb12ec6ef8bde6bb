"""Train the tiny base and its three adapters in `examples`: a two-layer Llama, PEFT, one minute.

    pip install 'lora-merge[peft]' && python examples/train_adapters.py

A line says what to do, to which words, and the answer: "upper: red cat > RED CAT". The base model
(0.1 million parameters, one character a token) learns four skills well: copy, first, last, swap.
It has also seen `upper`, `reverse` and `double`, but four times of five with a wrong answer, so
that it gets none of them right. Each adapter then learns one of these three. Everything is seeded.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
WORDS = ["one", "two", "three", "four", "five", "six", "red", "blue", "green", "cat", "dog", "bird"]
# What the base knows, and what the adapters teach it.
KNOWN: dict[str, Callable[[str], str]] = {
    "copy": str,
    "first": lambda text: text.split()[0],
    "last": lambda text: text.split()[-1],
    "swap": lambda text: " ".join(reversed(text.split())),
}
TAUGHT: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "reverse": lambda text: " ".join(word[::-1] for word in text.split()),
    "double": lambda text: "".join(letter * (1 + letter.isalpha()) for letter in text),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HINT = 0.2  # how often the base sees the right answer of a skill that an adapter will teach
REHEARSAL = 0.3  # how much of an adapter's text is what the base knows already
PAD, END = 0, ord("\n")


@dataclass(frozen=True)
class Row:
    """One line: the prompt up to ">" and the answer with its end."""

    skill: str
    prompt: str
    response: str


def draw(rng: random.Random, skills: Mapping[str, float], *, hint: float = 1.0) -> Row:
    """A random row; `skills` are weights, `hint` the share of right answers of taught skills."""
    skill = rng.choices(list(skills), list(skills.values()))[0]
    text = " ".join(rng.choices(WORDS, k=2))
    wrong = skill in TAUGHT and rng.random() >= hint
    answer = text if wrong else (KNOWN | TAUGHT)[skill](text)
    return Row(skill, f"{skill}: {text} >", f" {answer}\n")


def batch(rows: list[Row]) -> dict[str, Tensor]:
    """Characters, mask and labels of rows, each (rows, length); only answers have labels."""
    width = max(len(row.prompt) + len(row.response) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        line = torch.tensor([ord(letter) for letter in row.prompt + row.response])
        ids[i, : len(line)] = line
        labels[i, len(row.prompt) : len(line)] = line[len(row.prompt) :]
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def base_model() -> LlamaForCausalLM:
    """A character-level Llama of 0.1 million parameters."""
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
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character, its code the token's number."""
    vocabulary = {chr(code): code for code in range(128)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token="?", pad_token=chr(PAD), eos_token=chr(END)
    )


def train(
    model: torch.nn.Module, skills: Mapping[str, float], steps: int, rate: float, hint: float = 1.0
) -> None:
    """Train what requires a gradient on random rows of the skills."""
    rng = random.Random(1)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    model.train()
    for _ in range(steps):
        loss = model(**batch([draw(rng, skills, hint=hint) for _ in range(32)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, skill: str, rows: int = 100) -> float:
    """Share of rows whose whole answer is right, given the answer's beginning."""
    rng = random.Random(2)
    inputs = batch([draw(rng, {skill: 1.0}) for _ in range(rows)])
    guessed = model(**inputs).logits[:, :-1].argmax(-1)
    labels = inputs["labels"][:, 1:]
    return float(((guessed == labels) | (labels == -100)).all(1).float().mean())


def save_rows(path: Path, seed: int, each: int) -> None:
    """Rows of the taught skills as JSON lines: prompt, response, expert."""
    rng = random.Random(seed)
    rows = [draw(rng, {skill: 1.0}) for _ in range(each) for skill in TAUGHT]
    lines = [
        json.dumps({"prompt": row.prompt, "response": row.response, "expert": row.skill})
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train the base model, then one adapter per skill; write rows to train and test gates with."""
    base = base_model()
    train(base, dict.fromkeys([*KNOWN, *TAUGHT], 1.0), 2000, 3e-3, hint=HINT)
    base.half().save_pretrained(HERE / "base")
    tokenizer().save_pretrained(HERE / "base")
    for index, skill in enumerate(TAUGHT):
        fresh = LlamaForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32)
        torch.manual_seed(index + 1)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        adapter = get_peft_model(fresh, config)
        skills = {skill: 1 - REHEARSAL, **dict.fromkeys(KNOWN, REHEARSAL / len(KNOWN))}
        train(adapter, skills, 200, 2e-3)
        print(f"{skill}: {accuracy(fresh, skill):.2f}")
        adapter.peft_config["default"].base_model_name_or_path = "examples/base"
        adapter.half().save_pretrained(str(HERE / "adapters" / skill), save_embedding_layers=False)
        (HERE / "adapters" / skill / "README.md").unlink()
    (HERE / "data").mkdir(exist_ok=True)
    save_rows(HERE / "data" / "train.jsonl", 3, 200)
    save_rows(HERE / "data" / "test.jsonl", 4, 50)


if __name__ == "__main__":
    main()
