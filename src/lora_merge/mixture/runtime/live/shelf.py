"""Which experts may be put away for others, and where others are found."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_merge.errors import MethodError, SourceError
from lora_merge.files.names import place_below
from lora_merge.mixture.mixture import Mixture

# Where experts are loaded from by name: a directory of adapters, or references by name.
Library = str | Path | Mapping[str, str | Path]


@dataclass
class Shelf:
    """Which experts may be put away for others, and where others are found.

    Attributes:
        limit: Most experts at once, or None.
        library: Where experts are found that are named and not attached, or None.
        pinned: Those that stay.
        used: Names, the least recently used first.
    """

    limit: int | None = None
    library: Library | None = None
    pinned: set[str] = field(default_factory=set)
    used: dict[str, None] = field(default_factory=dict)

    def check(self, mixture: Mixture) -> None:
        """Refuse what cannot be, when a mixture is attached.

        Raises:
            MethodError: If the gate takes no new experts, or there are more than the limit.
        """
        if self.limit is None and self.library is None:
            return
        refuse_closed(mixture)
        if self.limit is not None and self.limit < max(1, mixture.num_experts):
            raise MethodError(
                f"max_experts is {self.limit}, and the mixture has {mixture.num_experts}",
                "a limit that holds them all",
            )
        if isinstance(self.library, str | Path) and not Path(self.library).is_dir():
            raise SourceError(f"{self.library}: no such directory", "name a directory of adapters")

    def touch(self, names: Iterable[str]) -> None:
        """These are the most recently used."""
        for name in names:
            self.used.pop(name, None)
            self.used[name] = None

    def to_put_away(self, names: Sequence[str], room: int, keep: Collection[str]) -> list[str]:
        """Experts that make room for so many others.

        Args:
            names: Of all that are attached.
            room: For how many.
            keep: Those that cannot go, besides the pinned.

        Raises:
            MethodError: If too few of them can go.
        """
        many = 0 if self.limit is None else len(names) + room - self.limit
        order = [*(n for n in names if n not in self.used), *(n for n in self.used if n in names)]
        free = [name for name in order if name not in self.pinned and name not in keep]
        if many > len(free):
            raise MethodError(
                f"there is room for {self.limit} experts, {len(names) - len(free)} of "
                f"{len(names)} are pinned or in use, and {room} more are wanted",
                "attach with a larger max_experts, or unpin some",
            )
        return free[: max(many, 0)]

    def find(self, name: str, attached: Sequence[str]) -> str | Path:
        """Where an expert is that is not attached.

        Raises:
            MethodError: If it is not in the library either.
        """
        where, known = None, list(attached)
        if isinstance(self.library, Mapping):
            where, known = self.library.get(name), [*known, *self.library]
        elif self.library is not None:
            root = Path(self.library)
            known += sorted(path.name for path in root.iterdir())
            place = place_below(root, name, str(root))
            where = place if place.exists() else None
        if where is None:
            few = [*dict.fromkeys(known)]
            shown = f"one of {', '.join(few[:12])}" + (", …" if len(few) > 12 else "")
            raise MethodError(f"no expert is called {name!r}", shown)
        return where


def refuse_closed(mixture: Mixture) -> None:
    """Refuse gates that were made for their experts and know nothing of others.

    Raises:
        MethodError: With what to do instead.
    """
    spec = mixture.spec
    if spec.is_open:
        return
    why = (
        "it was trained for the experts it has, and knows nothing of others"
        if spec.is_learned
        else "it has one weight for each of its experts"
    )
    remedy = (
        "detach, add them with lora_merge.append_experts, and train"
        if spec.is_learned
        else "detach, and make the mixture again with all experts and weights"
    )
    raise MethodError(
        f"the {spec.preset} gate takes no expert in or out while attached: {why}",
        f"{remedy}; arrow, spectr, hilora, sequence, request and retrieve take any",
    )
