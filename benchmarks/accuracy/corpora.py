"""Texts from Debian and Python's standard library, in an order that depends only on the texts.

None is shipped: Debian's package descriptions come with ``apt-get -o Acquire::Languages=en update``, docstrings with
Python's standard library.
"""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

_LEFT_OUT = ("head", "script", "style", "nav")
_BLOCKS = ("p", "div", "li", "h1", "h2", "h3", "h4", "td", "dt", "dd", "pre")
SHORTEST = 100  # characters; shorter texts say little
APT_LISTS = Path("/var/lib/apt/lists")
HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
APT_READER = "/usr/lib/apt/apt-helper"  # the lists are compressed as apt likes


class Corpus(NamedTuple):
    """Three disjoint sets of texts."""

    test: list[str]
    validation: list[str]
    calibration: list[str]  # all that is left; take as many as needed from the front

    def describe(self, calibration: int) -> dict[str, object]:
        """The number of texts, and a digest of those that are used."""
        used = [*self.test, *self.validation, *self.calibration[:calibration]]
        digest = hashlib.sha256("\0".join(used).encode()).hexdigest()
        return {"found": sum(map(len, self)), "used": len(used), "sha256": digest[:16]}


def corpus(kind: str, held_out: int) -> Corpus:
    """The texts of one kind, ``held_out`` of them for tests and as many for choices.

    Raises:
        RuntimeError: the machine has too few of them; the message says how to get them.
    """
    texts = shuffled(SOURCES[kind]())
    if len(texts) <= 2 * held_out:
        raise RuntimeError(
            f"only {len(texts)} texts of kind {kind!r} here, {2 * held_out} are to be held out. "
            "Debian's descriptions: apt-get -o Acquire::Languages=en update."
        )
    return Corpus(texts[:held_out], texts[held_out : 2 * held_out], texts[2 * held_out :])


def shuffled(texts: Iterable[str]) -> list[str]:
    """Each text once, ordered by its hash: any front part is a random sample, the same in every run."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def debian() -> Iterator[str]:
    """Long package descriptions in English; of packages that open with the same paragraph only the first."""
    seen: set[str] = set()
    for text in debian_with_near_copies():
        opening = text.split("\n\n")[1]
        if opening not in seen:
            seen.add(opening)
            yield text


def debian_with_near_copies() -> Iterator[str]:
    """All of them: a test text may differ from one for calibration by a word, such as the name of a language."""
    for file in sorted(APT_LISTS.glob("*i18n_Translation-en*")):
        listing = subprocess.run([APT_READER, "cat-file", str(file)], capture_output=True, text=True, check=True)
        yield from descriptions(listing.stdout)


def descriptions(listing: str) -> Iterator[str]:
    """The descriptions in a Translation file of apt: the summary, and the paragraphs after empty lines."""
    for match in re.finditer(r"^Description-en: (.*)\n((?: .*\n?)+)", listing, re.MULTILINE):
        summary, body = match.groups()
        lines = [line[1:] for line in body.splitlines()]  # a space comes before every line
        paragraphs = re.split(r"^\.$", "\n".join(lines), flags=re.MULTILINE)  # a dot alone divides them
        text = "\n\n".join([summary, *(" ".join(paragraph.split()) for paragraph in paragraphs)])
        if len(text) >= SHORTEST:
            yield text


def docstrings() -> Iterator[str]:
    """Docstrings of modules, classes and functions of the standard library, without those of its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    apart = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
    files = [path for path in sorted(root.rglob("*.py")) if not apart & set(path.relative_to(root).parts)]
    return documented(path.read_text(encoding="utf-8", errors="replace") for path in files)


def documented(sources: Iterable[str]) -> Iterator[str]:
    """The docstrings in Python sources, white space collapsed; files that do not parse are skipped."""
    for source in sources:
        try:
            with warnings.catch_warnings():  # of invalid escapes in old sources
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= SHORTEST:
                    yield text


def python_reference() -> Iterator[str]:
    """The topics of Python's language reference in ``help()``."""
    from pydoc_data.topics import topics

    yield from (text for text in topics.values() if len(text) >= SHORTEST)


def debian_handbook() -> Iterator[str]:
    """The English pages of the Debian handbook, without markup.

    Raises:
        RuntimeError: the package is not installed.
    """
    pages = sorted(HANDBOOK.glob("*.html"))
    if not pages:
        raise RuntimeError(f"no pages in {HANDBOOK}: apt-get install debian-handbook")
    for page in pages:
        text = html_text(page.read_text(encoding="utf-8"))
        if len(text) >= SHORTEST:
            yield text


class _Text(HTMLParser):
    """Collects the text of a page, without its head, scripts and navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._left_out = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._left_out += tag in _LEFT_OUT
        if tag in _BLOCKS or not self.lines:
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        self._left_out -= tag in _LEFT_OUT

    def handle_data(self, data: str) -> None:
        if not self._left_out and self.lines:
            self.lines[-1] += data


def html_text(page: str) -> str:
    """The text of an HTML page, one paragraph, heading or item per line, with single spaces."""
    parser = _Text()
    parser.feed(page)
    return "\n".join(" ".join(line.split()) for line in parser.lines if line.strip())


SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "debian": debian,
    "debian-with-near-copies": debian_with_near_copies,
    "docstrings": docstrings,
    "python": python_reference,
    "handbook": debian_handbook,
}
