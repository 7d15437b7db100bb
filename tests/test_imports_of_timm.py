"""Networks are registered with timm once it is imported, before this library or after; nothing imports it for that."""

import sys
from importlib import import_module
from importlib.util import find_spec

import pytest
import timm

import tscnc_hf  # noqa: F401  (which registers)
from tscnc_hf.imports import import_after


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """`first` is a package with a module and a file in it, `second` a module that notes when it was imported."""
    (tmp_path / "first_package").mkdir()
    (tmp_path / "first_package" / "__init__.py").write_text(
        "ready = False\nfrom first_package import part\nready = True"
    )
    (tmp_path / "first_package" / "part.py").write_text("")
    (tmp_path / "first_package" / "words.txt").write_text("words")
    (tmp_path / "second_module.py").write_text("import first_package\nwas_ready = first_package.ready")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    for name in ("first_package", "first_package.part", "second_module"):
        sys.modules.pop(name, None)


def test_after_the_other_one_and_once(packages):
    finders = len(sys.meta_path)
    import_after("first_package", "second_module")
    found = find_spec("first_package")  # as transformers asks whether timm is there
    assert found.loader.get_data(found.origin).startswith(b"ready = False")
    assert "first_package" not in sys.modules and "second_module" not in sys.modules
    first = import_module("first_package.part") and sys.modules["first_package"]
    assert sys.modules["second_module"].was_ready and len(sys.meta_path) == finders
    loader = first.__spec__.loader
    assert loader is first.__loader__ and loader.get_data(f"{first.__path__[0]}/words.txt") == b"words"


def test_at_once_where_the_other_one_is_there(packages):
    import_module("first_package")
    import_after("first_package", "second_module")
    assert sys.modules["second_module"].was_ready


def test_a_package_that_is_not_installed_stays_so(packages):
    import_after("no_such_package", "second_module")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            import_module("no_such_package")
    assert "second_module" not in sys.modules


def test_timm_knows_the_networks():
    assert set(timm.list_models("cifar_*")) == {"cifar_resnet18", "cifar_wrn28_10", "cifar_wrn40_4"}
