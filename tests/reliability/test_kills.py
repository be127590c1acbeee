"""SIGKILL at any moment: the old file or the new one, resumed runs end with the same bits, and nothing is left over."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.calibration import resume
from lowrank_ops.factors.memory import bytes_to_spare
from lowrank_ops.files import digest
from lowrank_ops.subspaces import layer_subspaces
from tests.reliability.campaign import LONG, figures, sized


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8))


def batches(seed: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(24, 16) for _ in range(2)]


RANKS = lro.Ranks({"0": 6, "2": 8, "4": 4})


def compress(folder: Path, seed: int) -> None:
    model = network(seed)
    report = lro.compress_(model, lro.calibrate(model, batches(), sensitivity="output"), RANKS)
    lro.save_pretrained(model, folder, report)


def compress_to_eight_bits(folder: Path, seed: int) -> None:
    model = network(seed)
    report = lro.compress_(model, lro.calibrate(model, batches()), lro.ByteBudget(0.3, allocation="uniform"))
    lro.save_pretrained(model, folder, report)


def drop_channels(folder: Path, seed: int) -> None:
    """Of the first two layers as an MLP, with the new layers in temporary files until the old ones are freed."""
    model, places = network(seed), tempfile.tempdir
    covariances = lro.calibrate(model, batches(), sensitivity="output")
    layers = {fqn: model.get_submodule(fqn) for fqn in covariances}
    config = lro.CompressionConfig(lro.Ranks({"4": 4}, channels={"2": 16}))
    spare = bytes_to_spare(layer_subspaces(layers, covariances), config.resolved(True, True), 10**9)
    (folder / "temporary").mkdir(exist_ok=True)
    tempfile.tempdir = str(folder / "temporary")
    report = lro.compress_(model, covariances, config, max_memory=10**9 - spare)
    tempfile.tempdir = places
    lro.save_pretrained(model, folder, report)


def loaded(folder: Path) -> str:
    return digest(lro.load_pretrained(network(), folder).state_dict())


def calibrate(folder: Path, seed: int) -> None:
    lro.calibrate(network(seed), batches(), sensitivity="output").save(folder / "file")


def calibrate_resumed(folder: Path, seed: int = 0) -> None:
    """With a state after as many batches as its cost allows."""
    torch.manual_seed(2)
    with mock.patch.object(resume, "SECONDS", 0):
        found = lro.calibrate(network(), 10 * batches(), sensitivity="fisher", checkpoint=folder / "states")
    found.save(folder / "file")


def covariances(folder: Path) -> str:
    if not (folder / "file").exists():
        return "nothing"
    return digest({fqn: layer.moments() for fqn, layer in lro.Covariances.load(folder / "file").items()})


def reconstruct(folder: Path, seed: int = 0, kind: Any = lro.SequentialReconstruction) -> None:
    model = network()
    settings = kind(batches(), checkpoint=folder / "file")
    lro.compress_(model, lro.calibrate(model, batches()), RANKS, reconstruction=settings)
    lro.save_pretrained(model, folder / "result")


def reconstruct_blocks(folder: Path, seed: int = 0) -> None:
    reconstruct(folder, kind=partial(lro.BlockReconstruction, epochs=1))


def finetune(folder: Path, seed: int = 0) -> None:
    model = network()
    loader = torch.utils.data.DataLoader(torch.cat(batches()), batch_size=12, shuffle=True)
    torch.manual_seed(3)
    lro.finetune_(
        model,
        loader,
        loss=lambda y, x: (y - 1).square().mean(),
        epochs=3,
        checkpoint=folder / "file",
        checkpoint_every=2,
    )
    lro.save_pretrained(model, folder / "result")


def search(folder: Path, seed: int = 0) -> None:
    model, inputs = network(), torch.cat(batches())
    expected = model(inputs).detach()
    ranks = lro.search_ranks(
        model,
        lro.calibrate(model, batches()),
        lambda m: -float((m(inputs) - expected).square().mean()),
        max_drop=0.02,
        num_evaluations=6,
        cache=folder / "file",
    )
    lro.compress_(model, lro.calibrate(model, batches()), ranks)
    lro.save_pretrained(model, folder / "result")


def result(folder: Path) -> str:
    return loaded(folder / "result") if (folder / "result" / "model.safetensors").exists() else "nothing"


class Work(NamedTuple):
    """What is killed: it writes into a folder that holds an older result or nothing, and ``state`` reads it."""

    run: Callable[[Path, int], Any]
    state: Callable[[Path], str]
    over_old: bool


WORKS = {
    "compress_ and save_pretrained over a good checkpoint": Work(compress, loaded, True),
    "calibrate and Covariances.save over a good file": Work(calibrate, covariances, True),
    "calibrate and Covariances.save to a new file": Work(calibrate, covariances, False),
    "calibrate with a checkpoint, resumed": Work(calibrate_resumed, covariances, False),
    "compress_ with a reconstruction, resumed": Work(reconstruct, result, False),
    "finetune_, resumed": Work(finetune, result, False),
    "search_ranks with a cache, resumed": Work(search, result, False),
}
if LONG:  # make test has enough of their kind
    WORKS |= {
        "compress_ to 8 bits and save_pretrained over a good checkpoint": Work(compress_to_eight_bits, loaded, True),
        "compress_ with a block reconstruction, resumed": Work(reconstruct_blocks, result, False),
        "compress_ of channels within max_memory and save_pretrained": Work(drop_channels, loaded, True),
    }


def in_a_child(work: Callable[[], object], after: float | None = None) -> bool:
    """Run ``work`` in a forked process and kill that after so many seconds; whether it was killed."""
    process = os.fork()
    if not process:
        try:
            os.setpgid(0, 0)
            warnings.simplefilter("ignore")
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work itself failed"
    return os.WIFSIGNALED(status)


def at_step(step: int | None, folder: Path, work: Callable[[], object]) -> int:
    """Run ``work`` in this process and kill it at its n-th operation on a file; the number of operations."""
    count = 0

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "fcntl.flock", "fsync"):
            if event == "open" and str(folder) not in str(arguments[0]):
                return
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    sys.addaudithook(see)
    os.fsync = lambda descriptor: (see("fsync", ()), fsync(descriptor))[1]
    work()
    return count


def steps_of(folder: Path, work: Callable[[], object]) -> int:
    """The number of operations on files that ``work`` takes."""
    read, write = os.pipe()
    in_a_child(lambda: os.write(write, str(at_step(None, folder, work)).encode()))
    return int(os.read(read, 100))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WORKS)
def test_a_kill_loses_nothing(name: str, tmp_path: Path) -> None:
    work = WORKS[name]
    old, new, place = tmp_path / "old", tmp_path / "new", tmp_path / "place"
    old.mkdir(), new.mkdir()
    if work.over_old:
        work.run(old, 5)
    work.run(new, 0)
    before, after = work.state(old), work.state(new)
    names = sorted(str(path.relative_to(new)) for path in new.rglob("*"))
    assert before != after
    shutil.copytree(old, place)
    steps = steps_of(place, lambda: work.run(place, 0))
    generator, seconds = random.Random(0), 0.1
    chosen = generator.sample(range(1, steps + 1), min(steps, sized(2, 40)))
    seen: Counter[str] = Counter()

    def one(kind: str, moment: float) -> bool:
        shutil.rmtree(place)
        shutil.copytree(old, place)
        if kind == "step":
            killed = in_a_child(lambda: at_step(int(moment), place, lambda: work.run(place, 0)))
        else:
            killed = in_a_child(lambda: work.run(place, 0), after=moment)
        if killed:
            found = work.state(place)
            assert found in (before, after), f"torn at {kind} {moment}"
            work.run(place, 0)
            assert work.state(place) == after, f"another result after {kind} {moment}"
            assert sorted(str(path.relative_to(place)) for path in place.rglob("*")) == names, "left over"
            seen.update({"cases": 1, f"at a random {kind}": 1, "new": found == after})
        return killed

    with figures(f"killed: {name}") as counts:
        for step in chosen:
            one("step", step)
        while seen["at a random time"] < sized(0, 100):  # the time that the work takes varies with the machine's load
            seconds *= 1.05 if one("time", generator.uniform(0, seconds)) else 0.8
        assert seen["at a random step"] >= 1  # calibration writes fewer states on a busy machine
        counts.update(seen)
