"""Recover accuracy after compression: train the factors by a loss, by distillation from the dense model, or by both.

Any other training loop works, too: the factors are plain parameters, and the zero directions that pad a rank receive
zero gradients, so training keeps the rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_positive, checked
from .files import check_file, digest, digests, open_tensors, read_header, read_tensor, replacing, write_tensors
from .models.masks import Mask, Masks, real_rows
from .models.running import (
    EMPTY,
    ProgressBar,
    call_model,
    device_of,
    evaluating,
    hooks,
    in_batch,
    move,
    output_tensor,
    training_flags_kept,
    warn_caller,
)

_FORMAT = "lowrank_ops.finetune/2"  # 1 was a pickle
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
            matched outputs. ``loss`` does as it pleases.
        checkpoint: file that is written every ``checkpoint_every`` steps and at the end. If it exists, training
            resumes from it, with the same batches and random numbers as an uninterrupted run, provided that
            ``batches`` draws from torch's global generator.
        checkpoint_every: optimizer steps between two checkpoints.
        progress: show a progress bar.

    Returns:
        The losses and the duration.

    Raises:
        ValueError: a bad argument, no batch, a loss or gradient that is not finite, a checkpoint that is damaged or of
            another run, float16 parameters, or outputs to match that have no common shape.
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
    run = _Run(student, total, lr, weight_decay, warmup, accumulate, clip, objective.settings())
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
            soft = _divergence(output, target, self.temperature, self.masks.of_output())
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
        """What must be equal in a resumed run."""
        return {
            "soft_weight": self.soft_weight,
            "temperature": self.temperature,
            "match": list(self.match),
            "match_weight": self.match_weight,
            "autocast": str(self.autocast),
            "teacher": self.teacher is not None,
            "loss": self.loss is not None,
            **({} if self.mask is None else {"mask": digest(self.mask)}),
        }

    def check(self) -> None:
        """Raise ValueError for arguments that leave nothing to train by or do not fit together."""
        if self.teacher is None and self.loss is None:
            raise ValueError("finetune_ needs a loss(output, batch), a teacher, or both.")
        if self.teacher is self.student:
            raise ValueError("teacher is the student itself; keep a copy of the dense model before compress_.")
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


def _divergence(output: Any, target: Any, temperature: float, mask: Tensor | None) -> Tensor:
    """temperature^2 KL(teacher || student) of the softened distributions, mean over the rows that are real."""
    logits = [found for part in (output, target) if (found := output_tensor(part, ("logits",))) is not None]
    if len(logits) < 2:
        raise ValueError(
            f"teacher needs logits in the models' output, a tensor or a field 'logits'; got {type(output).__name__}. "
            "Pass a forward that returns logits, or soft_weight=0 and a loss."
        )
    if logits[0].shape != logits[1].shape:
        raise ValueError(
            f"teacher gives logits of shape {tuple(logits[1].shape)} where the student gives {tuple(logits[0].shape)}; "
            "pass the dense model of this student, or a forward that makes them alike."
        )
    if mask is not None and all(part.shape[:-1] == mask.shape for part in logits):  # not logits of a whole sequence
        logits = [real_rows(part, mask) for part in logits]
    student, teacher = ((part.flatten(0, -2).float() / temperature).log_softmax(-1) for part in logits)
    return temperature**2 * nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


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
            variance = (target - target.mean()).square().mean()
            rounding = 1e-6 * target.square().mean()  # below, the output is constant: use the absolute error
            errors.append((y.float() - target).square().mean() / torch.where(variance > rounding, variance, 1.0))
    return torch.stack(errors).mean()


class _Run:
    """The optimizer and progress of a run; a checkpoint holds losses, batches of this epoch, and random states."""

    def __init__(
        self,
        student: nn.Module,
        total: int,
        lr: float,
        weight_decay: float,
        warmup: float,
        accumulate: int,
        clip: float,
        objective: dict[str, Any],
    ) -> None:
        self.student, self.device = student, device_of(student)
        self.total, self.lr, self.warmup, self.accumulate, self.clip = total, lr, warmup, accumulate, clip
        self.settings = {
            "steps": total,
            "lr": lr,
            "weight_decay": weight_decay,
            "warmup": warmup,
            "accumulate": accumulate,
            "clip": clip,
            **objective,
        }
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        matrices, vectors = ([p for p in self.parameters if (p.dim() > 1) is matrix] for matrix in (True, False))
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}], lr=lr
        )
        self.losses: list[float] = []
        self.taken = 0  # batches of this epoch
        self.epoch_random = self._random_states()  # at the start of this epoch
        self.resumed_random: list[Tensor] | None = None  # at the resumed checkpoint, until training reaches it

    @property
    def step(self) -> int:
        """Number of finished optimizer steps."""
        return len(self.losses)

    def optimize(self, objective: Callable[[Any], Tensor], stream: Iterator[Any]) -> None:
        """One optimizer step on the next ``accumulate`` batches.

        Raises:
            ValueError: the loss or the gradient is not finite; the parameters are unchanged.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * _schedule(self.step, self.total, self.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        mean = 0.0
        for _ in range(self.accumulate):
            with in_batch(self.taken):
                value = objective(move(next(stream), self.device))
                (value / self.accumulate).backward()
            mean += float(value.detach()) / self.accumulate
        if not math.isfinite(mean):
            self.optimizer.zero_grad(set_to_none=True)
            raise ValueError(
                f"the loss is {mean} at step {self.step} (counted from 0); check the batches, lower lr={self.lr}, or "
                "disable autocast."
            )
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise ValueError(
                f"the gradient is not finite at step {self.step} (counted from 0), although the loss is; check the "
                "loss function for square roots, logarithms and divisions at zero."
            )
        self.optimizer.step()
        self.losses.append(mean)

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Batches, epoch after epoch; a resumed epoch skips the batches that were already taken."""
        skip = self.taken
        if self.resumed_random is not None and self.step < self.total:
            self._set_random_states(self.epoch_random)
        while True:
            self.epoch_random, self.taken = self._random_states(), 0
            for batch in batches:
                if self.taken == skip:
                    self._restore_random()
                self.taken += 1
                if self.taken > skip:
                    yield batch
            if not self.taken:
                raise ValueError("batches was empty, or can be iterated only once; pass a list or a DataLoader.")
            self._restore_random()  # for a checkpoint that was saved after an epoch's last batch
            skip = 0

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint.

        Raises:
            ValueError: the student's state dict holds something else.
        """
        student = self.student.state_dict()
        for name, value in student.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"student has a {type(value).__name__} in its state dict at {name!r}; checkpoints hold only "
                    "tensors. Leave it out of get_extra_state, or train without a checkpoint."
                )
        moments = self.optimizer.state_dict()["state"]
        random = {"epoch_random": self.epoch_random, "random": self._random_states()}
        return {
            **{f"student.{name}": value for name, value in student.items()},
            **{f"optimizer.{i}.{name}": value for i, values in moments.items() for name, value in values.items()},
            **{f"{part}.{i}": value for part, states in random.items() for i, value in enumerate(states)},
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint; a crash leaves the old file or the new one."""
        tensors = self.tensors()
        header = {"format": _FORMAT, "settings": self.settings, "losses": self.losses, "taken": self.taken}
        with replacing(path) as (file,):
            write_tensors(file, tensors, {**header, "checksums": digests(tensors)})

    def resume(self, path: Path) -> None:
        """Load a checkpoint. On an error the student is unchanged.

        Raises:
            ValueError: the file is damaged, or of another run or student.
        """
        try:
            with open_tensors(path) as file:
                header, tensors = read_header(file), {}
                if known := header.get("format") == _FORMAT:
                    checksums = dict(header["checksums"])
                    tensors = {name: read_tensor(file, name, checksums) for name in checksums}
        except ValueError as error:
            raise ValueError(f"checkpoint {str(path)!r} cannot be read: {error}. Delete it to start over.") from None
        if not known:
            raise ValueError(f"checkpoint {str(path)!r} was not written by finetune_. Choose another file name.")
        problem = self._problem(header, tensors)
        if problem is not None:
            raise ValueError(f"checkpoint {str(path)!r} {problem}, or delete it to start over.")
        self.student.load_state_dict(_part(tensors, "student."))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": _moments(tensors), "param_groups": groups})
        self.losses, self.taken = header["losses"], header["taken"]
        self.epoch_random = [*_part(tensors, "epoch_random.").values()]
        self.resumed_random = [*_part(tensors, "random.").values()]

    def _problem(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
        """Why a checkpoint cannot be resumed, to be put after its name; None if it can."""
        try:
            settings = header["settings"]
            if settings != self.settings:
                return f"is of a run with {settings}, this one has {self.settings}. Use the same arguments to resume it"
            own, student = self.student.state_dict(), _part(tensors, "student.")
            differ = [name for name in {**own, **student} if _kind(own.get(name)) != _kind(student.get(name))]
            if differ:
                return f"is of another student: {', '.join(differ[:5])} differ. Name another file"
            ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            for index, values in _moments(tensors).items():
                if any(values[name].shape != ordered[index].shape for name in ("exp_avg", "exp_avg_sq")):
                    raise ValueError("its optimizer has moments of other shapes")
                if not values["step"].numel() == 1 <= float(values["step"]):
                    raise ValueError("its optimizer has an impossible number of steps")
            losses, taken = header["losses"], header["taken"]
            if not all(type(value) is float and math.isfinite(value) for value in losses):
                raise ValueError("its losses are not finite numbers")
            if type(losses) is not list or not 0 < len(losses) <= self.total or type(taken) is not int or taken < 0:
                raise ValueError("it has an impossible number of steps or batches")
            trained = [f"student.{name}" for name, part in self.student.named_parameters() if part.requires_grad]
            moments = [name for name in tensors if name.startswith("optimizer.")]
            if not all(bool(tensors[name].isfinite().all()) for name in [*trained, *moments]):
                raise ValueError("it holds NaN or inf")
            for part in ("epoch_random.", "random."):
                torch.Generator().set_state(_part(tensors, part)["0"])
        except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            return f"is damaged: {error if isinstance(error, ValueError) else repr(error)}. Copy it again"
        return None

    def _restore_random(self) -> None:
        """Once, at the place of the resumed checkpoint."""
        if self.resumed_random is not None:
            self._set_random_states(self.resumed_random)
            self.resumed_random = None

    def _random_states(self) -> list[Tensor]:
        """The states of the generators that training draws from."""
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def _set_random_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda" and len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it, by rising name."""
    return {name.removeprefix(prefix): tensors[name] for name in sorted(tensors) if name.startswith(prefix)}


def _moments(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The optimizer's state in a checkpoint, by the parameter's index."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _part(tensors, "optimizer.").items():
        index, _, key = name.partition(".")
        found.setdefault(int(index), {})[key] = tensor
    return found


def _kind(value: object) -> object:
    """The shape and dtype of a tensor, the type of anything else."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)


def _schedule(step: int, total: int, warmup: float) -> float:
    """The learning rate of a step relative to its peak: linear warmup, then half a cosine."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


@contextmanager
def _modes(student: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Train mode for the student, eval mode for the teacher; every module is back in its own mode afterwards."""
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
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("student has no parameter that requires gradients; call student.requires_grad_(True).")
    if any(parameter.is_meta for parameter in student.parameters()):
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
