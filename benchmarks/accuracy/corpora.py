"""Texts that a machine has at hand, in an order that depends on nothing but the texts themselves.

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
from pathlib import Path
from typing import NamedTuple

SHORTEST = 100  # characters; shorter texts say little
APT_LISTS = Path("/var/lib/apt/lists")
APT_READER = "/usr/lib/apt/apt-helper"  # the lists are compressed as apt likes


class Corpus(NamedTuple):
    """Three sets of texts that have no text in common."""

    test: list[str]
    validation: list[str]
    calibration: list[str]  # all that is left; take as many as needed from the front

    def describe(self, calibration: int) -> dict[str, object]:
        """How many texts there were, and what identifies those that are used."""
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
    """The docstrings in Python sources, with their white space made single; what does not parse has none."""
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


SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "debian": debian,
    "debian-with-near-copies": debian_with_near_copies,
    "docstrings": docstrings,
}
