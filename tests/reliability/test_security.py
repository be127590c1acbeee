"""What files, names and models from strangers can do: nothing but fail."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops import cli
from lowrank_ops.checkpoint import WEIGHTS_FILE
from lowrank_ops.description import CONFIG_FILE
from lowrank_ops.files import digests, replacing, write_tensors

SOURCES = sorted(Path(lro.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
CALLS = {
    "torch.load",
    "torch.save",
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "torch.hub.load",
    "pandas.read_pickle",
}


def used(tree: ast.AST) -> set[str]:
    """The modules imported and the functions called, by dotted name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module.split(".")[0], *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(Path(lro.__file__).parent)))
def test_no_source_pickles_or_runs_data(path: Path) -> None:
    names = used(ast.parse(path.read_text()))
    assert not names & (MODULES | CALLS)
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) in ("np.load", "numpy.load"):
            assert ast.unparse(next(k for k in call.keywords if k.arg == "allow_pickle").value) == "False"


@pytest.mark.parametrize(
    "source", ["import pickle", "from marshal import loads", "torch.load(x)", "eval(x)", "from torch import load, hub"]
)
def test_what_is_banned_is_found(source: str) -> None:
    assert used(ast.parse(source)) & (MODULES | CALLS)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))


LOADERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": lambda path: lro.load_pretrained(network(), path.parent),
    "covariances": lro.Covariances.load,
    "fine-tuning": lambda path: lro.finetune_(
        network(), [torch.ones(2, 8)], loss=lambda y, x: y.sum(), checkpoint=path
    ),
    "reconstruction": lambda path: lro.compress_(
        model := network(),
        lro.calibrate(model, [torch.ones(2, 8)]),
        reconstruction=lro.SequentialReconstruction([torch.ones(2, 8)], checkpoint=path),
    ),
    "search": lambda path: lro.search_ranks(
        model := network(), lro.calibrate(model, [torch.ones(2, 8)]), lambda m: 0.0, 1.0, cache=path
    ),
    "configuration": lambda path: lro.CompressionConfig.from_json(path.read_bytes().decode(errors="replace")),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("writer", [pickle.dumps, torch.save], ids=["pickle", "torch"])
def test_a_pickle_is_not_opened(tmp_path: Path, name: str, writer: Callable[..., Any]) -> None:
    path, fired = tmp_path / WEIGHTS_FILE, tmp_path / "fired"
    bomb = Bomb(fired)
    path.write_bytes(pickle.dumps(bomb)) if writer is pickle.dumps else torch.save(bomb, path)
    with pytest.raises(ValueError):
        LOADERS[name](path)
    assert not fired.exists()


ESCAPES = ["../../escape", "/etc/passwd", "..\\..\\escape", "a\x00b", "C:\\x", "file:///etc/passwd"]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_in_a_header_are_no_paths(tmp_path: Path, name: str) -> None:
    model, folder = network(), tmp_path / "in" / "side"
    lro.save_pretrained(model, folder)
    tensors: dict[str, Tensor] = {name: torch.ones(2), **model.state_dict()}
    config = json.loads((folder / CONFIG_FILE).read_text())
    config |= {"tied": {"0.weight": name}, "checksums": digests(tensors), "index": name, "weight_map": {name: name}}
    with replacing(folder / WEIGHTS_FILE) as (file,):
        write_tensors(file, tensors, config)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(lro.CheckpointError, match=r"'0\.weight' has shape|which dense_model does not"):
        lro.load_pretrained(network(), folder)
    assert sorted(tmp_path.rglob("*")) == before


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attributes)))


EVIL = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'onload='alert(1)", "&lt;b&gt;", "</svg><b>"]


def pages(name: str, folder: Path) -> list[list[tuple[str, tuple[str, ...]]]]:
    """The tags of every HTML report about a model whose layers have that name."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for part, module in {"": nn.Linear(16, 24), "2": nn.Linear(24, 16), "skipped": nn.Bilinear(2, 2, 2)}.items():
        model.add_module(name + part, module)
    batches = [torch.randn(64, 16)]
    forward = lambda model, batch: model[1](model[0](batch))  # noqa: E731
    covariances = lro.calibrate(model, batches, forward=forward, sensitivity="output")
    lro.utilization(model, covariances).to_html(folder / "utilization.html")
    report = lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({name: 8}), overrides={name + "2": 8}))
    report.with_measured({name: 0.1, name + "2": 0.2}).to_html(folder / "report.html")
    found = []
    for page in sorted(folder.glob("*.html")):
        parser = Tags()
        parser.feed(page.read_text())
        found.append(parser.found)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVIL)
def test_reports_escape_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir(), (tmp_path / "evil").mkdir()
    plain, evil = pages("x" * len(name), tmp_path / "plain"), pages(name, tmp_path / "evil")
    assert len(plain) == 2 and evil == plain
    assert not any(tag in ("script", "img", "b") for page in evil for tag, _ in page)


def test_the_command_line_says_what_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "says_what_it_runs").mkdir()
    (tmp_path / "says_what_it_runs" / "__init__.py").write_text("import sys; print('run', file=sys.stderr)")
    (tmp_path / "says_what_it_runs" / "inner.py").write_text("build = batches = None")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["analyze", "says_what_it_runs.inner:build", "--batches", "x:y"]) == 2
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == (
        "lowrank-ops: MODEL runs says_what_it_runs.inner:build, code of "
        f"{tmp_path / 'says_what_it_runs' / '__init__.py'}"
    )
    assert second == "run"
