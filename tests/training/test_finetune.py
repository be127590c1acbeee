"""Fine-tuning learns, keeps the rank, resumes exactly, and leaves the teacher unchanged."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro
from tests.rewriting import rewrite

Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network(dropout: float = 0.1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(dropout), nn.BatchNorm1d(32), nn.Linear(32, 5))


def truth(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.tanh(x @ torch.randn(12, 16, generator=generator)) @ torch.randn(16, 5, generator=generator)).argmax(
        -1
    )


def data(count: int = 12, rows: int = 32, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(rows, 12, generator=generator) for _ in range(count)]
    return [(x, truth(x)) for x in inputs]


def first(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0])


def cross_entropy(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output, batch[1])


def students(dropout: float = 0.1) -> tuple[nn.Sequential, nn.Sequential]:
    """A trained dense network and its compression to rank 5 in the first layer, stored as 8."""
    dense = network(dropout)
    lro.finetune_(dense, data(40), loss=cross_entropy, forward=first, epochs=8, lr=1e-2)
    student = copy.deepcopy(dense)
    covariances = lro.calibrate(student, data(), forward=first)
    lro.compress_(student, covariances, lro.CompressionConfig(lro.Ranks({"0": 5})))
    return dense.eval(), student


def score(model: nn.Module) -> float:
    x, y = (torch.cat(parts) for parts in zip(*data(20, seed=9), strict=True))
    model.eval()
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


@pytest.mark.parametrize("how", ["plain", "distilled", "both"])
def test_finetuning_recovers_accuracy_and_keeps_the_rank(how: str) -> None:
    dense, student = students()
    before, teacher_state = score(student), copy.deepcopy(dense.state_dict())
    dense[0].train()  # must be restored
    report = lro.finetune_(
        student,
        data(40),
        teacher=None if how == "plain" else dense,
        loss=None if how == "distilled" else cross_entropy,
        forward=first,
        epochs=3,
        lr=3e-3,
    )
    assert report.steps == 120 and sum(report.losses[-20:]) < sum(report.losses[:20])
    assert score(student) < before - 0.3 * (before - score(dense))
    layer = student[0]
    assert isinstance(layer, lro.LowRankLinear) and layer.rank == 5
    assert not layer.down[5:].any() and not layer.up[:, 5:].any()
    assert torch.linalg.matrix_rank(layer.weight) == 5
    assert all(torch.equal(value, teacher_state[key]) for key, value in dense.state_dict().items())
    assert all(parameter.grad is None for model in (dense, student) for parameter in model.parameters())


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    dense, student = students(dropout=0.0)
    batch = data(1)[0]
    student[3].eval()
    expected = copy.deepcopy(student).train()
    with torch.no_grad():
        p = (dense(batch[0]) / 3).softmax(-1)
        log_q = (expected(batch[0]) / 3).log_softmax(-1)
    divergence = 9 * (p * (p.log() - log_q)).sum(-1).mean()
    report = lro.finetune_(student, [batch], teacher=dense, temperature=3, forward=first)
    assert report.losses[0] == pytest.approx(divergence.item(), rel=1e-4)


def hooks(*models: nn.Module) -> int:
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


def test_matched_outputs_are_the_relative_squared_error() -> None:
    dense, student = students(dropout=0.0)
    batch = data(1)[0]
    expected = copy.deepcopy(student).train()
    with torch.no_grad():
        hard = cross_entropy(expected(batch[0]), batch)
        errors = []
        for end in (1, 2):  # after the first layer and after its activation
            target = dense[:end](batch[0])
            errors.append((student[:end](batch[0]) - target).square().mean() / target.var(correction=0))
    report = lro.finetune_(
        student,
        [batch],
        teacher=dense,
        loss=cross_entropy,
        forward=first,
        soft_weight=0,
        match=["0", "1"],
        match_weight=3,
    )
    assert report.losses[0] == pytest.approx(float(hard + 3 * sum(errors) / 2), rel=1e-4)
    assert hooks(dense, student) == 0


def test_matching_alone_trains_models_without_logits() -> None:
    """An encoder without logits: with soft_weight=0 only the matched outputs count."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32))

        def forward(self, x: Tensor) -> dict[str, str | Tensor]:
            return {"name": "code", "code": self.block(x)}

    dense = Encoder()
    student = copy.deepcopy(dense)
    batches = [x for x, _ in data(40)]
    covariances = lro.calibrate(student, batches)
    lro.compress_(student, covariances, lro.CompressionConfig(lro.Ranks({"re:.*": 6})))
    x = torch.cat([x for x, _ in data(10, seed=9)])

    def error() -> float:
        with torch.no_grad():
            return float((student.block(x) - dense.block(x)).square().mean())

    before = error()
    report = lro.finetune_(student, batches, teacher=dense, soft_weight=0, match=["block"], epochs=3, lr=3e-3)
    assert sum(report.losses[-10:]) < 0.9 * sum(report.losses[:10]) and error() < 0.9 * before
    assert hooks(dense, student) == 0


def test_a_constant_output_of_the_teacher_can_be_matched() -> None:
    """Without variance the absolute error is used, so the loss stays finite."""
    dense, student = students(dropout=0.0)
    with torch.no_grad():
        dense[0].weight.zero_()
    report = lro.finetune_(student, data(3), teacher=dense, match=["0"], soft_weight=0, forward=first)
    assert torch.tensor(report.losses).isfinite().all() and report.losses[0] < 100


def test_hooks_are_removed_after_an_error() -> None:
    dense, student = students()

    def loss(output: Tensor, batch: Batch) -> Tensor:
        assert hooks(dense, student) == 2
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        lro.finetune_(student, data(2), teacher=dense, loss=loss, match=["0"], forward=first)
    assert hooks(dense, student) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"match": "0"}, r"match must be a sequence of module names, such as \['blocks.0'\]; got '0'"),
        ({"match": None}, "match must be a sequence of module names, .*; got None"),
        ({"match": ["0"], "teacher": None, "loss": cross_entropy}, "match needs a teacher"),
        ({"match": ["0"], "match_weight": 0}, "match_weight must be positive; got 0"),
        ({"match": ["0", "fc"]}, "the student has no module 'fc'"),
        ({"soft_weight": 0}, "soft_weight=0 leaves nothing to train by"),
        ({"match": ["5"], "teacher": nn.Sequential(*network(), nn.Linear(5, 5))}, "the student has no module '5'"),
        ({"match": ["4"], "teacher": nn.Sequential(nn.Linear(12, 5))}, "the teacher has no module '4'"),
        ({"match": ["0"], "teacher": nn.Sequential(nn.Linear(12, 5))}, r"\(32, 32\) in the student and \(32, 5\)"),
        (
            {"match": ["0"], "forward": lambda model, batch: model[1:](torch.zeros(2, 32))},
            "calls '0' 0 times per batch and the teacher 0 times",
        ),
    ],
)
def test_outputs_that_cannot_be_matched_are_refused(arguments: dict[str, object], message: str) -> None:
    arguments = {"teacher": network(), "forward": first, **arguments}
    error = ValueError if isinstance(arguments.get("match", ()), (list, tuple)) else TypeError
    with pytest.raises(error, match=message):
        lro.finetune_(network(), data(2), **arguments)


def test_training_flags_are_restored() -> None:
    dense, student = students()
    dense.eval()
    dense[2].train()
    student.eval()
    student[3].train()
    flags = [module.training for model in (dense, student) for module in model.modules()]

    def loss(output: Tensor, batch: Batch) -> Tensor:
        assert all(module.training for module in student.modules())
        assert not any(module.training for module in dense.modules())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        lro.finetune_(student, data(2), teacher=dense, loss=loss, forward=first)
    assert [module.training for model in (dense, student) for module in model.modules()] == flags


def test_accumulated_batches_are_one_large_batch() -> None:
    plain = nn.Sequential(nn.Linear(12, 5))
    large, small = copy.deepcopy(plain), copy.deepcopy(plain)
    batches = data(4, rows=8)
    joined = [tuple(torch.cat(parts) for parts in zip(*batches[i : i + 2], strict=True)) for i in (0, 2)]
    of_large = lro.finetune_(large, joined, loss=cross_entropy, forward=first)
    of_small = lro.finetune_(small, batches, loss=cross_entropy, forward=first, accumulate=2)
    assert of_large.steps == of_small.steps == 2
    torch.testing.assert_close(large[0].weight, small[0].weight)


def test_learning_rate_rises_and_falls_by_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def recording(self: torch.optim.AdamW) -> None:
        rates.append(self.param_groups[0]["lr"])
        assert [group["weight_decay"] for group in self.param_groups] == [0.1, 0.0]
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    lro.finetune_(
        network(), data(10), loss=cross_entropy, forward=first, lr=0.01, warmup=0.3, epochs=2, weight_decay=0.1
    )
    assert len(rates) == 20 and rates[6] == pytest.approx(0.01)
    assert rates[:7] == sorted(rates[:7]) and rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[13] == pytest.approx(0.005) and 0 < rates[-1] < 0.0002


class Interrupted(Exception):
    pass


def interrupted_after(calls: int):  # type: ignore[no-untyped-def]
    def loss(output: Tensor, batch: Batch) -> Tensor:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Interrupted
        return F.cross_entropy(output, batch[1])

    return loss


@pytest.mark.parametrize("stop", [3, 12, 21])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    """With dropout, batch norm and a shuffling loader; 10 batches per epoch, 3 epochs, a checkpoint every 2 steps."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*data(10), strict=True))), 32, shuffle=True
    )
    start = network()
    whole, interrupted = copy.deepcopy(start), copy.deepcopy(start)
    arguments = {"forward": first, "epochs": 3, "checkpoint_every": 2, "lr": 1e-2}

    torch.manual_seed(5)
    expected = lro.finetune_(whole, loader, loss=interrupted_after(99), **arguments)
    torch.manual_seed(5)
    path = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        lro.finetune_(interrupted, loader, loss=interrupted_after(stop), checkpoint=path, **arguments)
    torch.manual_seed(77)
    fresh = copy.deepcopy(start)
    report = lro.finetune_(fresh, loader, loss=interrupted_after(99), checkpoint=path, **arguments)
    assert report.losses == expected.losses
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in fresh.state_dict().items())

    finished = copy.deepcopy(start)  # a finished run is loaded, not repeated
    again = lro.finetune_(finished, loader, loss=interrupted_after(0), checkpoint=path, **arguments)
    assert again.losses == expected.losses
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in finished.state_dict().items())


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    arguments = {"loss": cross_entropy, "forward": first, "checkpoint": path}
    lro.finetune_(network(), data(2), **arguments)
    with pytest.raises(ValueError, match=r"is of another run: its lr differ\. Use the same arguments to resume it"):
        lro.finetune_(network(), data(2), lr=0.1, **arguments)
    with pytest.raises(ValueError, match="another run: its loss, forward differ"):
        lro.finetune_(network(), data(2), loss=interrupted_after(9), forward=lambda m, b: m(b[0]), checkpoint=path)
    with pytest.raises(ValueError, match="another run: its soft_weight, teacher differ"):
        lro.finetune_(network(), data(2), teacher=network(), soft_weight=0.1, **arguments)
    with pytest.raises(ValueError, match="is of another student"):
        lro.finetune_(nn.Linear(12, 5), data(2), **arguments)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        lro.finetune_(network(), data(2), **arguments)
    lro.calibrate(network(), [torch.randn(4, 12)]).save(path)
    with pytest.raises(ValueError, match="its format is"):
        lro.finetune_(network(), data(2), **arguments)
    torch.save({"format": "lowrank_ops.finetune/1"}, path)  # as version 0.1 wrote; a pickle is not opened
    with pytest.raises(ValueError, match="cannot be read"):
        lro.finetune_(network(), data(2), **arguments)


def test_a_checkpoint_of_another_teacher_is_refused(tmp_path: Path) -> None:
    arguments = {"forward": first, "checkpoint": tmp_path / "run"}
    student, teacher = network(), network()
    lro.finetune_(copy.deepcopy(student), data(2), teacher=teacher, **arguments)
    teacher[-1].bias.data[0] += 1e-3
    with pytest.raises(ValueError, match="another run: its teacher differ"):
        lro.finetune_(student, data(2), teacher=teacher, **arguments)


def test_a_state_that_is_no_tensor_is_refused_at_the_start(tmp_path: Path) -> None:
    class WithState(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    student = nn.Sequential(WithState(12, 5))
    with pytest.raises(ValueError, match=r"student has a dict in its state dict at '0\._extra_state'"):
        lro.finetune_(student, data(2), loss=interrupted_after(0), forward=first, checkpoint=tmp_path / "run")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.pop("settings"),
        lambda header, tensors: header.pop("losses"),
        lambda header, tensors: header.update(losses=[0.1] * 99),
        lambda header, tensors: header.update(losses=[float("nan")] * 2),
        lambda header, tensors: header.update(losses=5),
        lambda header, tensors: header.update(taken=-1),
        lambda header, tensors: header.update(taken=True),
        lambda header, tensors: tensors.update({"optimizer.0.exp_avg": torch.zeros(3)}),
        lambda header, tensors: tensors.update({"optimizer.0.step": torch.zeros(())}),
        lambda header, tensors: tensors.pop("optimizer.0.step"),
        lambda header, tensors: tensors.update({"optimizer.x.step": torch.zeros(())}),
        lambda header, tensors: tensors.update({"optimizer.99.exp_avg": torch.zeros(3)}),
        lambda header, tensors: tensors["student.0.weight"].fill_(float("inf")),
        lambda header, tensors: tensors.update({"random.0": torch.zeros(3)}),
        lambda header, tensors: tensors.pop("epoch_random.0"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path: Path, change: Callable[[Any, Any], object]) -> None:
    path = tmp_path / "run.pt"
    arguments = {"loss": cross_entropy, "forward": first, "checkpoint": path}
    lro.finetune_(network(), data(2), **arguments)
    rewrite(path, change)
    student = network()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"run\.pt' is damaged: .*delete it to start again"):
        lro.finetune_(student, data(2), **arguments)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_mask_of_infinities_is_no_damage(tmp_path: Path) -> None:
    student = network()
    student.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    arguments = {"loss": cross_entropy, "forward": lambda model, batch: nn.Sequential.forward(model, batch[0])}
    first = lro.finetune_(copy.deepcopy(student), data(2), checkpoint=tmp_path / "run", **arguments)
    assert lro.finetune_(student, data(2), checkpoint=tmp_path / "run", **arguments).losses == first.losses


def test_mixed_precision_trains() -> None:
    _, student = students()
    seen: list[torch.dtype] = []
    student[0].register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    report = lro.finetune_(
        student, data(10), loss=lambda o, b: F.cross_entropy(o.float(), b[1]), forward=first, autocast=torch.bfloat16
    )
    assert set(seen) == {torch.bfloat16} and student[0].down.dtype == torch.float32
    assert report.losses[-1] < 2


def test_a_plain_training_loop_keeps_the_rank() -> None:
    _, student = students()
    before = score(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.1)
    student.train()
    for _ in range(3):
        for x, y in data(40):
            optimizer.zero_grad()
            F.cross_entropy(student(x), y).backward()
            optimizer.step()
    assert score(student) < before
    assert torch.linalg.matrix_rank(student[0].weight) == 5


def test_steps_replace_the_length_of_batches() -> None:
    class Endless:
        def __iter__(self) -> Iterator[Batch]:
            while True:
                yield from data(2)

    assert lro.finetune_(network(), Endless(), loss=cross_entropy, forward=first, steps=5).steps == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a loss"),
        ({"loss": cross_entropy, "batches": []}, "batches was empty"),
        ({"loss": cross_entropy, "batches": iter(data(2))}, "pass steps"),
        ({"loss": cross_entropy, "batches": iter(data(2)), "steps": 5}, "iterated only once"),
        ({"loss": cross_entropy, "epochs": 0}, "epochs must be positive; got 0"),
        ({"loss": cross_entropy, "epochs": 2, "steps": 3}, "epochs has no effect where steps is given"),
        ({"loss": cross_entropy, "temperature": 3.0}, "temperature has no effect without teacher"),
        ({"loss": cross_entropy, "soft_weight": 0.3}, "soft_weight has no effect without teacher"),
        ({"teacher": network(), "match_weight": 0.3}, "match_weight has no effect without match"),
        ({"loss": cross_entropy, "weight_decay": float("nan")}, "weight_decay must be a non-negative number; got nan"),
        ({"loss": cross_entropy, "lr": float("inf")}, "lr must be positive and finite; got inf"),
        ({"loss": cross_entropy, "lr": 0}, "lr must be positive; got 0"),
        ({"loss": cross_entropy, "warmup": 1}, r"warmup must be a fraction of the steps in \[0, 1\)"),
        ({"teacher": network(), "soft_weight": 2}, "soft_weight must be in"),
        ({"loss": cross_entropy, "autocast": torch.float16}, "autocast must be None or torch.bfloat16"),
        ({"loss": lambda output, batch: output.sum() * float("nan")}, "the loss is nan at step 0"),
        ({"teacher": network(), "forward": lambda model, batch: [str(model(batch[0]))]}, "teacher needs logits"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    arguments = {"batches": data(2), "forward": first, **arguments}
    with pytest.raises(ValueError, match=message):
        lro.finetune_(network(), **arguments)


def test_students_that_cannot_learn_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="teacher is the student itself"):
        lro.finetune_(model, data(2), teacher=model, forward=first)
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        lro.finetune_(model.requires_grad_(False), data(2), loss=cross_entropy, forward=first)


class Padded(nn.Module):
    """Token logits, with a block of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.block(x).tanh())


@pytest.mark.parametrize("arguments", [{}, {"match": ["block"], "soft_weight": 0.0}, {"match": ["block"]}])
def test_padding_does_not_count(arguments: dict[str, object]) -> None:
    dense = Padded()
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    x = torch.randn(2, 4, 6)
    found = []
    for padding in (0.0, 50.0):
        torch.manual_seed(1)
        student = Padded()
        batch = {"x": torch.where(mask.unsqueeze(-1) == 1, x, padding), "attention_mask": mask}
        lro.finetune_(student, [batch] * 4, teacher=dense, lr=1e-2, mask="attention_mask", **arguments)
        found.append(torch.cat([parameter.flatten() for parameter in student.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
