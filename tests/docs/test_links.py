"""Links of README.md and docs/ lead somewhere when they are read in the repository; `make docs` looks at the site."""

import os

import pytest

from tests.docs.pages import anchors, links, pages, tracked


def broken(page: str, link: str) -> str | None:
    """What is wrong with a link to this repository, if anything is."""
    path, _, anchor = link.partition("#")
    target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
    if target not in tracked():
        folder = any(name.startswith(f"{target}/") for name in tracked())
        if not folder or page != "README.md":  # which is no page of the site: that has no folders to show
            return f"{page}: {link} is {'a folder: name a file of it' if folder else 'no file that git knows of'}"
    elif anchor and target.endswith(".md") and anchor not in anchors(target):
        return f"{page}: {link}: {target} has no heading #{anchor}; it has {', '.join(sorted(anchors(target)))}"
    return None


@pytest.mark.parametrize("page", pages())
def test_links_into_the_repository_lead_somewhere(page):
    inside = [link for link in links(page) if "://" not in link and not link.startswith("mailto:")]
    problems = [problem for link in inside if (problem := broken(page, link))]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", pages())
def test_nothing_is_loaded_from_elsewhere(page):
    images = [
        link for link in links(page) if link.startswith("http") and link.endswith((".png", ".svg", ".js", ".css"))
    ]
    assert not images, f"{page} shows {images}: keep them in the repository"


def test_what_is_wrong_with_a_link_is_found():
    assert broken("docs/options.md", "packed_format.md#gaps") is None
    assert broken("docs/options.md", "../recipes/vit_cifar10.py") is None
    assert broken("README.md", "recipes/configs") is None
    assert "name a file" in broken("docs/options.md", "../recipes/configs")
    assert "no file" in broken("docs/options.md", "missing.md")
    assert "no heading #gap;" in broken("docs/options.md", "packed_format.md#gap")
