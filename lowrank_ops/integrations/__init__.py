"""Registers the low-rank layers with transformers and PEFT, once the user has imported them.

Neither library is imported for this.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterImport(MetaPathFinder):
    """Imports ``integrations.<name>``, which registers the layers, when the user imports ``trigger``.

    An import hook, because neither library has entry points, and importing them here would take seconds.
    """

    def __init__(self, name: str, trigger: str) -> None:
        self.name, self.trigger = name, trigger
        if trigger in sys.modules:
            self.register()
        else:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.trigger:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def register(self) -> None:
        try:
            importlib.import_module(f"{__name__}.{self.name}")
        except (ImportError, AttributeError) as error:  # the user's import of the library must not fail
            warnings.warn(
                f"low-rank layers could not be registered with {self.name} ({error}), so it refuses them; install a "
                "supported version.",
                stacklevel=2,
            )


_AfterImport("transformers", "transformers.modeling_utils")  # the module of save_pretrained and from_pretrained
_AfterImport("peft", "peft")
