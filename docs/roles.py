"""griffe extension: cross-references (``:func:`name```), ``name::`` and Example sections, as griffe reads them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?(?P<name>[\w.]+)`")


class Roles(griffe.Extension):
    """Replaces them before docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\g<name>`", obj.docstring.value)
            text = re.sub(r"::$", ":", text, flags=re.M)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)  # griffe's name for doctests
