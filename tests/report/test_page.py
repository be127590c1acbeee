"""Kinds of layers, spectra, and the pages of HTML: whole, self-contained, and true to the report."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.config import LatencyCurve, LayerLatencies
from lowrank_ops.report import KINDS, kind_of
from lowrank_ops.report.page import KIND_COLOURS
from lowrank_ops.subspaces import layer_subspaces


@pytest.mark.parametrize(
    ("fqn", "kind"),
    [
        ("blocks.0.attn.qkv", "qkv"),
        ("blocks.0.attn.proj", "proj"),
        ("blocks.0.fc1", "mlp"),
        ("encoder.layer.3.attention.self.query", "qkv"),
        ("encoder.layer.3.attention.output.dense", "proj"),
        ("encoder.layer.3.intermediate.dense", "mlp"),
        ("encoder.layer.3.output.dense", "mlp"),
        ("pooler.dense", "other"),
        ("classifier", "other"),
        ("model.layers.0.self_attn.o_proj", "proj"),
        ("model.layers.0.self_attn.k_proj", "qkv"),
        ("model.layers.0.mlp.down_proj", "mlp"),
        ("transformer.h.0.attn.c_attn", "qkv"),
        ("transformer.h.0.attn.c_proj", "proj"),
        ("transformer.h.0.mlp.c_proj", "mlp"),
        ("transformer.h.0.mlp.c_fc", "mlp"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "mlp"),
        ("down.attn1.to_out.0", "proj"),
        ("feed_forward.net.2", "mlp"),
        ("lm_head", "other"),
        ("", "other"),
        ("0", "other"),
    ],
)
def test_kinds_go_by_the_names_that_families_use(fqn: str, kind: str) -> None:
    assert kind_of(fqn, nn.Linear(2, 2)) == kind


def test_every_kind_has_a_colour_and_convolutions_are_known_by_their_type() -> None:
    assert kind_of("attn.qkv", nn.Conv2d(1, 1, 1)) == "conv"
    assert set(KIND_COLOURS) == set(KINDS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, 32, 4)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(32, 96), "proj": nn.Linear(96, 32)})
        self.mlp = nn.ModuleDict({"<b>&": nn.Linear(32, 64)})
        self.idle = nn.Linear(64, 64)
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn["proj"](self.attn["qkv"](self.embed(x).flatten(2).mT).tanh())
        return self.head(self.mlp["<b>&"](x).relu().mean(1))


@pytest.fixture(scope="module")
def calibrated() -> tuple[Net, lro.Covariances]:
    torch.manual_seed(0)
    model = Net()
    return model, lro.calibrate(model, torch.randn(400, 2, 8, 8).split(100), sensitivity="fisher")


def copy_of(model: nn.Module) -> Net:
    copy = Net()
    copy.load_state_dict(model.state_dict())
    return copy


def latencies(covariances: lro.Covariances) -> LayerLatencies:
    curve = LatencyCurve(2e-3, (8, 32), (0.5e-3, 1.5e-3))
    return LayerLatencies("made up", 1, {"any": curve}, {fqn: {"any": 1} for fqn in covariances})


class Reader(HTMLParser):
    """Balance of the tags, ids of resources, texts of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [str(value) for name, value in attrs if name in {"src", "href", "xlink:href", "action"}]
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"td", "th", "dd"}:
            self.cells.append(data)


def read(path: Path) -> Reader:
    """Parse a page and hold it to what every page keeps."""
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert not reader.open and text.startswith("<!doctype html>") and '<html lang="en">' in text
    assert not reader.addresses and not reader.tags & {"script", "link", "img", "iframe"}
    assert "http" not in text and "url(" not in text and "@import" not in text and "nan" not in text
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert pictures
    for picture in pictures:
        assert ElementTree.fromstring(picture).attrib["aria-label"]
    return reader


def test_the_page_of_a_utilization_report(calibrated, tmp_path: Path) -> None:
    report = lro.utilization(*calibrated, 0.9)
    report.to_html(tmp_path / "page.html")
    reader = read(tmp_path / "page.html")
    assert f"{report.mean_layer_utilization:.1%}" in reader.cells
    assert {layer.fqn for layer in report.layers} <= set(reader.cells)  # names are escaped
    assert any("idle" in cell for cell in reader.cells)
    assert report.by_kind().keys() == {"qkv", "proj", "mlp", "conv", "other"}
    assert json.loads(report.to_json())["by_kind"] == report.by_kind()


def test_the_page_of_a_compression_report(calibrated, tmp_path: Path) -> None:
    model, covariances = calibrated
    small = copy_of(model)
    config = lro.CompressionConfig(lro.LatencyBudget(0.9, latencies(covariances), "uniform"), overrides={"re:.*": 8})
    report = lro.compress_(small, covariances, config)
    report = report.with_measured(lro.measure_errors(model, small, [torch.randn(100, 2, 8, 8)]))
    report.to_html(tmp_path / "page.html")
    reader = read(tmp_path / "page.html")
    assert {"measured error", "dense ms", "loss", "multiplications"} <= set(reader.cells)
    assert f"{report.layer_parameters / report.layer_parameters_before:.1%}" in reader.cells
    assert "Predicted and measured" in (tmp_path / "page.html").read_text()
    qkv = next(layer for layer in report.layers if layer.kind == "qkv")
    assert (qkv.dense_multiplications, qkv.multiplications) == (10000 * 32 * 96, 10000 * 8 * 128)
    assert (qkv.dense_seconds, qkv.seconds) == (2e-3, 0.5e-3)


def test_a_page_without_anything_extra(calibrated, tmp_path: Path) -> None:
    model, covariances = calibrated
    report = lro.compress_(copy_of(model), covariances, lro.CompressionConfig(lro.Ranks({"head": 8})))
    report.to_html(tmp_path / "page.html")
    reader = read(tmp_path / "page.html")
    assert "measured error" not in reader.cells and "dense ms" not in reader.cells and report.prediction() is None
    assert "measured error" not in report.table()


def test_spectra_rise_to_one(calibrated) -> None:
    model, covariances = calibrated
    report = lro.utilization(model, covariances, 0.9)
    for layer in report.layers:
        assert len(layer.spectrum) == 33 and layer.spectrum[0] == 0 and layer.spectrum[-1] == pytest.approx(1)
        assert list(layer.spectrum) == sorted(layer.spectrum)
    space = layer_subspaces({"head": model.head}, covariances)["head"]
    head = next(layer for layer in report.layers if layer.fqn == "head")
    assert head.spectrum[16] == pytest.approx(float(space.output.explained(8)), abs=1e-6)


def test_a_wide_layer_is_not_decomposed_for_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_ops.subspaces import layer as subspaces

    monkeypatch.setattr(subspaces, "WIDE", 16)
    model = nn.Sequential(nn.Linear(32, 64))
    covariances = lro.calibrate(model, [torch.randn(200, 32)])
    assert lro.utilization(model, covariances).layers[0].spectrum is not None  # it was needed
    report = lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"0": 2})))
    assert report.layers[0].spectrum is None


def test_the_picture_of_a_compression(calibrated, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, covariances = calibrated
    report = lro.compress_(copy_of(model), covariances, lro.CompressionConfig(lro.Ranks({"head": 8})))
    report.plot(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
