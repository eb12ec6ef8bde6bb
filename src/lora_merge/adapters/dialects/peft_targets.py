"""Which modules a PEFT config adapts: the tensors of all others PEFT leaves in the file unread."""

import re
from typing import Any

from lora_merge.adapters.config import AdapterConfig, matching_keys
from lora_merge.adapters.dialects.config_patterns import matcher
from lora_merge.adapters.dialects.peft_whole import VOCABULARY
from lora_merge.adapters.module_names import WRAPPED
from lora_merge.errors import AdapterError

_ANY_LAYER = r".*?\.[^.]*\.(?P<layer>\d+)\."


def is_targeted(config: AdapterConfig, module: str) -> bool:
    """Whether a config adapts a module, by PEFT's rules; true where it does not say."""
    targets = config.target_modules
    if targets is None:
        return not config.target_parameters
    if targets == "all-linear":
        return True
    if config.raw.get("ensure_weight_tying") and module.rpartition(".")[2] in VOCABULARY:
        return True  # the tied one of two follows the other
    # PEFT wraps an attention of torch and the projection inside it.
    name = module.partition(f".{WRAPPED}.")[0]
    if _names(config.raw.get("exclude_modules"), name):
        return False
    if isinstance(targets, str):
        # The class that a file was made with may put "model." in front, or not.
        matches = matcher(targets, whole=True)
        return any(map(matches, (name, f"model.{name}", name.removeprefix("model."))))
    if not _names(targets, name):
        return False
    return name in targets or _in_layers(config, name)


def check_targets(config: AdapterConfig, modules: list[str], adapter: str) -> None:
    """Refuse tensors that PEFT would not load.

    Raises:
        AdapterError: Naming a module that the config does not adapt, or saves whole as well.
    """
    strangers = [module for module in modules if not is_targeted(config, module)]
    if strangers:
        raise AdapterError(
            f"{adapter}: {len(strangers)} modules have factors and are not among target_modules of "
            f"adapter_config.json ({strangers[0]}); PEFT would leave them out",
            "name them in target_modules, or take their tensors out of the file",
        )
    for module in modules:
        for saved in config.modules_to_save:
            if re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", module):
                raise AdapterError(
                    f"{adapter}: {module} has factors and is in modules_to_save, which is saved "
                    "whole; PEFT would leave the factors out",
                    "take its factors out of the file, or its name out of modules_to_save",
                )


def check_alpha(config: AdapterConfig, module: str, adapter: str) -> None:
    """Refuse two alphas for one module: PEFT sorts the patterns when it saves them.

    The first that matches is taken, and which was first in training the sorted file cannot tell.

    Raises:
        AdapterError: Naming module and patterns.
    """
    keys = matching_keys(config.alpha_pattern, module)
    alphas = {config.alpha_pattern[key] for key in keys}
    if len(alphas) > 1 and list(config.alpha_pattern) == sorted(config.alpha_pattern):
        said = ", ".join(f"{key!r}: {config.alpha_pattern[key]:g}" for key in keys)
        raise AdapterError(
            f"{adapter}: {module} matches {len(keys)} keys of alpha_pattern ({said}); PEFT sorts "
            "them when it saves, so which alpha it was trained with is not known",
            "leave the right one of them in adapter_config.json",
        )


def _names(targets: Any, module: str) -> bool:
    if not targets:
        return False
    if isinstance(targets, str):
        return matcher(targets, whole=True)(module)
    return module in targets or any(module.endswith(f".{target}") for target in targets)


def _in_layers(config: AdapterConfig, module: str) -> bool:
    layers = config.raw.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.raw.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # Names of lists, not expressions: what else stands here is looked for as it is.
    patterns = [re.escape(p) for p in patterns]
    regexes = [rf"(?:^|.*?\.){p}\.(?P<layer>\d+)\." for p in patterns] or [_ANY_LAYER]
    match = next((m for regex in regexes if (m := re.match(regex, module))), None)
    if match is None:
        return False
    return int(match["layer"]) in ([layers] if isinstance(layers, int) else layers)
