"""
The pages of the documentation as they are in the repository: their blocks of code, links and anchors.

A comment directly before a block says that it is not run, and why: `<!-- not run: needs eight GPUs -->`.
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token


ROOT = Path(__file__).parents[2]
EXEMPTION = re.compile(r"<!--\s*not run:(?P<reason>.*?)-->\s*", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """`line` is that of the first line of code, from 0; `reason` says why it is not run, if it is not."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line + 1}"


@cache
def tracked() -> tuple[str, ...]:
    """What git knows of, as a clone has it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(path for path in listed.split("\0") if path and (ROOT / path).is_file())


def pages() -> list[str]:
    return [path for path in tracked() if path == "README.md" or re.fullmatch(r"docs/.*\.md", path)]


@cache
def tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))


def blocks(page: str) -> list[Block]:
    found, before = [], None
    for token in tokens(page):
        if token.type == "fence":
            exemption = EXEMPTION.fullmatch(before.content) if before and before.type == "html_block" else None
            reason = exemption and " ".join(exemption["reason"].split())
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(Block(page, token.map[0] + 1, language, token.content, reason))
        before = token
    return found


def anchors(page: str) -> set[str]:
    """What a link may name behind `#`: headings as GitHub writes them."""
    seen, found = Counter(), set()
    for heading, inline in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type == "heading_open":
            text = "".join(token.content for token in inline.children if token.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


def links(page: str) -> list[str]:
    """The targets of links and images, as they are written, also those in HTML."""
    found = []
    for token in tokens(page):
        for part in (token, *(token.children or ())):
            if part.type in ("html_block", "html_inline"):
                parser = _Links()
                parser.feed(part.content)
                found += parser.found
            found += [part.attrs[name] for name in ("href", "src") if name in part.attrs]
    return found


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src")]
