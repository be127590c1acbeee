"""Does self-supervision use more of a layer? ``python -m benchmarks.accuracy.pretraining``, a table of docs/results.md.

Trains the demo's Vision Transformer as a masked autoencoder (He et al. 2022, arXiv 2111.06377) on the images that its
supervised twin was trained on: the encoder sees a quarter of the patches, a small decoder predicts the normalized
pixels of the others. Then measures Mean Layer Utilization of both and of an untrained one, on the same images, with the
accuracy of a linear probe. Training resumes from its checkpoint; rows are appended to a JSON file. ``--device cuda``
runs everything on a GPU; rows name the device.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops as lro
from lowrank_ops.demo.evaluation import percent_equal
from lowrank_ops.demo.vit import Block, ViT, load_vit
from lowrank_ops.subspaces import layer_subspaces

from . import vision
from .results import Results, study_parser

RESULTS = vision.RESULTS.with_name("pretraining.json")
THRESHOLDS = (0.9, 0.95, 0.99, 0.999)
PATCH = 7
VISIBLE = 4  # of 16 patches
MODELS = ("untrained", "supervised", "masked")
BATCH = 128
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
SAVE_EVERY = 100  # steps
PROBE_IMAGES = 10_000


class MaskedAutoencoder(nn.Module):
    """The demo's Vision Transformer as an encoder, and a decoder of two narrow blocks."""

    def __init__(self, encoder: ViT, dim: int = 96, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.encoder = encoder
        tokens, width = encoder.pos_embed.shape[1:]
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, 4) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.pixels = nn.Linear(dim, PATCH**2)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, 28, 28) -> the loss
        """Mean squared error of the normalized pixels of the patches that were hidden."""
        targets = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)  # (batch, 16, 49)
        targets = (targets - targets.mean(-1, keepdim=True)) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
        batch, patches, _ = targets.shape
        order = torch.rand(batch, patches).argsort(1).to(images.device)  # the first are seen
        predicted = self.decode(self.encode(images, order[:, :VISIBLE]), order)
        hidden = order[:, VISIBLE:, None].expand(-1, -1, PATCH**2)
        return F.mse_loss(predicted.gather(1, hidden), targets.gather(1, hidden))

    def encode(self, images: Tensor, seen: Tensor) -> Tensor:
        """The class token and the patches seen: (batch, 1 + visible, width)."""
        encoder = self.encoder
        x = encoder.patch_embed(images).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
        x = x.gather(1, seen.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], dim=1)
        for block in encoder.blocks:
            x = block(x)
        return encoder.norm(x)

    def decode(self, x: Tensor, order: Tensor) -> Tensor:
        """Pixels of all patches, in their places: (batch, 16, 49)."""
        x = self.embed(x)
        hidden = self.mask_token.expand(len(x), order.shape[1] - VISIBLE, -1)
        shuffled = torch.cat([x[:, 1:], hidden], dim=1)
        places = order.argsort(1).unsqueeze(-1).expand_as(shuffled)
        x = torch.cat([x[:, :1], shuffled.gather(1, places)], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.pixels(self.norm(x))[:, 1:]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    results = Results(options.out)
    models = {name: {"model": name, "epochs": options.epochs if name == "masked" else None} for name in MODELS}
    missing = [] if options.tables else [name for name, case in models.items() if results.find(case) is None]
    if missing:
        images, labels = (part.to(options.device) for part in vision.training_images(options.data))
        make: dict[str, Callable[[], tuple[ViT, dict[str, Any]]]] = {
            "untrained": lambda: (seeded(ViT), {}),
            "supervised": lambda: (load_vit(), {}),
            "masked": lambda: pretrained(images, options.epochs, options.checkpoint),
        }
        for name in missing:
            encoder, training = make[name]()
            encoder.eval().to(options.device)
            found = {"probe_accuracy": linear_probe(encoder, images, labels), **utilizations(encoder)}
            results.add(models[name], {**training, **found, "device": vision.name_of(options.device)})
    print(table(results, list(models.values())))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = study_parser("pretraining", __doc__, RESULTS)
    parser.add_argument("--epochs", type=int, default=6, help="of the masked autoencoder; its twin had 6")
    parser.add_argument("--checkpoint", type=Path, default=Path("masked.pt"), help="of its training, to resume from")
    parser.add_argument("--data", type=Path, default=vision.ORIGINAL, help="folder of the original files")
    parser.add_argument("--device", default="cpu", help="of models and images (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="show stored rows, compute nothing")
    return parser


def seeded(make: Callable[[], nn.Module]) -> Any:
    """A module with a fixed random initialization."""
    torch.manual_seed(0)
    return make()


def pretrained(images: Tensor, epochs: int, checkpoint: Path) -> tuple[ViT, dict[str, Any]]:
    """Train a masked autoencoder, or resume it; its encoder, and the mean loss of the last tenth of the steps."""
    model: MaskedAutoencoder = seeded(lambda: MaskedAutoencoder(ViT())).to(images.device)
    per_epoch = len(images) // BATCH
    total = epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total, pct_start=0.2)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    losses: list[float] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=images.device, weights_only=True)
        if state["total"] != total:
            raise ValueError(
                f"--checkpoint {checkpoint} is of {state['total']} steps, this run of {total}; name another."
            )
        losses = state["losses"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    model.train()
    with tqdm(total=total, initial=len(losses), desc="pretraining", unit="step") as bar:
        while len(losses) < total:
            epoch, place = divmod(len(losses), per_epoch)
            torch.manual_seed(epoch)
            rows = torch.randperm(len(images))[place * BATCH : (place + 1) * BATCH].to(images.device)
            torch.manual_seed(len(losses))  # of the masks: a resumed run draws the same ones
            loss = model(images[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
            if len(losses) % SAVE_EVERY == 0 or len(losses) == total:
                partial = checkpoint.with_name(checkpoint.name + ".part")
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save({**state, "losses": losses, "total": total}, partial)
                os.replace(partial, checkpoint)
    last = losses[-max(1, total // 10) :]
    return model.encoder, {"loss": sum(last) / len(last)}


@torch.no_grad()
def features(encoder: ViT, images: Tensor) -> Tensor:
    """The class token and the mean of the patches after the encoder's norm: (n, 2 width)."""
    kept: list[Tensor] = []
    handle = encoder.norm.register_forward_hook(lambda module, args, x: kept.append(x))
    try:
        for part in tqdm(images.split(vision.CALIBRATION_BATCH), desc="features", unit="batch"):
            encoder(part)
    finally:
        handle.remove()
    return torch.cat([torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=1) for x in kept])


def linear_probe(encoder: ViT, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent on the test images of a linear classifier of frozen features, fitted to 10,000 others."""
    test_images, test_labels = (part.to(images.device) for part in vision.load_images("test"))
    train, test = (features(encoder, part) for part in (images[:PROBE_IMAGES], test_images))
    mean, deviation = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    classifier = nn.Linear(train.shape[1], 10, device=images.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(train), labels[:PROBE_IMAGES]) + 1e-3 * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return percent_equal(classifier(test).argmax(-1), test_labels)


def utilizations(encoder: ViT) -> dict[str, float]:
    """Mean Layer Utilization by the calibration images that ship, about the mean and about zero; without the head."""
    images, _ = vision.load_images("calibration")
    batches = images.split(vision.CALIBRATION_BATCH)
    covariances = lro.calibrate(encoder, batches, filter_fn=lambda module, fqn: fqn != "head", progress=True)
    layers = {fqn: module for fqn, module in encoder.named_modules() if fqn in covariances}
    found = {}
    for about, centered in {"mean": True, "zero": False}.items():
        subspaces = layer_subspaces(layers, covariances, centered=centered)
        for threshold in THRESHOLDS:
            report = lro.utilization(encoder, covariances, threshold, centered=centered, subspaces=subspaces)
            found[f"mlu_{threshold:g}_about_{about}"] = report.mean_layer_utilization
    return found


def table(results: Results, cases: Sequence[dict[str, Any]]) -> str:
    """One line per model and centering."""
    columns = ["model", "linear probe", "about", *(f"MLU at {threshold:g}" for threshold in THRESHOLDS)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for case in cases:
        row = results.find(case)
        name = f"masked, epochs: {case['epochs']}" if case["epochs"] else case["model"]
        if row is None:
            lines.append(f"| {name} | {' | '.join(['not measured'] * (len(columns) - 1))} |")
            continue
        for about in ("mean", "zero"):
            shares = " | ".join(f"{row[f'mlu_{threshold:g}_about_{about}']:.3f}" for threshold in THRESHOLDS)
            lines.append(f"| {name} | {row['probe_accuracy']:.2f}% | {about} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
