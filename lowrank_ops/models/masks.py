"""Which rows of an activation are real tokens and which are padding, layer by layer.

A model may process several sequences: an encoder's and a decoder's, text and image patches. So a mask belongs to a
module and everything inside it. For a known mask name, each transformers model and each torch Transformer module
inside the model uses the mask that it is called with. Rows that a module receives from another sequence (the keys and
values of a cross-attention) have the mask of that sequence. Shapes decide only where nothing else is known.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Set
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .experts import routed_rows
from .mask_sources import INHERIT, Known, Mask, MaskSources, Reader, Rows, Unknown, rows_of
from .running import shortened
from .sequences import (
    batch_first_of,
    core_of,
    is_in,
    is_routed,
    may_be_sequence_first,
    outer_modules,
    parameters_of,
)

UNMASKED_ROWS = ("count", "error")

# Parameters of a forward for rows of another sequence than the module's own, and for their mask.
_OTHER_ROWS = ("encoder_hidden_states", "key_value_states", "memory", "rel_embeddings")
_OTHER_MASKS = ("encoder_attention_mask", "memory_key_padding_mask")


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
        self._source, self._refuse = source, unmasked_rows == "error"
        self._modules = dict(model.named_modules())
        self._readers: Mapping[str, Reader] = {}
        self._now: dict[str, Known] = {}  # by module: of its latest call in this forward
        self._call: tuple[Mapping[str, Any], tuple[Any, ...], Mapping[str, Any]] | None = None  # of the running forward
        self._output: Known = None
        self._origins: dict[int, tuple[weakref.ref[Tensor], Known]] = {}  # by storage
        self._unknown: dict[str, Unknown] = {}
        self._fitted = False
        self._thread = get_ident()
        self._sequence_first = any(map(may_be_sequence_first, model.modules()))
        self._core = core_of(self._modules)  # the text model or the decoder, whose rows the outermost module returns
        self._explicit: Set[str] = set()
        if source is None:
            return
        sources = MaskSources(model, source, self._modules, self._core)
        self._readers, self._explicit = sources.readers, sources.explicit
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
        if isinstance(known, Rows):
            known = self._fit(fqn, layer, x, known)
        elif isinstance(known, Unknown) and self._is_pooled(x):
            known = None
        if isinstance(known, Unknown):
            self._note(fqn, known)
            return None
        return None if known is None else known.real

    def of_block(self, fqn: str, block: nn.Module, x: Tensor | None) -> Tensor | None:
        """As :meth:`of`, for a tensor (batch, positions, features) that a block receives or returns; else None."""
        return None if x is None or x.dim() != 3 else self.of(fqn, block, x)

    def of_output(self) -> Tensor | None:
        """The mask of the last forward's output (batch, positions, ...); None if all rows count."""
        if isinstance(self._output, Unknown):
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
        lines = [f"\n  {shortened(layers)}: {reason}" for reason, layers in by_reason.items()]
        return (
            f"the masks of these layers are unknown, so all of their rows count:{''.join(lines)}\nName it with "
            "mask={module: name}, or None for a module without padding; unmasked_rows='error' refuses such rows."
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
            if known is INHERIT:
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
            self._output = self._now.get("", Unknown("is of no module that mask names"))
            if self._core is not None and self._core.fqn in self._now:
                self._output = self._now[self._core.fqn]
            self._call = None
            self._now.clear()
            self._check_fitted()
        elif fqn in self._now:
            first = next((part for part in _values(output) if isinstance(part, Tensor)), None)
            if first is not None and self._origin(first) is INHERIT:
                core = self._core
                inner = core.fqn if core is not None and is_in(core.fqn, fqn) else fqn
                self._remember(first, self._now.get(inner, self._now[fqn]))

    def _note_origin(self, fqn: str, name: str, rows: Tensor, given: Mapping[str, Any]) -> None:
        if name == "rel_embeddings":
            self._remember(rows, None)
            return
        if self._origin(rows) is not INHERIT:
            return
        masks = [given[mask] for mask in _OTHER_MASKS if isinstance(given.get(mask), Tensor)]
        if masks and masks[0].dim() == 2:
            mask_name = next(mask for mask in _OTHER_MASKS if given.get(mask) is masks[0])
            self._remember(rows, rows_of(masks[0], mask_name, batch_first_of(self._modules[fqn])))
        else:
            self._remember(rows, Unknown(f"has rows of {name}, which {fqn or 'the model'} was given without a mask"))

    def _remember(self, rows: Tensor, known: Known) -> None:
        self._origins = {key: entry for key, entry in self._origins.items() if entry[0]() is not None}
        self._origins[rows.untyped_storage().data_ptr()] = (weakref.ref(rows), known)

    def _origin(self, rows: Tensor) -> Any:
        pointer = rows.untyped_storage().data_ptr()
        tensor, known = self._origins.get(pointer, (None, None))
        found = None if tensor is None else tensor()
        return known if found is not None and found.untyped_storage().data_ptr() == pointer else INHERIT

    def _known(self, fqn: str, x: Tensor) -> Known:
        if fqn in self._explicit and fqn in self._now:
            return self._now[fqn]
        origin = self._origin(x)
        frame = next((outer for outer in [fqn, *outer_modules(fqn)] if outer in self._now), None)
        if origin is not INHERIT and not (isinstance(origin, Unknown) and frame in self._explicit):
            return origin
        if frame is None and self._call is None:
            return Unknown(
                "was called outside the model's own forward, where mask is not known; pass the module whose forward is "
                "called",
                misfit=True,
            )
        core = self._core
        closer = frame in self._explicit or not is_in("" if core is None else core.fqn, frame or "")
        if core is not None and not core.holds(fqn) and not closer:
            if core.encoder is None and fqn != core.head:
                return Unknown(f"is outside {core.fqn!r}, whose rows the mask is of")
            frame = core.fqn if core.fqn in self._now or core.encoder is not None else frame
        return self._now.get(frame, Unknown("is in no module that mask names"))  # type: ignore[arg-type]

    def _frame(self, fqn: str) -> str | None:
        return next((outer for outer in [fqn, *outer_modules(fqn)] if outer in self._readers), None)

    def _is_pooled(self, x: Tensor) -> bool:
        """Whether ``x`` (batch, features) has one row per sample."""
        rows = next((known for known in self._now.values() if isinstance(known, Rows)), None)
        return rows is not None and x.dim() == 2 and len(x) == rows.real.shape[0 if rows.batch_first else 1]

    def _fit(self, fqn: str, layer: nn.Module, x: Tensor, rows: Rows) -> Known:
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
                return Unknown(
                    f"has an activation {tuple(x.shape)} whose batch dimension is unknown, because the model has "
                    "modules with batch_first=False"
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
        return Unknown(
            f"has an activation {tuple(x.shape)}, which the mask of shape {tuple(real.shape)} does not fit; "
            "without its features, the activation must be (batch, positions), (batch * positions,) or (batch,)",
            misfit=True,
        )

    def _fits(self, real: Tensor) -> Rows:
        self._fitted = True
        return Rows(real)

    def _note(self, fqn: str, unknown: Unknown) -> None:
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


def _values(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, (tuple, list)) else [output]


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of ``x`` (..., features) where a mask that :meth:`Masks.of` has found is true."""
    if x.is_nested:
        return torch.cat(x.unbind())  # nn.TransformerEncoder has removed the padding
    return x if mask is None else x[mask.reshape(x.shape[:-1]).to(x.device)]
