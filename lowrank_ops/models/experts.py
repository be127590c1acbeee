"""transformers' fused experts as lists of Linears, so that every projection of every expert is a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from threading import get_ident, local
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import lowrank_experts
from ..ops._dispatcher import is_recorded
from .interrupts import uninterrupted_exits
from .layers import HOOKS, fused_projections, reason_to_stay_fused, tied_layers
from .old_optimizers import note_replaced

MIN_ROWS = 256  # an expert that receives fewer rows is also calibrated on rows that went to others

P = ParamSpec("P")
T = TypeVar("T")


class RoutedRows(NamedTuple):
    """Which tokens a router sent to an expert."""

    tokens: Tensor  # (rows,), indices
    total: int  # the tokens of the forward


class SortedRows(NamedTuple):
    """The slots (tokens, k) of a router, sorted by expert and flattened."""

    experts: Tensor  # larger indices than those of experts, at the end, belong to none
    order: Tensor  # of the slots; slot i of all tokens comes before slot i + 1
    ends: Tensor  # (experts,), of the rows of each expert
    tokens: Tensor
    x: Tensor  # (slots, features)
    weights: Tensor  # (slots, 1)
    shape: tuple[int, int]  # k and tokens


class ExpertLinear(nn.Linear):
    """One projection of one expert, a view of the fused parameters."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, requires_grad: bool) -> ExpertLinear:
        """A layer with these very tensors, weight (out_features, in_features) and bias (out_features,)."""
        linear = nn.utils.skip_init(cls, weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad)
        return linear


class ListedExperts(nn.Module):
    """The experts of a fused module, each an ``nn.ModuleDict`` of its Linears: ``experts.3.gate_up_proj``.

    A drop-in for the fused module. Each projection of all experts is one call of ``lowrank_ops.ops.lowrank_experts``.
    The layers are called, one expert after another on the rows that the router sends to it, if all are dense, if one
    has hooks, an adapter or another forward, and in eager mode on a CPU for fewer rows than experts. The Linears are
    views of the fused parameters.

    Args:
        fused: an experts module of transformers for which :func:`reason_to_stay_fused` returns None; not changed.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        names = fused_projections(fused)
        assert names is not None
        # The fused module without its parameters, for its activation and the constants of its gate. Not registered as a
        # child, so that it does not appear in state dicts and initializers.
        shell: Any = copy.copy(fused)
        vars(shell)["_parameters"] = {}
        vars(self)["_shell"] = shell
        self.num_experts = len(fused.get_parameter(names[0]))
        for name, child in fused.named_children():
            self.add_module(name, child)
        for index in range(self.num_experts):
            layers = nn.ModuleDict({name: _linear(fused, name, index) for name in names})
            self.add_module(str(index), layers.train(fused.training))
        self.training = fused.training
        self.pool: Pool | None = None

    def projections(self, expert: int) -> dict[str, nn.Module]:
        """``{name: layer}`` of one expert, in the order of their calls."""
        return dict(self._modules[str(expert)]._modules)  # type: ignore[union-attr, arg-type]  # in every forward: no lookup

    def is_dense(self) -> bool:
        """Whether all projections are still those of the fused module."""
        experts = map(self.projections, range(self.num_experts))
        return all(isinstance(layer, ExpertLinear) for layers in experts for layer in layers.values())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the fused module: hidden_states (tokens, features), the others (tokens, k); returns (tokens, features)."""
        if is_recorded():
            return self._run_all(hidden_states, top_k_index, top_k_weights)
        rows = self.sorted_rows(hidden_states, top_k_index, top_k_weights)
        # On a CPU, calls of the few experts that have rows cost less than a list of the factors of all.
        together = torch.compiler.is_compiling() or not hidden_states.is_cpu or len(rows.x) >= self.num_experts
        if together and (factors := self.factors()) is not None:
            return self.run_together(rows, factors).to(hidden_states.dtype)
        output = torch.zeros_like(hidden_states)
        # The rows of an expert are in the order of transformers' eager implementation, so the bits are the same; no two
        # belong to one token, so index_add_ is deterministic.
        start = 0
        for expert, end in enumerate(rows.ends.tolist()):
            if end > start:
                part = slice(start, end)
                routed = RoutedRows(rows.tokens[part], len(hidden_states))
                y = self._run(self.projections(expert), rows.x[part], routed) * rows.weights[part]
                output.index_add_(0, rows.tokens[part], y.to(output.dtype))
            start = end
        pool = self.pool
        if pool is not None and pool.thread == get_ident():  # rows of other threads are not those of the calibration
            for expert, tokens in pool.missing_rows(top_k_index):
                routed = RoutedRows(tokens, len(hidden_states))
                y = self._run(pool.twins[expert], hidden_states[tokens].detach(), routed)
                if torch.is_grad_enabled():
                    # This adds zero to the output, and gives the twin the gradient of rows sent by the router.
                    y = y * top_k_weights[tokens].mean()
                    output = output.index_add(0, tokens, (y - y.detach()).to(output.dtype))
        return output

    def _run_all(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The same, with all experts on all tokens: a graph cannot depend on how many tokens go to an expert."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            weights = torch.where(top_k_index == expert, top_k_weights, 0).sum(1, keepdim=True)
            y = self._run(self.projections(expert), hidden_states, None) * weights
            output = output + torch.where(weights != 0, y, 0).to(output.dtype)
        return output

    def run_slices(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The same, also for experts without rows: without branches, which torch.fx does not record."""
        rows = self.sorted_rows(hidden_states, top_k_index, top_k_weights)
        output, ends, start = torch.zeros_like(hidden_states), rows.ends.tolist(), 0
        for expert in range(self.num_experts):
            part = slice(start, ends[expert])
            y = self._run(self.projections(expert), rows.x[part], None) * rows.weights[part]
            output.index_add_(0, rows.tokens[part], y.to(output.dtype))
            start = ends[expert]
        return output

    def run_together(self, rows: SortedRows, factors: list[tuple[list[Any], ...]]) -> Tensor:
        """The output (tokens, features), with one call of ``lowrank_experts`` per projection."""
        first, down = factors
        y = lowrank_experts(self._between(lowrank_experts(rows.x, rows.ends, *first)), rows.ends, *down)
        # A norm may have a bias, which is not to be added to rows of no expert.
        y = (self._after(y) * rows.weights).masked_fill((rows.experts >= self.num_experts).unsqueeze(1), 0)
        # The slots of a token are added in their order; index_add_ adds in any order on a GPU.
        return y[rows.order.argsort()].view(*rows.shape, y.shape[-1]).sum(0)

    def sorted_rows(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> SortedRows:
        """Sorted once, so that each expert works on one slice."""
        experts, order = top_k_index.T.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, experts.new_tensor([*range(self.num_experts)]), right=True)
        tokens = order % top_k_index.shape[0]
        weights = top_k_weights.T.flatten()[order].unsqueeze(1)
        shape = top_k_index.shape[1], top_k_index.shape[0]
        return SortedRows(experts, order, ends, tokens, hidden_states[tokens], weights, shape)

    def _run(self, projections: Mapping[str, nn.Module], x: Tensor, routed: RoutedRows | None) -> Tensor:
        """The output of one expert for its rows (rows, features)."""
        first, down = projections.values()
        return self._after(_call(down, self._between(_call(first, x, routed)), routed))

    def _between(self, y: Tensor) -> Tensor:
        """The activation, on the output of the first projection."""
        shell: Any = self._shell
        return shell._apply_gate(y) if shell.has_gate else shell.act_fn(y)  # type: ignore[no-any-return]

    def _after(self, y: Tensor) -> Tensor:
        shell: Any = self._shell
        return shell.post_expert_norm(y) if shell.has_post_expert_norm else y

    def factors(self) -> list[tuple[list[Any], ...]] | None:
        """Downs, ups and biases of each projection; None if one must be called or none has low-rank factors."""
        if self.pool is not None or _has_any_global_hook():
            return None
        found: list[tuple[list[Any], ...]] = [([], [], []), ([], [], [])]
        for expert in range(self.num_experts):
            for layer, lists in zip(self.projections(expert).values(), found, strict=True):
                factors = _factors_of(layer)
                if factors is None:
                    return None
                for part, factor in zip(lists, factors, strict=True):
                    part.append(factor)
        return None if self.is_dense() else found

    def to_fused(self) -> nn.Module:
        """The fused module with copies of these weights; all projections must be nn.Linear.

        Raises:
            ValueError: a projection has a bias, as centered factors have, and the fused module has none.
        """
        fused: Any = copy.copy(self._shell)
        experts = [self.projections(index) for index in range(self.num_experts)]
        own = {name: child for name, child in self.named_children() if not name.isdecimal()}
        vars(fused).update(_parameters={}, _modules=own)
        for name in experts[0]:
            layers = [projections[name] for projections in experts]
            biases: list[Tensor] = [layer.get_parameter("bias") for layer in layers if layer.bias is not None]
            if biases and not fused.has_bias:
                raise ValueError(
                    f"{len(biases)} of {self.num_experts} experts have a bias in {name}, for which "
                    f"{type(fused).__name__} has no place; compress with CompressionConfig(..., centered=False), which "
                    "adds none."
                )
            weights = [layer.get_parameter("weight") for layer in layers]
            with torch.inference_mode(False), torch.no_grad():
                stacked = torch.stack([weight.T if fused.is_transposed else weight for weight in weights])
                fused.register_parameter(name, nn.Parameter(stacked, any(weight.requires_grad for weight in weights)))
                if fused.has_bias:
                    trained = any(bias.requires_grad for bias in biases)
                    fused.register_parameter(f"{name}_bias", nn.Parameter(torch.stack(biases), trained))
        return fused.train(self.training)  # type: ignore[no-any-return]

    def unshare_(self) -> None:
        """Copy the remaining Linears out of the fused parameters, so that those can be freed."""
        for layers in map(self.projections, range(self.num_experts)):
            for layer in layers.values():
                for name, old in layer.named_parameters() if isinstance(layer, ExpertLinear) else ():
                    if old.untyped_storage().nbytes() > old.numel() * old.element_size():
                        values = old.detach().clone(memory_format=torch.contiguous_format)
                        setattr(layer, name, nn.Parameter(values, old.requires_grad))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"


class Pool:
    """Extra rows for experts that receive few rows in a calibration.

    Args:
        experts: their projections get twins: layers with the same parameters that run on the extra rows only.

    Attributes:
        thread: the one that calibrates.
    """

    def __init__(self, experts: ListedExperts) -> None:
        self.thread = get_ident()
        self.twins = [
            {
                name: _twin(layer) if isinstance(layer, nn.Linear) else layer
                for name, layer in experts.projections(expert).items()
            }
            for expert in range(experts.num_experts)
        ]
        self._routed, self._pooled = [0] * experts.num_experts, [0] * experts.num_experts

    def missing_rows(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Count a call; for each expert with fewer than ``MIN_ROWS`` rows so far, yield tokens of other experts."""
        for expert, before in enumerate(self._routed):
            mine = (top_k_index == expert).any(1)
            self._routed[expert] = before + int(mine.sum())
            wanted = MIN_ROWS - self._pooled[expert]
            if self._routed[expert] < MIN_ROWS and wanted > 0:
                others = (~mine).nonzero().squeeze(1)
                chosen = others[:: max(1, len(others) // wanted)][:wanted]
                self._pooled[expert] += len(chosen)
                if len(chosen):
                    yield expert, chosen


def list_experts(model: nn.Module, names: Collection[str] | None = None) -> dict[nn.Module, ListedExperts]:
    """``{fused module: the same experts as Linears}`` for the fused experts inside ``model``, which is not changed.

    Args:
        model: any module.
        names: of layers; takes only the modules that contain one of them. None takes all.
    """
    tied = tied_layers(model)
    return {
        module: ListedExperts(module)
        for fqn, module in model.named_modules()
        if fqn
        and fqn not in tied
        and fused_projections(module)
        and reason_to_stay_fused(module) is None
        and (names is None or any(name.startswith(f"{fqn}.") for name in names))
    }


@contextmanager
def experts_listed(
    model: nn.Module, names: Collection[str] | None = None, listed: Mapping[nn.Module, ListedExperts] | None = None
) -> Iterator[None]:
    """Fused experts of ``model`` are :class:`ListedExperts` inside the block.

    After the block they are fused again, except those in which a Linear was replaced.

    Args:
        model: any module.
        names: as for :func:`list_experts`.
        listed: the result of :func:`list_experts`, which is called by default.
    """
    with torch.inference_mode(False):  # parameters created in inference mode could not be trained
        listed = list_experts(model, names) if listed is None else listed
    with uninterrupted_exits():
        try:
            _put_in(model, listed)
            yield
        finally:
            _put_in(model, {experts: fused for fused, experts in listed.items() if experts.is_dense()})
            with torch.inference_mode(False):
                for fused, experts in listed.items():
                    if not experts.is_dense():
                        experts.unshare_()
                        note_replaced(fused.parameters())


def list_experts_(model: nn.Module) -> None:
    """Put :class:`ListedExperts` in the places of the fused experts inside ``model``, permanently."""
    with torch.inference_mode(False):
        _put_in(model, list_experts(model))


def on_listed_experts(function: Callable[Concatenate[nn.Module, P], T]) -> Callable[Concatenate[nn.Module, P], T]:
    """A decorator: calls the function, whose first argument is a model, inside :func:`experts_listed`."""

    @wraps(function)
    def wrapper(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> T:
        if not isinstance(model, nn.Module):
            return function(model, *args, **kwargs)  # type: ignore[unreachable]  # it raises
        with experts_listed(model):
            return function(model, *args, **kwargs)

    return wrapper


def _put_in(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    for parent in list(model.modules()) if replacements else ():
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]


def _factors_of(layer: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Down, up and bias of a layer, or weight, None and bias of an nn.Linear; None if more happens in its call."""
    if any(getattr(layer, kind) for kind in HOOKS) or "forward" in vars(layer):
        return None
    if type(layer) in (nn.Linear, ExpertLinear):
        found = layer.weight, None, layer.bias
    elif not hasattr(layer, "factors") or (found := layer.factors()) is None:  # type: ignore[operator]
        return None
    plain = all(factor is None or type(factor) in (Tensor, nn.Parameter) for factor in found)
    return found if plain else None  # type: ignore[return-value]


def _linear(fused: nn.Module, name: str, expert: int) -> ExpertLinear:
    """Views of the fused parameters (experts, out_features, in_features) or transposed, and (experts, out_features)."""
    weights = fused.get_parameter(name)
    weight = weights.detach()[expert]
    bias = fused.get_parameter(f"{name}_bias").detach()[expert] if fused.has_bias else None
    return ExpertLinear.of(weight.T if fused.is_transposed else weight, bias, weights.requires_grad)


class _Call(local):
    """What each thread's call of a projection is for."""

    routed: RoutedRows | None = None


_now = _Call()


def routed_rows() -> RoutedRows | None:
    """For the hooks of a projection of an expert, the rows that it is called with."""
    return _now.routed


def _call(layer: nn.Module, x: Tensor, routed: RoutedRows | None) -> Tensor:
    """Call a projection; its hooks, if it has any, can read :func:`routed_rows`."""
    if routed is None or not any(getattr(layer, kind) for kind in HOOKS):
        return layer(x)
    _now.routed = routed
    try:
        return layer(x)
    finally:
        _now.routed = None


def _twin(layer: nn.Linear) -> nn.Linear:
    twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin
