"""search_ranks: the smallest model whose accuracy stays within a tolerance, by trial compressions."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import get_ident
from typing import Any
from weakref import ref

import torch
from torch import nn

from ..arguments import check_choice, checked
from ..calibration.covariances import Covariances
from ..config import CompressionConfig
from ..considered import considered_layers, resolved
from ..factors.layer_by_layer import as_stored, decompose, factorize_layers
from ..files import digest
from ..layers.replace import replace_
from ..models.copies import filter_of_original, shared_copy
from ..models.experts import list_experts_
from ..models.layers import FilterFn
from ..models.running import ProgressBar, hooks, training_flags_kept, warn_caller
from ..policies import ParameterBudget, Ranks
from ..ranks.choose import ChosenRanks, Limits, as_policy, limits_of
from ..ranks.costs import Option, dense_parameters, in_parameters
from ..ranks.groups import choose_grouped_sizes
from ..subspaces.channels import ChannelSubspaces, with_channels
from ..subspaces.layer import LayerSubspaces
from .trial_cache import TrialCache

Measure = Callable[[ChosenRanks], float]


@checked()
def search_ranks(
    model: nn.Module,
    covariances: Covariances,
    evaluate: Callable[[nn.Module], float],
    max_drop: float,
    *,
    by: str = "budget",
    allocation: str | None = None,
    num_evaluations: int | None = None,
    config: CompressionConfig | None = None,
    filter_fn: FilterFn | None = None,
    subspaces: Mapping[str, LayerSubspaces] | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Ranks:
    """Search for the smallest ranks whose accuracy is at most ``max_drop`` below that of the dense model.

    Args:
        model: the model that was calibrated. It is not changed, and other threads may run it meanwhile: trials run on
            copies of its structure, which share its parameters and have their own buffers.
        covariances: from :func:`lowrank_ops.calibrate`.
        evaluate: ``evaluate(trial) -> float``, higher is better; called with copies of the model, dense and compressed.
            It has to run the copy that it is called with: ``model`` itself stays dense. To train a trial, train
            ``copy.deepcopy(trial)``: a trial shares its dense parameters with the model.
        max_drop: accepted decrease from the dense model's value, in the units of ``evaluate``.
        by: ``"budget"`` bisects one parameter budget for all layers. ``"layers"`` bisects the rank of each layer, the
            largest layer first. Each trial keeps the layers before it compressed, and each layer may use a share of
            ``max_drop``. It takes up to log2(ranks) evaluations per layer (Garg et al. 2024 choose a threshold per
            layer).
        allocation: how layers share the budget, as in :class:`lowrank_ops.ParameterBudget`; for ``"budget"`` only.
        num_evaluations: for ``"budget"`` only: at most this many, the dense model's included; at least 2. None: 10.
        config: projection, centering, overrides, bounds, pivoting, channels and, for ``"budget"``, groups of the
            trials; its rank policy and its reconstruction are not used. Bounds take precedence over the tolerance.
        filter_fn, subspaces: as for :func:`lowrank_ops.compress_`.
        cache: file that stores the accuracy of every trial. Stored trials are not repeated, by the same search resumed
            or by another one on the same model. Trials of other weights, covariances or projections are refused;
            ``evaluate`` is not checked.
        progress: show a progress bar.

    Returns:
        The ranks found, a policy for :func:`lowrank_ops.compress_`; layers that stay dense are not named.

    Raises:
        RuntimeError: another thread calibrates or compresses the model when the search begins.
        TypeError: an argument of another type.
        ValueError: an invalid argument, an evaluation that is not a finite number or runs ``model`` instead of the
            copy, a model that cannot be copied, a cache of other trials, or as for :func:`lowrank_ops.compress_`.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> x = torch.randn(256, 64)
        >>> y = model(x).detach()
        >>> covariances = lro.calibrate(model, [x])
        >>> ranks = lro.search_ranks(model, covariances, lambda m: -float((m(x) - y).square().mean()), max_drop=0.01)
        >>> report = lro.compress_(model, covariances, ranks)
    """
    _check(max_drop, by, {"allocation": allocation, "num_evaluations": num_evaluations})
    num_evaluations = num_evaluations or 10
    config = replace(CompressionConfig.of(config), rank=ParameterBudget(1.0, allocation))
    if config.group and by == "layers":
        raise ValueError(
            "config.group=True cannot be combined with by='layers', which chooses each layer's rank without the others "
            "of its group; use by='budget'."
        )
    dense, filter_fn = shared_copy(model), filter_of_original(model, filter_fn)
    list_experts_(dense)
    subspaces, _ = considered_layers(dense, covariances, filter_fn, subspaces, centered=config.centered)
    config = resolved(config, subspaces)
    subspaces = with_channels(dense, subspaces, config.channels)
    policy = config.rank
    assert isinstance(policy, ParameterBudget)
    if by == "budget":  # layer by layer, no spectra are used
        decompose(policy, subspaces, progress)

    def at(fraction: float) -> ChosenRanks:
        return choose_grouped_sizes(replace(config, rank=replace(policy, fraction=fraction)), subspaces)[0]

    measure = accuracy_of(dense, model, evaluate, subspaces, config, cache)
    limits = limits_of(subspaces, config.overrides, config.bounds, pivoted=config.pivoted)
    free = {fqn: limits.options(fqn, space) for fqn, space in subspaces.items() if fqn not in limits.fixed}
    trials = num_evaluations if by == "budget" else 1 + sum(len(options).bit_length() for options in free.values())
    with ProgressBar(total=trials, desc="searching ranks", unit="trial", disable=not progress) as bar:
        known: dict[tuple[int | None, ...], float] = {}  # two budgets may give the same ranks

        def trial(ranks: ChosenRanks) -> float:
            whole = {fqn: {**ranks, **limits.fixed}[fqn] for fqn in subspaces}
            key = tuple(whole.values())
            accuracy = known[key] = known[key] if key in known else measure(whole)
            bar.set_postfix(accuracy=f"{accuracy:.4g}")
            bar.update()
            return accuracy

        dense_accuracy = trial(dict.fromkeys(subspaces))
        if by == "budget":
            found = _bisect_budget(num_evaluations, at, subspaces, limits, free, dense_accuracy - max_drop, trial)
        else:
            found = _bisect_layers(max_drop, free, dense_accuracy, trial)
    return as_policy({fqn: {**found, **limits.fixed}[fqn] for fqn in subspaces}, subspaces)


def accuracy_of(
    dense: nn.Module,
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    subspaces: Mapping[str, LayerSubspaces],
    config: CompressionConfig,
    cache: str | Path | None,
) -> Measure:
    """A function from ranks to the accuracy of the model compressed to them; stored trials are not repeated.

    Args:
        dense: a :func:`shared_copy` of ``model``, which is copied again for every trial.
        model: the user's own, which ``evaluate`` must not run instead.
        evaluate, config, cache: as for :func:`search_ranks`.
        subspaces: of the layers considered.
    """

    def accuracy_at(ranks: ChosenRanks) -> float:
        found = factorize_layers(subspaces, ranks, str(config.projection), keep_directions=True)
        factors = {
            fqn: part if part.kept is not None else as_stored(part, subspaces[fqn], config) for fqn, part in found
        }
        trial = shared_copy(dense)
        replace_(trial, factors, pivoted=config.pivoted)
        mine, others = _Runs(), _Runs(get_ident())
        with hooks() as handles, torch.no_grad(), training_flags_kept(trial):
            if factors:  # the dense copy keeps the fast path of nn.TransformerEncoderLayer, which hooks would disable
                for module in [trial, *(trial.get_submodule(fqn) for fqn in factors)]:
                    handles.append(module.register_forward_pre_hook(mine))
                handles.append(trial.register_state_dict_pre_hook(mine))  # saved, to be run elsewhere
                handles.append(model.register_forward_pre_hook(others))
            accuracy = evaluate(trial)
        if factors and not mine.seen:
            _complain(others.seen)
        alive = ref(trial)
        del trial
        if alive() is not None:
            gc.collect()  # a model in reference cycles would keep the factors of this trial during the next one
        return _finite(accuracy)

    if cache is None:
        return accuracy_at
    return TrialCache(cache, _key(dense, subspaces, config)).cached(accuracy_at)


class _Runs:
    """A hook that records whether its module or a copy has run; given a thread, only in that one. It can be pickled."""

    def __init__(self, thread: int | None = None) -> None:
        self.seen, self._thread = False, thread

    def __deepcopy__(self, memo: dict[int, Any]) -> _Runs:
        return self

    def __call__(self, *args: Any) -> None:
        if self._thread is None or (not torch.compiler.is_compiling() and get_ident() == self._thread):
            self.seen = True


def _complain(ran_model: bool) -> None:
    if ran_model:
        raise ValueError(
            "evaluate ran the model that was given to the search, which stays dense, and not the compressed copy that "
            "it is called with; write evaluate(trial) so that it runs trial."
        )
    warn_caller(
        "evaluate did not run the compressed copy that it was called with, so its value does not measure that copy."
    )


def _check(max_drop: float, by: str, of_budget: Mapping[str, Any]) -> None:
    if not max_drop >= 0:
        raise ValueError(f"max_drop must be a non-negative number; got {max_drop!r}.")
    check_choice("by", by, ("budget", "layers"))
    for name, value in of_budget.items():
        if by == "layers" and value is not None:
            raise ValueError(f"{name} has no effect with by='layers'; leave it out, or use by='budget'.")
    if of_budget["num_evaluations"] is not None and of_budget["num_evaluations"] < 2:
        raise ValueError(f"num_evaluations must be an integer of at least 2; got {of_budget['num_evaluations']!r}.")


def _finite(accuracy: Any) -> float:
    try:
        value = float(accuracy)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"evaluate must return a finite number, higher for better models; it returned {accuracy!r}.")
    return value


def _key(model: nn.Module, subspaces: Mapping[str, LayerSubspaces], config: CompressionConfig) -> dict[str, str]:
    """Digests of what decides the accuracy at given ranks, except the user's ``evaluate``."""
    sums: dict[str, torch.Tensor] = {}
    for fqn, space in subspaces.items():
        for name, moments in space.statistics.moments().items():
            if name == "activations" or config.projection == "loss":
                sums[f"{fqn} {name} total"] = moments.total
                sums[f"{fqn} {name} squares"] = moments.second_moment.diagonal(dim1=-2, dim2=-1)
                if moments.shift is not None:
                    sums[f"{fqn} {name} shift"] = moments.shift
    mlps = [fqn for fqn, space in subspaces.items() if isinstance(space, ChannelSubspaces)]
    return {
        **({"channels": digest(mlps)} if mlps else {}),
        "model": digest({**dict(model.named_parameters()), **dict(model.named_buffers())}),
        "covariances": digest(sums),
        "projection": str(config.projection),
        "centered": str(config.centered),
        **({"pivoted": "True"} if config.pivoted else {}),
    }


def _bisect_budget(
    num_evaluations: int,
    ranks_at: Callable[[float], ChosenRanks],
    spaces: Mapping[str, LayerSubspaces],
    limits: Limits,
    free: Mapping[str, list[Option]],
    min_accuracy: float,
    measure: Measure,
) -> ChosenRanks:
    """The smallest parameter budget found by bisection whose ranks are accurate enough."""
    minimum = sum(
        free[fqn][0].cost if fqn in free else in_parameters(limits.pivoted).of(fqn, space, limits.fixed[fqn])
        for fqn, space in spaces.items()
    )
    low, high = min(1.0, minimum / sum(map(dense_parameters, spaces.values()))), 1.0
    best: ChosenRanks = {fqn: options[-1].rank for fqn, options in free.items()}
    for _ in range(num_evaluations - 1):
        middle = (low + high) / 2
        whole = ranks_at(middle)
        ranks = {fqn: whole[fqn] for fqn in free}
        if ranks == best or measure(ranks) >= min_accuracy:
            best, high = ranks, middle
        else:
            low = middle
    return best


def _bisect_layers(
    max_drop: float, free: Mapping[str, list[Option]], dense_accuracy: float, measure: Measure
) -> ChosenRanks:
    """The smallest rank of one layer after another, each with its share of the tolerance by parameters."""
    chosen: ChosenRanks = {fqn: options[-1].rank for fqn, options in free.items()}
    by_size = sorted(free, key=lambda fqn: -free[fqn][-1].cost)
    seen, total = 0, sum(options[-1].cost for options in free.values())
    for fqn in by_size:
        seen += free[fqn][-1].cost
        min_accuracy = dense_accuracy - max_drop * seen / total
        low, high = 0, len(free[fqn]) - 1  # dense, at which earlier layers were accepted
        while low < high:
            middle = (low + high) // 2
            if measure({**chosen, fqn: free[fqn][middle].rank}) >= min_accuracy:
                high = middle
            else:
                low = middle + 1
        chosen[fqn] = free[fqn][high].rank
    return chosen
