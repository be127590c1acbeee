"""The images of the demo: Fashion-MNIST (Xiao et al. 2017, MIT licence; see assets/README.md)."""

import gzip
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ASSETS = files("lowrank_ops.demo") / "assets"
IMAGES = "fashion_mnist.npz"


def load_images(split: str) -> tuple[Tensor, Tensor]:
    """Images and labels that ship with the package.

    Args:
        split: ``"test"``, the whole test set of 10,000, or ``"calibration"``, 2,000 training images
            (200 of each class).

    Returns:
        Images (n, 1, 28, 28), float32, standardised, and labels (n,), int64.
    """
    with (ASSETS / IMAGES).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return standardise(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"].astype(np.int64))


def standardise(images: np.ndarray) -> Tensor:
    """uint8 images (n, 28, 28) to float32 (n, 1, 28, 28) by the mean and deviation of the training set."""
    return (torch.tensor(images, dtype=torch.float32).unsqueeze(1) / 255 - 0.2860) / 0.3530


def read_original(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the IDX files of the original data set: ``split`` is ``"train"`` or ``"t10k"``."""
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def pack(folder: Path, destination: Path, per_class: int = 200) -> None:
    """Write the images that ship with the package: the test set and ``per_class`` training images of each class."""
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
