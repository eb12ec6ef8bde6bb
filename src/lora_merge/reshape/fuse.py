"""Fuse an adapter into its base model: base + delta, shard by shard, in the base's dtype.

Each shard is copied as bytes, and the tensors the adapter changes are rewritten where they lie, in
bands: memory is one band and one module's factors. Everything else of the directory (tokenizer,
configuration, index, tied tensors that are stored once) stays what it was, but for the model card,
and the tokenizer where the adapter brings its own.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.adapters.formats.peft import PEFT
from lora_merge.adapters.identity.expert_layout import fit_to
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import AdapterError, MethodError, OutputError
from lora_merge.files.atomic import atomic_directory
from lora_merge.files.checkpoint import Checkpoint, TensorPlace, open_checkpoint
from lora_merge.files.documents import read_json
from lora_merge.files.pages.cards import code, fused_card, markdown
from lora_merge.files.shards import ShardEditor, copy_shard
from lora_merge.files.tensor_file import DTYPES, refuse_non_finite
from lora_merge.files.tensor_stream import cast_to
from lora_merge.planning import How, Plan
from lora_merge.printing import Report, Summary
from lora_merge.printing import notes as noted
from lora_merge.reshape.fuse_targets import Match, Target, match_adapter
from lora_merge.reshape.module_renames import renamed

# What a trainer saves beside an adapter when it changed the tokenizer or the chat format.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
# Entries of a tensor that are in memory at once, with their delta: 1 MB each, which stays in cache.
_BAND_ENTRIES = 1 << 18


@dataclass(frozen=True, repr=False)
class FuseReport(Report):
    """What was done.

    Attributes:
        out: The directory written.
        modules: Modules whose weight changed.
        replaced: Tensors that the adapter stores whole and that replaced the base's.
        added: Tensors that the base did not have.
        untied: Tensors that shared another one's storage in the base and now have their own.
        relative_change: Frobenius norm of all deltas over that of the weights they change.
        num_bytes: Size of the weights.
        notes: What the user should know, in words.
    """

    out: str
    modules: int
    replaced: tuple[str, ...]
    added: tuple[str, ...]
    untied: tuple[str, ...]
    relative_change: float
    num_bytes: int
    notes: tuple[str, ...]

    def summary(self) -> Summary:
        """What changed, by how much, and where it lies."""
        facts = [
            ("modules", f"{self.modules} changed by {100 * self.relative_change:.2g} %"),
            ("written to", f"{self.out}, {self.num_bytes:,} bytes"),
        ]
        for what in ("replaced", "added", "untied"):
            if getattr(self, what):
                facts.append((what, f"{len(getattr(self, what))} tensors"))
        return Summary("Fuse report", (*facts, *noted(self.notes)))

    def rows(self) -> list[dict[str, Any]]:
        """One row per tensor that is not only a changed weight."""
        what = ("replaced", "added", "untied")
        return [{"tensor": name, "what": one} for one in what for name in getattr(self, one)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"schema": 1, **asdict(self)}


@dataclass(frozen=True, eq=False, repr=False)
class FusePlan(Plan[FuseReport]):
    """An adapter and the base that it fits, and which tensors will change.

    Attributes:
        adapter: The adapter, its modules named as the base's.
        base: The base model.
        match: Which tensor of the base each of the adapter's changes.
        weight: Multiplies the adapter's deltas and its `lora_bias`.
    """

    adapter: Adapter
    base: Checkpoint
    match: Match
    weight: float

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return (*self.adapter.notes, *self.match.notes)

    def summary(self) -> Summary:
        """How many tensors will change."""
        facts = [("modules", f"{len(self.match.targets)} of {self.base.folder}")]
        return Summary("Fuse plan", (*facts, *noted(self.notes)))

    def rows(self) -> list[dict[str, Any]]:
        """One row per weight."""
        return [{"module": t.module.name, "tensor": t.tensor} for t in self.match.targets]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"schema": 1, "notes": list(self.notes), "modules": self.rows()}

    def _run(self, how: How) -> FuseReport:
        """Write the model.

        Raises:
            AdapterError: If base + delta is beyond the base's dtype.
            OutputError: If the directory cannot be written; nothing is left behind.
        """
        if how.out is None:
            raise OutputError("a model is made in a directory, not in memory", "give one")
        base, match = self.base, self.match
        new_bytes = sum(prod(shape) * DTYPES[code].itemsize for code, shape in match.new.values())
        inputs = [base.folder, *base.paths, *self.adapter.files]
        needed = base.num_bytes + new_bytes
        step = how.step("fusing", len(match.targets))
        with atomic_directory(how.out, force=how.force, inputs=inputs, needed=needed) as folder:
            for name in base.other_files():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(base.folder / name, folder / name)
            places = _copy_shards(base, match, folder)
            with _Editors(folder, places, match.prefix) as editors:
                _write_whole_tensors(self.adapter, match, editors)
                change = _add_deltas(self.adapter, match, editors, self.weight, step)
            _write_json(base, match, places, folder)
            notes = (*self.notes, *_copy_tokenizer(self.adapter, folder))
            card = _card(self.adapter, base, self.weight, notes)
            (folder / "README.md").write_text(card, "utf-8")
            num_bytes = sum((folder / shard).stat().st_size for shard in base.shards)
        return FuseReport(
            out=str(how.out),
            modules=len(match.targets),
            replaced=tuple(sorted(n for n in match.whole.values() if n in base.tensors)),
            added=tuple(sorted(set(match.new) - set(match.untied) - match.resized)),
            untied=tuple(sorted(match.untied)),
            relative_change=change,
            num_bytes=num_bytes,
            notes=notes,
        )


def plan_fuse(adapter: Adapter, base: Path, *, weight: float = 1.0) -> FusePlan:
    """Find the base's tensors that an adapter changes, from headers alone.

    Args:
        adapter: The adapter.
        base: Directory of the base model, in safetensors.
        weight: Multiplies the adapter's deltas and its `lora_bias`.

    Raises:
        SourceError: If the base is no safetensors checkpoint.
        AdapterError: If the adapter does not fit the base.
        MethodError: If the weight is no finite number.
    """
    if not isfinite(weight):
        raise MethodError(f"the weight is {weight}", "give a finite number")
    checkpoint = open_checkpoint(base)
    if adapter.dialect in ("gguf", "mlx"):  # the base tells llama.cpp's names and order of rows
        adapter = renamed(adapter, PEFT, base=checkpoint)
    adapter = fit_to(adapter, {name: place.shape for name, place in checkpoint.tensors.items()})
    return FusePlan(adapter, checkpoint, match_adapter(adapter, checkpoint), weight)


def _copy_tokenizer(adapter: Adapter, folder: Path) -> list[str]:
    """An adapter's own tokenizer and chat template replace the base's: it was trained with them."""
    if adapter.source is None:
        return []
    beside = adapter.source.weights.parent
    names = [name for name in _TOKENIZER if (beside / name).is_file()]
    for name in names:
        shutil.copyfile(beside / name, folder / name)
    return [f"{', '.join(names)}: the adapter's, not the base's"] if names else []


def _card(adapter: Adapter, base: Checkpoint, weight: float, notes: Sequence[str]) -> str:
    name = adapter.config.base_model
    text = (
        f"{code(name) if name else 'The base model'} with the LoRA adapter {code(adapter.name)} "
        f"added to its weights, times {weight:g}. It loads as the base does and needs no PEFT.\n\n"
        + "".join(f"- {markdown(note)}\n" for note in notes)
    )
    return fused_card("A model with an adapter in it", name, text.rstrip(), base.licence)


def _copy_shards(checkpoint: Checkpoint, match: Match, folder: Path) -> dict[str, TensorPlace]:
    """Copy every shard; the last one gets the new tensors (zeros, for now)."""
    places: dict[str, TensorPlace] = {}
    for shard in checkpoint.shards:
        new = match.new if shard == checkpoint.shards[-1] else {}
        places |= copy_shard(
            checkpoint.folder / shard,
            folder / shard,
            new=new,
            prefix=match.prefix,
            dropped=match.resized,
        )
    return places


class _Editors(contextlib.ExitStack):
    """Reads and overwrites tensors by their names in the base, whatever shard they are in."""

    def __init__(self, folder: Path, places: dict[str, TensorPlace], prefix: str) -> None:
        super().__init__()
        self._folder, self._places, self._prefix = folder, places, prefix
        self._open: dict[str, ShardEditor] = {}

    def place(self, name: str) -> TensorPlace:
        return self._places.get(self._prefix + name) or self._places[name]

    def editor(self, place: TensorPlace) -> ShardEditor:
        if place.shard not in self._open:
            editor = ShardEditor(self._folder / place.shard)
            self._open[place.shard] = self.enter_context(editor)
        return self._open[place.shard]

    def read(self, name: str, start: int, count: int) -> Tensor:
        place = self.place(name)
        return self.editor(place).read(place, start, count)

    def write(self, name: str, start: int, tensor: Tensor) -> None:
        place = self.place(name)
        self.editor(place).write(place, start, tensor.to(DTYPES[place.dtype]))


def _write_whole_tensors(adapter: Adapter, match: Match, editors: _Editors) -> None:
    for name, source in match.untied.items():
        size = prod(editors.place(source).shape)
        for start in range(0, size, _BAND_ENTRIES):
            count = min(_BAND_ENTRIES, size - start)
            editors.write(name, start, editors.read(source, start, count))
    for extra, name in match.whole.items():
        tensor = adapter.read_extra(extra)
        editors.write(name, 0, cast_to(tensor, editors.place(name).dtype, name))


def _add_deltas(
    adapter: Adapter,
    match: Match,
    editors: _Editors,
    weight: float,
    step: Callable[[], None],
) -> float:
    """Returns the Frobenius norm of all deltas over that of what they are added to."""
    alignment = align([adapter])
    squares = [0.0, 0.0]
    for target in match.targets:
        for expert, stack in enumerate(read_stacks(alignment, target.module)):
            size = stack.d_out * stack.d_in
            parts = _add_delta(adapter, target, stack, editors, expert * size, weight)
            squares = [total + part for total, part in zip(squares, parts, strict=True)]
        bias = adapter.read_bias(target.module.name)
        if bias is not None and target.bias is not None:
            stored = editors.read(target.bias, 0, bias.numel())
            editors.write(target.bias, 0, stored.double() + bias * weight)
        step()
    delta, base = squares
    return sqrt(delta / base) if base > 0 else 0.0


def _add_delta(
    adapter: Adapter, target: Target, stack: RankStack, editors: _Editors, start: int, weight: float
) -> tuple[float, float]:
    """Add one matrix, band by band; returns the squared norms of the delta and the base."""
    left, right = stack.up * (stack.scale * weight).to(stack.up.dtype), stack.down
    if target.layout == "transposed":
        left, right = right.mT, left.mT
    rows, columns = left.shape[0], right.shape[1]
    step = max(1, _BAND_ENTRIES // columns)
    delta_square = base_square = 0.0
    for row in range(0, rows, step):
        delta = left[row : row + step] @ right
        place = start + row * columns
        stored = editors.read(target.tensor, place, delta.numel()).view(delta.shape)
        fused = stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True)
        base_square += _square(fused)
        delta_square += _square(delta)
        fused.add_(delta)
        low, high = (float(bound) for bound in fused.aminmax())
        limit = torch.finfo(stored.dtype).max
        if not -limit <= low <= high <= limit:
            refuse_non_finite(stored, f"the base's {target.tensor}")
            raise AdapterError(
                f"{adapter.name}: {target.module.name}: base + delta is beyond the range of "
                f"{stored.dtype}".replace("torch.", ""),
                "lower --weight, or fuse into a bfloat16 or float32 base",
            )
        editors.write(target.tensor, place, fused)
    return delta_square, base_square


def _square(x: Tensor) -> float:
    flat = x.flatten()
    return float(flat @ flat)


def _write_json(
    checkpoint: Checkpoint, match: Match, places: dict[str, TensorPlace], folder: Path
) -> None:
    """Rewrite the index and the config where they say something that is no longer so."""
    if checkpoint.index and (match.new or match.prefix):
        path = folder / checkpoint.index
        index = read_json(checkpoint.folder / checkpoint.index, str(checkpoint.folder))
        index["weight_map"] = {name: places[name].shard for name in sorted(places)}
        added = sum(prod(shape) * DTYPES[code].itemsize for code, shape in match.new.values())
        dropped = [checkpoint.tensors[name] for name in match.resized]
        added -= sum(prod(place.shape) * DTYPES[place.dtype].itemsize for place in dropped)
        if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
            index["metadata"]["total_size"] += added
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    elif checkpoint.index:
        shutil.copyfile(checkpoint.folder / checkpoint.index, folder / checkpoint.index)
    changes: dict[str, Any] = {"tie_word_embeddings": False} if match.unties else {}
    if match.resized:
        changes["vocab_size"] = match.new[next(iter(match.resized))][1][0]
    if changes and checkpoint.config:
        config = _changed(checkpoint.config, changes)
        text = json.dumps(config, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with some values changed, also where its text model has a config inside."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return {**config, **changes}
    inside = {name: value for name, value in changes.items() if name in nested}
    outside = {n: v for n, v in changes.items() if n in config or n not in nested}
    return {**config, **outside, "text_config": {**nested, **inside}}
