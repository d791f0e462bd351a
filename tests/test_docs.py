"""What the documents say is run: every Python block that is a program, and every link."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from interp_vlm import testbed

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


ROWS = {
    "all, standard": ("standard", "all"),
    "existence": ("standard", "existence"),
    "existence, adversarial negatives": ("standard", "existence_no_adversarial"),
    "count": ("standard", "count"),
    "colour": ("standard", "colour"),
    "digit": ("standard", "digit"),
    "where": ("standard", "where"),
    "all, hard": ("hard", "all"),
    "existence, hard": ("hard", "existence"),
    "best answer to the question's kind": ("text_only", "best_answer_of_kind"),
    "other pictures": ("text_only", "images_shuffled"),
    "picture mean-ablated": ("interventions", "image_mean_ablated", "all"),
    "text to picture blocked": ("interventions", "text_to_image_blocked", "all"),
    "30 % most attended patches masked": ("patches_masked", "top", "accuracy"),
    "30 % random patches masked": ("patches_masked", "random", "accuracy"),
    "30 % least attended patches masked": ("patches_masked", "bottom", "accuracy"),
}


def card_table():
    """The table of docs/testbed.md, from the cards."""
    lines = ["| accuracy, % | " + " | ".join(testbed.NAMES) + " |", "|---|" + "---|" * len(testbed.NAMES)]
    for label, path in ROWS.items():
        cells = []
        for name in testbed.NAMES:
            figure = testbed.card(name)["figures"]
            for key in path:
                figure = figure[key]
            value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
            cells.append(f"{value:.1f} ({low:.1f} to {high:.1f})")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_figures_of_the_embedded_models_are_those_of_their_cards():
    assert card_table() in (ROOT / "docs" / "testbed.md").read_text()


def test_documents_name_only_what_exists():
    import interp_vlm as iv

    for page in PAGES:
        for name in re.findall(r"\biv\.([A-Za-z_]+)", page.read_text()):
            assert hasattr(iv, name), f"{page.name} names iv.{name}"
