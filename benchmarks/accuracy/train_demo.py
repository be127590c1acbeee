"""Reproduce the weights of the demo: ``python -m benchmarks.accuracy.train_demo`` (about 40 minutes on 2 CPU cores).

Needs the original Fashion-MNIST files; on Debian: ``apt install dataset-fashion-mnist``.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from lowrank_ops.demo.data import IMAGES, TRAINING, WEIGHTS, standardize
from lowrank_ops.demo.evaluation import percent_equal, predict
from lowrank_ops.demo.vit import ViT

OUT = Path(__file__).parents[2] / "demo"
BATCH = 128
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05


def main() -> None:
    """Pack the images and train."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.train_demo", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the original files"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    pack(options.data, options.out / IMAGES)
    train(options.data, options.out, options.epochs, options.seed)


def train(data: Path, out: Path, epochs: int, seed: int) -> None:
    """Train with AdamW and a one-cycle schedule; write the weights in float16 and ``training.json``."""
    torch.manual_seed(seed)
    images, labels = _tensors(data, "train")
    test_images, test_labels = _tensors(data, "t10k")
    model = ViT()
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps, pct_start=0.2)

    log, started = [], time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        order, total = torch.randperm(len(images)), 0.0
        for rows in tqdm(order[: steps * BATCH].split(BATCH), desc=f"epoch {epoch}/{epochs}"):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        accuracy = percent_equal(predict(model, test_images), test_labels)
        log.append({"epoch": epoch, "train_loss": round(total / steps, 4), "test_accuracy": accuracy})
        print(log[-1], flush=True)

    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_file(half, out / WEIGHTS)
    model.load_state_dict(half)
    record = {
        "seed": seed,
        "epochs": epochs,
        "batch": BATCH,
        "optimizer": f"AdamW, one cycle to {LEARNING_RATE}, weight decay {WEIGHT_DECAY}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "test_accuracy_float16_weights": percent_equal(predict(model, test_images), test_labels),
        "seconds": round(time.perf_counter() - started),
        "torch": torch.__version__,
        "log": log,
    }
    (out / TRAINING).write_text(json.dumps(record, indent=2) + "\n")


def read_original(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels from the IDX files of the original data set: ``split`` is ``"train"`` or ``"t10k"``."""
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def pack(folder: Path, destination: Path, per_class: int = 200) -> None:
    """Write the demo's images: the test set, and for calibration ``per_class`` training images of each class."""
    images, labels = read_original(folder, "train")
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(10)]))
    test_images, test_labels = read_original(folder, "t10k")
    np.savez_compressed(
        destination,
        calibration_images=images[chosen],
        calibration_labels=labels[chosen],
        test_images=test_images,
        test_labels=test_labels,
    )


def _tensors(data: Path, split: str) -> tuple[Tensor, Tensor]:
    images, labels = read_original(data, split)
    return standardize(images), torch.tensor(labels, dtype=torch.int64)


if __name__ == "__main__":
    main()
