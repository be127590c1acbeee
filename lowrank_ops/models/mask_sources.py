"""Where the mask of each module comes from: which modules have one of their own, and how a call of them gives it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sequences import Core, batch_first_of, is_in, is_transformers, modality_of, outer_modules

_OneMask = str | Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]
Mask = _OneMask | Mapping[str, _OneMask | None]
_TORCH_MODULES = (nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
INHERIT: Any = object()  # the module has no mask of its own: that of the module around it holds


class Rows(NamedTuple):
    """The rows of one sequence per sample; ``real`` is (batch, positions), or (positions, batch) if not batch_first."""

    real: Tensor
    batch_first: bool = True


class Unknown(NamedTuple):
    """Rows whose mask is unknown, and why."""

    reason: str
    misfit: bool = False  # the mask may be a wrong one


Known = Rows | Unknown | None  # None: all rows are real
Reader = Callable[[Mapping[str, Any], tuple[Any, ...], Mapping[str, Any]], Known]


class MaskSources:
    """The modules of a model that have masks of their own.

    Args:
        model: any module.
        source: as for :func:`lowrank_ops.calibrate`, not None.
        modules: of ``model``, by name.
        core: the text model or the decoder of ``model``.

    Attributes:
        readers: by module: ``reader(given, args, kwargs)`` returns what a call of the module, or of the model for
            those in ``explicit``, says about its rows, or ``INHERIT``. ``given`` are all arguments by name.
        explicit: modules that the user has named.

    Raises:
        TypeError, ValueError: as for :class:`lowrank_ops.models.masks.Masks`.
    """

    def __init__(self, model: nn.Module, source: Mask, modules: Mapping[str, nn.Module], core: Core | None) -> None:
        self._model, self._modules, self._core = model, modules, core
        self.readers: dict[str, Reader] = {}
        self.explicit: set[str] = set()
        if isinstance(source, Mapping):
            self._read_by_module(source)
            return
        _check_source("mask", source)
        if callable(source) and core is not None and core.encoder:
            raise ValueError(
                f"mask is one function, but {core.encoder!r} and {core.fqn!r} process different sequences; pass "
                f"mask={{{core.encoder!r}: ..., {core.fqn!r}: ...}}."
            )
        self.readers[""] = partial(self._of_call, source, "mask")
        if isinstance(source, str):
            self._read_by_name(source)

    def _read_by_module(self, source: Mapping[str, _OneMask | None]) -> None:
        exact: dict[str, tuple[str, _OneMask | None]] = {}
        patterns: dict[str, tuple[str, _OneMask | None]] = {}
        for key, one in source.items():
            if not isinstance(key, str):
                raise TypeError(f'keys of mask must be names of modules or "re:pattern"; got {key!r}.')
            _check_source(f"mask[{key!r}]", one)
            found = [key] if key in self._modules else []
            if key.startswith("re:"):
                found = [fqn for fqn in self._modules if re.fullmatch(key[3:], fqn)]
            if not found:
                near = [fqn for fqn in self._modules if fqn.split(".")[-1] == key.split(".")[-1]][:3]
                hint = f"did you mean {', '.join(map(repr, near))}?" if near else "use names of model.named_modules()."
                raise ValueError(f"mask has the key {key!r}, which names no module; {hint}")
            for fqn in found:
                (patterns if key.startswith("re:") else exact)[fqn] = (key, one)
        for fqn, (key, one) in {**patterns, **exact}.items():
            self.readers[fqn] = partial(self._of_call, one, f"mask[{key!r}]")
        self.explicit = set(self.readers)

    def _read_by_name(self, name: str) -> None:
        """Modules that are known to receive a mask with their own call."""
        if name == "attention_mask":
            for fqn, module in self._modules.items():
                if is_transformers(module):
                    self.readers[fqn] = partial(self._of_own_call, fqn, modality_of(module))
        elif name.endswith("key_padding_mask"):
            for fqn, module in self._modules.items():
                outer = [self._modules[other] for other in outer_modules(fqn)]
                if isinstance(module, _TORCH_MODULES) and not any(isinstance(one, _TORCH_MODULES) for one in outer):
                    self._read_torch_module(fqn, module, name)

    def _read_torch_module(self, fqn: str, module: nn.Module, name: str) -> None:
        decodes = isinstance(module, (nn.TransformerDecoder, nn.TransformerDecoderLayer))
        own, batch_first = f"{'tgt' if decodes else 'src'}_key_padding_mask", batch_first_of(module)

        def read(given: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            if given.get(own) is None:
                return INHERIT if own == name else Unknown(f"is in {fqn!r}, which was called without {own}")
            return rows_of(given[own], own, batch_first)

        self.readers[fqn] = read
        if decodes and own != name and "" in self.readers and fqn:
            self.readers[""] = lambda given, args, kwargs: Unknown(
                f"may have rows of {fqn!r}, to which mask={name!r} does not apply"
            )

    def _of_call(
        self,
        source: _OneMask | None,
        argument: str,
        given: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Known:
        if source is None:
            return None
        if callable(source):
            return rows_of(source(args, dict(kwargs)), "")
        if source not in given:
            if argument == "mask" and len(self.readers) > 1 and not is_transformers(self._model):
                return Unknown(f"is in no module that was called with {source}")
            if "encoder_outputs" in given:
                return Unknown(f"has rows of the encoder, whose {source} was not given")
            names = ", ".join(kwargs) or "none"
            raise ValueError(
                f"{argument}={source!r} is not among the keyword arguments of the model's forward ({names}); pass "
                "batches as mappings, or a callable mask(args, kwargs)."
            )
        others = [
            name
            for name, value in given.items()
            if name.endswith("mask") and name != source and isinstance(value, Tensor) and value.dim() == 2
        ]
        if argument == "mask" and others:
            if len(self.readers) > 1:
                return Unknown(f"may have the rows of any of several masks ({source}, {', '.join(others)})")
            raise ValueError(
                f"mask={source!r} is one of several masks in the call of the model ({', '.join(others)}); name the "
                f"modules, mask={{'encoder': {source!r}, ...}}, or mask={{'': {source!r}}} for the whole model."
            )
        return _newest(rows_of(given[source], source), given)

    def _of_own_call(
        self, fqn: str, modality: str, given: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The mask that a transformers model was called with."""
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return _newest(rows_of(mask, "attention_mask"), given)
        if (
            fqn == ""
            and mask is None
            and self._core is not None
            and self._core.encoder
            and "attention_mask" not in given
        ):
            return Unknown("is in no module that was called with attention_mask")
        if fqn == "" and mask is None:
            return self._of_call("attention_mask", "mask", given, args, kwargs)
        if mask is not None:  # already (batch, 1, positions, positions)
            return INHERIT if fqn else Unknown("has a mask that is not of the shape (batch, positions)")
        if modality != "input_ids":
            return None  # images and audio frames without a mask have no padding
        core = self._core
        if core is not None and (is_in(fqn, core.fqn) if core.encoder else not core.around(fqn)):
            hint = " (decoder_attention_mask of the model)" if core.encoder else ""
            return Unknown(f"is in {fqn!r}, which was called without attention_mask{hint}")
        return INHERIT


def _newest(known: Known, given: Mapping[str, Any]) -> Known:
    """With a cache of keys, the mask is of the cached positions and of the new ones; the rows are the new ones."""
    cached = any(given.get(name) is not None for name in ("past_key_values", "cache"))
    if isinstance(known, Rows) and cached:
        for name, dims in (("input_ids", 2), ("inputs_embeds", 3), ("decoder_input_ids", 2)):
            new = given.get(name)
            if isinstance(new, Tensor) and new.dim() == dims and new.shape[1] < known.real.shape[1]:
                return known._replace(real=known.real[:, -new.shape[1] :])
    return known


def rows_of(mask: Any, name: str, batch_first: bool = True) -> Known:
    """A mask (batch, positions) that was given, as rows.

    Raises:
        ValueError: it does not have two dimensions, or holds NaN or negative values.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must have shape (batch, positions); got {given}.")
    if mask.is_floating_point() and bool(mask.isnan().any()):
        raise ValueError("mask holds NaN; pass one that is true or 1 for real tokens.")
    added = mask.is_floating_point() and name.endswith("key_padding_mask")
    if not added and mask.dtype != torch.bool and bool((mask < 0).any()):
        raise ValueError(
            "mask holds negative values, as masks do that are added to attention scores, and labels of padding; pass a "
            "function mask(args, kwargs) that is true for real tokens."
        )
    real = mask.bool()
    if name.endswith("key_padding_mask"):  # true is padding; of floats, which are added to scores, -inf is
        real = mask > -torch.inf if mask.is_floating_point() else ~real
    return Rows(real if batch_first else real.T, batch_first)


def _check_source(argument: str, source: object) -> None:
    if source is not None and not isinstance(source, str) and not callable(source):
        raise TypeError(
            f"{argument} must be the name of an argument of the model's forward, a function mask(args, kwargs), or a "
            f"mapping of module names to these; got {source!r}."
        )
    if isinstance(source, str) and "pad" in source and not source.endswith("key_padding_mask"):
        raise ValueError(
            f"{argument}={source!r}: the name does not show whether true means padding; pass a function that is true "
            f"for real tokens, such as lambda args, kwargs: ~kwargs[{source!r}]."
        )
