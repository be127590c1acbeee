"""Which rows of an activation are real tokens and which are padding, layer by layer.

A model may process several sequences: an encoder's and a decoder's, text and image patches. So a mask belongs to a
module and everything inside it. For a known mask name, each transformers model and each torch Transformer module
inside the model uses the mask that it is called with. Rows that a module receives from another sequence (the keys and
values of a cross-attention) have the mask of that sequence. Shapes decide only where nothing else is known.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .experts import routed_rows
from .sequences import (
    batch_first_of,
    core_of,
    is_in,
    is_routed,
    is_transformers,
    may_be_sequence_first,
    modality_of,
    outer_modules,
    parameters_of,
)

_OneMask = str | Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]
Mask = _OneMask | Mapping[str, _OneMask | None]
UNMASKED_ROWS = ("count", "error")

# Parameters of a forward for rows of another sequence than the module's own, and for their mask.
_OTHER_ROWS = ("encoder_hidden_states", "key_value_states", "memory", "rel_embeddings")
_OTHER_MASKS = ("encoder_attention_mask", "memory_key_padding_mask")
_TORCH_MODULES = (nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class _Rows(NamedTuple):
    """The rows of one sequence per sample; ``real`` is (batch, positions), or (positions, batch) if not batch_first."""

    real: Tensor
    batch_first: bool = True


class _Unknown(NamedTuple):
    """Rows whose mask is unknown, and why."""

    reason: str
    misfit: bool = False  # the mask may be a wrong one


_Known = _Rows | _Unknown | None  # None: all rows are real
_Reader = Callable[[Mapping[str, Any], tuple[Any, ...], Mapping[str, Any]], _Known]


class Masks:
    """The masks of a model's layers during its forwards.

    Args:
        model: any module.
        source: as for :func:`lowrank_ops.calibrate`.
        unmasked_rows: ``"count"`` or ``"error"``, for rows whose mask is unknown.

    Raises:
        TypeError: ``source`` is not a mask.
        ValueError: a key names no module, the polarity of a name is not known, or one mask is given for a model that
            is known to have two sequences.
    """

    def __init__(self, model: nn.Module, source: Mask | None, unmasked_rows: str = "count") -> None:
        if unmasked_rows not in UNMASKED_ROWS:
            raise ValueError(f"unmasked_rows must be 'count' or 'error'; got {unmasked_rows!r}.")
        self._model, self._source, self._refuse = model, source, unmasked_rows == "error"
        self._modules = dict(model.named_modules())
        self._readers: dict[str, _Reader] = {}
        self._now: dict[str, _Known] = {}  # by module: of its latest call in this forward
        self._call: tuple[Mapping[str, Any], tuple[Any, ...], Mapping[str, Any]] | None = None  # of the running forward
        self._output: _Known = None
        self._origins: dict[int, tuple[weakref.ref[Tensor], _Known]] = {}  # by storage
        self._unknown: dict[str, _Unknown] = {}
        self._fitted = False
        self._thread = get_ident()
        self._sequence_first = any(map(may_be_sequence_first, model.modules()))
        self._core = core_of(self._modules)  # the text model or the decoder, whose rows the outermost module returns
        self._explicit: set[str] = set()
        if source is None:
            return
        if isinstance(source, Mapping):
            self._read_by_module(source)
        else:
            _check_source("mask", source)
            if callable(source) and self._core is not None and self._core.encoder:
                raise ValueError(
                    f"mask is one function, and {self._core.encoder!r} and {self._core.fqn!r} have rows of two "
                    f"sequences; pass mask={{{self._core.encoder!r}: ..., {self._core.fqn!r}: ...}}."
                )
            self._readers[""] = partial(self._of_call, source, "mask")
            if isinstance(source, str):
                self._read_by_name(source)
        self._names = {fqn: parameters_of(module) for fqn, module in self._modules.items() if self._is_watched(fqn)}

    def attach(self, handles: list[RemovableHandle]) -> None:
        """Hook the model and the modules that have masks of their own; call from the thread that runs the model."""
        self._thread = get_ident()
        if self._source is None:
            return
        for fqn in self._names:
            module = self._modules[fqn]
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, fqn=fqn: self._before(fqn, args, kwargs), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(lambda module, args, y, fqn=fqn: self._after(fqn, y)))

    def of(self, fqn: str, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The mask of the rows of ``x`` (..., features), the input of a layer that is being called.

        Returns:
            A bool tensor, true for real rows, of the leading shape of ``x`` or with as many elements as ``x`` has rows;
            None if all rows count.

        Raises:
            ValueError: the mask is unknown, and ``unmasked_rows="error"``.
        """
        if self._source is None or x.is_nested:
            return None  # nn.TransformerEncoder has removed the padding of nested tensors
        known = self._known(fqn, x)
        if isinstance(known, _Rows):
            known = self._fit(fqn, layer, x, known)
        elif isinstance(known, _Unknown) and self._is_pooled(x):
            known = None
        if isinstance(known, _Unknown):
            self._note(fqn, known)
            return None
        return None if known is None else known.real

    def of_block(self, fqn: str, block: nn.Module, x: Tensor | None) -> Tensor | None:
        """As :meth:`of`, for a tensor (batch, positions, features) that a block receives or returns; else None."""
        return None if x is None or x.dim() != 3 else self.of(fqn, block, x)

    def of_output(self) -> Tensor | None:
        """The mask of the last forward's output (batch, positions, ...); None if all rows count."""
        if isinstance(self._output, _Unknown):
            self._note("", self._output)
            return None
        if self._output is None:
            return None
        self._fitted = True
        return self._output.real

    def same(self, fqn: str, other: str) -> bool:
        """Whether two layers that receive one tensor have the same mask."""
        return self._source is None or self._frame(fqn) == self._frame(other)

    def finish(self) -> str | None:
        """What to warn of: the layers whose rows were counted without a mask.

        Raises:
            ValueError: the mask fitted no layer.
        """
        self._check_fitted()
        if not self._unknown:
            return None
        by_reason: dict[str, list[str]] = {}
        for fqn, unknown in self._unknown.items():
            by_reason.setdefault(unknown.reason, []).append(fqn or "the output")
        lines = [
            f"\n  {', '.join(layers[:3])}{f' and {len(layers) - 3} more' if len(layers) > 3 else ''}: {reason}"
            for reason, layers in by_reason.items()
        ]
        return (
            f"all rows of these layers count, because their mask is unknown:{''.join(lines)}\nName it with "
            "mask={module: name}, or None for a module without padding; unmasked_rows='error' refuses such rows."
        )

    # Which modules have a mask of their own.

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
                raise ValueError(f"mask has the key {key!r}, which is the name of no module; {hint}")
            for fqn in found:
                (patterns if key.startswith("re:") else exact)[fqn] = (key, one)
        for fqn, (key, one) in {**patterns, **exact}.items():
            self._readers[fqn] = partial(self._of_call, one, f"mask[{key!r}]")
        self._explicit = set(self._readers)

    def _read_by_name(self, name: str) -> None:
        """Modules that are known to receive a mask with their own call."""
        if name == "attention_mask":
            for fqn, module in self._modules.items():
                if is_transformers(module):
                    self._readers[fqn] = partial(self._of_own_call, fqn, modality_of(module))
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
                return _INHERIT if own == name else _Unknown(f"is in {fqn!r}, which was called without {own}")
            return _rows(given[own], own, batch_first)

        self._readers[fqn] = read
        if decodes and own != name and "" in self._readers and fqn:
            self._readers[""] = lambda given, args, kwargs: _Unknown(
                f"may have rows of {fqn!r}, which mask={name!r} is not of"
            )

    def _is_watched(self, fqn: str) -> bool:
        return (
            fqn == "" or fqn in self._readers or any(name in _OTHER_ROWS for name in parameters_of(self._modules[fqn]))
        )

    # What is known during a forward.

    def _before(self, fqn: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() != self._thread:
            return
        given = {**dict(zip(self._names[fqn], args, strict=False)), **kwargs}
        if fqn == "":
            self._now.clear()
            self._call = (given, args, kwargs)
        if fqn in self._readers:
            call = self._call if fqn in self._explicit else None
            known = self._readers[fqn](*(call or (given, args, kwargs)))
            if known is _INHERIT:
                self._now.pop(fqn, None)
            else:
                self._now[fqn] = known
        tensors = [value for name, value in given.items() if isinstance(value, Tensor) and name not in _OTHER_ROWS]
        for name in _OTHER_ROWS:
            if isinstance(given.get(name), Tensor) and not any(given[name] is other for other in tensors):
                self._note_origin(fqn, name, given[name], given)

    def _after(self, fqn: str, output: Any) -> None:
        if get_ident() != self._thread:
            return
        if fqn == "":
            self._output = self._now.get("", _Unknown("is of no module that mask names"))
            if self._core is not None and self._core.fqn in self._now:
                self._output = self._now[self._core.fqn]
            self._call = None
            self._now.clear()
            self._check_fitted()
        elif fqn in self._now:
            first = next((part for part in _values(output) if isinstance(part, Tensor)), None)
            if first is not None and self._origin(first) is _INHERIT:
                core = self._core
                inner = core.fqn if core is not None and is_in(core.fqn, fqn) else fqn
                self._remember(first, self._now.get(inner, self._now[fqn]))

    def _note_origin(self, fqn: str, name: str, rows: Tensor, given: Mapping[str, Any]) -> None:
        if name == "rel_embeddings":
            self._remember(rows, None)
            return
        if self._origin(rows) is not _INHERIT:
            return
        masks = [given[mask] for mask in _OTHER_MASKS if isinstance(given.get(mask), Tensor)]
        if masks and masks[0].dim() == 2:
            mask_name = next(mask for mask in _OTHER_MASKS if given.get(mask) is masks[0])
            self._remember(rows, _rows(masks[0], mask_name, batch_first_of(self._modules[fqn])))
        else:
            self._remember(rows, _Unknown(f"has rows of {name}, which {fqn or 'the model'} was given without a mask"))

    def _remember(self, rows: Tensor, known: _Known) -> None:
        self._origins = {key: entry for key, entry in self._origins.items() if entry[0]() is not None}
        self._origins[rows.untyped_storage().data_ptr()] = (weakref.ref(rows), known)

    def _origin(self, rows: Tensor) -> Any:
        pointer = rows.untyped_storage().data_ptr()
        tensor, known = self._origins.get(pointer, (None, None))
        found = None if tensor is None else tensor()
        return known if found is not None and found.untyped_storage().data_ptr() == pointer else _INHERIT

    def _known(self, fqn: str, x: Tensor) -> _Known:
        if fqn in self._explicit and fqn in self._now:
            return self._now[fqn]
        origin = self._origin(x)
        frame = next((outer for outer in [fqn, *outer_modules(fqn)] if outer in self._now), None)
        if origin is not _INHERIT and not (isinstance(origin, _Unknown) and frame in self._explicit):
            return origin
        if frame is None and self._call is None:
            return _Unknown(
                "was called outside the model's own forward, where mask is not known; pass the module whose forward is "
                "called",
                misfit=True,
            )
        core = self._core
        closer = frame in self._explicit or not is_in("" if core is None else core.fqn, frame or "")
        if core is not None and not core.holds(fqn) and not closer:
            if core.encoder is None and fqn != core.head:
                return _Unknown(f"is outside {core.fqn!r}, whose rows the mask is of")
            frame = core.fqn if core.fqn in self._now or core.encoder is not None else frame
        return self._now.get(frame, _Unknown("is in no module that mask names"))  # type: ignore[arg-type]

    def _frame(self, fqn: str) -> str | None:
        return next((outer for outer in [fqn, *outer_modules(fqn)] if outer in self._readers), None)

    def _is_pooled(self, x: Tensor) -> bool:
        """Whether ``x`` (batch, features) has one row per sample."""
        rows = next((known for known in self._now.values() if isinstance(known, _Rows)), None)
        return rows is not None and x.dim() == 2 and len(x) == rows.real.shape[0 if rows.batch_first else 1]

    def _fit(self, fqn: str, layer: nn.Module, x: Tensor, rows: _Rows) -> _Known:
        """The mask of the rows of ``x``, which are positions of ``rows``, all of them or some."""
        real, leading = rows.real, x.shape[:-1]
        routed = routed_rows()
        if routed is not None and routed.total == real.numel():
            return self._fits(real.flatten()[routed.tokens.to(real.device)].unsqueeze(1))  # samples of one position
        square = real.shape[0] == real.shape[1] != 1
        flat = leading == (real.numel(),) and not is_routed(fqn) and routed is None
        if self._sequence_first and rows.batch_first:  # the mask is of the model; its layers may be either way
            if leading == real.T.shape and not square:
                return self._fits(real.T)
            if square or flat:
                return _Unknown(
                    f"has an activation {tuple(x.shape)} whose batch dimension is unknown, because the model has "
                    "modules whose first dimension is the position (batch_first=False)"
                )
        if leading == real.shape or flat:
            return self._fits(real)
        if leading == (real.shape[0 if rows.batch_first else 1],) and not is_routed(fqn):
            return None  # pooled: one row per sequence
        kept = None if self._call is None else self._call[0].get("logits_to_keep")
        if isinstance(kept, int) and len(leading) == 2 and leading[0] == real.shape[0] and 0 < leading[1] == kept:
            return self._fits(real[:, -kept:])
        for extractor in (self._modules[outer] for outer in outer_modules(fqn) if outer in self._modules):
            if hasattr(extractor, "_get_feature_vector_attention_mask") and len(leading) == 2:
                frames = extractor._get_feature_vector_attention_mask(leading[1], real)  # type: ignore[operator]
                if frames.shape == leading:
                    return self._fits(frames.bool())
        return _Unknown(
            f"has an activation {tuple(x.shape)} that the mask of shape {tuple(real.shape)} does not fit; its leading "
            "shape must be (batch, positions), (batch * positions,) or (batch,)",
            misfit=True,
        )

    def _fits(self, real: Tensor) -> _Rows:
        self._fitted = True
        return _Rows(real)

    def _note(self, fqn: str, unknown: _Unknown) -> None:
        if self._refuse:
            raise ValueError(
                f"mask of layer {fqn!r} is unknown: it {unknown.reason}. Name its mask with "
                "mask={module: name}, None for a module without padding, or leave the layer out with filter_fn."
            )
        self._unknown.setdefault(fqn, unknown)

    def _check_fitted(self) -> None:
        if self._source is not None and not self._fitted and any(unknown.misfit for unknown in self._unknown.values()):
            fqn, reason = next((fqn, unknown.reason) for fqn, unknown in self._unknown.items() if unknown.misfit)
            raise ValueError(f"mask fits no layer: layer {fqn!r} {reason}. To count all rows, leave mask out.")

    # Reading one mask.

    def _of_call(
        self,
        source: _OneMask | None,
        argument: str,
        given: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> _Known:
        if source is None:
            return None
        if callable(source):
            return _rows(source(args, dict(kwargs)), "")
        if source not in given:
            if argument == "mask" and len(self._readers) > 1 and not is_transformers(self._model):
                return _Unknown(f"is in no module that was called with {source}")
            if "encoder_outputs" in given:
                return _Unknown(f"has rows of the encoder, whose {source} was not given")
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
            if len(self._readers) > 1:
                return _Unknown(f"may have the rows of any of several masks ({source}, {', '.join(others)})")
            raise ValueError(
                f"mask={source!r} is one of several masks in the call of the model ({', '.join(others)}); name the "
                f"modules, mask={{'encoder': {source!r}, ...}}, or mask={{'': {source!r}}} for the whole model."
            )
        return _newest(_rows(given[source], source), given)

    def _of_own_call(
        self, fqn: str, modality: str, given: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The mask that a transformers model was called with."""
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return _newest(_rows(mask, "attention_mask"), given)
        if (
            fqn == ""
            and mask is None
            and self._core is not None
            and self._core.encoder
            and "attention_mask" not in given
        ):
            return _Unknown("is in no module that was called with attention_mask")
        if fqn == "" and mask is None:
            return self._of_call("attention_mask", "mask", given, args, kwargs)
        if mask is not None:  # already (batch, 1, positions, positions)
            return _INHERIT if fqn else _Unknown("has a mask that is not of the shape (batch, positions)")
        if modality != "input_ids":
            return None  # images and audio frames without a mask have no padding
        core = self._core
        if core is not None and (is_in(fqn, core.fqn) if core.encoder else not core.around(fqn)):
            hint = " (decoder_attention_mask of the model)" if core.encoder else ""
            return _Unknown(f"is in {fqn!r}, which was called without attention_mask{hint}")
        return _INHERIT


_INHERIT: Any = object()  # the module has no mask of its own: that of the module around it holds


def _newest(known: _Known, given: Mapping[str, Any]) -> _Known:
    """With a cache of keys, the mask is of the cached positions and of the new ones; the rows are the new ones."""
    cached = any(given.get(name) is not None for name in ("past_key_values", "cache"))
    if isinstance(known, _Rows) and cached:
        for name, dims in (("input_ids", 2), ("inputs_embeds", 3), ("decoder_input_ids", 2)):
            new = given.get(name)
            if isinstance(new, Tensor) and new.dim() == dims and new.shape[1] < known.real.shape[1]:
                return known._replace(real=known.real[:, -new.shape[1] :])
    return known


def _rows(mask: Any, name: str, batch_first: bool = True) -> _Known:
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
    return _Rows(real if batch_first else real.T, batch_first)


def _check_source(argument: str, source: object) -> None:
    if source is not None and not isinstance(source, str) and not callable(source):
        raise TypeError(
            f"{argument} must be the name of an argument of the model's forward, a function mask(args, kwargs), or a "
            f"mapping of module names to these; got {source!r}."
        )
    if isinstance(source, str) and "pad" in source and not source.endswith("key_padding_mask"):
        raise ValueError(
            f"{argument}={source!r}: whether true means padding does not follow from that name; pass a function, such "
            f"as lambda args, kwargs: ~kwargs[{source!r}], that is true for real tokens."
        )


def _values(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, (tuple, list)) else [output]


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of ``x`` (..., features) where a mask that :meth:`Masks.of` has found is true."""
    if x.is_nested:
        return torch.cat(x.unbind())  # nn.TransformerEncoder has removed the padding
    return x if mask is None else x[mask.reshape(x.shape[:-1]).to(x.device)]
