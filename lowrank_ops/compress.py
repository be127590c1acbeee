"""compress_: from covariances to a smaller model, the steps in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .arguments import checked
from .calibration.covariances import Covariances
from .calibration.packing import empty_in_file
from .config import CompressionConfig
from .considered import considered_layers, resolved
from .factors.layer_by_layer import MAX_HELD_BYTES, as_stored, decompose, factorize_layers
from .factors.memory import bytes_to_spare, new_bytes
from .factors.projections import Factors
from .layers import group_
from .layers.replace import replaceable, replacement, swap_
from .models.experts import on_listed_experts
from .models.layers import FilterFn
from .models.memory import parse_bytes
from .models.running import available, exclusive, in_layer, warn_of_few_rows
from .policies import RankPolicy
from .ranks.choose import ChosenRanks, Rounded
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
from .subspaces.layer import LayerSubspaces


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
            ``ParameterBudget(0.5)``. Choices that it leaves open depend on ``covariances``: with output gradients,
            ranks and factors by loss; without, uniform ranks and output PCA. The report states them.
        filter_fn: ``filter_fn(module, fqn) -> bool`` selects among the calibrated layers. None selects all but layers
            whose weight is tied to another module, which the report lists; selecting one of those is an error.
        subspaces: from :func:`lowrank_ops.subspaces.layer_subspaces`, to try several configurations on copies of a
            model without decomposing again; they keep up to 2 GiB of decompositions. Computed here by default, and for
            layers that they lack.
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
    """The steps: layers, spectra, ranks, factors, reconstruction, new layers, report, replacement, groups.

    Returns:
        The report, and ``{new layer: device to move it to}`` for those whose values are in files.
    """
    config = _with_reconstruction(CompressionConfig.of(config), reconstruction)
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
    in_files = max_memory is not None and held + new_bytes(members, ranks, eight_bit, config.pivoted) > spare
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
