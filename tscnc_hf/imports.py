"""One module imported when another one is: timm takes seconds, and whoever does not use it should not wait for it."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def import_after(name: str, module: str) -> None:
    """Import `module` as soon as the top-level package `name` has been imported: now, if that is so already."""
    if name in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _Finder(name, module))


class _Finder:
    """Finds the package as the other finders do, also for those who only ask whether it is there."""

    def __init__(self, name: str, module: str):
        self.name, self.module = name, module

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader:
    def __init__(self, loader: Any, finder: _Finder):
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # what others ask for its files
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        import_module(self.finder.module)
