"""From what a user types to files on disk. The only place that downloads."""

import glob
import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_merge.adapters.library.index import INDEX, Member, in_library, is_library, members
from lora_merge.adapters.library.tensors import whole_file
from lora_merge.errors import SourceError
from lora_merge.files.hub import download
from lora_merge.files.inputs import note_input

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
# What mlx-lm, diffusers and our GGUF are called; other files beside them are checkpoints.
OTHER_NAMES = ("adapters.safetensors", "pytorch_lora_weights.safetensors", "adapter.gguf")
_WEIGHTS = (".safetensors", ".gguf")

_NUMBER = re.compile(r"\d+")
# transformers' and kohya's checkpoints, MLX's and kohya's numbers with zeros in front.
_CHECKPOINT = re.compile(r"(?i)(checkpoint|ckpt|step|epoch|iter)[-_]?\d+|(?<!\d)0\d{5,}")
_HUB_ID = re.compile(
    r"^(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^:@]+))?(?::(?P<subfolder>[^:@]+))?$"
)
_HUB_SCHEMES = ("hf://", "https://huggingface.co/", "https://hf.co/")


@dataclass(frozen=True)
class Source:
    """One adapter's files.

    Attributes:
        ref: What the user typed (or the match of their glob).
        weights: The safetensors or GGUF file, or a pickle.
        config: `adapter_config.json` beside it, None if there is none.
        revision: Commit hash on the Hub, None for local files.
        sha256: Of the weights, where somebody who can be believed has said it.
        member: The adapter in a library, None for adapters with files of their own; `weights` is
            the library's index then.
    """

    ref: str
    weights: Path
    config: Path | None
    revision: str | None = None
    sha256: str | None = None
    member: Member | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, computed once."""
        return self.sha256 or sha256(self.weights)

    @property
    def is_pickle(self) -> bool:
        """Whether the weights would have to be unpickled."""
        return self.member is None and self.weights.suffix not in _WEIGHTS

    @property
    def has_safetensors(self) -> bool:
        """Whether there is a safetensors file, of its own or in a library."""
        return self.member is not None or self.weights.suffix == ".safetensors"

    @property
    def config_text(self) -> str | None:
        """Its `adapter_config.json`; None if it has none."""
        if self.member is not None:
            return self.member.packed.config
        return None if self.config is None else self.config.read_text(encoding="utf-8")

    def write(self, folder: Path) -> None:
        """Copy its files, byte by byte, under PEFT's names into a directory."""
        if self.member is not None:
            (folder / WEIGHTS_NAME).write_bytes(whole_file(self.member))
        else:
            shutil.copyfile(self.weights, folder / WEIGHTS_NAME)
        if self.config_text is not None:
            (folder / CONFIG_NAME).write_text(self.config_text, encoding="utf-8")


def expand(refs: Sequence[str]) -> list[str]:
    """Replace what stands for several adapters by these; other references stay.

    A pattern stands for the paths it matches, in name order, a library for all of its adapters, and
    `LIBRARY[tag=value]` for those with this tag, in the order in which they were packed.

    Raises:
        SourceError: If a pattern matches nothing, or no adapter has these tags.
    """
    expanded: list[str] = []
    for ref in refs:
        path = Path(ref).expanduser()
        packed = members(ref)
        if packed is not None:
            expanded.extend(packed)
            continue
        if path.exists() or not glob.has_magic(ref):
            expanded.append(ref)
            continue
        matches = sorted(glob.glob(str(path)))  # noqa: PTH207 - may be absolute
        if not matches:
            raise SourceError(f"{ref}: no file matches this pattern", "check the pattern")
        expanded.extend(matches)
    return expanded


def in_order(names: Sequence[str]) -> list[str]:
    """Checkpoints by the numbers in their names: checkpoint-500 before checkpoint-1000.

    Names that differ in more than numbers stay in the order given.
    """
    if len({_NUMBER.sub("#", name) for name in names}) > 1:
        return list(names)
    return sorted(names, key=lambda name: [int(number) for number in _NUMBER.findall(name)])


def is_run(names: Sequence[str]) -> bool:
    """Whether names are those of one run's checkpoints, as trainers call them."""
    alike = len({_NUMBER.sub("#", name) for name in names}) == 1
    return alike and all(_CHECKPOINT.search(name) for name in names)


def resolve(ref: str, *, allow_pickle: bool = False) -> Source:
    """Find the files of an adapter.

    Args:
        ref: A directory, a `.safetensors` or `.gguf` file, `user/repo`, `user/repo@revision`,
            `user/repo:subfolder`, `user/repo:file.safetensors`, an `hf://` URI or a Hub URL; or
            `LIBRARY:name`, an adapter in a library. What exists on disk wins.
        allow_pickle: Accept `adapter_model.bin` where no safetensors file is there.

    Raises:
        SourceError: If the reference leads nowhere, or only to a pickle that is not allowed.
    """
    path = Path(ref).expanduser()
    if not ref.strip():
        raise SourceError("an empty name is no adapter", "name a directory, a file or a repository")
    try:
        ref.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{ref!a}: the name is not UTF-8, and neither a recipe nor a model card can hold it",
            "rename it",
        ) from error
    if path.is_symlink() and not path.exists():
        raise SourceError(f"{ref}: a link that leads nowhere", "repair the link")
    if path.exists():
        return _local(ref, path, allow_pickle)
    member = in_library(ref)
    if member is None:
        return _hub(ref, allow_pickle)
    index = member.library.folder / INDEX
    return Source(ref, index, None, sha256=member.packed.sha256, member=member)


def pin(ref: str, revision: str) -> str:
    """A Hub reference at a given commit, whatever revision it names; local paths stay."""
    if Path(ref).expanduser().exists():
        return ref
    repo, _, subfolder = _parse_hub(ref)
    return f"{repo}@{revision}" + (f":{subfolder}" if subfolder else "")


def sha256(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derived_data(name: str) -> Path:
    """A directory for results that can be computed again: below the Hub's own assets cache."""
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path("lora-merge", namespace=name))


def _local(ref: str, path: Path, allow_pickle: bool) -> Source:
    note_input(path)
    if is_library(path):
        raise SourceError(
            f"{ref}: a library of adapters, where one adapter is meant", f"name one: {ref}:NAME"
        )
    if path.is_dir():
        weights = _weights_in(ref, path, allow_pickle)
    elif path.is_file() and (
        path.suffix in _WEIGHTS or (path.suffix in {".bin", ".pt"} and allow_pickle)
    ):
        weights = path
    else:
        raise SourceError(
            f"{ref}: not an adapter directory, a .safetensors or a .gguf file",
            "give the directory that holds adapter_config.json"
            if path.suffix not in {".bin", ".pt"}
            else "pass --allow-pickle to load this pickle with weights_only=True",
        )
    config = weights.parent / CONFIG_NAME
    return Source(ref, weights, config if config.is_file() else None)


def _weights_in(ref: str, folder: Path, allow_pickle: bool) -> Path:
    if (folder / WEIGHTS_NAME).is_file():
        return folder / WEIGHTS_NAME
    pickle = folder / PICKLE_NAME
    if pickle.is_file():
        if allow_pickle:
            return pickle
        raise SourceError(
            f"{ref}: its weights are a pickle ({PICKLE_NAME}), which can run code when loaded",
            "pass --allow-pickle to load it with weights_only=True",
        )
    for name in OTHER_NAMES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(p for p in folder.iterdir() if p.suffix in _WEIGHTS and p.is_file())
    if len(others) == 1:
        return others[0]
    if others:
        raise SourceError(
            f"{ref}: several {others[0].suffix} files and none is {WEIGHTS_NAME}",
            f"name one of them: {', '.join(p.name for p in others[:4])}",
        )
    nested = sorted(p.parent.name for p in folder.glob(f"*/{WEIGHTS_NAME}"))
    remedy = "check the path"
    if nested:
        remedy = f"did you mean {ref.rstrip('/')}/{nested[0]}"
        remedy += f", or all {len(nested)} of them: {ref.rstrip('/')}/*?" if nested[1:] else "?"
    raise SourceError(f"{ref}: no {WEIGHTS_NAME} in this directory", remedy)


def _hub(ref: str, allow_pickle: bool) -> Source:
    repo, revision, subfolder = _parse_hub(ref)
    if ".." in Path(subfolder).parts or subfolder.startswith("/"):
        raise SourceError(f"{ref}: a subfolder may not leave the repository", "drop the '..'")
    file = Path(subfolder).name if subfolder.endswith(_WEIGHTS) else None
    subfolder = str(Path(subfolder).parent) if file else subfolder
    subfolder = "" if subfolder == "." else subfolder
    names = [file or WEIGHTS_NAME, CONFIG_NAME]
    if file is None:
        names += [*OTHER_NAMES, *([PICKLE_NAME] if allow_pickle else [])]
    patterns = [f"{subfolder}/{name}" if subfolder else name for name in names]
    folder = download(ref, repo, revision, patterns)
    inside = folder / subfolder if subfolder else folder
    if not inside.is_dir():
        raise SourceError(f"{ref}: {repo} holds no adapter there", "name the right subfolder")
    weights = inside / file if file else _weights_in(ref, inside, allow_pickle)
    if not weights.is_file():
        raise SourceError(f"{ref}: {repo} holds no such file", "name the right file")
    config = inside / CONFIG_NAME
    return Source(ref, weights, config if config.is_file() else None, revision=folder.name)


def _parse_hub(ref: str) -> tuple[str, str | None, str]:
    """(repo id, revision, subfolder) of a Hub reference."""
    if ref.startswith(_HUB_SCHEMES):
        from huggingface_hub import parse_hf_uri
        from huggingface_hub.errors import HfUriError

        try:
            uri = parse_hf_uri(ref)
        except HfUriError as error:
            raise SourceError(f"{ref}: {error}", "write hf://user/repo[@revision]") from error
        if uri.type != "model":
            raise SourceError(f"{ref}: a {uri.type}, not a model repository", "check the URI")
        return uri.id, uri.revision, uri.path_in_repo
    match = _HUB_ID.match(ref)
    if match is None or ref.startswith(("./", "../", "~", "/")):
        raise SourceError(f"{ref}: no such file or directory", "check the path")
    return match["repo"], match["revision"], match["subfolder"] or ""
