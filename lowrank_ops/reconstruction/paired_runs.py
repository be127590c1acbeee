"""Paired runs of a model, dense and with the layers replaced so far, each stopped at the layer of interest.

Blocks (the children of a ModuleList or Sequential) whose layers are all done are not run again: they return the stored
output of the last of them. Code between blocks (embeddings, masks, positions) runs each time, so nothing is assumed
about the arguments of blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..models.layers import compiled_or_scripted, input_of, is_conv
from ..models.masks import Masks
from ..models.running import (
    device_of,
    evaluating,
    exclusive,
    hooks,
    in_batch,
    move,
    output_tensor,
    random_state_kept,
    without_fast_path,
)

LOGITS = ("logits",)
OUTPUT_FIELDS = ("last_hidden_state",)  # of a block's output, where it is an object or a mapping
Block = tuple[str, int]  # a chain, and the index of one of its children
_CPU = torch.device("cpu")
Position = dict[str, int]  # by chain: how many of its children have been passed


class _Reached(BaseException):
    """Ends a run of the model; a BaseException, so that the model's own ``except Exception`` does not catch it."""


@dataclass(frozen=True)
class Group:
    """Layers that receive one and the same tensor.

    Attributes:
        layers: their names, the one called first in front.
        calls: how often the first one is called in a forward.
        position: the blocks that had been passed at its first call.
    """

    layers: tuple[str, ...]
    calls: int
    position: Position


@dataclass(frozen=True)
class Section:
    """One run through one or several blocks.

    Attributes:
        input: the first tensor that the first one received, if any.
        output: of the last one.
        mask: of the rows of that output.
    """

    input: Tensor | None
    output: Any
    mask: Tensor | None


def find_chains(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Names of the ModuleLists and Sequentials whose children hold the layers, none inside another.

    Every layer costs a run through its child. A container with n layers, split over children with n_i, therefore saves
    n^2 - sum n_i^2 layer runs; of nested containers the one that saves most is chosen.
    """
    saved = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(map(compiled_or_scripted, module.modules())):
            prefix = f"{name}." if name else ""
            children = Counter(fqn[len(prefix) :].split(".")[0] for fqn in layers if fqn.startswith(prefix))
            if len(children) > 1:
                saved[name] = children.total() ** 2 - sum(count**2 for count in children.values())
    chosen: list[str] = []
    for name in sorted(saved, key=lambda name: -saved[name]):
        if not any(_inside(name, other) or _inside(other, name) for other in chosen):
            chosen.append(name)
    return chosen


def _inside(name: str, other: str) -> bool:
    return not other or name == other or name.startswith(f"{other}.")


def block_name(model: nn.Module, block: Block) -> str:
    """The name of a chain's child in the model."""
    chain, index = block
    child = list(model.get_submodule(chain)._modules)[index]
    return f"{chain}.{child}" if chain else child


class PairedRuns:
    """The two runs of a model, as a context manager that restores the model.

    Args:
        model: the dense model.
        layers: ``{fqn: layer}``, those that may be replaced.
        batches: each is run many times.
        forward: ``forward(model, batch)``.
        masks: of the model.
        chains: names of containers of blocks, for instance from :func:`find_chains`.
        strict: raise ValueError if a chain cannot be run block by block, instead of ignoring the chain.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Sequence[Any],
        forward: Callable[[nn.Module, Any], Any],
        masks: Masks,
        chains: Sequence[str],
        strict: bool = False,
    ) -> None:
        self.model, self.layers, self.batches = model, layers, batches
        self._forward, self._masks, self._strict = forward, masks, strict
        self.device = device_of(model)
        self._chains = list(chains)
        self._replacements: dict[str, nn.Module] = {}
        self._stored: dict[tuple[str, bool, int], Any] = {}  # output of the last passed child
        self._passed: Position = {}
        self._compressed, self._batch = False, 0  # of this run
        self._disturbed = False  # this run scales the outputs of the layers
        self._on_input: Callable[[str, Tensor], None] = lambda fqn, x: None  # a layer's input
        self._on_output: Callable[[str, int, Any], None] = lambda chain, index, output: None  # a child's output
        self._on_block: Callable[[Block, tuple[Any, ...], dict[str, Any]], None] = lambda block, args, kwargs: None
        self._ends: tuple[Position, dict[tuple[str, bool, int], Any]] | None = None
        self._stack = ExitStack()
        self.groups: list[Group] = []
        self.blocks: list[Block] = []  # children of chains, in the order of their calls

    def __enter__(self) -> PairedRuns:
        with ExitStack() as stack:
            stack.enter_context(exclusive(self.model))
            stack.enter_context(random_state_kept(self.model))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self.model))
            stack.enter_context(without_fast_path())
            self._masks.attach(stack.enter_context(hooks()))
            for fqn, layer in self.layers.items():
                self._attach(stack, fqn, layer)
            for chain in self._chains:
                for index, child in enumerate(self.model.get_submodule(chain).children()):
                    self._route_child(stack, chain, index, child)
            self._trace()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._stored.clear()
        self._ends = None

    def replace(self, fqn: str, replacement: nn.Module) -> None:
        """Use ``replacement`` for a layer in the compressed run from now on."""
        self._replacements[fqn] = replacement.eval()

    def advance(self, position: Position) -> None:
        """Store what both runs need to start from ``position``; nothing before it may change afterwards."""
        for chain, count in position.items():
            if count > self._passed.get(chain, 0):
                for batch in range(len(self.batches)):
                    for compressed in (False, True):
                        self._stored[chain, compressed, batch] = self._output_of(chain, count - 1, batch, compressed)
                self._passed[chain] = count

    def pairs(self, group: Group) -> Iterator[tuple[int, list[Tensor], list[Tensor], list[Tensor | None]]]:
        """Per batch: its index, and per call the group's inputs in the dense and the compressed run, and the mask."""
        for batch in range(len(self.batches)):
            x, _ = self._inputs_of(group, batch, compressed=False)
            z, masks = self._inputs_of(group, batch, compressed=True)
            yield batch, x, z, masks

    def section(self, first: Block, last: Block, batch: int, compressed: bool) -> Section:
        """One run up to and including a block, from the stored position; gradients flow if they are enabled."""
        inputs: list[Tensor | None] = []
        found: list[tuple[Any, Tensor | None]] = []
        name = block_name(self.model, last)

        def on_block(called: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if called == first:
                x = output_tensor([*args, *kwargs.values()], ())
                inputs.append(None if x is None else x.detach().clone())

        def on_output(chain: str, index: int, output: Any) -> None:
            if (chain, index) == last:
                y = output_tensor(output, OUTPUT_FIELDS)
                found.append((output, self._masks.of_block(name, self.model.get_submodule(name), y)))
                raise _Reached

        self._on_block = on_block
        try:
            self._run(batch, compressed, on_output=on_output)
        finally:
            self._on_block = lambda block, args, kwargs: None
        if not found:
            raise self._missed(last, batch)
        return Section(inputs[0], *found[0])

    def output(self, batch: int) -> Any:
        """The compressed model's output, from the stored position; gradients flow if they are enabled."""
        return self._run(batch, True)

    def dense_output(self, batch: int) -> Any:
        """The dense model's output. Only what follows the blocks is run, after a first call that runs the whole."""
        if self._ends is None:
            self._ends = self._stored_ends()
        kept = self._passed, self._stored
        self._passed, self._stored = self._ends
        try:
            return self._run(batch, False)
        finally:
            self._passed, self._stored = kept

    def _stored_ends(self) -> tuple[Position, dict[tuple[str, bool, int], Any]]:
        """The position after all blocks, and the dense run's outputs there; none if the model's output needs more."""
        kept, position = (self._passed, self._stored), {chain: index + 1 for chain, index in self.blocks}
        stored: dict[tuple[str, bool, int], Any] = {}
        outputs: list[Any] = []
        self._passed = {}
        try:
            for batch in range(len(self.batches)):

                def on_output(chain: str, index: int, output: Any, batch: int = batch) -> None:
                    if index + 1 == position.get(chain):
                        stored[chain, False, batch] = _copied(output, _CPU)
                    if batch and (chain, index) == self.blocks[-1]:  # the first batch's output is compared
                        raise _Reached

                output = self._run(batch, False, on_output=on_output)
                outputs = outputs or [_copied(output_tensor(output, LOGITS), _CPU)]
            self._disturb()
            self._passed, self._stored = position, stored
            found = _copied(output_tensor(self._run(0, False), LOGITS), _CPU)
        finally:
            self._passed, self._stored = kept
        return (position, stored) if _all_close(found, outputs[0]) else ({}, {})

    def _attach(self, stack: ExitStack, fqn: str, layer: nn.Module) -> None:
        dense = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            replacement = self._replacements.get(fqn) if self._compressed else None
            if replacement is not None:
                return replacement(input_of(args, kwargs))
            return 0.5 * dense(*args, **kwargs) if self._disturbed else dense(*args, **kwargs)

        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            if isinstance(x := input_of(args, kwargs), Tensor):  # else the layer raises
                self._on_input(fqn, x)

        # A pre-hook sees the input after other hooks have changed it.
        hook = layer.register_forward_pre_hook(see, with_kwargs=True)
        stack.callback(hook.remove)
        _override(stack, layer, forward)

    def _route_child(self, stack: ExitStack, chain: str, index: int, child: nn.Module) -> None:
        run = child.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if index < self._passed.get(chain, 0):
                return _copied(self._stored[chain, self._compressed, self._batch], self.device)
            self._on_block((chain, index), args, kwargs)
            output = run(*args, **kwargs)
            self._on_output(chain, index, output)
            return output

        _override(stack, child, forward)

    def _run(
        self,
        batch: int,
        compressed: bool,
        on_input: Callable[[str, Tensor], None] | None = None,
        on_output: Callable[[str, int, Any], None] | None = None,
    ) -> Any:
        """What the model returns; None if a callback has ended the run."""
        self._batch, self._compressed = batch, compressed
        self._on_input = on_input or (lambda fqn, x: None)
        self._on_output = on_output or (lambda chain, index, output: None)
        try:
            with in_batch(batch):
                return self._forward(self.model, move(self.batches[batch], self.device))
        except _Reached:
            return None
        finally:
            self._compressed = False
            self._on_input, self._on_output = (lambda fqn, x: None), (lambda chain, index, output: None)

    def _inputs_of(self, group: Group, batch: int, compressed: bool) -> tuple[list[Tensor], list[Tensor | None]]:
        found: list[Tensor] = []
        masks: list[Tensor | None] = []  # forward= may call the model several times, each time with its own mask

        def on_input(fqn: str, x: Tensor) -> None:
            if fqn == group.layers[0]:
                layer = self.layers[fqn]
                masks.append(None if is_conv(layer) else self._masks.of(fqn, layer, x))
                found.append(x if group.calls == 1 else x.clone())  # the run continues and may change it in place
                if group.calls == 1:
                    raise _Reached

        self._run(batch, compressed, on_input)
        return found, masks

    def _output_of(self, chain: str, index: int, batch: int, compressed: bool) -> Any:
        found: list[Any] = []

        def on_output(name: str, child: int, output: Any) -> None:
            if (name, child) == (chain, index):
                found.append(_copied(output, _CPU))
                raise _Reached

        self._run(batch, compressed, on_output=on_output)
        if not found:
            raise self._missed((chain, index), batch)
        return found[0]

    def _missed(self, block: Block, batch: int) -> ValueError:
        return ValueError(
            f"block {block[1]} of {block[0]!r} was called for the first batch but not for batch {batch} (counted from "
            "0); batches must run through the same blocks."
        )

    def _trace(self) -> None:
        """Find the groups in the order of their calls, on the first batch, and drop chains that do not work as such."""
        while True:
            events, outputs, broken = self._observe()
            broken = broken or self._first_broken(events, outputs)
            if not broken:
                break
            if self._strict:
                raise ValueError(
                    f"blocks={broken!r} cannot be run block by block: its children are not called once each, in order, "
                    "each from the last one's output alone. Name another container, or omit blocks."
                )
            self._chains.remove(broken)
        self.groups = _grouped(events, self.layers)
        self.blocks = list(outputs)

    def _observe(self) -> tuple[list[_Event], dict[tuple[str, int], Any], str | None]:
        """All calls of layers, the outputs of all children, and a chain that is not called in order, if any."""
        events: list[_Event] = []
        outputs: dict[tuple[str, int], Any] = {}
        passed: Position = {}
        broken: list[str] = []

        def on_input(fqn: str, x: Tensor) -> None:
            version = 0 if x.is_inference() else x._version
            events.append(_Event(fqn, x, x if x.is_nested else x.clone(), version, dict(passed)))

        def on_output(chain: str, index: int, output: Any) -> None:
            if chain in self._chains:
                if index < passed.get(chain, 0):
                    broken.append(chain)
                passed[chain] = index + 1
                outputs[chain, index] = _copied(output, _CPU)

        self._run(0, False, on_input, on_output)
        return events, outputs, broken[0] if broken else None

    def _first_broken(self, events: list[_Event], outputs: dict[tuple[str, int], Any]) -> str | None:
        """The first chain whose stored outputs do not reproduce what a run from the start computes.

        Another run comes in between, with other activations, because blocks may pass values on beside their outputs
        (value residuals, shared keys and values): those would be of the last whole run.
        """
        before: Position = {}
        try:
            for event in events:
                new = [chain for chain, count in event.position.items() if count != before.get(chain, 0)]
                before = event.position
                if not new:
                    continue
                self._disturb()
                self._passed = event.position
                for chain, count in event.position.items():
                    self._stored[chain, False, 0] = outputs[chain, count - 1]
                expected = [other for other in events if other.position == event.position]
                try:
                    found, after = self._replay({other.fqn for other in expected}, len(expected))
                except Exception:  # the model's code between blocks rejects outputs of later blocks in earlier places
                    return new[-1]
                inputs_agree = len(found) == len(expected) and all(
                    fqn == other.fqn and _close(x, other.kept) for (fqn, x), other in zip(found, expected, strict=True)
                )
                if not inputs_agree or not all(_all_close(output, outputs[place]) for place, output in after):
                    return new[-1]
        finally:
            self._passed = {}
            self._stored.clear()
        return None

    def _disturb(self) -> None:
        """Run another batch, if there is one, with scaled outputs of the layers."""
        self._passed, self._disturbed = {}, True
        try:
            self._run(len(self.batches) - 1, False)
        except Exception:  # the model's code rejects such activations; what ran so far has left its traces
            pass
        finally:
            self._disturbed = False

    def _replay(self, wanted: set[str], count: int) -> tuple[list[tuple[str, Tensor]], list[tuple[Block, Any]]]:
        """A dense run of the first batch: the first calls of some layers, and the outputs of blocks up to theirs."""
        found: list[tuple[str, Tensor]] = []
        after: list[tuple[Block, Any]] = []

        def on_input(fqn: str, x: Tensor) -> None:
            if fqn in wanted and len(found) < count:
                found.append((fqn, x if x.is_nested else x.clone()))

        def on_output(chain: str, index: int, output: Any) -> None:
            if chain in self._chains:
                after.append(((chain, index), _copied(output, _CPU)))
                if len(found) >= count:
                    raise _Reached

        self._run(0, False, on_input, on_output)
        return found, after


@dataclass(frozen=True)
class _Event:
    """One call of a layer."""

    fqn: str
    x: Tensor  # what it was called with, for its identity
    kept: Tensor  # the values at that time
    version: int
    position: Position


def _first_calls(events: list[_Event]) -> list[_Event]:
    return list({event.fqn: event for event in reversed(events)}.values())[::-1]


def _grouped(events: list[_Event], layers: Mapping[str, nn.Module]) -> list[Group]:
    calls = Counter(event.fqn for event in events)
    groups: dict[object, list[_Event]] = {}
    for event in _first_calls(events):
        shares = calls[event.fqn] == 1 and not is_conv(layers[event.fqn])
        groups.setdefault((id(event.x), event.version) if shares else event.fqn, []).append(event)
    return [
        Group(tuple(event.fqn for event in group), calls[group[0].fqn], group[0].position) for group in groups.values()
    ]


def _override(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Override one module's forward for as long as ``stack`` lasts."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    if own is None:
        stack.callback(delattr, module, "forward")
    else:
        stack.callback(setattr, module, "forward", own)


def _copied(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors copied, because the model may change them in place."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, (tuple, list)):
        copies = [_copied(part, device) for part in value]
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
    if type(value) is dict:
        return {key: _copied(part, device) for key, part in value.items()}
    return value


def _close(x: Tensor, expected: Tensor) -> bool:
    if x.is_nested or expected.is_nested:
        return x.is_nested and expected.is_nested and _close(torch.cat(x.unbind()), torch.cat(expected.unbind()))
    if x.shape != expected.shape:
        return False
    return not x.numel() or bool((x - expected).abs().max() <= 1e-3 * expected.abs().max())


def _all_close(value: Any, expected: Any) -> bool:
    """:func:`_close` for all floating-point tensors of two outputs."""
    pairs = zip(_tensors(value), _tensors(expected), strict=True)
    return len(_tensors(value)) == len(_tensors(expected)) and all(_close(x, other) for x, other in pairs)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
