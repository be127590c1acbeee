"""Packing the demo's images and training its model, on a small data set."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.accuracy import train_demo
from lowrank_ops.demo.evaluation import percent_equal, predict
from lowrank_ops.demo.vit import ViT


def write_original(folder: Path, counts: dict[str, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write IDX files like those of the data set, with images whose brightness depends on their class."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    made = {}
    for split, count in counts.items():
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 25, (count, 28, 28), dtype=np.uint8) + 25 * labels[:, None, None]
        header = b"".join(number.to_bytes(4, "big") for number in (2051, count, 28, 28))
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = b"".join(number.to_bytes(4, "big") for number in (2049, count))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
        made[split] = images, labels
    return made


def test_pack_keeps_the_test_set_and_images_of_each_class(tmp_path: Path) -> None:
    made = write_original(tmp_path / "original", {"train": 70, "t10k": 20})
    for found, expected in zip(train_demo.read_original(tmp_path / "original", "train"), made["train"], strict=True):
        assert np.array_equal(found, expected)
    train_demo.pack(tmp_path / "original", tmp_path / "packed.npz", per_class=3)
    with np.load(tmp_path / "packed.npz") as packed:
        assert np.array_equal(packed["calibration_images"], made["train"][0][:30])
        assert np.array_equal(packed["calibration_labels"], made["train"][1][:30])
        assert np.array_equal(packed["test_images"], made["t10k"][0])
        assert np.array_equal(packed["test_labels"], made["t10k"][1])


def test_training_writes_weights_and_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_original(tmp_path / "original", {"train": 256, "t10k": 50})
    arguments = ["--data", tmp_path / "original", "--out", tmp_path / "new" / "out", "--epochs", 1, "--seed", 3]
    monkeypatch.setattr(sys, "argv", ["train_demo", *map(str, arguments)])
    train_demo.main()
    out = tmp_path / "new" / "out"
    weights = load_file(out / "vit.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    model = ViT()
    model.load_state_dict(weights)
    images, labels = train_demo._tensors(tmp_path / "original", "t10k")
    record = json.loads((out / "training.json").read_text())
    assert record["test_accuracy_float16_weights"] == percent_equal(predict(model, images), labels)
    assert record["seed"] == 3 and [entry["epoch"] for entry in record["log"]] == [1]
    assert (out / "fashion_mnist.npz").exists()
