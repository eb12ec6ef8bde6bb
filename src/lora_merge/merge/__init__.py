"""Merge methods, recipes, and the executor that streams modules from files to files.

`lora_merge.merge` is both this package and the function it is named after: calling the module calls
`lora_merge.merge.api.merge`, whichever of its submodules was imported first.
"""

import inspect
import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        from lora_merge.merge.api import merge

        return merge(*arguments, **keywords)

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        from lora_merge.merge.api import merge

        return merge.__doc__ or ""

    @property
    def __signature__(self) -> inspect.Signature:
        from lora_merge.merge.api import merge

        return inspect.signature(merge)


sys.modules[__name__].__class__ = _CallableModule
