"""mkdocs hooks: write the table of compiled CUDA kernels, and refuse examples that are not shown as code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "lowrank_ops" / "liblowrank_ops.so"
TABLE = "tests.native.table"  # prints the table of the library that is built
MARK = "<!-- table of compiled kernels -->"
MISSING = """\
*This build of the documentation has no table: the CUDA library was not built. With nvcc on the machine,
`make test-native docs` builds the library and generates the table.*"""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with the table in place of its mark."""
    return markdown.replace(MARK, table()) if MARK in markdown else markdown


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """The page, unless Markdown took the ``>>>`` of an example for quotations.

    Raises:
        ValueError: it did.
    """
    if "<blockquote>\n<blockquote>" in html:
        raise ValueError(f"{page.file.src_uri}: an example is shown as quotations; griffe did not find its section.")
    return html


def table() -> str:
    """One line per compiled kernel, or a sentence that says how to get them.

    Raises:
        CalledProcessError: the library is there and cannot be read.
    """
    if not LIBRARY.is_file():
        return MISSING
    command = [sys.executable, "-m", TABLE]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
