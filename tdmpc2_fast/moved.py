"""Import paths of earlier versions: a package's `_MOVED` says where its modules went; both names are one module.

`python -m` takes them, too. New code names the new places.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import CodeType, ModuleType


class Moved(MetaPathFinder, InspectLoader):
    """Finds modules of this project by the names they had; asked last, when nothing else was found."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return a spec that leads to the module's new place, or None where there is none."""
        return spec_from_loader(name, self) if _place(name) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module itself, as imported by its new name."""
        module = import_module(_place(spec.name) or "")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module the spec that it was executed with."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, fullname: str) -> CodeType:
        """Return what `python -m` runs: the module by its new name."""
        run = f"import runpy; runpy.run_module({_place(fullname)!r}, run_name='__main__', alter_sys=True)"
        return compile(run, fullname, "exec")

    def get_source(self, fullname: str) -> None:
        """Return None: a name has no source of its own."""


def _place(name: str) -> str | None:
    package, _, module = name.rpartition(".")
    moved: dict[str, str] = getattr(sys.modules.get(package), "_MOVED", {})
    return f"{package}.{moved[module]}" if module in moved else None


if not any(type(finder).__name__ == "Moved" for finder in sys.meta_path):
    sys.meta_path.append(Moved())
