"""Threads, data loaders and Ctrl-C: right values, and a model that is as it was."""

from __future__ import annotations

import copy
import os
import random
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lowrank_ops as lro
from lowrank_ops.factors.memory import bytes_to_spare
from lowrank_ops.files import digest
from lowrank_ops.ops import lowrank_linear
from lowrank_ops.report.measured_errors import measure_errors
from lowrank_ops.subspaces import layer_subspaces
from tests.reliability.campaign import LONG, figures, sized

HOOKS = [
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
]  # fmt: skip


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(24, 48), nn.Dropout(0.1), nn.Tanh(), nn.Sequential(nn.Linear(48, 48), nn.Tanh()), nn.Linear(48, 16)
    )


def batches(seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(40, 24) for _ in range(4)]


RANKS = lro.Ranks({"0": 8, "3.0": 16, "4": 4})


def state_of(*models: nn.Module) -> list[Any]:
    """All that a caller can see of models and of the process."""
    found: list[Any] = [
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.backends.mha.get_fastpath_enabled(),
        torch.get_num_threads(), torch.get_default_dtype(),
    ]  # fmt: skip
    for model in models:
        for module in model.modules():
            found += [id(module), type(module), module.training, [len(getattr(module, kind)) for kind in HOOKS]]
            found.append(
                [(name, id(part), part.requires_grad) for name, part in module.named_parameters(recurse=False)]
            )
        found += [digest(model.state_dict()), [parameter.grad for parameter in model.parameters()]]
    return found


def handed_back(model: nn.Module) -> list[Any]:
    """What new layers take over from the old ones, and the setting of the process that runs change."""
    modules = [(module.training, [len(getattr(module, kind)) for kind in HOOKS]) for module in model.modules()]
    return [*modules, *state_of()]


def reconstruct(model: nn.Module, covariances: lro.Covariances) -> None:
    reconstruction = lro.SequentialReconstruction(batches(), sensitivity="output")
    lro.compress_(model, covariances, RANKS, reconstruction=reconstruction)


def reconstruct_blocks(model: nn.Module, covariances: lro.Covariances) -> None:
    reconstruction = lro.BlockReconstruction(batches(), sensitivity="output", epochs=1)
    lro.compress_(model, covariances, RANKS, reconstruction=reconstruction)


def drop_channels(model: nn.Module, covariances: lro.Covariances) -> None:
    """With the new layers in temporary files until the old ones are freed."""
    config = lro.CompressionConfig(lro.Ranks({"4": 4}, channels={"3.0": 24}))
    spaces = layer_subspaces({fqn: model.get_submodule(fqn) for fqn in covariances}, covariances)
    spare = bytes_to_spare(spaces, config.resolved(True, True), 10**9)
    lro.compress_(model, covariances, config, max_memory=10**9 - spare)


def measure_channels(model: nn.Module, covariances: lro.Covariances) -> None:
    batch, config = batches()[:1], lro.CompressionConfig(channels=True)
    spaces = lro.correct_predictions(model, covariances, batch, sensitivity="output", channels=True)
    ranks = lro.measured_ranks(
        model, covariances, batch, 0.7, sensitivity="output", rounds=1, config=config, subspaces=spaces
    )
    lro.compress_(model, covariances, ranks)


def finetune(model: nn.Module, teacher: nn.Module) -> None:
    lro.finetune_(model, batches(), teacher=teacher, match=["3"], epochs=2)


def search(model: nn.Module, covariances: lro.Covariances) -> None:
    lro.search_ranks(model, covariances, lambda m: -float(m(batches()[0]).square().mean()), 0.1, num_evaluations=4)


def prepared() -> tuple[nn.Module, nn.Module, lro.Covariances, nn.Module]:
    model, other = network(), network(3)
    model[3].eval()
    covariances = lro.calibrate(model, batches(), sensitivity="output")
    compressed = copy.deepcopy(model)
    lro.compress_(compressed, covariances, RANKS)
    return model, other, covariances, compressed


# What is interrupted; fine-tuning may leave other values.
INTERRUPTED: dict[str, Callable[..., Any]] = {
    "calibrate": lambda model, other, covariances, compressed: lro.calibrate(model, batches(), sensitivity="output"),
    "compress_ with a reconstruction": lambda model, other, covariances, compressed: reconstruct(model, covariances),
    "compress_ with a block reconstruction": lambda model, other, covariances, compressed: reconstruct_blocks(
        model, covariances
    ),
    "compress_ of channels by measured ranks": lambda model, other, covariances, compressed: measure_channels(
        model, covariances
    ),
    "compress_ of channels within max_memory": lambda model, other, covariances, compressed: drop_channels(
        model, covariances
    ),
    "search_ranks": lambda model, other, covariances, compressed: search(model, covariances),
    "measure_errors": lambda model, other, covariances, compressed: measure_errors(model, compressed, batches()),
    "finetune_": lambda model, other, covariances, compressed: finetune(other, model),
}


@contextmanager
def ctrl_c(after: float) -> Iterator[None]:
    """SIGINT from another process, so many seconds after the block has begun, unless that has ended."""
    parent, child = os.getpid(), os.fork()
    if not child:
        time.sleep(after)
        os.kill(parent, signal.SIGINT)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if LONG:  # at random moments, which a failure in make test could not repeat

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("name", INTERRUPTED)
    def test_an_interrupt_leaves_the_model_as_it_was(name: str) -> None:
        work = INTERRUPTED[name]
        generator, seen, seconds = random.Random(0), Counter[str](), 0.1
        finished = prepared()
        work(*finished)
        new = [type(module) for module in finished[0].modules()]
        with figures(f"interrupted: {name}") as counts:
            while seen["cases"] < 200:
                parts = prepared()
                watched = [parts[0], parts[3]]
                before = state_of(*watched)
                hooks = [[len(getattr(module, kind)) for kind in HOOKS] for module in parts[1].modules()]
                ended = False
                try:
                    with ctrl_c(generator.uniform(0, seconds)):
                        work(*parts)
                        ended = True
                        time.sleep(0.2)  # for an interrupt that waited
                    seconds *= 0.8
                except KeyboardInterrupt:
                    if ended:
                        continue
                    seconds *= 1.05
                    seen["cases"] += 1
                    found = [[len(getattr(module, kind)) for kind in HOOKS] for module in parts[1].modules()]
                    assert found == hooks
                    kinds = [type(module) for module in parts[0].modules()]
                    if kinds == new != [type(module) for module in prepared()[0].modules()]:  # at the end of compress_
                        assert handed_back(parts[0]) == handed_back(prepared()[0])
                        seen["new"] += 1
                        continue
                    assert state_of(*watched) == before
                    work(*parts)  # nothing is locked
            counts.update(seen)


class Failing(nn.Module):
    """Raises in its n-th call, in which those of copies are counted."""

    left = 0

    def __init__(self, at: int, kind: type[BaseException]) -> None:
        super().__init__()
        Failing.left, self.kind = at, kind

    def forward(self, x: Tensor) -> Tensor:
        Failing.left -= 1
        if not Failing.left:
            raise self.kind("on purpose")
        return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt], ids=lambda kind: kind.__name__)
def test_hooks_are_removed_once_on_every_path(kind: type[BaseException]) -> None:
    """The model raises in any of its calls, in calibration, reconstruction, and a search."""
    works: list[Callable[[nn.Module, lro.Covariances], Any]] = [
        lambda model, covariances: lro.calibrate(model, batches(), sensitivity="output"),
        reconstruct,
        search,
    ]
    covariances = lro.calibrate(nn.Sequential(*network(), nn.Identity()), batches(), sensitivity="output")
    for work in works:
        for at in (1, 3):
            model = nn.Sequential(*network(), Failing(at, kind))
            mine: list[int] = []
            model[0].register_forward_hook(lambda *args, seen=mine: seen.append(1)) if work is works[0] else None
            before = state_of(model)
            with pytest.raises(kind):
                work(model, covariances)
            assert state_of(model) == before
            Failing.left = 10**6
            mine.clear()
            model(batches()[0])
            assert len(mine) == (work is works[0])


def in_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


def test_models_in_threads_are_calibrated_and_compressed_as_alone() -> None:
    fixed, threads = batches(), sized(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [copy.deepcopy(network()) for _ in range(threads)]
        for index, model in enumerate(models):
            for parameter in model.parameters():
                parameter.data += 0.1 * index
        alone, together = copy.deepcopy(models), models

        def compress(model: nn.Module) -> str:
            lro.compress_(model, lro.calibrate(model, fixed), RANKS)
            return digest(model.state_dict())

        expected, found = [compress(model) for model in alone], [""] * threads

        def one(index: int) -> None:
            found[index] = compress(together[index])

        with figures("models in threads") as counts:
            in_threads(threads, one)
            assert found == expected
            counts["cases"] = threads


def test_one_layer_serves_many_threads() -> None:
    """Shapes that no thread has seen before, while other threads fill and empty the cache of decisions."""
    layer, calls = lro.LowRankLinear(16, 12, rank=5).requires_grad_(False), sized(100, 3000)

    def work(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        for call in range(calls):
            x = torch.randn(1 + (call * 7 + index) % 61, 16, generator=generator)
            torch.testing.assert_close(
                lowrank_linear(x, layer.down, layer.up, layer.bias), x @ layer.product().T + layer.bias
            )

    with figures("one layer in threads") as counts:
        in_threads(4, work)
        counts["cases"] = 4 * calls


def in_ddp(rank: int, folder: Path) -> None:
    """A process of DDP: calibrates the wrapped model, compresses the module, wraps it again, trains it."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    wrapped = nn.parallel.DistributedDataParallel(network())
    mine = [batch[rank::2] for batch in batches()]
    wrapped(mine[0]).square().sum().backward()  # in the middle of a training
    before = state_of(wrapped)
    covariances = lro.calibrate(wrapped, mine, sensitivity=squares).all_reduce_()
    assert state_of(wrapped) == before
    with pytest.raises(ValueError, match="is wrapped by DistributedDataParallel"):
        lro.compress_(wrapped, covariances, RANKS)
    assert state_of(wrapped) == before
    of_module = {fqn.removeprefix("module."): part for fqn, part in covariances.items()}
    model = wrapped.module.eval()
    lro.compress_(model, lro.Covariances(of_module), RANKS)
    compressed = copy.deepcopy(model.state_dict())
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.01)
    for batch in mine:
        optimizer.zero_grad()
        wrapped(batch).square().mean().backward()
        optimizer.step()
    trained = copy.deepcopy(model.state_dict())
    lro.finetune_(wrapped, mine, teacher=network(), match=[], soft_weight=1.0, steps=3)
    tuned = model.state_dict()
    torch.save(
        [compressed, trained, tuned, {f: p.activations.second_moment for f, p in of_module.items()}], folder / f"{rank}"
    )
    torch.distributed.destroy_process_group()


def squares(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().sum(-1)


if LONG:  # two processes import torch again

    @pytest.mark.filterwarnings("ignore")
    def test_ddp_trains_what_was_calibrated_and_compressed(tmp_path: Path) -> None:
        with figures("DDP of two processes, gloo") as counts:
            torch.multiprocessing.start_processes(in_ddp, (tmp_path,), nprocs=2, start_method="spawn")
            first, second = (torch.load(tmp_path / f"{rank}") for rank in range(2))
            for mine, others in zip(first, second, strict=True):
                for name in mine:
                    assert torch.equal(mine[name], others[name]), name
            model = network().eval()
            covariances = lro.calibrate(model, batches(), sensitivity=squares)
            for fqn, moment in first[3].items():
                torch.testing.assert_close(moment, covariances[fqn].activations.second_moment)
            lro.compress_(model, covariances, RANKS)
            for name, expected in model.state_dict().items():
                torch.testing.assert_close(first[0][name], expected, rtol=1e-3, atol=1e-4)
            model.load_state_dict(first[0])
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            for batch in batches():  # one process takes the same steps over the rows of both
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
            for name, expected in model.state_dict().items():
                torch.testing.assert_close(first[1][name], expected, rtol=1e-4, atol=1e-5)
            counts["cases"] = 2


class Compressed(Dataset[Tensor]):
    """Items that a low-rank layer computes in the loader's process."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = lro.LowRankLinear(24, 24, rank=6).requires_grad_(False)
        self.x = torch.randn(32, 24)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.layer(self.x[index])


@pytest.mark.parametrize("start", ["fork", *(["spawn", "forkserver"] if LONG else [])])  # the others import torch again
def test_data_loaders_feed_calibration(start: str, tmp_path: Path) -> None:
    data, model = Compressed(), network()
    loader = DataLoader(data, 8, num_workers=2, multiprocessing_context=start)
    with figures(f"data loader by {start}") as counts:
        found = lro.calibrate(model, loader)
        expected = lro.calibrate(model, DataLoader(data, 8))
        assert digest({k: v.moments() for k, v in found.items()}) == digest(
            {k: v.moments() for k, v in expected.items()}
        )
        counts["cases"] = 1


def test_progress_bars_take_no_lock_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm's lock is shared with forked processes: one killed while it holds the lock would stop all others."""

    def taken(*args: object) -> None:
        raise AssertionError("tqdm's own lock")

    monkeypatch.setattr("tqdm.std.TqdmDefaultWriteLock.acquire", taken)
    monkeypatch.setattr("tqdm.std.TqdmDefaultWriteLock.create_mp_lock", taken)
    monkeypatch.delattr("tqdm.std.tqdm._lock", raising=False)
    model = network()
    for progress in (True, False):
        covariances = lro.calibrate(model, batches(), progress=progress)
    lro.compress_(model, covariances, RANKS, progress=True)
    importing = [path for path in Path(lro.__file__).parent.rglob("*.py") if "import tqdm" in path.read_text()]
    assert [path.name for path in importing] == ["running.py"]
