"""The study of a speech recognizer: its model from a CTranslate2 file, word errors, and rows that are measured once."""

import copy
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.accuracy import speech, whisper
from benchmarks.accuracy.corpora import Corpus

transformers = pytest.importorskip("transformers")
VOCABULARY, FRAMES = 60, 40


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=FRAMES // 2, max_target_positions=64, decoder_start_token_id=50, eos_token_id=51,
        pad_token_id=51, bos_token_id=51, suppress_tokens=None, begin_suppress_tokens=None, init_std=0.2,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=50, eos_token_id=51, pad_token_id=51, bos_token_id=51, max_length=64,
        is_multilingual=True, lang_to_id={"<|en|>": 52}, task_to_id={"transcribe": 53}, no_timestamps_token_id=54,
    )  # fmt: skip
    return model


def ctranslate2(model: torch.nn.Module) -> bytes:
    """The model as CTranslate2 stores it: q, k and v concatenated, a zero bias for k."""
    variables: dict[str, torch.Tensor] = {"encoder/num_heads": torch.tensor(2, dtype=torch.int16)}

    def put(name: str, *layers: Any) -> None:
        rows = [layer.weight for layer in layers]
        biases = [
            torch.zeros(len(row)) if layer.bias is None else layer.bias for layer, row in zip(layers, rows, strict=True)
        ]
        norm = isinstance(layers[0], torch.nn.LayerNorm)
        variables[f"{name}/{'gamma' if norm else 'weight'}"] = torch.cat(rows)
        variables[f"{name}/{'beta' if norm else 'bias'}"] = torch.cat(biases)

    for side, part in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        put(f"{side}/layer_norm", part.layer_norm)
        variables[f"{side}/position_encodings/encodings"] = part.embed_positions.weight
        for index, block in enumerate(part.layers):
            name, own = f"{side}/layer_{index}", block.self_attn
            put(f"{name}/self_attention/layer_norm", block.self_attn_layer_norm)
            put(f"{name}/self_attention/linear_0", own.q_proj, own.k_proj, own.v_proj)
            put(f"{name}/self_attention/linear_1", own.out_proj)
            put(f"{name}/ffn/layer_norm", block.final_layer_norm)
            put(f"{name}/ffn/linear_0", block.fc1)
            put(f"{name}/ffn/linear_1", block.fc2)
            if side == "decoder":
                other = block.encoder_attn
                put(f"{name}/attention/layer_norm", block.encoder_attn_layer_norm)
                put(f"{name}/attention/linear_0", other.q_proj)
                put(f"{name}/attention/linear_1", other.k_proj, other.v_proj)
                put(f"{name}/attention/linear_2", other.out_proj)
    put("encoder/conv1", model.model.encoder.conv1)
    put("encoder/conv2", model.model.encoder.conv2)
    variables["decoder/embeddings/weight"] = model.model.decoder.embed_tokens.weight

    def name_of(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    content = struct.pack("<I", 6) + name_of("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, tensor in variables.items():
        values = tensor.detach().numpy()
        values = values if values.dtype == np.int16 else values.astype(np.float16)
        content += name_of(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        content += struct.pack("<BI", 2 if values.dtype == np.int16 else 4, values.nbytes) + values.tobytes()
    return content + struct.pack("<I", 1) + name_of("decoder/projection/weight") + name_of("decoder/embeddings/weight")


def test_a_ctranslate2_file_holds_the_model(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.half().float()
    with torch.no_grad():  # torch's are zero
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape).half())
    found = whisper.state_dict(whisper.read_variables(ctranslate2(model)))
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_other_files_are_refused(model: torch.nn.Module) -> None:
    content = ctranslate2(model)
    with pytest.raises(ValueError, match="its first number is 5"):
        whisper.read_variables(struct.pack("<I", 5) + content[4:])
    with pytest.raises(ValueError, match="bytes are left"):
        whisper.read_variables(content + b"\0")
    variables = dict(whisper.read_variables(content))
    key = "encoder/layer_0/self_attention/linear_0/bias"
    variables[key] = np.ones_like(variables[key])
    with pytest.raises(ValueError, match="which Whisper does not have"):
        whisper.state_dict(variables)


def test_names_of_variants_list_their_options() -> None:
    for name, variant in speech.VARIANTS.items():
        for option in ("damped", "pivoted", "corrected"):
            assert getattr(variant, option) == (option in name.split(", ")), name


def test_word_errors() -> None:
    found = speech.word_errors(["Red wine, blue sea.", "sun moon"], ["red wine green sea foam", "sun moon"])
    assert found["words"] == 6 and found["rate"] == pytest.approx(100 * 2 / 6)
    # Errors 2 and 0, expected 4/3 and 2/3: each is off by 2/3.
    assert found["deviation"] == pytest.approx(100 * (2 * 2 * (2 / 3) ** 2) ** 0.5 / 6)
    assert speech.edits("kitten", "sitting") == 3 and speech.edits("", "abc") == 3 and speech.edits("abc", "") == 3


def test_sentences_have_plain_words_only() -> None:
    text = (
        "You can also restrict the use of programs to a group. Run apt-get update as the root user, then wait for it.\n"
        "It is short. This one, however, is long enough for us to be kept!"
    )
    assert list(speech.sentences([text])) == [
        "You can also restrict the use of programs to a group.",
        "This one, however, is long enough for us to be kept!",
    ]


def test_variants_are_measured_once(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = "abcdefghijklmnop"
    texts = [" ".join([f"The {letter}"] + [letter * k for k in range(2, 12)]) + "." for letter in words]
    monkeypatch.setattr(speech, "corpus", lambda kind, held_out: Corpus(texts[:8], [], texts[8:]))
    monkeypatch.setattr(speech, "say", lambda text, voice, speed: torch.full((8, FRAMES), float(ord(text[4]) % 7)))
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(f"w{int(i)}x" for i in ids[4:]))

    def extractor(spoken: Any, **options: Any) -> SimpleNamespace:
        features = torch.stack([torch.from_numpy(part) for part in spoken])
        return SimpleNamespace(input_features=features + torch.randn(features.shape))

    monkeypatch.setattr(speech, "load", lambda folder: (model, tokenizer, extractor))
    monkeypatch.setattr(speech, "LONGEST", 8)
    before = copy.deepcopy(model.state_dict())
    variants = ["output, shares of variance (LiteASR)", "loss, damped, pivoted, corrected"]
    arguments = ["--out", str(tmp_path / "rows.json"), "--calibration", "2", "--test", "2", "--budgets", "60"]
    arguments += ["--cache", str(tmp_path / "cache"), "--variants", *variants]
    speech.main(arguments)
    rows = speech.Results(tmp_path / "rows.json").rows
    assert [row["variant"] for row in rows] == ["dense", *variants]
    dense, *students = rows
    assert dense["to_dense_rate"] == dense["divergence"] == 0 and dense["to_spoken_words"] > 0
    for row in students:
        assert row["layer_share"] <= 0.6 and row["divergence"] > 0 and row["to_dense_deviation"] >= 0
        assert row["encoder_parameters"] < dense["encoder_parameters"]
    speech.main(arguments)
    assert speech.Results(tmp_path / "rows.json").rows == rows
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
