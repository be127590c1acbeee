"""Files are written whole or not at all, with the user's mode, and leave nothing behind."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_ops as lro
from lowrank_ops.files import digest, open_tensors, parse_json, read_header, replacing, write_tensors
from lowrank_ops.folders import compress_folder
from lowrank_ops.latencies import LayerLatencies


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def batches() -> list[torch.Tensor]:
    return [torch.ones(4, 64)]


def finetune(path: Path) -> None:
    lro.finetune_(model(), batches(), teacher=model().double().float(), steps=1, checkpoint=path)


def reconstruct(path: Path) -> None:
    dense = model()
    settings = lro.SequentialReconstruction(batches(), checkpoint=path)
    lro.compress_(dense, lro.calibrate(dense, batches()), 8, reconstruction=settings)


def latencies(path: Path) -> None:
    LayerLatencies("cpu", 1, {}, {f"layer {i}": {} for i in range(5000)}).save(path)


def report() -> Any:
    dense = model()
    covariances = lro.calibrate(dense, [torch.randn(80, 64)])
    return lro.utilization(dense, covariances), lro.compress_(dense, covariances, 8)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "save_pretrained": lambda path: lro.save_pretrained(model(), path.parent),
    "covariances": lambda path: lro.calibrate(model(), batches()).save(path),
    "finetune_": finetune,
    "reconstruction": reconstruct,
    "latencies": latencies,
    "page of a utilization": lambda path: report()[0].to_html(path),
    "page of a compression": lambda path: report()[1].to_html(path),
    "picture of a compression": lambda path: report()[1].plot(path.with_suffix(".svg")),
}


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 2,000 bytes, as on a disk that fills up. Pytest's own output may, outside of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    with small_files(), pytest.raises(OSError, match="File too large"):
        WRITERS[name](tmp_path / "file")
    assert not content(tmp_path)


def test_a_folder_that_was_made_for_a_failed_save_is_removed(tmp_path: Path) -> None:
    lro.save_pretrained(model(), tmp_path / "dense")
    covariances = lro.calibrate(model(), [torch.randn(80, 64)])
    with small_files():
        with pytest.raises(OSError, match="File too large"):
            lro.save_pretrained(model(), tmp_path / "new")
        with pytest.raises(OSError, match="File too large"):
            compress_folder(tmp_path / "dense", tmp_path / "smaller", covariances, 8)
    assert os.listdir(tmp_path) == ["dense"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in WRITERS if "of a" in name])
def test_reports_that_cannot_be_written_keep_the_old_ones(tmp_path: Path, name: str) -> None:
    old = dict.fromkeys(("file", "file.svg"), b"old")
    for file, text in old.items():
        (tmp_path / file).write_bytes(text)
    with small_files(), pytest.raises(OSError, match="File too large"):
        WRITERS[name](tmp_path / "file")
    assert content(tmp_path) == old


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRITERS)
def test_files_are_synced_and_have_the_default_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), fsync(descriptor)))
    WRITERS[name](tmp_path / "file")
    files = list(tmp_path.iterdir())
    assert {file.stat().st_ino for file in [*files, tmp_path]} <= set(synced)
    (tmp_path / "default").touch()
    assert {file.stat().st_mode for file in files} == {(tmp_path / "default").stat().st_mode}


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_keeps_the_old_files(tmp_path: Path, kind: type[BaseException]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(kind), replacing(tmp_path / "a", tmp_path / "b") as files:
        files[0].write(b"new" * 10000)
        raise kind
    assert content(tmp_path) == {"a": b"old", "b": b"old"}


def test_a_killed_writer_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    process = os.fork()
    if not process:
        with replacing(tmp_path / "a") as (file,):
            file.write(b"new" * 10000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert (tmp_path / "a").read_bytes() == b"old" and len(content(tmp_path)) == 2
    with replacing(tmp_path / "a") as (file,):
        file.write(b"newer")
    assert content(tmp_path) == {"a": b"newer"}


def test_a_living_writer_keeps_its_temporary_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as (first,):
        first.write(b"first")
        with replacing(tmp_path / "a") as (second,):
            second.write(b"second")
    assert content(tmp_path) == {"a": b"first"}


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "a").touch(0o600)
    with replacing(tmp_path / "a") as (file,):
        file.write(b"secret")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_temporary_names_are_not_guessed(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "a"):
            names |= {file.name for file in tmp_path.iterdir()} - {"a"}
    assert len(names) == 3


@pytest.mark.parametrize("bad", ["folder", "missing/file"])
def test_paths_that_cannot_be_written_are_oserrors(tmp_path: Path, bad: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=bad.split("/")[0]), replacing(tmp_path / bad):
        raise AssertionError
    assert os.listdir(tmp_path) == ["folder"]


def test_tensors_of_every_dtype_are_read_back(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(12).view(3, 4).to(dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64)
    }
    tensors |= {"transposed": torch.eye(5)[:2].T, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    tensors["float8"] = torch.ones(3).to(torch.float8_e4m3fn)
    with replacing(tmp_path / "a") as (file,):
        write_tensors(file, tensors, {"key": ["value"]})
    found = load_file(tmp_path / "a")
    assert {name: digest(tensor) for name, tensor in found.items()} == {n: digest(t) for n, t in tensors.items()}
    with open_tensors(tmp_path / "a") as stored:
        assert read_header(stored) == {"key": ["value"]}
    with pytest.raises(ValueError, match=r"'a' has dtype torch.complex128"), replacing(tmp_path / "b") as (file,):
        write_tensors(file, {"a": torch.zeros(2, dtype=torch.complex128)}, {})


@pytest.mark.parametrize(
    "text", ["[" * 100000, '{"a":' * 100000, "[" * 100000 + "]" * 100000, "{", "", b"\xff\xfe\x00"]
)
def test_every_bad_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_digests_see_values_at_any_depth() -> None:
    class Batch:
        def __init__(self, x: torch.Tensor) -> None:
            self.x, self.own = x, self

    x, other = torch.zeros(3), torch.tensor([0.0, 0.0, 1.0])

    class InSlots:
        __slots__ = ("x",)

        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    class InOneSlot:
        __slots__ = "rows"

        def __init__(self, rows: torch.Tensor) -> None:
            self.rows = rows

    for wrap in (
        InSlots,
        InOneSlot,
        lambda x: {"a": [x, "b"]},
        lambda x: (1, (x,)),
        Batch,
        lambda x: x.numpy(),
        lambda x: [x.tolist()],
    ):
        assert digest(wrap(x)) == digest(wrap(x.clone())) != digest(wrap(other))
    assert digest([[x], x]) != digest([x, [x]]) and digest("1") != digest(1)
    values = [torch.float16, torch.float32, torch.device("cpu"), {1, 2}, {1, 3}, range(2), range(3), Path("a"), np.int8]
    assert len(set(map(digest, values))) == len(values) and digest({"b", "a"}) == digest({"a", "b"})


class Loss:
    def __init__(self, power: int) -> None:
        self.power = power

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        return y**self.power

    def halved(self, y: torch.Tensor) -> torch.Tensor:
        return 0.5 * self(y)


class OtherLoss(Loss):
    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        return y.abs() ** self.power


OtherLoss.__qualname__ = "Loss"


def test_digests_see_the_code_of_functions() -> None:
    """Other constants, operations, nested code, defaults, wrappers, methods and objects, under one name."""

    def calls(*operations: Callable[..., Any]) -> list[Callable[..., Any]]:
        return [functools.wraps(operation)(lambda y, operation=operation: operation(y)) for operation in operations]

    def scaled(by: float) -> Callable[..., Any]:
        def loss(y: torch.Tensor, by: float = by) -> torch.Tensor:
            return by * y

        return loss

    functions = [
        lambda y: y.square(), lambda y: 2 * y.square(), lambda y: 3 * y.square(), lambda y: y.exp(),
        lambda y: [v for v in y if v in {1, 2}], lambda y: [v for v in y if v in {1, 3}], *calls(torch.sum, torch.mean),
        scaled(1.0), scaled(2.0), functools.partial(scaled, 1.0), functools.partial(scaled, 2.0), Loss(2), OtherLoss(2),
        Loss(2).halved, nn.MSELoss(), torch.sum,
    ]  # fmt: skip
    assert len(set(map(digest, functions))) == len(functions)
    assert digest(scaled(1.0)) == digest(scaled(1.0)) and digest(Loss(2)) == digest(Loss(2))


def test_digests_of_functions_do_not_depend_on_the_order_of_sets() -> None:
    def loss(y: list[int]) -> list[int]:
        return [v for v in y if v in {0, 8}]

    digests = set()
    for members in ([0, 8], [8, 0]):  # which collide in a small set
        consts = [frozenset(members) if isinstance(part, frozenset) else part for part in loss.__code__.co_consts]
        loss.__code__ = loss.__code__.replace(co_consts=tuple(consts))
        digests.add(digest(loss))
    assert len(digests) == 1


def test_digests_see_the_settings_of_losses() -> None:
    def losses() -> list[torch.nn.Module]:
        kind = torch.nn.CrossEntropyLoss
        weighted = [kind(torch.full((3,), weight)) for weight in (1.0, 2.0)]
        return [kind(), kind(label_smoothing=0.1), kind(ignore_index=0), *weighted]

    found = [digest(loss) for loss in losses()]
    assert len(set(found)) == len(found) and found == [digest(loss) for loss in losses()]
    assert digest(torch.nn.Linear(2, 2, device="meta")) == digest(torch.nn.Linear(2, 2, device="meta"))


SCALE = 1.0


def scaled(y: torch.Tensor) -> torch.Tensor:
    return SCALE * y


def scaled_inside(y: torch.Tensor) -> Any:
    return sum(SCALE * part for part in y)


def captured(value: Any) -> Callable[..., Any]:
    return lambda y: [(y, value) for _ in range(1)]


def test_digests_see_the_numbers_that_functions_read(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [1, 2.5, "kl", None]
    assert len({digest(captured(value)) for value in values}) == len(values)
    assert digest(captured(torch.nn.Linear(2, 2))) == digest(captured(None))  # a model may be another copy
    calls = 0

    def counted(y: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return y

    before = digest(counted)
    counted(torch.ones(1))
    assert digest(counted) == before  # where a run is resumed, a counter goes on
    before = list(map(digest, (scaled, scaled_inside)))
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert not set(before) & set(map(digest, (scaled, scaled_inside)))


class Weighted(torch.nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight, self.calls = weight, 0

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.weight * y


def test_digests_see_the_numbers_that_objects_hold() -> None:
    for made in (Weighted, Loss, lambda weight: Weighted(weight).forward, lambda weight: Loss(weight).__call__):
        assert len({digest(made(weight)) for weight in (1.0, 2.0, 2.0)}) == 2
    loss = Weighted(1.0)
    before = digest(loss)
    loss.eval()(torch.ones(1))
    assert digest(loss) == before  # its counter and its mode are no settings
