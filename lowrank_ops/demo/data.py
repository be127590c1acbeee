"""The demo's images, weights and training record, which are in the folder ``demo`` of a checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGES = "fashion_mnist.npz"
WEIGHTS = "vit.safetensors"
TRAINING = "training.json"


def data_folder(folder: Path | None = None) -> Path:
    """The folder with the demo's data.

    Args:
        folder: where to look; by default the folder ``demo`` of the checkout that contains this package, then the
            one of the working directory.

    Raises:
        FileNotFoundError: the data is not there, as with an installed wheel.
    """
    root = Path(__file__).resolve().parents[2]
    folders = [root / "demo", Path.cwd() / "demo"] if folder is None else [folder]
    for candidate in folders:
        if all((candidate / name).is_file() for name in (IMAGES, WEIGHTS, TRAINING)):
            return candidate
    raise FileNotFoundError(
        f"no demo data in {' or '.join(dict.fromkeys(map(str, folders)))}; wheels do not contain it. Clone the "
        "repository and run the demo in its folder, or pass --data DIR with the repository's folder demo."
    )


def load_images(split: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels of Fashion-MNIST.

    Args:
        split: ``"test"``, the whole test set of 10,000, or ``"calibration"``, 2,000 training images
            (200 of each class).
        folder: as for :func:`data_folder`.

    Returns:
        Images (n, 1, 28, 28), float32, standardized, and labels (n,), int64.
    """
    with np.load(data_folder(folder) / IMAGES, allow_pickle=False) as arrays:
        return standardize(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"].astype(np.int64))


def standardize(images: np.ndarray) -> Tensor:
    """uint8 images (n, 28, 28) to float32 (n, 1, 28, 28) by the mean and standard deviation of the training set."""
    return (torch.tensor(images, dtype=torch.float32).unsqueeze(1) / 255 - 0.2860) / 0.3530


def load_training_record(folder: Path | None = None) -> dict[str, Any]:
    """How the weights were trained: seed, settings, log, accuracy."""
    record: dict[str, Any] = json.loads((data_folder(folder) / TRAINING).read_text())
    return record
