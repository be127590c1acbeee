"""Low-rank layers of one input that compute their outputs together, while the model calls them one after another."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..models.layers import check_not_dispatched
from ..ops import grouped
from ..ops._backend import distrusted_kernels
from ..ops.grouped import MAX_MEMBERS
from .linear import LowRankLinear

_MAX_WASTED = 3  # consecutive calls of the group with unused outputs; after more, its members run alone


@checked()
def group_(model: nn.Module, groups: Iterable[Sequence[str]]) -> nn.Module:
    """Let low-rank layers that receive the same tensor compute their outputs together, in place.

    The layers, their parameters, hooks and state dict stay as they are, and so do results, up to rounding: the first
    call of a member with a tensor runs :func:`lowrank_ops.ops.lowrank_linear_grouped` for all members. The others
    return their outputs of that call if they are called with that tensor in the same thread, and neither the tensor nor
    their parameters were changed. This happens only where kernels for groups run (on a GPU) and where no gradient is
    recorded. Elsewhere each member runs alone; also with inference tensors, under autocast, ``torch.compile``, tracing,
    profilers and ``torch.func``, and while a CUDA graph is captured.

    A group whose outputs are repeatedly not used, because its members get different tensors, stops computing together.
    A copy of all members, also by pickle, is again a group; a copy or a replacement of one member is in no group.
    Writes through ``.data`` between the calls of two members, such as ``x.data.add_(1)``, are not detected; autograd
    does not detect them either.

    Args:
        model: any module.
        groups: names of layers per group, two or three with the same ``in_features``, device and dtype.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument of another type.
        ValueError: a name that is not a :class:`lowrank_ops.LowRankLinear`, layers that do not fit together, a layer in
            two groups, or weights that accelerate moves on each call; no layer is grouped then.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.ModuleDict({name: lro.LowRankLinear(64, 32, rank=8) for name in ("q", "k", "v")})
        >>> model = lro.layers.group_(model, [("q", "k", "v")])
        >>> model["q"].group
        LowRankGroup(3 layers)
    """
    check_not_dispatched(model)
    group_layers(dict(model.named_modules(remove_duplicate=False)), groups)
    return model


def group_layers(modules: Mapping[str, nn.Module], groups: Iterable[Sequence[str]]) -> None:
    """:func:`group_` for the modules with these names."""
    found: list[list[LowRankLinear]] = []
    taken: set[nn.Module] = set()
    for names in groups:
        members = []
        for name in names:
            layer = modules.get(name)
            if type(layer) is not LowRankLinear:
                what = "no such layer" if layer is None else f"a {type(layer).__name__}"
                raise ValueError(f"groups names {name!r}, {what}; it must be a LowRankLinear.")
            if layer in taken:
                raise ValueError(f"groups names the layer {name!r} twice; a layer can be in one group.")
            taken.add(layer)
            members.append(layer)
        if not 2 <= len(members) <= MAX_MEMBERS:
            raise ValueError(f"groups must hold 2 to {MAX_MEMBERS} layers each; got {list(names)!r}.")
        forms = [(member.in_features, member.up.dtype, member.up.device) for member in members]
        if len(set(forms)) > 1:
            raise ValueError(f"the layers {list(names)!r} differ in in_features, dtype or device: {forms}.")
        found.append(members)
    for members in found:
        group = LowRankGroup(len(members))
        for place, member in enumerate(members):
            if member.group is not None:
                member.group.leave(member)
            member.group, member.place = group, place
            group.join(member)


def groups_in(model: nn.Module) -> list[list[str]]:
    """The names of each group's layers, of groups that are in ``model`` as a whole."""
    found: dict[LowRankGroup, dict[int, str]] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, LowRankLinear) and module.group is not None and module in module.group.members():
            found.setdefault(module.group, {})[module.place] = fqn
    return [[names[place] for place in sorted(names)] for group, names in found.items() if len(names) == group.size]


class LowRankGroup:
    """What the members of a group share: weak references to each other, and outputs that were not taken yet.

    Args:
        size: number of members.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._members: list[weakref.ref[LowRankLinear] | None] = [None] * size
        self._wasted = 0
        self._local = threading.local()

    def __repr__(self) -> str:
        return f"LowRankGroup({self.size} layers)"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of members join the copy of their group."""
        return LowRankGroup, (self.size,)

    def join(self, member: LowRankLinear) -> None:
        """Take the member's place, unless another layer has it."""
        place = self._members[member.place]
        if place is None or place() is None:
            self._members[member.place] = weakref.ref(member)

    def leave(self, member: LowRankLinear) -> None:
        """Give up the member's place: the others run alone from then on."""
        if member in self.members():
            self._members[member.place] = None

    def members(self) -> list[LowRankLinear]:
        """The layers; fewer than ``size`` if some were freed or copied alone."""
        found = [place() for place in self._members if place is not None]
        return [member for member in found if member is not None]

    def output(self, member: LowRankLinear, x: Tensor) -> Tensor | None:
        """The member's output for ``x`` if the group computes or has computed it, else None: the member runs alone."""
        if self._wasted > _MAX_WASTED or type(x) is not Tensor or not grouped.may_fuse(x) or x.is_inference():
            return None
        own = _factors(member)
        if own is None or not grouped.unobserved(x, *own.tensors):
            return None
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        state = _state(x)
        left: _Left | None = getattr(self._local, "left", None)
        if left is not None and left.x() is x and left.state == state:
            output = left.outputs.pop(member.place, None)
            if output is not None and output.member is member and output.factors.state == own.state:
                if not left.outputs:
                    self._wasted = 0
                return output.y
        return self._compute(member, x, state, own)

    def _compute(self, member: LowRankLinear, x: Tensor, state: tuple[Any, ...], own: _Factors) -> Tensor | None:
        members = self.members()
        if len(members) < self.size or members[member.place] is not member:
            return None
        found = [own if one is member else _factors(one) for one in members]
        factors = [part for part in found if part is not None]
        if len(factors) < self.size:
            return None
        downs, ups, biases = zip(*(part.tensors for part in factors), strict=True)
        run = self._kernel(x, factors, downs, ups, biases)
        if run is None:
            return None
        ys = run(x, downs, ups, biases)
        self._wasted += 1
        storage = x.untyped_storage()
        outputs = {
            place: _Output(one, ys[place], factors[place], factors[place].storages(), storage)
            for place, one in enumerate(members)
            if one is not member
        }
        # Outputs that nobody takes are freed with x at the latest.
        self._local.left = _Left(weakref.ref(x, lambda _: outputs.clear()), state, outputs)
        return ys[member.place]

    def _kernel(self, x: Tensor, factors: list[_Factors], *lists: Any) -> Callable[..., list[Tensor]] | None:
        """What computes the group, which is looked up again only for other shapes, factors or distrusted kernels."""
        layout = x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15, len(distrusted_kernels())
        key = *layout, *(part.state for part in factors)
        ready: tuple[Any, Any] | None = getattr(self._local, "ready", None)
        if ready is not None and ready[0] == key and not torch.is_grad_enabled():
            return ready[1]  # type: ignore[no-any-return]
        decision = grouped.fused(x, *lists)
        self._local.ready = (key, decision.run) if decision is not None and decision.settled else None
        return None if decision is None else decision.run


class _Factors(NamedTuple):
    """The parameters of a member, and what shows whether they were changed."""

    tensors: tuple[Tensor, Tensor, Tensor | None]
    state: tuple[Any, ...]

    def storages(self) -> list[Any]:
        """While they are held, no other storage can have their addresses."""
        return [part.untyped_storage() for part in self.tensors if part is not None]


class _Output(NamedTuple):
    member: LowRankLinear
    y: Tensor
    factors: _Factors
    storages: list[Any]
    storage: Any  # of x, held likewise


class _Left(NamedTuple):
    """The outputs for one input that were not taken yet."""

    x: weakref.ref[Tensor]
    state: tuple[Any, ...]  # of x and the thread when they were computed
    outputs: dict[int, _Output]


def _factors(member: LowRankLinear) -> _Factors | None:
    """None for parametrized or 8-bit factors, and for those of inference mode, which have no version."""
    parameters = member._parameters  # nn.Module.__getattr__ is slow
    if member._dtype is not None or not ("down" in parameters and "up" in parameters and "bias" in parameters):
        return None
    tensors: Any = parameters["down"], parameters["up"], parameters["bias"]
    try:
        return _Factors(tensors, tuple(None if part is None else (id(part), *_contents(part)) for part in tensors))
    except (RuntimeError, NotImplementedError):  # no version, or no address
        return None


def _contents(tensor: Tensor) -> tuple[Any, ...]:
    """Equal as long as no operation has changed the tensor's values, if its storage is held."""
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _state(x: Tensor) -> tuple[Any, ...]:
    """Everything besides the factors that outputs depend on and that may change between two calls."""
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    return *_contents(x), torch.is_inference_mode_enabled(), stream
