"""The documentation runs: every Python block of README.md and docs/, in order, one namespace per page.

Shell commands are not run: their arguments are parsed, and make's targets looked up.

A page may prepare its blocks in a comment that readers do not see::

    <!-- before the blocks:
    name = "a small model instead of a download"
    -->

Blocks run on the CPU in an empty folder. ``tests/docs_models.py`` makes small models under the names that pages use.
"""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import lowrank_ops as lro

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_COMMANDS = [
    *(page for page in PAGES if page.name != "bad-inputs.md"),
    ROOT / "CONTRIBUTING.md",
    ROOT / "demo" / "README.md",
]
BLOCK = re.compile(r"^<!-- before the blocks:\n(?P<hidden>.*?)^-->$|^```python\n(?P<shown>.*?)^```$", re.M | re.S)
COMMAND = re.compile(
    r"(?:^|`)(?:[A-Z_]+=\S+ )*(?P<run>(?:lowrank-ops|(?:\.venv/bin/)?python -m benchmarks\.[\w.]+) [^`\n]*)", re.M
)
TARGET = re.compile(r"(?:^|`)make (?P<names>[a-z][\w -]*)", re.M)
PLACEHOLDERS = "--model my:model --calibration my:batches --out folder"  # what "lowrank-ops compress ..." leaves out
LINK = re.compile(r"\]\((?!https?:)(?P<file>[^)#\s]*)(?:#(?P<heading>[^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)


class Block(NamedTuple):
    """Code and the line of the page that it begins at."""

    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """The code of a page, in order."""
    found = []
    for match in BLOCK.finditer(text):
        kind = "hidden" if match["hidden"] is not None else "shown"
        found.append(Block(match[kind], text.count("\n", 0, match.start(kind)) + 1))
    return found


def run(page: Path) -> None:
    """Run the blocks of a page; tracebacks name the page and its lines."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))], ids=named)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    run(page)


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    titles = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        target = page.parent / link["file"] if link["file"] else page
        assert target.exists(), link[0]
        if link["heading"] and target.suffix == ".md":
            assert link["heading"] in headings(target), link[0]


class Parsed(Exception):
    """The arguments of a command were accepted."""


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command up to its parsed arguments; SystemExit if they are not accepted."""

    def stopping(parse: Callable[..., object]) -> Callable[..., None]:
        def stop(*arguments: object) -> None:
            parse(*arguments)
            raise Parsed

        return stop

    words = shlex.split(command.replace("...", PLACEHOLDERS), comments=True)
    module, arguments = ("lowrank_ops.cli", words[1:]) if words[0] == "lowrank-ops" else (words[2], words[3:])
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [module, *arguments])
        runpy.run_module(module, run_name="__main__")


def commands(text: str) -> list[str]:
    return list(dict.fromkeys(match["run"] for match in COMMAND.finditer(text.replace("\\\n", " "))))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("page", "command"),
    [(page, command) for page in WITH_COMMANDS for command in commands(page.read_text(encoding="utf-8"))],
    ids=lambda value: named(value) if isinstance(value, Path) else value.split(" #")[0].strip(),
)
def test_commands_are_accepted(page: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(command, monkeypatch)


def test_unknown_arguments_are_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "`lowrank-ops compress ... --refit sequential`\n```\npython -m benchmarks.tables --none\n```\n"
    found = commands(text)
    assert len(found) == 2
    for command in found:
        with pytest.raises(SystemExit):
            parse(command, monkeypatch)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    found = {
        name for names in TARGET.findall(page.read_text(encoding="utf-8")) for name in names.split("  ")[0].split()
    }
    assert found - targets == set()
    for name in found:  # and what it needs has a rule
        subprocess.run(["make", "--dry-run", name], cwd=ROOT, check=True, capture_output=True)


def test_reference_has_every_public_name() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = {path.rpartition(".")[2] for path in re.findall(r"^::: ([\w.]+)$", text, re.M)}
    assert {*lro.__all__, *lro.ops.__all__} - {"ops"} - listed == set()


def test_failing_block_names_page_and_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- before the blocks:\nx = 1\n-->\n\n```python\nx = x + 1\nassert x == 3, x\n```\n")
    with pytest.raises(AssertionError) as raised:
        run(page)
    assert str(raised.value) == "2"
    assert (raised.traceback[-1].path, raised.traceback[-1].lineno + 1) == (page, 9)
