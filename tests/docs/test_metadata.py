"""The changelog and the citation say what the package says of itself."""

import re

import yaml

from tests.docs.pages import ROOT
from tscnc_hf import __version__


# not with tomllib, which Python 3.10 does not have
PROJECT = dict(re.findall(r'^(name|version|license) = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
SECTIONS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def test_the_package_has_the_version_of_the_project():
    assert PROJECT["version"] == __version__


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changelog\n")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    released = r"\d{4}-\d{2}-\d{2}|unreleased"
    assert all(re.fullmatch(rf"\[\d+\.\d+\.\d+\] - ({released})", version) for version in versions), versions
    assert versions[0].startswith(f"[{__version__}] ")
    sections = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert sections and set(sections) <= set(SECTIONS)


def test_the_citation_is_valid_and_of_this_version():
    """The fields that version 1.2.0 of the Citation File Format asks for, of the software and of each reference."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert all(isinstance(cited[key], str) for key in ("message", "title"))
    assert (cited["title"], cited["version"], cited["license"]) == (PROJECT["name"], __version__, PROJECT["license"])
    for one in (cited, *cited["references"]):
        assert one["title"] and one["type"]
        assert one["authors"] and all({"name", "family-names"} & set(author) for author in one["authors"])
    assert [one["url"] for one in cited["references"]] == ["https://arxiv.org/abs/2503.20454"]


def test_the_oldest_transformers_divides_the_loss_by_the_accumulated_steps():
    """Up to 5.18 that of four micro-batches was four times the loss, without a word."""
    floor = re.search(r'"transformers>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert (int(floor[1]), int(floor[2])) >= (5, 19)
