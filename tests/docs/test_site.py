"""The site's navigation, reference and links, without building it: `make docs` does that, strictly."""

import importlib
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
import yaml

import interp_vlm as iv

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *DOCS.glob("*.ipynb")])
REFERENCE = sorted((DOCS / "api").glob("*.md"))


def building():
    """The module by which the site reads pages; it needs nothing that only the site needs."""
    spec = importlib.util.spec_from_file_location("building_links", DOCS / "building" / "links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LINKS = building()


def in_nav():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return [page for _, page in LINKS.nav_pages(nav)]


def described(page):
    """What a page of the reference describes, by dotted path."""
    return {path: resolved(path) for path in LINKS.listed(page)}


def resolved(path):
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        return importlib.import_module(path)


def test_the_navigation_has_every_page_once():
    names = [path.relative_to(DOCS).as_posix() for path in PAGES] + list(LINKS.FRONT.values())
    assert sorted(in_nav()) == sorted(names), "list each page of docs/ in mkdocs.yml under nav"


def test_every_public_name_is_in_the_reference_once():
    shown = [found for page in REFERENCE for found in described(page).values()]
    for name in iv.__all__:
        times = sum(found is getattr(iv, name) for found in shown)
        assert times == 1, f"iv.{name} is described {times} times: give it one line `::: ...` in a page of docs/api"


@pytest.mark.parametrize("module", sorted(iv._MODULES))
def test_public_modules_are_described_whole(module):
    """Their pages show `__all__` unless they choose members; what they choose not must have an entry of its own."""
    public = getattr(iv, module)
    shown = [found for page in REFERENCE for found in described(page).values()]
    text = "".join(page.read_text() for page in REFERENCE)
    options = re.search(rf"^::: \S*\.{module}\n    options:\n      members: \[([^\]]*)\]", text, re.MULTILINE)
    chosen = options.group(1).split(", ") if options else public.__all__
    assert set(chosen) <= set(public.__all__)
    left = [
        name for name in public.__all__ if name not in chosen and not any(getattr(public, name) is x for x in shown)
    ]
    assert left == []


def text_of(page):
    """A page's text, a notebook's cells of text."""
    if page.suffix != ".ipynb":
        return page.read_text()
    return "\n".join(cell.source for cell in nbformat.read(page, as_version=4).cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / name for name in LINKS.FRONT)], ids=lambda page: page.name)
def test_no_page_links_to_a_missing_file(page):
    for found in LINKS.LINK.finditer(text_of(page)):
        target = found[3] or found[6]
        assert ":" in target or (page.parent / target).exists(), target


def test_links_of_the_repository_become_links_of_the_site():
    front = (
        '[docs/claims.md](docs/claims.md#all), [a notebook](docs/quick-start.ipynb), <img src="docs/light-cone.png">'
    )
    assert LINKS.relinked(front, "README.md", "index.md") == (
        '[Claims](claims.md#all), [a notebook](quick-start.ipynb), <img src="light-cone.png">'
    )
    page = "[`experiments`](../experiments), [../LICENSE](../LICENSE), [start](../README.md)"
    assert LINKS.relinked(page, "docs/claims.md", "claims.md") == "`experiments`, `LICENSE`, [start](index.md)"
    outside = "[x](https://arxiv.org/abs/2605.08200), [gone](docs/gone.md)"
    assert LINKS.relinked(outside, "README.md", "index.md") == outside


def test_nothing_is_fetched_by_a_reader():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False
    loaded = [*config["extra_css"], *config["extra"]["polyfills"]]
    assert [path for path in loaded if not (DOCS / path).is_file()] == []
    styles = "".join(path.read_text() for path in DOCS.rglob("*.css"))
    assert not re.search(r"@import|url\(", styles)
