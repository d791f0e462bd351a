"""Links of the repository's pages as links of the site, and the public names that the reference lists."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
FRONT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)\s#]+)(#[^)\s]*)?\)|(<img [^>]*?src=\")([^\"]+)(\")")


def relinked(markdown: str, source: str, page: str) -> str:
    """The text with its links as the site needs them; what the site does not hold is named, not linked.

    Args:
        markdown: the text.
        source: the page's file in the repository, from its root.
        page: the page's name in the site.

    Example:
        >>> relinked("[docs/claims.md](docs/claims.md), [the licence](LICENSE)", "README.md", "index.md")
        '[Claims](claims.md), the licence'
    """

    def one(found: re.Match[str]) -> str:
        mark, text, target, anchor, before, address, after = found.groups()
        old = target or address
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), old))
        if ":" in old or not (ROOT / path).exists():
            return found.group()  # another site's, or nowhere: the strict build tells of it
        path = f"docs/{FRONT[path]}" if path in FRONT else path
        if not path.startswith("docs/"):
            return f"`{path}`" if text == old else text
        new = posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(page) or ".")
        if before:
            return f"{before}{new}{after}"
        said = Path(path).stem.replace("-", " ").capitalize() if text == old else text
        return f"{mark}[{said}]({new}{anchor or ''})"

    return LINK.sub(one, markdown)


def listed(page: Path) -> list[str]:
    """The dotted names that a page of the reference describes, in its order."""
    return re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def nav_pages(nav: list[Any]) -> Iterator[tuple[str | None, str]]:
    """The title (None where it has none) and the page of every entry of a `nav` of mkdocs.yml, in order."""
    for entry in nav:
        for title, inside in entry.items() if isinstance(entry, dict) else [(None, entry)]:
            if isinstance(inside, str):
                yield title, inside
            else:
                yield from nav_pages(inside)
