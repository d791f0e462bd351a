"""What the documents say is run: every Python block that is a program, and every link."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from interp_vlm import testbed
from interp_vlm.cli import app
from interp_vlm.study.claim import TABLES, Part, load_claims
from interp_vlm.study.verdict import region_text

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Blocks that need the published weights are shown, not run (docs/published-models.md says so).
PROGRAMS = [
    "README.md",
    "docs/extending.md",
    "docs/how-the-engine-works.md",
    "docs/leaks.md",
    "docs/protocols.md",
    "docs/reliability.md",
    "docs/testbed.md",
    "docs/transformer-lens.md",
    "docs/validation.md",
]


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize(("page", "number"), [(page, i) for page in PROGRAMS for i in range(len(blocks(page)))])
def test_python_blocks_run(page, number, tmp_path):
    script = tmp_path / "block.py"  # nnsight reads the source of a trace from a file
    script.write_text(blocks(page)[number])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"""(?:\]\(|src=")([^)"#]+)""", page.read_text()):
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


def rule(part: Part) -> str:
    """Where one part of a claim is true, and of whom it speaks."""
    of = f" ({', '.join(part.families)})" if part.families else ""
    named = f"{part.name}{of}: " if part.name else ""
    return named + region_text(part.region, part.unit)


def claim_table():
    """The table of docs/claims.md, from the claims' files."""
    lines = ["| id | statement | published | true where |", "|---|---|---|---|"]
    for claim in load_claims("all"):
        figures = [
            ", ".join(f"{family} {figure}" for family, figure in (part.published or {}).items()) for part in claim.parts
        ]
        cells = (claim.id, claim.statement, "; ".join(dict.fromkeys(figures)), "; ".join(map(rule, claim.parts)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def open_table():
    """What the published text leaves open: what each claim takes for it, and what else is run."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for claim in load_claims("all"):
        for parameter, chosen in claim.chosen.items():
            others = "; ".join(other.setting for other in claim.alternatives if other.parameter == parameter)
            found.setdefault((parameter, chosen, others), []).append(claim.id)
    lines = ["| left open | taken | also run | claims |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join((*row, ', '.join(ids)))} |" for row, ids in found.items())])


def test_the_tables_of_claims_are_those_of_their_files():
    text = (ROOT / "docs" / "claims.md").read_text()
    assert claim_table() in text
    assert open_table() in text
    listed = re.search(r"`table` is an experiment: ([a-z,\s]+)\.", text)
    assert listed
    assert sorted(re.findall(r"[a-z]+", listed.group(1))) == sorted(TABLES)


@pytest.mark.parametrize("page", ["docs/claims.md", "docs/extending.md"])
def test_claims_shown_are_claims(page, tmp_path):
    shown = [block for block in blocks(page, "toml") if "[[parts]]" in block]
    assert shown
    for number, block in enumerate(shown):
        file = tmp_path / f"{number}.toml"
        file.write_text(block)
        assert load_claims([str(file)])[0].parts


def commands(page: Path) -> list[str]:
    """The command lines of a page, continued ones joined, comments left out."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}(?:\S.* \| )?(interp-vlm .*)$", text, re.MULTILINE)
    return [re.split(r" \| | > |\s+#", line)[0].strip() for line in lines]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_shown_are_understood(page):
    for line in commands(page):
        command, words = typer.main.get_command(app), shlex.split(line)[1:]
        while known := getattr(command, "commands", {}):
            assert words, line
            assert words[0] in known, line
            command, words = known[words[0]], words[1:]
        command.make_context("interp-vlm", words)  # raises where an option is unknown, missing or malformed


def test_documents_name_only_what_exists():
    import interp_vlm as iv

    for page in PAGES:
        for name in re.findall(r"\biv\.([A-Za-z_]+)", page.read_text()):
            assert hasattr(iv, name), f"{page.name} names iv.{name}"
