"""One module imported when another one is: timm takes seconds, and whoever does not use it should not wait for it."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def import_after(name: str, module: str) -> None:
    """Import `module` as soon as the top-level package `name` has been imported: now, if that is so already."""
    if name in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _Finder(name, module))


class _Finder:
    """Finds the package as it would be found without it, once, and is gone."""

    def __init__(self, name: str, module: str):
        self.name, self.module = name, module

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)  # it is not installed, yet
            return spec
        spec.loader = _Loader(spec.loader, self.module)
        return spec


class _Loader:
    def __init__(self, loader: Any, module: str):
        self.loader, self.module = loader, module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # what others ask for its files
        self.loader.exec_module(module)
        import_module(self.module)
