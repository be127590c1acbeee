"""Recover accuracy after compression: train the model by a loss, by distillation from the dense model, or by both.

Any other training loop works as well: the factors are ordinary parameters. The zeros that pad a rank receive zero
gradients, so training keeps the rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_positive, checked
from ..calibration.objectives import divergence
from ..files import check_file, digest
from ..layers import LowRankLinear
from ..models.layers import check_not_dispatched
from ..models.mask_sources import Mask
from ..models.masks import Masks, real_rows
from ..models.running import (
    EMPTY,
    NO_REAL_ROW,
    ProgressBar,
    call_model,
    check_differentiable,
    device_of,
    evaluating,
    hooks,
    output_tensor,
    training_flags_kept,
    warn_caller,
)
from .run import Run

_FIELDS = ("last_hidden_state", "logits")  # of a matched output that is an object or a mapping


@dataclass(frozen=True)
class FinetuneReport:
    """The result of :func:`finetune_`.

    Attributes:
        losses: one per optimizer step, including the steps before a resumed checkpoint.
        seconds: duration of this call.
    """

    losses: tuple[float, ...]
    seconds: float

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.losses)


@checked(soft_weight="teacher", temperature="teacher", match_weight="match", unmasked_rows="mask")
def finetune_(
    student: nn.Module,
    batches: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    soft_weight: float = 0.5,
    temperature: float = 2.0,
    match: Sequence[str] = (),
    match_weight: float = 1.0,
    epochs: int = 1,
    steps: int | None = None,
    lr: float = 3e-4,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    accumulate: int = 1,
    clip: float = 1.0,
    autocast: torch.dtype | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    mask: Mask | None = None,
    unmasked_rows: str = "count",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    progress: bool = False,
) -> FinetuneReport:
    """Train ``student`` in place with AdamW, linear warmup and a cosine schedule.

    Args:
        student: the compressed model, float32 or bfloat16; its parameters that require gradients are trained.
        batches: as for :func:`lowrank_ops.calibrate`; iterated once per epoch, so a list or a DataLoader.
        teacher: the dense model, for distillation: the Kullback-Leibler divergence between the softened distributions
            of teacher and student, times temperature^2, mean over rows (Hinton et al. 2015, arXiv 1503.02531).
            Outputs are logits (..., classes) or have a field ``logits``.
        loss: ``loss(output, batch)``, a scalar, mean over samples; optional with a teacher.
        soft_weight: weight of the divergence if there are both a teacher and a loss, in [0, 1]; the loss has the weight
            1 - ``soft_weight``. 0 leaves the divergence out, for models without logits, which need ``match`` or
            ``loss``.
        temperature: divides the logits of both models in the divergence.
        match: names of modules whose outputs are matched to the teacher's, such as ``["blocks.0", "blocks.1"]``: the
            squared error relative to the variance of the teacher's output, mean over entries and modules (hidden
            states as in Sanh et al. 2019, arXiv 1910.01108, but by squared error). Both models must have the modules;
            of a tuple the first tensor counts.
        match_weight: weight of the matched outputs, added to the other terms.
        epochs: passes through ``batches``.
        steps: optimizer steps, instead of ``epochs``; required if ``batches`` has no length.
        lr: peak learning rate.
        weight_decay: of matrices; vectors have none.
        warmup: fraction of the steps in which the learning rate rises, in [0, 1).
        accumulate: batches per optimizer step; their losses are averaged.
        clip: maximum norm of the gradient.
        autocast: ``torch.bfloat16`` runs the forward pass in mixed precision; None does not.
        forward: ``forward(model, batch)`` replaces the call of both models.
        mask, unmasked_rows: as for :func:`lowrank_ops.calibrate`: padding counts neither in the divergence nor in
            matched outputs. It is not applied to ``loss``.
        checkpoint: file written every ``checkpoint_every`` steps and at the end. If it exists, training
            resumes from it, with the same batches and random numbers as an uninterrupted run, provided that
            ``batches`` draws from torch's global generator. A checkpoint of other arguments, of another loss or forward
            by code and the numbers they read, or of another teacher is refused; ``batches`` are not compared.
        checkpoint_every: optimizer steps between two checkpoints.
        progress: show a progress bar.

    Returns:
        The losses and the duration.

    Raises:
        ValueError: a bad argument, no batch, a batch without rows that count, a loss or gradient that is not finite, a
            checkpoint that is damaged or of another run, float16 parameters, or outputs to match that have no common
            shape.
        OSError: the checkpoint cannot be written.

    Example:
        >>> import copy
        >>> import torch
        >>> import lowrank_ops as lro
        >>> dense = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> student = copy.deepcopy(dense)
        >>> student[0] = lro.LowRankLinear.from_linear(dense[0], rank=8)
        >>> batches = [torch.randn(64, 16) for _ in range(5)]
        >>> report = lro.finetune_(student, batches, teacher=dense, epochs=2, lr=1e-2)
        >>> report.steps
        10
    """
    total = _total_steps(batches, epochs, steps, accumulate)
    masks = Masks(student, mask, unmasked_rows)
    objective = _Objective(
        student, teacher, loss, soft_weight, temperature, match, match_weight, autocast, forward, mask, masks
    )
    objective.check()
    _check(student, lr, weight_decay, warmup, clip, checkpoint_every)
    run = Run(
        student, total, lr, weight_decay, warmup, accumulate, clip, {} if checkpoint is None else objective.settings()
    )
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        check_file("checkpoint", path)
        run.tensors()  # raises now for what could not be stored later
        if path.exists():
            run.resume(path)

    started = time.perf_counter()
    with (
        _modes(student, teacher),
        objective.recording(),
        torch.enable_grad(),
        ProgressBar(total=total, initial=run.step, desc="fine-tuning", unit="step", disable=not progress) as bar,
    ):
        stream = run.stream(batches)
        while run.step < total:
            run.optimize(objective, stream)
            bar.set_postfix(loss=f"{run.losses[-1]:.4g}")
            bar.update()
            if path is not None and (run.step % checkpoint_every == 0 or run.step == total):
                run.save(path)
    run.optimizer.zero_grad(set_to_none=True)
    if (warning := masks.finish()) is not None:
        warn_caller(warning)
    return FinetuneReport(tuple(run.losses), time.perf_counter() - started)


@dataclass
class _Objective:
    """The loss of one batch: distillation, the user's loss and matched outputs, weighted; see :func:`finetune_`."""

    student: nn.Module
    teacher: nn.Module | None
    loss: Callable[[Any, Any], Tensor] | None
    soft_weight: float
    temperature: float
    match: Sequence[str]
    match_weight: float
    autocast: torch.dtype | None
    forward: Callable[[nn.Module, Any], Any] | None
    mask: Mask | None
    masks: Masks
    student_outputs: dict[str, list[Any]] = field(default_factory=dict)
    teacher_outputs: dict[str, list[Any]] = field(default_factory=dict)
    output_masks: dict[str, list[Tensor | None]] = field(default_factory=dict)  # of the student's outputs

    def __call__(self, batch: Any) -> Tensor:
        for recorded in (self.student_outputs, self.teacher_outputs, self.output_masks):
            recorded.clear()
        run, teacher = self.forward or call_model, self.teacher
        with torch.autocast(device_of(self.student).type, self.autocast or torch.bfloat16, self.autocast is not None):
            output = run(self.student, batch)
            with torch.no_grad():
                target = run(teacher, batch) if teacher is not None and (self.match or self.soft_weight) else None
        soft = None
        if teacher is not None and self.soft_weight:
            soft = divergence(
                output, target, self.masks.of_output(), self.temperature, "teacher", "soft_weight=0 and a loss"
            )
        hard = None if self.loss is None else _checked_loss(self.loss(output, batch))
        if hard is not None and soft is not None:
            soft, hard = self.soft_weight * soft, (1 - self.soft_weight) * hard
        matched = None
        if self.match:
            matched = self.match_weight * _mismatch(
                self.student_outputs, self.teacher_outputs, self.output_masks, self.match
            )
        terms = [term for term in (soft, hard, matched) if term is not None]
        return sum(terms[1:], start=terms[0])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the outputs of the modules in ``match``, by name and in the order of their calls."""

        def record(outputs: dict[str, list[Any]], name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                outputs.setdefault(name, []).append(output)
                if outputs is self.student_outputs:
                    mask = self.masks.of_block(name, module, output_tensor(output, _FIELDS))
                    self.output_masks.setdefault(name, []).append(mask)

            return hook

        with hooks() as handles:
            self.masks.attach(handles)
            for name in self.match:
                for model, outputs in ((self.student, self.student_outputs), (self.teacher, self.teacher_outputs)):
                    assert model is not None
                    handles.append(model.get_submodule(name).register_forward_hook(record(outputs, name)))
            yield

    def settings(self) -> dict[str, Any]:
        """What must be equal in a resumed run; of functions and of the teacher, digests."""
        return {
            "soft_weight": self.soft_weight,
            "temperature": self.temperature,
            "match": list(self.match),
            "match_weight": self.match_weight,
            "autocast": str(self.autocast),
            "teacher": digest(None if self.teacher is None else self.teacher.state_dict()),
            "loss": digest(self.loss),
            "forward": digest(self.forward),
            **({} if self.mask is None else {"mask": digest(self.mask)}),
        }

    def check(self) -> None:
        """Raise ValueError for arguments that define no loss, or contradict each other."""
        if self.teacher is None and self.loss is None:
            raise ValueError("finetune_ needs a loss(output, batch), a teacher, or both.")
        if self.teacher is self.student:
            raise ValueError("teacher is the student itself; keep a copy of the dense model before compress_.")
        teacher = nn.Module() if self.teacher is None else self.teacher
        dispatched = any(hasattr(module, "_hf_hook") for module in teacher.modules())  # by accelerate, which loads them
        if any(parameter.is_meta for parameter in teacher.parameters()) and not dispatched:
            raise ValueError("teacher has parameters on the meta device, which have no values; load the weights.")
        if not 0 <= self.soft_weight <= 1:
            raise ValueError(f"soft_weight must be in [0, 1]; got {self.soft_weight!r}.")
        check_positive(temperature=self.temperature)
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast must be None or torch.bfloat16; got {self.autocast!r}.")
        if self.match and self.teacher is None:
            raise ValueError("match needs a teacher, whose outputs the student is trained to match.")
        check_positive(match_weight=self.match_weight)
        if self.loss is None and not self.match and not self.soft_weight:
            raise ValueError("soft_weight=0 leaves nothing to train by; pass a loss, or module names in match.")
        for role, model in {"student": self.student, "teacher": self.teacher}.items():
            names = set() if model is None else {name for name, _ in model.named_modules()}
            missing = [name for name in self.match if model is not None and name not in names]
            if missing:
                raise ValueError(f"match: the {role} has no module {missing[0]!r}; use names of named_modules().")


def _checked_loss(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        given = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        without = ", without a gradient" if isinstance(value, Tensor) and not value.requires_grad else ""
        raise ValueError(
            f"loss must return a scalar tensor that depends on the student's parameters; it returned {given}{without}."
        )
    return value.sum()


def _mismatch(
    student_outputs: dict[str, list[Any]],
    teacher_outputs: dict[str, list[Any]],
    masks: dict[str, list[Tensor | None]],
    names: Sequence[str],
) -> Tensor:
    """The squared error of the student's outputs over the variance of the teacher's, mean over calls and modules."""
    errors = []
    for name in names:
        calls, teacher_calls = student_outputs.get(name, []), teacher_outputs.get(name, [])
        if len(calls) != len(teacher_calls) or not calls:
            raise ValueError(
                f"match: the student calls {name!r} {len(calls)} times per batch and the teacher {len(teacher_calls)} "
                "times; name modules that both call equally often."
            )
        for *pair, mask in zip(calls, teacher_calls, masks[name], strict=True):
            y, target = (output_tensor(output, _FIELDS) for output in pair)
            if y is None or target is None:
                raise ValueError(
                    f"match: {name!r} returns {type(pair[0]).__name__}, which holds no float tensor; name another."
                )
            if y.shape != target.shape:
                raise ValueError(
                    f"match: the output of {name!r} is {tuple(y.shape)} in the student and {tuple(target.shape)} in "
                    "the teacher; name modules whose outputs have the same shape."
                )
            y, target = real_rows(y, mask), real_rows(target, mask).float()
            if not y.numel():
                raise ValueError(f"match: a batch of {name!r} {NO_REAL_ROW}")
            variance = (target - target.mean()).square().mean()
            rounding = 1e-6 * target.square().mean()  # below, the output is constant: use the absolute error
            errors.append((y.float() - target).square().mean() / torch.where(variance > rounding, variance, 1.0))
    return torch.stack(errors).mean()


@contextmanager
def _modes(student: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Train mode for the student, eval mode for the teacher; every module's mode is restored afterwards."""
    with evaluating(*([] if teacher is None else [teacher])), training_flags_kept(student, trained=True):
        if not all(module.training for module in student.modules()):
            student.train()
        yield


def _total_steps(batches: Iterable[Any], epochs: int, steps: int | None, accumulate: int) -> int:
    for name, value in {"epochs": epochs, "steps": steps, "accumulate": accumulate}.items():
        if value is not None:
            check_positive(**{name: value})
    if steps is not None:
        if epochs != 1:
            raise ValueError("epochs has no effect where steps is given; leave one of them out.")
        return steps
    if not isinstance(batches, Sized):
        raise ValueError("batches has no length, which the schedule needs; pass steps.")
    if not len(batches):
        raise ValueError(EMPTY)
    return math.ceil(epochs * len(batches) / accumulate)


def _check(
    student: nn.Module, lr: float, weight_decay: float, warmup: float, clip: float, checkpoint_every: int
) -> None:
    check_differentiable(student)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for fqn, layer in student.named_modules():
        if isinstance(layer, LowRankLinear) and any(layer.formats) and not fqn.endswith("base_layer"):
            raise ValueError(
                f"student has 8-bit factors, which have no gradients, in layer {fqn!r}: call dequantize_() on it and "
                "lowrank_ops.layers.quantize_ after the training (replace an EightBitLinear by layer.to_dense()), or "
                "train adapters of PEFT."
            )
    if not trained:
        raise ValueError("student has no parameter that requires gradients; call student.requires_grad_(True).")
    if any(parameter.is_meta for parameter in student.parameters()):
        check_not_dispatched(student)
        raise ValueError("student has parameters on the meta device, which have no values; load the weights first.")
    if any(parameter.dtype == torch.float16 for parameter in trained):
        raise ValueError(
            "student has float16 parameters, in which AdamW's steps underflow; call student.float() and pass "
            "autocast=torch.bfloat16 for speed."
        )
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be a fraction of the steps in [0, 1); got {warmup!r}.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a non-negative number; got {weight_decay!r}.")
    if clip != math.inf:
        check_positive(clip=clip)
    check_positive(lr=lr, checkpoint_every=checkpoint_every)
