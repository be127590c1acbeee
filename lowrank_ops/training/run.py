"""The optimizer steps of a fine-tuning, and the checkpoint that it resumes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import digests, open_checkpoint, replacing, write_tensors
from ..models.running import device_of, in_batch, move, shortened

_FORMAT = "lowrank_ops.finetune/2"  # 1 was a pickle


class Run:
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
        with open_checkpoint(path, _FORMAT) as (header, tensors):
            problem = self._problem(header, tensors)
        if problem is not None:
            raise ValueError(f"checkpoint {str(path)!r} {problem}, or delete it to start again.")
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
            changed = [name for name in {**self.settings, **settings} if settings.get(name) != self.settings.get(name)]
            if changed:
                return f"is of another run: its {', '.join(changed)} differ. Use the same arguments to resume it"
            own, student = self.student.state_dict(), _part(tensors, "student.")
            differ = [name for name in {**own, **student} if _kind(own.get(name)) != _kind(student.get(name))]
            if differ:
                return f"is of another student: {shortened(differ)} differ. Name another file"
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
    """The tensors whose names begin with ``prefix``, sorted by name, with the prefix removed."""
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
