"""Which modules of a model hold which sequence: text, images, an encoder's or a decoder's, and in which layout."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn


class Core(NamedTuple):
    """The module whose rows the model returns, and the encoder that it attends to, if any."""

    fqn: str
    encoder: str | None
    head: str | None  # the output embedding

    def holds(self, fqn: str) -> bool:
        """Whether a layer is in the module or in its encoder."""
        return is_in(fqn, self.fqn) or (self.encoder is not None and is_in(fqn, self.encoder))

    def around(self, fqn: str) -> bool:
        """Whether a module is in this one or around it."""
        return is_in(fqn, self.fqn) or is_in(self.fqn, fqn)


def core_of(modules: Mapping[str, nn.Module]) -> Core | None:
    """The decoder of a transformers model, or its text model if it also has models of images or audio."""
    names: dict[Any, str] = {module: fqn for fqn, module in modules.items()}
    outermost: Any = next((module for module in modules.values() if is_transformers(module)), None)
    if outermost is None:
        return None
    head = outermost.get_output_embeddings()
    head_name = names.get(head) if isinstance(head, nn.Module) else None
    if getattr(outermost.config, "is_encoder_decoder", False):
        encoder, decoder = (names.get(part) for part in (outermost.get_encoder(), outermost.get_decoder()))
        own = names[outermost]
        if encoder is not None and decoder is not None and own not in (encoder, decoder) and encoder != decoder:
            return Core(decoder, encoder, head_name)
        return None
    text = type(outermost.config.get_text_config())
    if text is type(outermost.config):
        return None
    for fqn, module in modules.items():
        if is_transformers(module) and type(module.config) is text:
            return Core(fqn, None, head_name)
    return None


def is_transformers(module: nn.Module) -> bool:
    """Whether ``module`` is a PreTrainedModel, without an import of transformers."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def may_be_sequence_first(module: nn.Module) -> bool:
    """Whether activations in ``module`` may be (positions, batch, features)."""
    own_layout = type(module).__name__.startswith(("XLNet", "FSMT")) and is_transformers(module)
    return own_layout or getattr(module, "batch_first", True) is False


def modality_of(module: nn.Module) -> str:
    return str(getattr(module, "main_input_name", "input_ids"))


def batch_first_of(module: nn.Module) -> bool:
    flags = [part.batch_first for part in module.modules() if isinstance(getattr(part, "batch_first", None), bool)]
    return all(flags)


def parameters_of(module: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []


def outer_modules(fqn: str) -> list[str]:
    """The names of the modules around one, innermost first; the model's last."""
    parts = fqn.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)] if fqn else []


def is_in(fqn: str, outer: str) -> bool:
    return not outer or fqn == outer or fqn.startswith(f"{outer}.")


def is_routed(fqn: str) -> bool:
    """Whether a layer is in an expert by its name, where a router chooses the rows."""
    return re.search(r"(^|\.)experts\.\d+(\.|$)", fqn) is not None
