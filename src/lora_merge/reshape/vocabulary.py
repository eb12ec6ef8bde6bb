"""A base's input embedding and head: whether they are one tensor, and what a change does to it."""

from collections.abc import Mapping

from lora_merge.adapters.adapter import Adapter
from lora_merge.errors import AdapterError
from lora_merge.files.checkpoint import Checkpoint

HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


def check_resized(
    adapter: Adapter,
    base: Checkpoint,
    whole: Mapping[str, str],
    new: Mapping[str, tuple[str, tuple[int, ...]]],
    resized: set[str],
    *,
    renamed: bool,
) -> None:
    """A vocabulary can only be resized everywhere at once: embedding and head, stored or tied.

    Args:
        adapter: The adapter.
        base: The base.
        whole: Tensors that the adapter stores whole: its name → the base's.
        new: Tensors that take the place of the base's: name → (dtype code, shape).
        resized: Names of those with other rows.
        renamed: Whether the adapter's names differ from the base's.

    Raises:
        AdapterError: If something that belongs to the vocabulary would keep its size.
    """
    if not resized:
        return
    rows = {new[name][1][0] for name in resized}
    stale = {name for name in base.tensors if is_vocabulary(name)} - resized
    if _is_tied(base) and HEAD not in base.tensors and HEAD not in whole.values():
        stale.add(HEAD)
    if stale or len(rows) > 1 or renamed:
        raise AdapterError(
            f"{adapter.name}: it resizes the vocabulary ({', '.join(sorted(resized))}: "
            f"{', '.join(map(str, sorted(rows)))} rows) but not all that belongs to it"
            + (f" ({', '.join(sorted(stale))})" if stale else ""),
            resize_remedy(max(rows)),
        )


def resize_remedy(rows: int) -> str:
    """How to fuse an adapter whose vocabulary has another size than the base's."""
    return (
        f"load the base, model.resize_token_embeddings({rows}), save_pretrained, and fuse into that"
    )


def untie_head(
    base: Checkpoint,
    changed: set[str],
    new: dict[str, tuple[str, tuple[int, ...]]],
    untied: dict[str, str],
) -> bool:
    """Give a head that shares the embedding's storage its own, if one of the two changes.

    Args:
        base: The base.
        changed: Tensors of the base that change.
        new: Tensors that the base does not have; a head of its own is added.
        untied: Copies among these: name → name of the original; the head is added.

    Returns:
        Whether it did; the config must then say that they are not tied.
    """
    said = base.config.get("architectures")
    architecture = str(said[0]) if isinstance(said, list) and said else ""
    causal = architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    embeddings = sorted(n for n in changed & base.tensors.keys() if _is_embedding(n))
    if not _is_tied(base) or not (HEAD in changed or (embeddings and causal)):
        return False
    if HEAD not in base.tensors and HEAD not in new:
        new[HEAD] = (base.tensors[embeddings[0]].dtype, base.tensors[embeddings[0]].shape)
        untied[HEAD] = embeddings[0]
    return True


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row per token: an input embedding or a head."""
    return name == HEAD or _is_embedding(name)


def _is_embedding(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS


def embedding_of(adapter: Adapter, base: Checkpoint) -> str:
    """The input embedding that a missing head is tied to.

    Raises:
        AdapterError: If there is none.
    """
    found = [name for name in base.tensors if _is_embedding(name)]
    if len(found) != 1 or not _is_tied(base):
        raise AdapterError(
            f"{adapter.name}: it changes lm_head, which {base.folder} does not have",
            "is this the base model the adapter was trained on?",
        )
    return found[0]


def _is_tied(base: Checkpoint) -> bool:
    nested = base.config.get("text_config")
    text = nested if isinstance(nested, Mapping) else {}
    default = HEAD not in base.tensors
    return bool(base.config.get("tie_word_embeddings", text.get("tie_word_embeddings", default)))
