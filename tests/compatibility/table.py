"""What works with compressed models of each family; ``make compatibility`` writes docs/compatibility.md.

Every cell is the result of a check that runs transformers' own code. A check that fails is run on the dense model too.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops as lro
from lowrank_ops.report import CompressionReport

from .families import FAMILIES, Family

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BUDGET = 0.6


class NotApplicable(Exception):
    """The check has no meaning for the family."""


class First(nn.Module):
    """A model whose output is the first tensor of its outputs, computed without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        if getattr(self.model.config, "use_cache", None):
            return self.model(**batch, use_cache=False)[0]
        return self.model(**batch)[0]


@torch.no_grad()
def output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return First(model)(**batch)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def same_bits(family: Family, model: nn.Module, folder: Path) -> nn.Module:
    loaded = family.load(str(folder))
    assert torch.equal(output(loaded, family.batch(3)), output(model, family.batch(3))), "other outputs after loading"
    return loaded


def check_save(family: Family, model: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="20KB")
        same_bits(family, model, Path(folder))


def check_generate(family: Family, model: nn.Module) -> None:
    if not family.generates:
        raise NotApplicable
    batch = family.batch(2)
    batch.pop("decoder_input_ids", None)
    with torch.no_grad():
        dynamic, static = (
            model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation=cache)
            for cache in ("dynamic", None if "Mamba" in family.model else "static")
        )
    assert torch.equal(dynamic, static), "other tokens with a static cache"


def check_compile(family: Family, model: nn.Module) -> None:
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(First(model), backend="aot_eager")(**family.batch(3))
    close(compiled, output(model, family.batch(3)))


def check_export(family: Family, model: nn.Module) -> None:
    exported = torch.export.export(First(model), (), family.batch(3)).module()
    close(exported(**family.batch(3)), output(model, family.batch(3)))


def check_onnx(family: Family, model: nn.Module) -> None:
    import onnxruntime

    batch = family.batch(3)
    program = torch.onnx.export(First(model), (), kwargs=batch, dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    (result,) = session.run(None, {name: value.numpy() for name, value in batch.items() if name in names})
    close(torch.from_numpy(result), output(model, batch))


def check_lora(family: Family, model: nn.Module) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = copy.deepcopy(model)
    config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config)
    adapted.eval()
    expected = output(adapted, family.batch(3))
    assert not torch.equal(expected, output(model, family.batch(3))), "the adapter changes nothing"
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        close(output(PeftModel.from_pretrained(base, folder).eval(), family.batch(3)), expected)
    close(output(adapted.merge_and_unload(), family.batch(3)), expected)


class _Trainer(transformers.Trainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        result = model(**inputs).to_tuple()
        return next(value for value in result if value.is_floating_point()).square().mean()


def check_trainer(family: Family, model: nn.Module) -> None:
    batch = family.batch(4)
    examples = [{name: values[i] for name, values in batch.items()} for i in range(4)]
    trained = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2,
            report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        _Trainer(trained, arguments, train_dataset=examples).train()
        trained.eval()
        assert not torch.equal(output(trained, batch), output(model, batch)), "training changes nothing"
        same_bits(family, trained, Path(folder) / "checkpoint-2")


CHECKS = {
    "save and load": check_save,
    "generate": check_generate,
    "compile": check_compile,
    "export": check_export,
    "ONNX": check_onnx,
    "LoRA": check_lora,
    "Trainer": check_trainer,
}


class Row:
    """The results of one family."""

    def __init__(self, name: str, family: Family, checks: Collection[str] = tuple(CHECKS)) -> None:
        self.name, self.family = name, family
        self.words: dict[str, str] = {}  # what a check that failed said
        model = family.build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few rows, and of layers that stay dense, which the page lists
            covariances = lro.calibrate(model, [family.batch(8), family.batch(9)])
            self.report: CompressionReport = lro.compress_(model, covariances, lro.ParameterBudget(BUDGET))
        self.cells = {check: self._result(check, CHECKS[check], model) for check in checks}

    def _result(self, check: str, run: Callable[[Family, nn.Module], None], model: nn.Module) -> str:
        try:
            run(self.family, model)
        except NotApplicable:
            return ""
        except Exception as error:
            self.words[check] = _first_line(error)
            try:
                run(self.family, self.family.build())
            except Exception:
                return "dense: no"
            return "no"
        return "yes"


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:200].replace("`", "'")


def page(rows: list[Row]) -> str:
    """The text of docs/compatibility.md."""
    libraries = ("torch", "transformers", "peft", "onnxruntime")
    versions = ", ".join(f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in libraries)
    head = ["family", "class", "layers", "considered", *CHECKS]
    lines = [
        "# Compatibility with transformers",
        "",
        "`make compatibility` writes this page. Versions of Python, torch and Triton are in",
        "[Reliability](reliability.md#compatibility).",
        f"Each row is a small model of random weights that runs transformers' code ({versions}).",
        f"It is calibrated, compressed to {BUDGET:.0%} of its layers' parameters, and then checked:",
        "",
        "- layers: how many were replaced, of those that were calibrated",
        "- considered: the share of the model's parameters that these layers hold",
        "- save and load: `save_pretrained` in shards and `from_pretrained`; outputs are bit-identical",
        "- generate: with the dynamic and the static cache, which give the same tokens",
        '- compile: `torch.compile` with the backend "aot_eager"',
        "- export: `torch.export.export`; ONNX: `torch.onnx.export(dynamo=True)`, run by onnxruntime",
        '- LoRA: a PEFT adapter with target "all-linear", saved, loaded and merged',
        "- Trainer: two steps, and its checkpoint loaded, bit-identical",
        "",
        "Outputs of compile, export, ONNX and LoRA may differ by 1e-4. An empty cell: the check does not apply.",
        '"dense: no": it fails for the dense model as well.',
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        replaced = sum(layer.rank is not None for layer in row.report.layers)
        counts = [f"{replaced} of {len(row.report.layers)}", f"{share(row.report):.0%}"]
        lines.append("| " + " | ".join([row.name, f"`{row.family.model}`", *counts, *row.cells.values()]) + " |")
    lines += ["", "## What fails, and with which words", ""]
    lines += [f"- {row.name}, {check}: `{words}`" for row in rows for check, words in row.words.items()] or ["Nothing."]
    lines += ["", "## What stays dense", ""]
    for row in rows:
        kinds: dict[str, list[str]] = {}
        for fqn, reason in row.report.skipped.items():
            kinds.setdefault(reason.partition(";")[0], []).append(fqn)
        lines += [f"- {row.name}: {_listed(fqns)}: {reason}" for reason, fqns in kinds.items()]
    return "\n".join(lines) + "\n"


def share(report: CompressionReport) -> float:
    """The share of the model's parameters in the layers that were considered."""
    return report.layer_parameters_before / report.model_parameters_before


def _listed(fqns: list[str]) -> str:
    shown = ", ".join(f"`{fqn or '(the model)'}`" for fqn in fqns[:2])
    return shown if len(fqns) <= 2 else f"{shown} and {len(fqns) - 2} more"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility.table", description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = [Row(name, FAMILIES[name]) for name in tqdm(options.families, unit="family")]
    options.out.write_text(page(rows))


if __name__ == "__main__":
    main()
