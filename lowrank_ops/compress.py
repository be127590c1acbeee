"""compress_: from covariances to a smaller model, the steps in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .arguments import checked
from .calibration.covariances import Covariances
from .calibration.packing import empty_in_file
from .config import CompressionConfig
from .factors.channels import narrowed
from .factors.memory import bytes_to_spare
from .factors.projections import Factors, eight_bit_weight, factorize, rounded, stored_as
from .layers import EightBitLinear, LowRankLayer, NarrowLinear, group_
from .layers.replace import replaceable, replacement, swap_
from .models.experts import on_listed_experts
from .models.layers import FilterFn, check_not_wrapped, find_layers, tied_layers, with_values
from .models.memory import parse_bytes
from .models.running import ProgressBar, exclusive, in_layer, shortened, warn_of_few_rows
from .policies import ExplainedVariance, RankPolicy
from .ranks.choose import ChosenRanks, Rounded
from .ranks.costs import is_pivoted
from .ranks.eight_bit import eight_bit_bytes, lowrank_bytes
from .ranks.groups import choose_grouped_sizes
from .reconstruction import (
    RECONSTRUCTIONS,
    BlockReconstruction,
    SequentialReconstruction,
    reconstruct_blocks,
    reconstruct_factors,
)
from .report import CompressionReport
from .subspaces.channels import ChannelSubspaces, with_channels
from .subspaces.layer import LayerSubspaces, layer_subspaces

# Decompositions held between choosing ranks and factorizing, and for the next call; beyond this they are recomputed.
MAX_HELD_BYTES = 2 << 30


@checked()
def compress_(
    model: nn.Module,
    covariances: Covariances,
    config: CompressionConfig | RankPolicy | int | None = None,
    filter_fn: FilterFn | None = None,
    *,
    subspaces: Mapping[str, LayerSubspaces] | None = None,
    reconstruction: SequentialReconstruction | BlockReconstruction | None = None,
    device: torch.device | str | None = None,
    max_memory: int | str | None = None,
    progress: bool = False,
) -> CompressionReport:
    """Replace layers of ``model`` by smaller ones, in place; on an error the model is unchanged.

    The new layers have new parameters. So compress first, then wrap the model for distributed training, create the
    optimizer and call ``torch.compile``: an optimizer created before would train the old parameters, and warns of it in
    its next step. No other thread may run the model meanwhile: layers are replaced one after another.

    Args:
        model: the model that was calibrated.
        covariances: from :func:`lowrank_ops.calibrate`.
        config: a configuration, a rank policy, or an int, one rank for all layers where it saves parameters. By default
            ``ParameterBudget(0.5)``. What it leaves open is chosen by what ``covariances`` hold: with output
            gradients, ranks and factors by loss; without, uniform ranks and output PCA. The report says which.
        filter_fn: ``filter_fn(module, fqn) -> bool`` selects among the calibrated layers. None selects all but layers
            whose weight is tied to another module, which the report lists; selecting one of those is an error.
        subspaces: from :func:`lowrank_ops.subspaces.layer_subspaces`, to try several configurations on copies of a
            model without decomposing again; they keep up to 2 GiB of decompositions. By default computed here, and for
            layers that are not among them.
        reconstruction: fit the factors to the dense model's outputs on data, layer by layer or block by block.
        device: where factors are computed, such as ``"cuda"`` for a model in the CPU's memory: the layers are moved
            there one after another, and their factors back. By default each layer's own device; the CPU instead of a
            device without float64. A reconstruction runs where the model is.
        max_memory: bound on the memory used in addition to the model and ``covariances``, in bytes or as a string such
            as ``"2GB"``. It covers the matrices of one layer at a time, the new layers and the decompositions that are
            kept. New layers that do not fit are stored in temporary files (in TMPDIR) until the dense layers are freed;
            decompositions that do not fit are computed again. By default new layers are in memory, and up to 2 GiB of
            decompositions are kept.
        progress: show progress bars with the time left.

    Returns:
        What was chosen per layer, with the predicted output error.

    Raises:
        OSError: there is no room for temporary files (``max_memory``).
        RuntimeError: another thread calibrates, compresses or searches the model.
        TypeError: ``config`` or ``covariances`` of another type.
        ValueError: covariances of another model, a budget or override that cannot be met, a ``device`` that is not
            there, a layer that cannot be replaced or that alone needs more than ``max_memory``, a model that is wrapped
            for distributed training; the message names it. ``max_memory`` together with a reconstruction, which it
            does not bound.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> covariances = lro.calibrate(model, [torch.randn(256, 64)])
        >>> report = lro.compress_(model, covariances, lro.ParameterBudget(0.5))
        >>> report.layer_parameters / report.layer_parameters_before <= 0.5
        True
    """
    bound = None if max_memory is None else parse_bytes(max_memory)
    if bound is not None and reconstruction is not None:
        raise ValueError("max_memory does not bound a reconstruction, which runs the model; leave one of the two out.")
    with exclusive(model):
        on = None if device is None else available(device)
        report, in_files = _compress(
            model, covariances, config, filter_fn, subspaces, reconstruction, on, bound, progress
        )
        with torch.inference_mode(False):
            for layer, home in in_files.items():  # the dense layers are freed now
                layer._apply(lambda part, home=home: part.to(home, copy=True))
        return report


@on_listed_experts
def _compress(
    model: nn.Module,
    covariances: Covariances,
    config: CompressionConfig | RankPolicy | int | None,
    filter_fn: FilterFn | None,
    subspaces: Mapping[str, LayerSubspaces] | None,
    reconstruction: SequentialReconstruction | BlockReconstruction | None,
    device: torch.device | None,
    max_memory: int | None,
    progress: bool,
) -> tuple[CompressionReport, dict[nn.Module, torch.device]]:
    """The report, and ``{new layer: device to move it to}`` for those whose values are in files."""
    config = CompressionConfig.of(config)
    config = _with_reconstruction(config, reconstruction)
    reused = subspaces is not None
    subspaces, skipped = considered_layers(
        model, covariances, filter_fn, subspaces, centered=config.centered, device=device
    )
    config = resolved(config, subspaces)
    spare = MAX_HELD_BYTES if max_memory is None else bytes_to_spare(subspaces, config, max_memory)
    members = with_channels(model, subspaces, config.channels_of)
    decompose(config.rank, members, progress, spare)
    ranks, eight_bit, groups = choose_grouped_sizes(config, members)
    layers = replaceable(model, _changed(members, ranks, eight_bit))
    held = spare if reused else sum(space.held_bytes() for space in members.values())
    in_files = max_memory is not None and held + _new_bytes(members, ranks, eight_bit, config.pivoted) > spare
    with torch.inference_mode(False):  # parameters created in inference mode could not be trained
        found: Iterable[tuple[str, Factors]] = factorize_layers(
            members, ranks, str(config.projection), keep_directions=reused, max_held_bytes=spare, progress=progress
        )
        if reconstruction is not None and any(rank is not None for rank in ranks.values()):
            found = _reconstructed(model, dict(found), reconstruction, covariances, config.centered, progress).items()
        factors: dict[str, Factors] = {}  # without values
        new: dict[nn.Module, nn.Module] = {}
        for fqn, part in _as_stored(found, subspaces, eight_bit, config):
            with in_layer(fqn):
                layer = replacement(layers[fqn], part, config.pivoted)
                new[layers[fqn]] = layer._apply(_in_file) if in_files else layer
            factors[fqn] = part.to(device=torch.device("meta"))
        report = CompressionReport.build(model, config, subspaces, factors, skipped, groups)
        swap_(model, new)
    if not reused:
        for space in subspaces.values():
            space.drop_spaces()
    group_(model, groups)
    warn_of_few_rows(report.few_rows())
    return report, {new[dense]: dense.get_parameter("weight").device for dense in new if in_files}


def _changed(
    members: Mapping[str, LayerSubspaces], ranks: ChosenRanks, eight_bit: Mapping[str, Rounded]
) -> Iterator[str]:
    """The names of the layers that are replaced."""
    for fqn, rank in ranks.items():
        member = members[fqn]
        if rank is not None and isinstance(member, ChannelSubspaces):
            yield from member.producers
        if rank is not None or fqn in eight_bit:
            yield fqn


def _new_bytes(
    subspaces: Mapping[str, LayerSubspaces], ranks: ChosenRanks, eight_bit: Mapping[str, Rounded], pivoted: bool
) -> int:
    """Bytes of the new layers."""
    plain = Rounded()
    sizes = {
        fqn: lowrank_bytes(subspaces[fqn], rank, eight_bit.get(fqn, plain).formats, pivoted=pivoted)
        for fqn, rank in ranks.items()
        if rank is not None
    }
    return sum(sizes.values()) + sum(eight_bit_bytes(subspaces[fqn]) for fqn in eight_bit if fqn not in sizes)


def _in_file(tensor: Tensor) -> Tensor:
    return empty_in_file(tensor.shape, tensor.dtype).copy_(tensor)


def _reconstructed(
    model: nn.Module,
    factors: dict[str, Factors],
    reconstruction: SequentialReconstruction | BlockReconstruction,
    covariances: Covariances,
    centered: bool,
    progress: bool,
) -> dict[str, Factors]:
    if isinstance(reconstruction, BlockReconstruction):
        return reconstruct_blocks(model, factors, reconstruction, progress=progress)
    return reconstruct_factors(
        model, factors, reconstruction, statistics=covariances, centered=centered, progress=progress
    )


def _as_stored(
    found: Iterable[tuple[str, Factors]],
    subspaces: Mapping[str, LayerSubspaces],
    eight_bit: Mapping[str, Rounded],
    config: CompressionConfig,
) -> Iterator[tuple[str, Factors]]:
    """``found``, for layers of 8 bits or pivot rows; then the 8-bit weights of layers without factors."""
    dense = dict.fromkeys(eight_bit)
    for fqn, part in found:
        dense.pop(fqn, None)
        yield fqn, as_stored(part, subspaces[fqn], config, eight_bit.get(fqn))
        subspaces[fqn].release(directions=False)
    for fqn in dense:
        yield fqn, as_stored(None, subspaces[fqn], config, eight_bit[fqn])
        subspaces[fqn].release(directions=False)


def _with_reconstruction(
    config: CompressionConfig, reconstruction: SequentialReconstruction | BlockReconstruction | None
) -> CompressionConfig:
    if reconstruction is None and config.reconstruction is not None:
        kind = RECONSTRUCTIONS[config.reconstruction].__name__
        raise ValueError(
            f"config.reconstruction={config.reconstruction!r} runs the model: pass "
            f"compress_(..., reconstruction={kind}(batches))."
        )
    if reconstruction is None:
        return config
    name = next(name for name, kind in RECONSTRUCTIONS.items() if isinstance(reconstruction, kind))
    if config.reconstruction not in (None, name):
        raise ValueError(
            f"config.reconstruction={config.reconstruction!r} and reconstruction={type(reconstruction).__name__}(...) "
            "are two kinds; pass one of them."
        )
    return replace(config, reconstruction=name)


def considered_layers(
    model: nn.Module,
    covariances: Covariances,
    filter_fn: FilterFn | None,
    subspaces: Mapping[str, LayerSubspaces] | None,
    *,
    centered: bool,
    device: torch.device | None = None,
    load: Callable[[str], nn.Module] | None = None,
) -> tuple[dict[str, LayerSubspaces], dict[str, str]]:
    """The subspaces of the layers that may be replaced, and ``{fqn: reason}`` of those that may not.

    Args:
        model, covariances, filter_fn, subspaces: as for :func:`compress_`.
        centered, device, load: as for :func:`layer_subspaces`. With ``load`` the model may be on the meta device.

    Raises:
        ValueError: as for :func:`compress_`.
    """
    check_not_wrapped(model)
    layers, skipped = find_layers(model, filter_fn)
    if load is None:
        layers, without = with_values(layers)
        skipped |= without
    if filter_fn is None:
        tied = {fqn: f"its weight is tied to {other!r}" for fqn, other in tied_layers(model).items() if fqn in layers}
        layers = {fqn: layer for fqn, layer in layers.items() if fqn not in tied}
        skipped = {**skipped, **tied}
    if "" in layers:
        raise ValueError("model is itself the layer to replace; use LowRankLinear.from_linear or its like.")
    missing = [fqn for fqn in covariances if fqn not in dict(model.named_modules())]
    if missing:
        raise ValueError(
            f"covariances name layers that model does not have: {shortened(missing)}; pass the model that was "
            "calibrated."
        )
    unknown = {
        fqn: "no calibration batch reached it" if fqn in covariances.unreached else "it was not calibrated"
        for fqn in layers
        if fqn not in covariances
    }
    skipped |= unknown | {fqn: covariances.skipped[fqn] for fqn in unknown if fqn in covariances.skipped}
    for fqn, module in model.named_modules():
        if isinstance(module, NarrowLinear):
            layers.pop(fqn, None)
            skipped[fqn] = "it has fewer channels already"
        if isinstance(module, LowRankLayer):
            skipped[fqn] = f"it is {'8-bit' if isinstance(module, EightBitLinear) else 'low-rank'} already"
    given = _checked_subspaces(subspaces, layers, covariances)
    if any(space.centered != centered or device not in (None, space.device) for space in given.values()):
        if any(space.loss is not None and space.loss.corrected is not None for space in given.values()):
            raise ValueError(
                f"these subspaces hold corrected predictions for other settings than centered={centered}, "
                f"device={device}; pass centered={centered} to correct_predictions, and no device to compress_."
            )
        given = {}
    others = {fqn: layer for fqn, layer in layers.items() if fqn not in given}
    new = layer_subspaces(others, covariances, centered=centered, device=device, load=load)
    subspaces = {fqn: given.get(fqn) or new[fqn] for fqn in layers if fqn in given or fqn in new}
    if not subspaces:
        reasons = "".join(f"\n  {fqn or '(the model)'}: {reason}" for fqn, reason in skipped.items())
        raise ValueError(
            "covariances hold none of the layers that can be replaced and that filter_fn keeps; calibrate those layers "
            f"first.{reasons}"
        )
    return subspaces, skipped


def _checked_subspaces(
    subspaces: Mapping[str, LayerSubspaces] | None, layers: Mapping[str, nn.Module], covariances: Covariances
) -> dict[str, LayerSubspaces]:
    """The given subspaces of ``layers``, which must be of their weights and of ``covariances``."""
    if subspaces is None:
        return {}
    for fqn, space in subspaces.items():
        if fqn in covariances and space.statistics is not covariances[fqn]:
            raise ValueError(
                f"subspaces[{fqn!r}] was computed from other covariances than those given; pass "
                "subspaces=layer_subspaces(layers, covariances) of the same calibration."
            )
        if fqn in layers and not space.is_of(layers[fqn]):
            raise ValueError(
                f"subspaces[{fqn!r}] was computed from another weight, bias, dtype or device than the layer's; pass "
                "subspaces=layer_subspaces(layers, covariances) of this model or of a copy of it."
            )
    return {fqn: space for fqn, space in subspaces.items() if fqn in layers and fqn in covariances}


def resolved(config: CompressionConfig, subspaces: Mapping[str, LayerSubspaces]) -> CompressionConfig:
    """``config`` with its open choices made by what the statistics of these layers hold."""
    gradients = [space.statistics.output_gradients is not None for space in subspaces.values()]
    if config.projection == "loss" and not any(gradients):
        raise ValueError(
            "projection='loss' needs output gradients, which covariances lack; use calibrate(..., sensitivity=...), or "
            "projection='output'."
        )
    return config.resolved(some_gradients=any(gradients), all_gradients=all(gradients))


def decompose(
    policy: RankPolicy,
    subspaces: Mapping[str, LayerSubspaces],
    progress: bool,
    max_held_bytes: int | None = None,
) -> None:
    """Compute the spectra that ``policy`` will use, with a progress bar and in bounded memory."""
    allocation = getattr(policy, "allocation", None)
    max_held_bytes = MAX_HELD_BYTES if max_held_bytes is None else max_held_bytes
    held = 0
    left = Counter(id(space.input) for space in subspaces.values())
    for fqn, space in ProgressBar(subspaces.items(), desc="decomposing", unit="layer", disable=not progress):
        with in_layer(fqn):
            if isinstance(policy, ExplainedVariance):
                space.utilized_rank(policy.threshold)
            elif allocation == "variance":
                _ = space.output.spectrum
            elif allocation == "loss" and space.loss is not None:
                _ = space.loss.subspace.spectrum
        held += space.held_bytes()
        left[id(space.input)] -= 1
        space.release(directions=held > max_held_bytes, shared=not left[id(space.input)])


def factorize_layers(
    subspaces: Mapping[str, LayerSubspaces],
    ranks: ChosenRanks,
    projection: str,
    *,
    keep_directions: bool = False,
    max_held_bytes: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[str, Factors]]:
    """Names and factors of the layers that have a rank, one by one, in the dtype and on the device of their weights.

    Args:
        subspaces: of the layers; those of an MLP yield the factors of each of its layers.
        ranks: ``{fqn: rank or None}``.
        projection: as for :func:`lowrank_ops.factors.factorize`.
        keep_directions: keep the decompositions for other ranks of the same layers.
        max_held_bytes: bound on the decompositions that are kept; by default ``MAX_HELD_BYTES``.
        progress: show a progress bar.
    """
    max_held_bytes = MAX_HELD_BYTES if max_held_bytes is None else max_held_bytes
    left = Counter(id(subspaces[fqn].input) for fqn, rank in ranks.items() if rank is not None)
    for fqn, rank in ProgressBar(ranks.items(), desc="factorizing", unit="layer", disable=not progress):
        if rank is not None:
            space = subspaces[fqn]
            try:
                with in_layer(fqn):
                    if isinstance(space, ChannelSubspaces):
                        found = narrowed(fqn, space, rank, projection)
                    else:
                        exact = factorize(space, rank, projection)
                        found = {fqn: rounded(exact, space, space.dtype, space.layer_device)}
                        del exact  # twice as large
            except ValueError as error:
                raise ValueError(f"layer {fqn!r}: {error}") from None
            left[id(space.input)] -= 1
            held = sum(other.held_bytes() for other in subspaces.values()) if keep_directions else 0
            drop = not keep_directions or held > max_held_bytes
            space.release(directions=drop, shared=not left[id(space.input)])
            yield from found.items()


def as_stored(
    factors: Factors | None, space: LayerSubspaces, config: CompressionConfig, chosen: Rounded | None = None
) -> Factors:
    """``factors``, or the weight of a layer that stays dense, as a layer of 8 bits or pivot rows stores them."""
    if factors is None:
        return eight_bit_weight(space, str(config.projection), *(chosen or Rounded()))
    pivoted = factors.kept is None and is_pivoted(space, factors.rank, config.pivoted)
    return stored_as(factors, space, *(chosen or Rounded()), pivoted=pivoted) if chosen or pivoted else factors


def available(device: torch.device | str) -> torch.device:
    """The device, with its index.

    Raises:
        ValueError: it is unknown or not there.
    """
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here: {error}") from None
    return found
