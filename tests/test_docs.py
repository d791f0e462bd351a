"""What the documents say is run: every Python block that is a program, and every link."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Blocks that need the published weights are shown, not run (docs/published-models.md says so).
PROGRAMS = ["README.md", "docs/extending.md"]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize(("page", "number"), [(page, i) for page in PROGRAMS for i in range(len(blocks(page)))])
def test_python_blocks_run(page, number, tmp_path):
    script = tmp_path / "block.py"  # nnsight reads the source of a trace from a file
    script.write_text(blocks(page)[number])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_documents_name_only_what_exists():
    import interp_vlm as iv

    for page in PAGES:
        for name in re.findall(r"\biv\.([A-Za-z_]+)", page.read_text()):
            assert hasattr(iv, name), f"{page.name} names iv.{name}"
