"""The HTML pages: well-formed, self-contained, and true to the report."""

import copy
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import lowrank_ops as lro
from lowrank_ops.latencies import LatencyCurve, LayerLatencies
from lowrank_ops.report import KINDS
from lowrank_ops.report.page import KIND_COLORS


def latencies(covariances: lro.Covariances) -> LayerLatencies:
    curve = LatencyCurve(2e-3, (8, 32), (0.5e-3, 1.5e-3))
    return LayerLatencies("cpu", 1, {"any": curve}, {fqn: {"any": 1} for fqn in covariances})


class Reader(HTMLParser):
    """Checks that tags are balanced; collects tags, addresses of resources, and texts of cells."""

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
    """Parse a page and check what must hold for every page."""
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


def test_every_kind_has_a_color() -> None:
    assert set(KIND_COLORS) == set(KINDS)


def test_utilization_page_shows_every_layer(net, tmp_path: Path) -> None:
    report = lro.utilization(*net, 0.9)
    report.to_html(tmp_path / "page.html")
    reader = read(tmp_path / "page.html")
    assert f"{report.mean_layer_utilization:.1%}" in reader.cells
    assert {layer.fqn for layer in report.layers} <= set(reader.cells)  # names are escaped
    assert any("idle" in cell for cell in reader.cells)
    assert report.by_kind().keys() == {"qkv", "proj", "mlp", "conv", "other"}
    assert json.loads(report.to_json())["by_kind"] == report.by_kind()


def test_compression_page_shows_times_and_errors(net, tmp_path: Path) -> None:
    model, covariances = net
    dense = copy.deepcopy(model)
    config = lro.CompressionConfig(lro.LatencyBudget(0.9, latencies(covariances), "uniform"), overrides={"re:.*": 8})
    report = lro.compress_(model, covariances, config)
    report = report.with_measured(lro.measure_errors(dense, model, [torch.randn(100, 2, 8, 8)]))
    report.to_html(tmp_path / "page.html")
    reader = read(tmp_path / "page.html")
    assert {"projection", "MACs", "loss increase", "measured error", "dense ms"} <= set(reader.cells)
    assert f"{report.layer_parameters / report.layer_parameters_before:.1%}" in reader.cells
    text = (tmp_path / "page.html").read_text()
    assert "Predicted and measured errors" in text
    assert "Ranks by LatencyBudget(fraction=0.9), allocation uniform; projection loss." in text
    qkv = next(layer for layer in report.layers if layer.kind == "qkv")
    assert (qkv.dense_macs, qkv.macs) == (10000 * 32 * 96, 10000 * 8 * 128)
    assert (qkv.dense_seconds, qkv.seconds) == (2e-3, 0.5e-3)


def test_page_leaves_out_columns_without_content(net, tmp_path: Path) -> None:
    report = lro.compress_(*net, lro.CompressionConfig(lro.Ranks({"head": 8}), "output"))
    report.to_html(tmp_path / "page.html")
    reader = read(tmp_path / "page.html")
    assert not {"measured error", "dense ms"} & set(reader.cells) and report.prediction() is None
    assert "measured error" not in report.table()


def test_page_of_many_layers_has_no_bar_per_layer(net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_ops.report import sections

    monkeypatch.setattr(sections, "MAX_BARS", 2)
    report = lro.utilization(*net)
    report.to_html(tmp_path / "page.html")
    assert "By layer" not in (tmp_path / "page.html").read_text()
    assert {layer.fqn for layer in report.layers} <= set(read(tmp_path / "page.html").cells)


def test_notebooks_show_the_page_in_a_frame_of_its_own(net, tmp_path: Path) -> None:
    report = lro.utilization(*net)
    report.to_html(tmp_path / "page.html")
    shown = report._repr_html_()
    inside = re.fullmatch(r'<iframe srcdoc="([^"]*)" sandbox="" style="[^"]*"></iframe>', shown)
    assert inside and html.unescape(inside[1]) == (tmp_path / "page.html").read_text(encoding="utf-8")
