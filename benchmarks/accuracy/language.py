"""A language model at equal size: ``python -m benchmarks.accuracy.language``, the perplexity tables of docs/results.md.

Compresses SmolLM2-135M-Instruct (in the environment of ``make demo-llm``) and reports perplexity, next-token agreement
and divergence from the dense model on documents that calibration has not seen: Python's language reference and the
Debian handbook (``apt-get install debian-handbook``). The package holds 4-bit weights; their noise is part of the dense
model. The output layer stays dense, because its weight is the embedding's.

Rows are appended to a JSON file; another run computes those that are missing. Statistics, the dense model's logits and
the training of a distillation are stored in ``--cache``, from which an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops as lro
from lowrank_ops.factors import Factors
from lowrank_ops.factors.eight_bit import quantized
from lowrank_ops.layers.replace import replace_
from lowrank_ops.ops.linear.reference import dequantized
from lowrank_ops.ranks.choose import choose_ranks
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces
from lowrank_ops.subspaces.channels import with_channels

from .corpora import corpus
from .results import Results

KINDS = ("python", "handbook")
HELD_OUT = 20  # documents of each kind that are tested on
STEPS = 200  # of a distillation, one sequence each; more if there are more sequences
LABELS = 0.25  # weight of the true next tokens where a distillation uses them
WINDOW = 256  # tokens of one sequence
BATCH = 4  # sequences
DAMPING = 0.1  # of the inputs; half of it of the output gradients
MEASURED = 4  # measured ranks take every fourth calibration batch
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain recursion to a child.",
    "Give me three tips for sleeping well.",
    "What does a compiler do?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "Who wrote Romeo and Juliet?",
    "What is 17 plus 25?",
    "Name four planets.",
    "How do plants make food?",
)


class Variant(NamedTuple):
    """What is done at a budget: factors, ranks, and what follows."""

    projection: str
    allocation: str
    then: tuple[str, ...] = ()  # "midpoint", "sequential", "measured", "blocks", and the three kinds of "distilled"
    pivoted: bool = False
    corrected: bool = False  # predictions
    damped: bool = False  # statistics, by DAMPING
    channels: bool = False  # drop channels of MLPs instead of factorizing their layers
    form: str | None = None  # of 8-bit factors and weights of a model in bfloat16; the budget is then of bytes


BEST = Variant("loss", "loss", ("measured",), pivoted=True, corrected=True, damped=True, channels=True)
RECIPE = "loss, damped, channels, pivoted, corrected, measured ranks"

# SVD-LLM (Wang et al. 2024, arXiv 2403.07378) computes output PCA with uniform ranks. KFAC-SVD's factors are those by
# loss. ASVD (Yuan et al. 2023, arXiv 2312.05821) scales the input features before a truncated SVD.
VARIANTS = {
    "weight SVD": Variant("weight", "uniform"),
    "ASVD": Variant("asvd", "uniform"),
    "output, uniform (SVD-LLM)": Variant("output", "uniform"),
    "loss, uniform (KFAC-SVD)": Variant("loss", "uniform"),
    "loss": Variant("loss", "loss"),
    "loss, midpoint gradients": Variant("loss", "loss", ("midpoint",)),
    "loss, sequential reconstruction": Variant("loss", "loss", ("sequential",)),
    RECIPE: BEST,
    f"{RECIPE}, blocks": BEST._replace(then=("measured", "blocks")),
    f"{RECIPE}, distilled": BEST._replace(then=("measured", "distilled")),
    f"{RECIPE}, distilled with labels": BEST._replace(then=("measured", "distilled with labels")),
    f"{RECIPE}, distilled with labels on 10x": BEST._replace(then=("measured", "distilled with labels on 10x")),
    "dense, distilled with labels": Variant("none", "uniform", ("distilled with labels",)),  # what the labels alone do
    "no factors, int8": Variant("none", "uniform", form="int8"),
    "loss, corrected, int8": Variant("loss", "loss", corrected=True, form="int8"),
    "loss, pivoted, corrected, int8": Variant("loss", "loss", pivoted=True, corrected=True, form="int8"),
}

ONE_SHOT = (  # by default
    "weight SVD",
    "ASVD",
    "output, uniform (SVD-LLM)",
    "loss, uniform (KFAC-SVD)",
    "loss",
    RECIPE,
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    results = Results(options.out)
    dense, tokenizer = load(options.model)
    study = Study(dense, tokenizer, options)
    cases = [
        {
            "calibrated": options.calibrate,
            "tokens": options.tokens,
            "sensitivity": "fisher",
            "test_tokens": options.test_tokens,
            "bfloat16": options.bfloat16,
            "variant": variant,
            "budget": budget,
        }
        for budget in options.budgets
        for variant in options.variants
    ]
    for case in tqdm([case for case in cases if results.find(case) is None], unit="model", desc="variants"):
        results.add(case, study.measure(case["variant"], case["budget"]))
    print(table([row for case in cases if (row := results.find(case)) is not None], study.dense_perplexity))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.language",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("language.json"), help="file of rows, read and added to")
    parser.add_argument("--model", type=Path, default=Path("smollm2"), help="folder; written if it does not exist")
    parser.add_argument("--calibrate", choices=[*KINDS, "both"], default="python", help="kind of text")
    parser.add_argument("--tokens", type=int, default=16384, help="for calibration")
    parser.add_argument("--test-tokens", type=int, default=16384, help="of each kind, to evaluate on")
    parser.add_argument("--budgets", type=float, nargs="+", default=[90, 80, 70, 60, 50], help="%% of layer parameters")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=ONE_SHOT)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of text to test on")
    parser.add_argument("--no-answers", action="store_true", help="leave out the answers to a dozen prompts")
    parser.add_argument("--bfloat16", action="store_true", help="run tests and distillation in mixed precision")
    parser.add_argument("--lr", type=float, default=3e-5, help="of the distillation")
    parser.add_argument(
        "--cache", type=Path, default=Path("language-cache"), help="folder; written if it does not exist"
    )
    return parser


def load(folder: Path) -> tuple[nn.Module, Any]:
    """The dense model in float32 and its tokenizer; the folder is written from the package if it does not exist."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.exists():
        from demo.language_model import dense_model

        dense_model(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


class Study:
    """The dense model, its statistics, and the texts to test on."""

    def __init__(self, dense: nn.Module, tokenizer: Any, options: argparse.Namespace) -> None:
        self.dense, self.tokenizer, self.options = dense, tokenizer, options
        self.autocast = torch.bfloat16 if options.bfloat16 else None
        calibrated = KINDS if options.calibrate == "both" else (options.calibrate,)
        texts = {kind: corpus(kind, HELD_OUT) for kind in {*calibrated, *options.kinds}}
        self.tests = {
            kind: windows(tokenizer, texts[kind].test, options.test_tokens).split(BATCH) for kind in options.kinds
        }
        self.documents = [texts[kind].calibration for kind in calibrated]
        self.batches = [{"input_ids": ids} for ids in self.text(options.tokens).split(BATCH)]
        options.cache.mkdir(exist_ok=True)
        self.wanted = {kind: self.dense_logits(kind) for kind in self.tests}
        self.dense_perplexity = {
            kind: compare(self.wanted[kind], self.wanted[kind], test)["perplexity"] for kind, test in self.tests.items()
        }
        self.cached = options.cache / f"{options.calibrate}-{options.tokens}-fisher.safetensors"
        started = time.perf_counter()
        torch.manual_seed(0)
        if not self.cached.exists():
            found = lro.calibrate(dense, self.batches, filter_fn=is_block_layer, sensitivity="fisher", progress=True)
            found.save(self.cached)
        self.covariances = lro.Covariances.load(self.cached, packed=True)
        self.calibration_seconds = time.perf_counter() - started
        self.kept: tuple[Any, ...] = (None,)  # by subspaces
        self.measured_ranks: dict[tuple[Variant, float], lro.Ranks] = {}  # by variant and budget

    def text(self, tokens: int) -> Tensor:
        """Sequences (tokens / WINDOW, WINDOW) for calibration, equally many and in turn of every kind."""
        kinds = [windows(self.tokenizer, part, tokens // len(self.documents)) for part in self.documents]
        return torch.stack(kinds, 1).flatten(0, 1)

    def dense_logits(self, kind: str) -> list[Tensor]:
        """The dense model's logits of a test, by batch. They stay in their file, which processes share."""
        file = self.options.cache / f"dense-{kind}-{self.options.test_tokens}-{self.autocast or torch.float32}.pt"
        if not file.exists():
            torch.save([logits_of(self.dense, ids, self.autocast) for ids in self.tests[kind]], file)
        return torch.load(file, mmap=True)

    @cached_property
    def answers(self) -> list[list[int]]:
        return answers(self.dense, self.tokenizer)[0]

    def subspaces(self, variant: Variant) -> tuple[lro.Covariances, dict[str, LayerSubspaces]]:
        """Statistics and subspaces of a variant, kept until one needs others."""
        kind = (variant.damped, variant.corrected, variant.channels, variant.form is not None)
        if self.kept[0] != kind:
            self.kept = (None,)  # frees their memory
            covariances = self.covariances.damped(DAMPING) if variant.damped else self.covariances
            model = self.dense if variant.form is None else copy.deepcopy(self.dense).bfloat16()
            found = layer_subspaces({fqn: model.get_submodule(fqn) for fqn in covariances}, covariances)
            if variant.corrected:
                names = [name for name in ("damped", "channels") if getattr(variant, name)]
                file = self.cached.with_suffix(".".join(["", *names, "corrections.pt"]))
                if not file.exists():
                    torch.save(self.corrections(covariances, variant.channels), file)
                members = with_channels(model, found, variant.channels)
                for fqn, spectrum in torch.load(file).items():
                    loss = members[fqn].loss
                    assert loss is not None
                    loss.corrected = spectrum
            self.kept = kind, covariances, found
        return self.kept[1:]  # type: ignore[return-value]

    def corrections(self, covariances: lro.Covariances, channels: bool) -> dict[str, Tensor]:
        """Corrected spectra, by labels that are drawn from the model's own distribution."""
        with torch.autocast("cpu", self.autocast or torch.bfloat16, self.autocast is not None):
            found = lro.correct_predictions(
                self.dense,
                covariances,
                self.batches[::2],
                filter_fn=is_block_layer,
                channels=channels,
                progress=True,
            )
        members = with_channels(self.dense, found, channels)
        return {fqn: space.loss.corrected for fqn, space in members.items() if space.loss is not None}  # type: ignore[misc]

    def measure(self, name: str, budget: float) -> dict[str, Any]:
        """Everything that is reported of one compressed model."""
        variant, student = VARIANTS[name], copy.deepcopy(self.dense)
        if variant.form is not None:
            student = student.bfloat16()
        statistics = self.subspaces(variant)
        started = time.perf_counter()
        kept = self.compress(student, name, budget, *statistics)
        for step in variant.then:
            if step.startswith("distilled"):
                text = self.text(self.options.tokens * (10 if step.endswith("10x") else 1))
                self.distill(student, text, self.checkpoint(name, budget, step), "labels" in step)
        seconds = time.perf_counter() - started
        size = sum(part.numel() * min(part.itemsize, 2) for part in (*student.parameters(), *student.buffers()))
        student.float()  # 8-bit factors keep their bits
        forward = 0.0

        def logits(ids: Tensor) -> Tensor:
            nonlocal forward
            started = time.process_time()
            found = logits_of(student, ids, self.autocast)
            forward += time.process_time() - started
            return found

        by_kind = {kind: compare(self.wanted[kind], map(logits, test), test) for kind, test in self.tests.items()}
        generated = {}
        if not self.options.no_answers:
            found, speed = answers(student, self.tokenizer)
            generated = {**repetition(self.answers, found), "generated_per_second": speed}
        return {
            "layer_share": kept,
            "bytes": size,  # as stored in bfloat16
            "seconds": seconds,
            "calibration_seconds": self.calibration_seconds,
            "tokens_per_second": sum(ids.numel() for test in self.tests.values() for ids in test) / forward,
            **{f"{kind}_{name}": value for kind, found in by_kind.items() for name, value in found.items()},
            **generated,
        }

    def checkpoint(self, name: str, budget: float, step: str) -> Path:
        """The file of a variant's training, up to and including ``step``."""
        done = name[: name.index(step)] + step
        return self.cached.with_suffix(f".{budget:g}.{done.replace(', ', '-').replace(' ', '-')}.safetensors")

    def compress(
        self,
        model: nn.Module,
        name: str,
        budget: float,
        covariances: lro.Covariances,
        subspaces: dict[str, LayerSubspaces],
    ) -> float:
        """Compress ``model`` in place; the share of the layers' bytes that it keeps."""
        variant, share = VARIANTS[name], budget / 100
        policy: Any = lro.ParameterBudget(share, variant.allocation)
        if variant.form is not None:
            policy = lro.ByteBudget(share, variant.form, variant.allocation)
        if variant.projection == "none" and variant.form is None:
            return 1.0
        if variant.projection == "none":
            weights = [model.get_submodule(fqn).get_parameter("weight") for fqn in self.covariances]
            for weight in weights:
                weight.data = dequantized(*quantized(weight.data, str(variant.form)), weight.dtype)
            return 0.5 + 2 * sum(map(len, weights)) / sum(weight.numel() for weight in weights)  # 4 bytes per scale
        if variant.projection == "asvd":
            chosen = choose_ranks(policy, subspaces)
            replace_(model, {fqn: asvd(subspaces[fqn], rank) for fqn, rank in chosen.items() if rank is not None})
            return share
        config = lro.CompressionConfig(
            policy, projection=variant.projection, pivoted=variant.pivoted, channels=variant.channels
        )
        if "midpoint" in variant.then:
            covariances = lro.recalibrate(
                model, covariances, self.batches, config, filter_fn=is_block_layer, sensitivity="fisher", progress=True
            )
            subspaces = layer_subspaces({fqn: model.get_submodule(fqn) for fqn in covariances}, covariances)
        if "measured" in variant.then:
            case = variant._replace(then=()), budget
            if case not in self.measured_ranks:
                with torch.autocast("cpu", self.autocast or torch.bfloat16, self.autocast is not None):
                    self.measured_ranks[case] = lro.measured_ranks(
                        model,
                        covariances,
                        self.batches[::MEASURED],
                        share,
                        config=config,
                        subspaces=subspaces,
                        filter_fn=is_block_layer,
                        progress=True,
                    )
            config = replace(config, rank=self.measured_ranks[case])
        reconstruction: Any = None
        if "sequential" in variant.then:
            reconstruction = lro.SequentialReconstruction(self.batches, sensitivity="fisher")
        if "blocks" in variant.then:
            sequences = [  # one per step; logits at every fourth position, to save time
                {"input_ids": ids, "logits_to_keep": torch.arange(index % 4, WINDOW - 1, 4)}
                for index, ids in enumerate(self.text(self.options.tokens).split(1))
            ]
            reconstruction = lro.BlockReconstruction(
                sequences,
                target="logits",
                together=5,
                epochs=1,
                autocast=self.autocast,
                checkpoint=self.checkpoint(name, budget, "blocks"),
            )
        report = lro.compress_(
            model,
            covariances,
            config,
            is_block_layer,
            subspaces=subspaces,
            reconstruction=reconstruction,
            progress=True,
        )
        return report.layer_bytes / report.layer_bytes_before

    def distill(self, student: nn.Module, text: Tensor, checkpoint: Path, labels: bool) -> None:
        """Train factors, biases and norms by the dense model's next-token distributions, one sequence per step.

        With ``labels``, the true next tokens have a weight of ``LABELS``.
        """
        student.get_parameter("model.embed_tokens.weight").requires_grad_(False)
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
        batches = [{"input_ids": ids} for ids in text[order].split(1)]
        loss: dict[str, Any] = {"loss": label_loss, "soft_weight": 1 - LABELS} if labels else {}
        lro.finetune_(
            student, batches, teacher=self.dense, temperature=1.0,
            steps=max(STEPS, len(batches)), lr=self.options.lr, weight_decay=0.0,
            autocast=self.autocast, checkpoint=checkpoint, checkpoint_every=STEPS // 8,
            progress=True, **loss,
        )  # fmt: skip


def is_block_layer(module: nn.Module, fqn: str) -> bool:
    """All but the output layer."""
    return fqn != "lm_head"


def label_loss(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The negative log-likelihood of the next tokens, mean over tokens."""
    return nn.functional.cross_entropy(output.logits[:, :-1].mT.float(), batch["input_ids"][:, 1:])


def asvd(space: LayerSubspaces, rank: int) -> Factors:
    """Truncated SVD of W S, S the square root of each input feature's root mean square (ASVD's alpha of 0.5)."""
    moments = space.statistics.activations
    scale = (moments.second_moment.diagonal().double() / moments.count).clamp_min(1e-12) ** 0.25
    u, s, v = torch.linalg.svd(space.weight * scale, full_matrices=False)
    root = s[:rank].sqrt()
    down, up = root.unsqueeze(1) * v[:rank] / scale, u[:, :rank] * root
    return Factors(down, up, space.bias, rank, "weight", None, 0.0).to(space.dtype)


def windows(tokenizer: Any, documents: Sequence[str], tokens: int) -> Tensor:
    """Sequences (tokens / WINDOW, WINDOW), windows at equal distances over all documents.

    Raises:
        ValueError: there are not so many.
    """
    ids = [token for document in documents for token in tokenizer(document)["input_ids"]]
    found = len(ids) // WINDOW
    wanted = tokens // WINDOW
    if found < wanted:
        raise ValueError(f"the documents hold {len(ids)} tokens; {tokens} are asked for.")
    rows = torch.tensor(ids[: found * WINDOW]).view(-1, WINDOW)
    return rows[torch.arange(wanted) * found // wanted]


@torch.inference_mode()
def logits_of(model: nn.Module, ids: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    """(tokens, vocabulary), float16, at all positions that have a next token."""
    with torch.autocast("cpu", autocast or torch.bfloat16, autocast is not None):
        return model(input_ids=ids).logits[:, :-1].half().flatten(0, 1)


def compare(dense: Sequence[Tensor], student: Iterable[Tensor], test: Sequence[Tensor]) -> dict[str, float]:
    """Perplexity of the student, and how it differs from the dense model: next-token agreement and KL divergence.

    Args:
        dense, student: the models' logits, by batch.
        test: batches of token ids.
    """
    loss = agreed = divergence = 0.0
    count = 0
    for wanted, logits, ids in zip(dense, student, test, strict=True):
        log_p, log_q = wanted.float().log_softmax(-1), logits.float().log_softmax(-1)
        labels = ids[:, 1:].flatten()
        loss -= float(log_q.gather(1, labels.unsqueeze(1)).sum())
        agreed += float((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        divergence += float(nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
        count += labels.numel()
    return {"perplexity": math.exp(loss / count), "agreement": 100 * agreed / count, "divergence": divergence / count}


@torch.inference_mode()
def answers(model: nn.Module, tokenizer: Any, length: int = 32) -> tuple[list[list[int]], float]:
    """Greedy answers to the prompts, as tokens, and tokens per second of processor time, the prompts' included."""
    found, started = [], time.process_time()
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**given, max_new_tokens=length, do_sample=False)[0, given["input_ids"].shape[1] :]
        found.append(answer.tolist())
    return found, sum(map(len, found)) / (time.process_time() - started)


def repetition(dense: Sequence[list[int]], student: Sequence[list[int]]) -> dict[str, float]:
    """Repeated 4-grams of the answers in percent, and tokens that agree with the dense model's answers."""
    repeated = agreed = total = grams = 0
    for wanted, answer in zip(dense, student, strict=True):
        found = [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]
        repeated, grams = repeated + len(found) - len(set(found)), grams + len(found)
        agreed += sum(a == b for a, b in zip(answer, wanted, strict=False))
        total += len(wanted)
    return {"repeated": 100 * repeated / max(grams, 1), "answers_agree": 100 * agreed / total}


def table(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> str:
    """One line per budget and variant: perplexities over the dense model's, agreement, answers, seconds."""
    heads = [f"{kind}: perplexity (dense: {value:.2f}) | agreement" for kind, value in dense.items()]
    lines = [f"| layer parameters | variant | {' | '.join(heads)} | answers agree | repeated | seconds |"]
    lines.append("|---|---|" + "---|" * (2 * len(dense) + 3))
    for row in rows:
        cells = [
            f"{row[f'{kind}_perplexity'] / value:.3g}x | {row[f'{kind}_agreement']:.1f}%"
            if f"{kind}_perplexity" in row
            else "- | -"
            for kind, value in dense.items()
        ]
        cells += [f"{row[name]:.1f}%" if name in row else "-" for name in ("answers_agree", "repeated")]
        lines.append(f"| {row['budget']:g}% | {row['variant']} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
