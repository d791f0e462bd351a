"""What the site makes of the repository: its front pages, its notebooks, and an index of the public names.

MkDocs calls the functions whose names begin with `on_` (`hooks:` in mkdocs.yml). Notebooks are shown as they were
executed; none runs here.
"""

from __future__ import annotations

import posixpath
import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import nbformat
from links import FRONT, ROOT, listed, nav_pages, relinked
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

# What a cell gave is told from what it was asked.
CELLS = """{% extends 'markdown/index.md.j2' %}
{% block stream %}
```{ .text .nb-output }
{{ output.text | trim }}
```
{% endblock stream %}
{% block data_text scoped %}
```{ .text .nb-output }
{{ output.data['text/plain'] | trim }}
```
{% endblock data_text %}
{% block data_html scoped %}
<div class="nb-output nb-html" data-search-exclude>
{{ output.data['text/html'] | trim }}
</div>
{% endblock data_html %}
"""


class Notebook(File):
    """A notebook of docs/, which is a page as it stands."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The front pages of the repository join those of docs/, and every notebook brings its figures."""
    for source, page in FRONT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        files.append(Notebook(file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls))
        for name, content in notebook_page(Path(config.docs_dir) / file.src_uri)[1].items():
            files.append(File.generated(config, posixpath.join(posixpath.dirname(file.src_uri), name), content=content))
    return files


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:
    """A notebook as Markdown; other pages as MkDocs reads them."""
    if not isinstance(page.file, Notebook):
        return None
    return notebook_page(Path(config.docs_dir) / page.file.src_uri)[0]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site needs them, and the index of names where it belongs."""
    uri = page.file.src_uri
    sources = {front: source for source, front in FRONT.items()}
    text = relinked(markdown, sources.get(uri, f"docs/{uri}"), uri)
    if uri == "api/index.md":
        pages = [path for _, path in nav_pages(config.nav or []) if path.startswith("api/") and path != uri]
        text += "\n".join(names_of(Path(config.docs_dir) / path, package()) for path in pages)
    return text


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Figures open by themselves when they are clicked: some are wider than a page of text."""
    return re.sub(r'<img [^>]*?src="(?!data:)([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', html)


@cache
def notebook_page(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its figures by the names it gives them.

    Args:
        notebook: the file, executed.

    Raises:
        OSError: when it cannot be read.
    """
    exporter = MarkdownExporter(raw_template=CELLS)
    exporter.register_preprocessor("nbconvert.preprocessors.CoalesceStreamsPreprocessor", enabled=True)
    resources: dict[str, Any] = {"output_files_dir": f"{notebook.stem}_figures", "unique_key": notebook.stem}
    text, resources = exporter.from_notebook_node(nbformat.read(notebook, as_version=4), resources)
    return text.replace("![png](", "![Figure drawn by the code above]("), resources.get("outputs", {})


@cache
def package() -> griffe.Object:
    """The package as its source says, nothing imported."""
    loaded = griffe.load("interp_vlm", search_paths=[ROOT])
    assert isinstance(loaded, griffe.Object)
    return loaded


def names_of(page: Path, source: griffe.Object) -> str:
    """A page of the reference as a table: each name it describes, with the first sentence about it."""
    title = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    lines = [f"\n## [{title}]({page.name})\n", "| name | what it is |", "|---|---|"]
    for path in listed(page):
        found = source[path.removeprefix(f"{source.path}.")]
        about = found.docstring.value.partition("\n\n")[0].replace("\n", " ") if found.docstring else ""
        lines.append(f"| [`{found.name}`][{path}] | {about} |")
    return "\n".join(lines) + "\n"
