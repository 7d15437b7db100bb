"""The site: `make docs`. Pages are plain Markdown, as GitHub shows them; a link that leads nowhere is an error."""

import re
from collections.abc import Sequence
from pathlib import Path

from sphinx.application import Sphinx

from tscnc_hf import __version__


# the order of the navigation; a page that is not here is an error
PAGES = {
    "Use": ["quickstart", "method", "pruning", "slimming", "inference", "recipes", "distributed", "evaluation", "hub"],
    "Look up": [
        "options",
        "results",
        "coefficients",
        "results_json",
        "packed_format",
        "architectures",
        "benchmarks",
        "paper_index",
    ],
    "API": ["api/training", "api/evaluation", "api/models", "api/method"],
    "Carry on": ["extending", "contributing"],
}

project = "tscnc-hf"
copyright = "the tscnc-hf authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4  # as GitHub makes them
default_role = "code"  # one backtick in a docstring is code, as in Markdown
maximum_signature_line_length = 88
smartquotes_action = "D"  # quotes are often those of a value
autodoc_preserve_defaults = True
napoleon_use_param = False  # several names may share a line: "train_dataset, eval_dataset: ..."
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"tscnc-hf {__version__}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Here rather than in index.md, where GitHub would show it as a block of code."""
    if page == "index":
        for caption, pages in PAGES.items():
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", *pages, "```", ""])


def link_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Markdown outside docs/, such as the changelog, is no page of the site but a file to fetch, as code is."""

    def as_file(link: re.Match) -> str:
        inside = Path(app.srcdir, page).parent.joinpath(link[1]).resolve().is_relative_to(app.srcdir)
        return link[0] if inside else f"](path:{link[1]})"

    source[0] = re.sub(r"\]\((\.\./[^)#\s]+\.md)(?:#[^)\s]*)?\)", as_file, source[0])


def leave_options_out(
    app: Sphinx, what: str, name: str, documented: object, options: object, lines: Sequence[str]
) -> None:
    """The options of TSCNCConfig have a page of their own."""
    if name.endswith("TSCNCConfig"):
        del lines[next(number for number, line in enumerate(lines) if line.startswith("Parameters that")) :]


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.connect("source-read", link_files)
    app.connect("autodoc-process-docstring", leave_options_out, priority=100)  # before napoleon
