"""Sort a PEFT file's tensors by module and part."""

import re

from lora_merge.adapters.dialects.dialect import Header
from lora_merge.adapters.dialects.spelling import canonical
from lora_merge.errors import AdapterError


def sort_keys(
    header: Header, prefix: str
) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str]]:
    """(module → part → key, shared part → key, other canonical names → key)."""
    pattern = re.compile(rf"^(?P<module>.+?)\.(?P<part>{prefix}\w+(?:\..+)?)$")
    keys: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    rest: dict[str, str] = {}
    for key in sorted(header.entries):
        name = canonical(key)
        match = pattern.match(name)
        if match is None:
            rest[name] = key
            continue
        parts = shared if match["module"] == "base_model" else keys.setdefault(match["module"], {})
        if match["part"] in parts:
            raise AdapterError(
                f"{header.adapter}: {key} and {parts[match['part']]} are both {match['part']} of "
                f"{match['module']}",
                "take one of the two out of the file",
            )
        parts[match["part"]] = key
    return keys, shared, rest
