"""The pages for people: every link, file, make target, command and name that they mention exists."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import openmm_tsf
from openmm_tsf import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])
FOLDERS = ("examples", "tests", "benchmarks", "docs", "openmm_tsf")
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text("utf-8"), re.M))


def broken_links(text: str, folder: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [t for t in targets if "://" not in t and not t.startswith("mailto:") and not (folder / t).exists()]


def missing_files(text: str) -> list[str]:
    named = re.findall(rf"(?<![\w/.])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", text)
    return [name for name in named if not (ROOT / name).exists()]


def unknown_targets(text: str) -> list[str]:
    return [name for name in re.findall(r"(?:^\s*|`)make ([a-z][a-z0-9-]*)", text, re.M) if name not in TARGETS]


def unknown_commands(text: str) -> list[str]:
    """Command lines with a subcommand or an option that does not exist."""
    found = re.findall(r"(?:openmm-tsf|-m openmm_tsf) ([^`\n#]+)", text)
    return [line.strip() for line in found if not _exists(line)]


def _exists(line: str) -> bool:
    words = shlex.split(line, comments=True)
    if words[0].startswith("-"):
        return CliRunner().invoke(cli.app, words[:1]).exit_code == 0
    if not re.fullmatch(r"[a-z]+", words[0]):  # prose, not a command line
        return True
    shown = CliRunner().invoke(cli.app, [words[0], "--help"], env={"COLUMNS": "200"})
    options = [word.split("=")[0] for word in words[1:] if word.startswith("-")]
    return shown.exit_code == 0 and all(re.search(rf"(?<![\w-]){option}(?![\w-])", shown.output) for option in options)


def unknown_names(text: str) -> list[str]:
    return [name for name in re.findall(r"\btsf\.([A-Za-z_]+)\b", text) if name not in openmm_tsf.__all__]


def code_blocks(text: str) -> list[str]:
    """Indented or fenced blocks that begin with an import or a class: Python."""
    fenced = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"(?:^ {4}.*\n|^\n)+", text, re.M)
    python = [block for block in indented if re.match(r"\s*(import|from|class|def) ", block)]
    return [*fenced, *(re.sub(r"^ {4}", "", block, flags=re.M) for block in python)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_mentions_exists(page):
    text = page.read_text("utf-8")
    assert not broken_links(text, page.parent)
    assert not missing_files(text)
    assert not unknown_targets(text)
    assert not unknown_commands(text)
    assert not unknown_names(text)
    for block in code_blocks(text):
        ast.parse(block)


def test_the_checks_can_fail():
    bad = "[x](no/such.md) see tests/test_nothing.py\n\n    make nothing\n\n    openmm-tsf run --oot x\n\ntsf.no_name"
    assert broken_links(bad, ROOT) == ["no/such.md"]
    assert missing_files(bad) == ["tests/test_nothing.py"]
    assert unknown_targets(bad) == ["nothing"]
    assert unknown_commands(bad) == ["run --oot x"]
    assert unknown_commands("`openmm-tsf fly x`") == ["fly x"]
    assert unknown_names(bad) == ["no_name"]
    assert code_blocks("text\n\n    import a\n\n    b = 1\n\ntext\n") == ["\nimport a\n\nb = 1\n\n"]


def test_pages_have_commands_and_code():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "make ala2" in readme and "openmm-tsf run" in readme
    assert any("tsf.draw" in block for block in code_blocks(readme))
