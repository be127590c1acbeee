"""Reproduce the weights of the demo: ``python -m lowrank_ops.demo.train`` (about 20 minutes on 2 CPU cores).

Needs the original Fashion-MNIST files; on Debian: ``apt install dataset-fashion-mnist``.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .data import IMAGES, pack, read_original, standardise
from .evaluation import percent_equal, predict
from .vit import WEIGHTS, ViT

BATCH = 128
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m lowrank_ops.demo.train", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the original files"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets", help="folder to write to")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    pack(options.data, options.out / IMAGES)
    train(options.data, options.out, options.epochs, options.seed)


def train(data: Path, out: Path, epochs: int, seed: int) -> None:
    """Train with AdamW and a one-cycle schedule; write ``vit.safetensors`` (float16) and ``training.json``."""
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
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def _tensors(data: Path, split: str) -> tuple[Tensor, Tensor]:
    images, labels = read_original(data, split)
    return standardise(images), torch.tensor(labels, dtype=torch.int64)


if __name__ == "__main__":
    main()
