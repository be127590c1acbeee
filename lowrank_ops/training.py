"""Recover accuracy: train the factors as they are, by a loss, by distillation from the dense model, or by both.

Any other training loop does as well: the factors are plain parameters, and the zero directions that pad a rank
receive zero gradients, so that the rank is kept.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .models.running import call_model, device_of, move, output_tensor

_FORMAT = "lowrank_ops.finetune/1"


@dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tuning did.

    Attributes:
        losses: of every optimizer step, those before a resumed checkpoint included.
        seconds: that this call took.
    """

    losses: tuple[float, ...]
    seconds: float

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.losses)


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
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    progress: bool = False,
) -> FinetuneReport:
    """Train ``student`` in place with AdamW, a linear warm-up and a cosine schedule.

    Args:
        student: the compressed model; its parameters that require gradients are trained.
        batches: as for :func:`lowrank_ops.calibrate`; passed through once per epoch, so a list or a DataLoader.
        teacher: the dense model, for distillation: the Kullback-Leibler divergence of the student's softened
            distribution from the teacher's, times temperature^2, mean over rows (Hinton et al. 2015,
            arXiv 1503.02531). Outputs are logits (..., classes), or have a field ``logits``.
        loss: ``loss(output, batch)``, a scalar, mean over samples; may be left out with a teacher.
        soft_weight: in [0, 1], the weight of the distillation where there are a teacher and a loss; the loss
            has the rest. 0 leaves the divergence out, for models without logits, which need ``match`` or a loss.
        temperature: divides the logits of both in the distillation.
        match: names of modules whose outputs the student is also to have from the teacher, such as
            ``["blocks.0", "blocks.1"]``: the squared error over the variance of the teacher's, mean over all entries
            and modules (hidden states as in Sanh et al. 2019, arXiv 1910.01108, by their squared error). Both models
            must have them; of tuples the first tensor counts.
        match_weight: of that, beside the rest.
        epochs: passes through ``batches``.
        steps: optimizer steps, instead of ``epochs``; needed where ``batches`` has no length.
        lr: the largest learning rate.
        weight_decay: of matrices; vectors have none.
        warmup: share of the steps in which the learning rate rises, in [0, 1).
        accumulate: batches per optimizer step; the loss is their mean.
        clip: largest norm of the gradient.
        autocast: ``torch.bfloat16`` runs the forward in mixed precision; None does not.
        forward: ``forward(model, batch)`` replaces the call of both models.
        checkpoint: file to save to every ``checkpoint_every`` steps and at the end. If it exists, training goes on
            from it, with the order of batches and the random numbers that an unbroken run has, provided that
            ``batches`` draws from torch's global generator.
        checkpoint_every: optimizer steps between two checkpoints.
        progress: show a progress bar.

    Raises:
        ValueError: a bad argument, no batch, a loss or gradient that is not finite, a checkpoint of another run,
            float16 parameters, outputs to match that do not compare.
    """
    total = _total_steps(batches, epochs, steps, accumulate)
    _check(student, teacher, loss, soft_weight, temperature, lr, warmup, clip, autocast, checkpoint_every)
    _check_match(student, teacher, loss, soft_weight, match, match_weight)
    run, device = forward or call_model, device_of(student)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    matrices, vectors = ([p for p in trained if (p.dim() > 1) is matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}], lr=lr
    )
    settings = {
        "steps": total,
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "accumulate": accumulate,
        "clip": clip,
        "soft_weight": soft_weight,
        "temperature": temperature,
        "match": list(match),
        "match_weight": match_weight,
        "autocast": str(autocast),
        "teacher": teacher is not None,
        "loss": loss is not None,
    }
    place = _Place(device)
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise ValueError(f"checkpoint {str(checkpoint)!r} is in a folder that does not exist; make it first.")
    if checkpoint is not None and Path(checkpoint).exists():
        _resume(Path(checkpoint), student, optimizer, place, settings)

    def objective(batch: Any) -> Tensor:
        of_student.clear()
        of_teacher.clear()
        with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            output = run(student, batch)
            with torch.no_grad():
                target = run(teacher, batch) if teacher is not None and (match or soft_weight) else None
        soft = _divergence(output, target, temperature) if teacher is not None and soft_weight else None
        hard = None if loss is None else loss(output, batch)
        if hard is not None and soft is not None:
            soft, hard = soft_weight * soft, (1 - soft_weight) * hard
        matched = match_weight * _mismatch(of_student, of_teacher, match) if match else None
        terms = [term for term in (soft, hard, matched) if term is not None]
        return sum(terms[1:], start=terms[0])

    started = time.perf_counter()
    with (
        _modes(student, teacher),
        _outputs(student, match) as of_student,
        _outputs(teacher, match) as of_teacher,
        torch.enable_grad(),
        tqdm(total=total, initial=len(place.losses), desc="fine-tuning", unit="step", disable=not progress) as bar,
    ):
        stream = _endless(batches, place, len(place.losses) < total)
        while len(place.losses) < total:
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(len(place.losses), total, warmup)
            optimizer.zero_grad(set_to_none=True)
            mean = 0.0
            for _ in range(accumulate):
                value = objective(move(next(stream), device))
                (value / accumulate).backward()
                mean += float(value.detach()) / accumulate
            if not math.isfinite(mean):
                optimizer.zero_grad(set_to_none=True)
                raise ValueError(
                    f"the loss is {mean} at step {len(place.losses)} (counted from 0); check the batches, lower "
                    f"lr={lr}, or do without autocast."
                )
            norm = float(nn.utils.clip_grad_norm_(trained, clip))
            if not math.isfinite(norm):
                optimizer.zero_grad(set_to_none=True)
                raise ValueError(
                    f"the gradient is not finite at step {len(place.losses)} (counted from 0), although the loss is; "
                    "check the loss function for square roots, logarithms and divisions at zero."
                )
            optimizer.step()
            place.losses.append(mean)
            bar.set_postfix(loss=f"{mean:.4g}")
            bar.update()
            done = len(place.losses)
            if checkpoint is not None and (done % checkpoint_every == 0 or done == total):
                _save(Path(checkpoint), student, optimizer, place, settings)
    optimizer.zero_grad(set_to_none=True)
    return FinetuneReport(tuple(place.losses), time.perf_counter() - started)


class _Place:
    """Where a run is: losses so far, batches taken from this epoch, random states at its start and now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.losses: list[float] = []
        self.taken = 0
        self.epoch_random = self.random()
        self.resumed_random: list[Tensor] | None = None

    def random(self) -> list[Tensor]:
        """The states of the generators that training draws from."""
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def go_on(self) -> None:
        """Once, where the checkpoint was saved: take up its random numbers."""
        if self.resumed_random is not None:
            self.set_random(self.resumed_random)
            self.resumed_random = None

    def set_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda" and len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)


def _endless(batches: Iterable[Any], place: _Place, needed: bool) -> Iterator[Any]:
    """Batches, epoch after epoch; in a resumed epoch those that were taken are passed over."""
    passed_over = place.taken
    if place.resumed_random is not None and needed:
        place.set_random(place.epoch_random)
    while True:
        place.epoch_random, place.taken = place.random(), 0
        for batch in batches:
            if place.taken == passed_over:
                place.go_on()
            place.taken += 1
            if place.taken > passed_over:
                yield batch
        if not place.taken:
            raise ValueError("batches was empty, or can be passed through only once; pass a list or a DataLoader.")
        place.go_on()  # where the checkpoint was saved after an epoch's last batch
        passed_over = 0


def _divergence(output: Any, target: Any, temperature: float) -> Tensor:
    """temperature^2 KL(teacher || student) of the softened distributions, mean over rows."""
    of_student, of_teacher = (output_tensor(part, ("logits",)) for part in (output, target))
    if of_student is None or of_teacher is None:
        raise ValueError(
            f"teacher needs logits in the models' output, a tensor or a field 'logits'; got {type(output).__name__}. "
            "Pass forward= that gives them, or a loss that distils in another way."
        )
    student, teacher = (
        (logits.flatten(0, -2).float() / temperature).log_softmax(-1) for logits in (of_student, of_teacher)
    )
    return temperature**2 * nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


@contextmanager
def _outputs(model: nn.Module | None, names: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """What the named modules give, by name and in the order of their calls, until the dictionary is cleared."""
    seen: dict[str, list[Any]] = {}

    def see(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: seen.setdefault(name, []).append(output)

    handles = []
    try:
        for name in names:
            assert model is not None
            handles.append(model.get_submodule(name).register_forward_hook(see(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _mismatch(of_student: dict[str, list[Any]], of_teacher: dict[str, list[Any]], names: Sequence[str]) -> Tensor:
    """The squared error of the student's outputs over the variance of the teacher's, mean over calls and modules."""
    errors = []
    for name in names:
        calls = [len(seen.get(name, ())) for seen in (of_student, of_teacher)]
        if calls[0] != calls[1] or not calls[0]:
            raise ValueError(
                f"match: the student calls {name!r} {calls[0]} times per batch and the teacher {calls[1]} times; name "
                "modules that both call, and equally often."
            )
        for pair in zip(of_student[name], of_teacher[name], strict=True):
            y, target = (output_tensor(output, ("last_hidden_state", "logits")) for output in pair)
            if y is None or target is None:
                raise ValueError(
                    f"match: {name!r} gives no tensor of floats but {type(pair[0]).__name__}; name another."
                )
            if y.shape != target.shape:
                raise ValueError(
                    f"match: the output of {name!r} is {tuple(y.shape)} in the student and {tuple(target.shape)} in "
                    "the teacher; name modules whose outputs have one shape."
                )
            target = target.float()
            variance = (target - target.mean()).square().mean()
            constant = 1e-6 * target.square().mean()  # no more than rounding varies: the error is taken as it is
            scale = torch.where(variance > constant, variance, 1.0)
            errors.append((y.float() - target).square().mean() / scale)
    return torch.stack(errors).mean()


def _schedule(step: int, total: int, warmup: float) -> float:
    """The learning rate of a step relative to the largest: up linearly, then down by half a cosine."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))


@contextmanager
def _modes(student: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Train the student and evaluate the teacher; put every module's flag back."""
    modules = [*(teacher.modules() if teacher is not None else ()), *student.modules()]
    training = [(module, module.training) for module in modules]
    try:
        if teacher is not None:
            teacher.eval()
        student.train()
        yield
    finally:
        for module, flag in training:
            module.training = flag


def _save(
    path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, place: _Place, settings: dict[str, Any]
) -> None:
    """Write all that resuming needs; a crash leaves the old file or the new one."""
    partial = path.with_name(path.name + ".part")
    state = {
        "format": _FORMAT,
        "settings": settings,
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": place.losses,
        "taken": place.taken,
        "epoch_random": place.epoch_random,
        "random": place.random(),
    }
    torch.save(state, partial)
    os.replace(partial, path)


def _resume(
    path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, place: _Place, settings: dict[str, Any]
) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = isinstance(state, dict) and state.get("format") == _FORMAT
    except Exception as error:  # what torch.load raises depends on where the file is cut
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {error}. Delete it to start anew.") from None
    if not known:
        raise ValueError(f"checkpoint {str(path)!r} was not written by finetune_. Name another file.")
    if state["settings"] != settings:
        raise ValueError(
            f"checkpoint {str(path)!r} is of a run with {state['settings']}, this one has {settings}. Use the same "
            "arguments to go on with it, or delete it to start anew."
        )
    try:
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"checkpoint {str(path)!r} is of another student: {error}") from None
    place.losses, place.taken = state["losses"], state["taken"]
    place.epoch_random, place.resumed_random = state["epoch_random"], state["random"]


def _total_steps(batches: Iterable[Any], epochs: int, steps: int | None, accumulate: int) -> int:
    for name, value in {"epochs": epochs, "steps": steps, "accumulate": accumulate}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer; got {value!r}.")
    if steps is not None:
        return steps
    if not isinstance(batches, Sized):
        raise ValueError("batches has no length, which the schedule needs; pass steps.")
    if not len(batches):
        raise ValueError("batches was empty; pass at least one batch.")
    return math.ceil(epochs * len(batches) / accumulate)


def _check(
    student: nn.Module,
    teacher: nn.Module | None,
    loss: Callable[[Any, Any], Tensor] | None,
    soft_weight: float,
    temperature: float,
    lr: float,
    warmup: float,
    clip: float,
    autocast: torch.dtype | None,
    checkpoint_every: int,
) -> None:
    if teacher is None and loss is None:
        raise ValueError("finetune_ needs a loss(output, batch), a teacher, or both.")
    if teacher is student:
        raise ValueError("teacher is the student itself; keep a copy of the dense model before compress_.")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("student has no parameter that requires gradients; call student.requires_grad_(True).")
    if any(parameter.dtype == torch.float16 and parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "student has float16 parameters, which AdamW's steps underflow; call student.float() and pass "
            "autocast=torch.bfloat16 for speed."
        )
    if not 0 <= soft_weight <= 1:
        raise ValueError(f"soft_weight must be in [0, 1]; got {soft_weight!r}.")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be a share of the steps in [0, 1); got {warmup!r}.")
    for name, value in {
        "temperature": temperature,
        "lr": lr,
        "clip": clip,
        "checkpoint_every": checkpoint_every,
    }.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value!r}.")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast must be None or torch.bfloat16; got {autocast!r}.")


def _check_match(
    student: nn.Module,
    teacher: nn.Module | None,
    loss: Callable[[Any, Any], Tensor] | None,
    soft_weight: float,
    match: Sequence[str],
    match_weight: float,
) -> None:
    if isinstance(match, str) or not isinstance(match, Sequence):
        raise ValueError(f"match must be a sequence of module names, such as ['blocks.0']; got {match!r}.")
    if match and teacher is None:
        raise ValueError("match needs a teacher, whose outputs the student is to have.")
    if not match_weight > 0:
        raise ValueError(f"match_weight must be positive; got {match_weight!r}. Leave match out to do without.")
    if loss is None and not match and not soft_weight:
        raise ValueError("soft_weight=0 leaves nothing to train by; pass a loss, or module names in match.")
    for role, model in {"student": student, "teacher": teacher}.items():
        missing = [name for name in match if model is not None and name not in dict(model.named_modules())]
        if missing:
            raise ValueError(f"match: the {role} has no module {missing[0]!r}; its names are those of named_modules().")
