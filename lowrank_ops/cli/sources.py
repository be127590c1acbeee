"""Models and calibration data by name: ``hf:``, ``timm:``, ``text:`` and ``images:``.

transformers, timm and PIL are imported only for the names that need them.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .command import Failure, failing_as

BATCH_SIZE, SAMPLES, MAX_LENGTH = 8, 256, 512
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def named_model(options: argparse.Namespace) -> nn.Module | None:
    """The model of ``hf:DIR``, ``hf:OWNER/NAME`` of the Hub or ``timm:NAME``; None for other names."""
    kind, _, name = options.model.partition(":")
    if kind == "hf":
        _library("transformers", "--model hf:", "hf")
        what = f"--model {options.model}"
        if not Path(name).is_dir():
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                raise Failure(2, f"{what}: no such folder; a name of the Hugging Face Hub is OWNER/NAME")
            what += ": no such folder; loading it from the Hugging Face Hub"
        with failing_as(what, code=2):
            from ..integrations.transformers import class_of

            model: nn.Module = class_of(name)[0].from_pretrained(name)
            return model
    if kind == "timm":
        timm = _library("timm", "--model timm:")
        with failing_as(f"--model {options.model}", code=2):
            found: nn.Module = timm.create_model(name, pretrained=options.checkpoint is None)
            return found
    return None


def named_batches(options: argparse.Namespace, model: nn.Module) -> Batches | None:
    """The batches of ``text:FILE`` or ``images:DIR``; None for other names."""
    kind, _, name = options.batches.partition(":")
    if kind not in ("text", "images"):
        for flag in ("batch_size", "samples", "max_length"):
            if getattr(options, flag) is not None:
                raise Failure(2, f"--{flag.replace('_', '-')} is for --calibration text:FILE or images:DIR")
        return None
    size, samples = options.batch_size or BATCH_SIZE, options.samples or SAMPLES
    if kind == "text":
        return Batches(_texts(Path(name), options.batches)[:samples], size, _tokenize(options, model))
    if options.max_length is not None:
        raise Failure(2, "--max-length is for --calibration text:FILE")
    return Batches(_image_files(Path(name), options.batches)[:samples], size, _prepare_images(options, model))


class Batches:
    """Batches that are prepared in every iteration."""

    def __init__(self, items: list[Any], size: int, prepare: Callable[[list[Any]], Any]) -> None:
        self._items, self._size, self._prepare = items, size, prepare

    def __len__(self) -> int:
        return -(-len(self._items) // self._size)

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self._items), self._size):
            yield self._prepare(self._items[first : first + self._size])


def save_processors(options: argparse.Namespace, folder: Path) -> None:
    """Save the tokenizer or image processor of an ``hf:`` model beside it, if it has one."""
    transformers = importlib.import_module("transformers")
    name = options.model.partition(":")[2]
    for loader in (transformers.AutoTokenizer, transformers.AutoImageProcessor):
        try:
            loader.from_pretrained(name, trust_remote_code=False).save_pretrained(folder)
        except Exception:  # each transformers class has its own error for a missing processor
            continue


def _texts(path: Path, spec: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Failure(2, f"--calibration {spec}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Failure(2, f"--calibration {spec}: is not UTF-8 text: {error}") from None
    texts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not texts:
        raise Failure(2, f"--calibration {spec}: holds no text; write texts with empty lines between them")
    return texts


def _tokenize(options: argparse.Namespace, model: nn.Module) -> Callable[[list[str]], dict[str, Tensor]]:
    if not options.model.startswith("hf:"):
        raise Failure(2, "--calibration text:FILE needs the tokenizer of --model hf:DIR; pass module:function")
    config: Any = model.config
    if config.is_encoder_decoder:
        raise Failure(
            2, "--calibration text:FILE holds inputs without targets, and the model is an encoder with a decoder; pass "
            "module:function, whose batches have decoder_input_ids",
        )  # fmt: skip
    transformers = importlib.import_module("transformers")
    name = options.model.partition(":")[2]
    with failing_as(f"--calibration {options.batches}: loading the tokenizer", code=2):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limits = [options.max_length or MAX_LENGTH, tokenizer.model_max_length]
    limits += [getattr(config.get_text_config(), "max_position_embeddings", None)]
    length = min(limit for limit in limits if limit)

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt"))

    return tokenize


def _image_files(folder: Path, spec: str) -> list[Path]:
    if not folder.is_dir():
        raise Failure(2, f"--calibration {spec}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES)
    if not files:
        raise Failure(2, f"--calibration {spec}: holds no images ({', '.join(_IMAGES)})")
    return files


def _prepare_images(options: argparse.Namespace, model: Any) -> Callable[[list[Path]], Any]:
    kind, _, name = options.model.partition(":")
    if kind not in ("hf", "timm"):
        raise Failure(2, "--calibration images:DIR needs --model hf:DIR or timm:NAME; pass module:function")
    image = _library("PIL.Image", "--calibration images:", package="pillow")

    def read(path: Path) -> Any:
        with failing_as(f"--calibration {options.batches}: reading {str(path)!r}", code=2), image.open(path) as found:
            return found.convert("RGB")

    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    if kind == "timm":
        timm = importlib.import_module("timm")
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        return lambda paths: torch.stack([transform(read(path)) for path in paths]).to(dtype)
    transformers = importlib.import_module("transformers")
    with failing_as(f"--calibration {options.batches}: loading the image processor", code=2):
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    return lambda paths: {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in processor(images=[read(path) for path in paths], return_tensors="pt").items()
    }


def _library(module: str, what: str, extra: str | None = None, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = f"'lowrank_ops[{extra}]'" if extra else package or module
        raise Failure(2, f"{what} needs {package or module}: pip install {install} ({error})") from None
