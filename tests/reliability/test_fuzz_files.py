"""Files with mutated bytes: the documented error, or what was saved; and nothing but the file is opened."""

from __future__ import annotations

import copy
import json
import math
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

import lowrank_ops as lro
from lowrank_ops.checkpoint import WEIGHTS_FILE
from lowrank_ops.description import CONFIG_FILE
from lowrank_ops.files import digest, digests, replacing, write_tensors
from lowrank_ops.folders import compress_folder
from lowrank_ops.latencies import LatencyCurve, LayerLatencies
from lowrank_ops.layers import LowRankLayer, NarrowLinear, PivotedLinear
from lowrank_ops.layers.group import groups_in
from lowrank_ops.search.trial_cache import TrialCache
from tests.reliability.campaign import examples, figures
from tests.rewriting import content_of

MAX_GROWTH = 64 << 10  # KiB that a campaign may add to the process
MAX_SECONDS = 5.0  # of the processor, for one load
RANKS = lro.Ranks({"0": 4, "2": 3})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))


class Siblings(nn.Module):
    """Two layers of one input, which are grouped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) * self.k(x)


def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(24, 8) for _ in range(2)]


def squared(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def load_checkpoint(path: Path, make: Callable[[], nn.Module] = network) -> str:
    model = make()
    before = digest(model.state_dict())
    try:
        lro.load_pretrained(model, path.parent)
    except ValueError:
        assert digest(model.state_dict()) == before
        assert not any(isinstance(part, (LowRankLayer, NarrowLinear)) for part in model.modules())
        raise
    model(batches()[0])
    return digest(model.state_dict()) + repr(groups_in(model))


def load_siblings(path: Path) -> str:
    return load_checkpoint(path, Siblings)


def compress_saved(path: Path) -> str:
    """A dense folder is compressed without loading it."""
    compress_folder(path.parent, path.parent / "out", lro.calibrate(network(), batches()), RANKS)
    return digest(lro.load_pretrained(network(), path.parent / "out").state_dict())


def load_covariances(path: Path) -> str:
    covariances = lro.Covariances.load(path)
    return digest({fqn: (s.side, s.moments()) for fqn, s in covariances.items()}) + repr(
        (covariances.unreached, covariances.skipped)
    )


def reconstruct(path: Path, make: Any = lro.SequentialReconstruction) -> str:
    model = network()
    settings = make(batches(), checkpoint=path)
    report = lro.compress_(model, lro.calibrate(model, batches()), RANKS, reconstruction=settings)
    return digest(model.state_dict()) + repr([layer.predicted_error for layer in report.layers])


def reconstruct_blocks(path: Path) -> str:
    return reconstruct(path, partial(lro.BlockReconstruction, epochs=1))


def finetune(path: Path) -> str:
    model = network()
    report = lro.finetune_(model, batches(), loss=squared, epochs=2, checkpoint=path)
    return digest(model.state_dict()) + repr(report.losses)


def accuracy(ranks: Any) -> float:
    return sum(rank or 12 for rank in ranks.values()) / 24


def search(path: Path) -> str:
    measure = TrialCache(path, {"model": "a", "covariances": "b"}).cached(accuracy)
    return repr([measure({"0": rank, "2": None}) for rank in range(4, 9)])


def latencies(path: Path) -> str:
    if not path.exists():
        curves = {"Linear 8 -> 12": LatencyCurve(3e-5, (4, 8), (1e-5, 2e-5)), "b": LatencyCurve(1e-5, (8,), (2e-5,))}
        LayerLatencies("cpu", 1, curves, {"0": {"Linear 8 -> 12": 1}, "2": {"b": 2}}).save(path)
    loaded = LayerLatencies.load(path)
    for fqn in loaded.layers:
        assert all(math.isfinite(loaded.seconds(fqn, rank)) for rank in (None, 1, 8, 100))
    return ""  # has no checksum


def config(path: Path) -> str:
    if not path.exists():
        made = lro.CompressionConfig(lro.ParameterBudget(0.5), overrides={"0": None}, bounds={"re:.*": (1, 8)})
        path.write_text(made.to_json())
    loaded = lro.CompressionConfig.from_json(path.read_bytes().decode(errors="surrogateescape"))
    assert lro.CompressionConfig.from_json(loaded.to_json()) == loaded
    return ""


def saved_checkpoint(path: Path, make: Callable[[], nn.Module] = network, **options: Any) -> None:
    model = make()
    settings = lro.CompressionConfig(**({"rank": RANKS} | options))
    report = lro.compress_(model, lro.calibrate(model, batches(), sensitivity="output"), settings)
    lro.save_pretrained(model, path.parent, report)


def saved_eight_bit(path: Path, pivoted: bool = False) -> None:
    """Factors of each form, one of the layer's dtype, and a dense layer."""
    model = nn.Sequential(*network(), nn.Linear(6, 6))
    lro.compress_(model, lro.calibrate(model, batches()), lro.CompressionConfig(RANKS, pivoted=pivoted))
    assert isinstance(model[0], PivotedLinear) is pivoted
    model[0].quantize_("int8")
    model[2].quantize_("fp8", up=False)
    model[3] = lro.layers.EightBitLinear.from_linear(model[3])
    lro.save_pretrained(model, path.parent)


def load_with_head(path: Path) -> str:
    return load_checkpoint(path, lambda: nn.Sequential(*network(), nn.Linear(6, 6)))


def saved_channels(path: Path) -> None:
    """An MLP that has lost channels, and a layer with factors."""
    model = nn.Sequential(*network(), nn.Linear(6, 6))
    covariances = lro.calibrate(model, batches(), sensitivity="output")
    lro.compress_(model, covariances, lro.Ranks({"3": 2}, channels={"2": 7}))
    assert isinstance(model[2], NarrowLinear) and isinstance(model[3], LowRankLayer)
    lro.save_pretrained(model, path.parent)


class Format(NamedTuple):
    """A file that is written by the first function and read by the second, whose result must never change."""

    file: str
    write: Callable[[Path], Any]
    load: Callable[[Path], str]


FORMATS = {
    "checkpoint": Format(WEIGHTS_FILE, saved_checkpoint, load_checkpoint),
    "checkpoint, 8-bit factors": Format(WEIGHTS_FILE, saved_eight_bit, load_with_head),
    "checkpoint, pivoted layers of 8 bits": Format(
        WEIGHTS_FILE, partial(saved_eight_bit, pivoted=True), load_with_head
    ),
    "checkpoint, pivoted layers": Format(WEIGHTS_FILE, partial(saved_checkpoint, pivoted=True), load_checkpoint),
    "checkpoint, fewer channels": Format(WEIGHTS_FILE, saved_channels, load_with_head),
    "checkpoint, grouped layers": Format(
        WEIGHTS_FILE, partial(saved_checkpoint, make=Siblings, rank=4, group=True), load_siblings
    ),
    "checkpoint's JSON copy": Format(CONFIG_FILE, saved_checkpoint, load_checkpoint),
    "dense folder": Format(WEIGHTS_FILE, lambda path: lro.save_pretrained(network(), path.parent), compress_saved),
    "covariances": Format(
        "covariances",
        lambda path: lro.calibrate(network(), batches(), sensitivity="output").save(path),
        load_covariances,
    ),
    "reconstruction": Format("file", reconstruct, reconstruct),
    "block reconstruction": Format("file", reconstruct_blocks, reconstruct_blocks),
    "fine-tuning": Format("file", finetune, finetune),
    "trial cache": Format("file", search, search),
    "latencies": Format("file", latencies, latencies),
    "configuration": Format("file", config, config),
}
HEADERS = [n for n in FORMATS if n not in ("checkpoint's JSON copy", "trial cache", "latencies", "configuration")]


# --- what a load may do ---------------------------------------------------------------------------------------------

_watching: list[tuple[Path, list[str]]] = []
_FORBIDDEN = (
    "pickle.find_class",
    "exec",
    "os.system",
    "os.exec",
    "subprocess.Popen",
    "socket.connect",
    "ctypes.dlopen",
)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    folder, seen = _watching[-1]
    if event in _FORBIDDEN and not (event == "exec" and _is_import(arguments)):
        seen.append(f"{event} {arguments!r:.100}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path = Path(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode()).absolute()
        known = path.suffix == ".py" or str(path).startswith((sys.prefix, sys.base_prefix, "/proc", "/sys"))
        if folder not in (path, *path.parents) and not known:  # sources are read for tracebacks
            seen.append(f"open {path}")


def _is_import(arguments: tuple[Any, ...]) -> bool:
    """Whether an exec is that of a module of the installation, which is imported when first used."""
    return str(getattr(arguments[0], "co_filename", "")).startswith((sys.prefix, sys.base_prefix, "<frozen"))


sys.addaudithook(_audit)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """No code is run and no file outside ``folder`` is opened inside the block."""
    seen: list[str] = []
    _watching.append((folder, seen))
    try:
        yield
    finally:
        _watching.pop()
    assert not seen


def attempt(format: Format, path: Path, expected: str) -> bool:
    """Load a damaged file: True if it was refused as documented, False if it gave the value that was saved."""
    started = time.process_time()
    with warnings.catch_warnings(), watched(path.parent):
        warnings.simplefilter("ignore")
        try:
            found = format.load(path)
        except ValueError as error:
            assert str(error) and type(error).__module__.split(".")[0] in ("builtins", "lowrank_ops")
            return True
        finally:
            assert time.process_time() - started < MAX_SECONDS
    assert found == expected, "loaded, but not what was saved"
    return False


# --- mutations ------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 255, 2**31, 2**60, 2**63, 2**64 - 1]
TOKENS = [b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"', b"\\", b"\x00", b"9" * 5000, b"[" * 3000, b"\xff\xfe"]


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        # The beginning holds lengths and headers, so half of the mutations go there.
        end = max(len(changed), 1)
        at = draw(st.integers(0, end - 1) | st.integers(0, min(end, 64) - 1))
        size = draw(st.sampled_from([1, 2, 8, 64, 1000]))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "repeat", "insert", "number", "random", "header length"]))
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[at:]
        elif kind == "drop":
            del changed[at : at + size]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + size]
        elif kind == "insert":
            changed[at:at] = draw(st.sampled_from(TOKENS))
        elif kind == "number":
            changed[at : at + 8] = draw(st.sampled_from(NUMBERS)).to_bytes(8, "little")
        elif kind == "random":
            changed[at : at + size] = draw(st.binary(min_size=1, max_size=16))
        else:
            changed[:8] = draw(st.sampled_from(NUMBERS)).to_bytes(8, "little")
    return bytes(changed)


JSON = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=4),
    st.sampled_from([[], {}, [[]], {"a": {}}, "../../escape", "/etc/passwd", 10**400]),
)  # fmt: skip


@st.composite
def edited(draw: st.DrawFn, document: Any) -> Any:
    """A copy of a JSON document with one to three values replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        at = document
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], (dict, list)) and at[key] and draw(st.booleans()):
                at = at[key]
                continue
            if draw(st.booleans()):
                at[key] = copy.deepcopy(draw(JSON))
            elif isinstance(at, dict) and draw(st.booleans()):
                at[draw(st.sampled_from(["0", "../x", "", "\x00", "added"]))] = at.pop(key)
            else:
                del at[key]
            break
    return document


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    found = {}
    for name, format in FORMATS.items():
        path = tmp_path_factory.mktemp("saved") / format.file
        format.write(path)
        found[name] = path, format.load(path)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_bytes_are_refused_or_harmless(name: str, originals: dict[str, tuple[Path, str]]) -> None:
    format, (path, expected) = FORMATS[name], originals[name]
    content = path.read_bytes()
    seen: Counter[str] = Counter()

    @examples(8, 1000)
    @given(mutated(content))
    def check(changed: bytes) -> None:
        path.write_bytes(changed)
        seen["refused"] += attempt(format, path, expected)
        seen["cases"] += 1

    with figures(f"mutated bytes: {name}") as counts:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            check()
        finally:
            path.write_bytes(content)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        assert grown < MAX_GROWTH, f"{grown} KiB"
        counts.update(seen, MiB=grown >> 10)


@pytest.mark.parametrize("name", HEADERS)
def test_forged_headers_are_documented_errors(name: str, originals: dict[str, tuple[Path, str]]) -> None:
    """Headers with right checksums, as an attacker would write them: any value may load, no code may run."""
    format, (path, _) = FORMATS[name], originals[name]
    content = path.read_bytes()
    header, tensors = content_of(path)
    seen: Counter[str] = Counter()

    @examples(8, 1000)
    @given(edited(header), st.sampled_from([*tensors, None]), st.sampled_from(["drop", "int", "empty", "nan", "big"]))
    def check(changed: Any, key: str | None, change: str) -> None:
        parts = dict(tensors)
        if key is not None and change == "drop":
            del parts[key]
        elif key is not None:
            parts[key] = {
                "int": lambda t: t.long(), "empty": lambda t: t.flatten()[:0], "nan": lambda t: t.float() * math.nan,
                "big": lambda t: torch.zeros(3, 70, dtype=torch.float64),
            }[change](parts[key])  # fmt: skip
        if isinstance(changed, dict) and changed.get("checksums") == header["checksums"]:
            changed["checksums"] = digests(parts)
        with replacing(path) as (file,):
            write_tensors(file, parts, changed)
        try:
            seen["refused"] += attempt(format, path, "")
        except AssertionError as error:
            if "loaded, but not" not in str(error):
                raise
        seen["cases"] += 1

    with figures(f"forged headers: {name}") as counts:
        try:
            check()
        finally:
            path.write_bytes(content)
        counts.update(seen)


@pytest.mark.parametrize("kind", ["configuration", "latencies"])
def test_edited_json_is_a_value_or_a_value_error(kind: str, originals: dict[str, tuple[Path, str]]) -> None:
    format, (path, expected) = FORMATS[kind], originals[kind]
    content = path.read_bytes()
    document = json.loads(content)
    seen: Counter[str] = Counter()

    @examples(20, 1500)
    @given(edited(document))
    def check(changed: Any) -> None:
        path.write_text(json.dumps(changed))
        seen["refused"] += attempt(format, path, expected)
        seen["cases"] += 1

    with figures(f"edited JSON: {kind}") as counts:
        try:
            check()
        finally:
            path.write_bytes(content)
        counts.update(seen)


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("claim", ["header", "offset", "shape"])
def test_sizes_that_no_file_has_are_not_allocated(
    name: str, claim: str, originals: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    format, (path, expected) = FORMATS[name], originals[name]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    key = next(key for key in head if key != "__metadata__")
    if claim == "offset":
        head[key]["data_offsets"][1] = 2**60
    elif claim == "shape":
        head[key] |= {"shape": [2**30, 2**28], "data_offsets": [0, 2**58 * 8]}
    text = json.dumps(head).encode()
    size = 2**60 if claim == "header" else len(text)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        path.write_bytes(size.to_bytes(8, "little") + text + content[8 + length :])
        assert attempt(format, path, expected)
    finally:
        path.write_bytes(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MAX_GROWTH
