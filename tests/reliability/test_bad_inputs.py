"""Bad inputs of every public function: one clear error of the documented type, and the model as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.config import LayerLatencies
from lowrank_ops.files import digest
from lowrank_ops.layers import replace_
from lowrank_ops.ops import BackendUnavailableError, conv_covariance_update_, covariance_update_, lowrank_linear
from lowrank_ops.report.measured_errors import measure_errors
from tests.reliability.campaign import LONG, figures

NAN = float("nan")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def inputs() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(32, 16) for _ in range(2)]


MODEL = network()
COVARIANCES = lro.calibrate(MODEL, inputs())
WITH_LOSS = lro.calibrate(MODEL, inputs(), sensitivity="output")


def compress(config: Any = None, covariances: Any = COVARIANCES, **arguments: Any) -> Any:
    return lro.compress_(MODEL, covariances, config, **arguments)


def config(**arguments: Any) -> Any:
    return lro.CompressionConfig(**arguments)


def holed(change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    model = network()
    with torch.no_grad():
        change(model)
    return model


def forged(**changes: Any) -> lro.Covariances:
    """Covariances whose first layer has other sums."""
    covariances = lro.calibrate(network(), inputs())
    for name, value in changes.items():
        setattr(covariances["0"].activations, name, value)
    return covariances


def finetune(**arguments: Any) -> Any:
    return lro.finetune_(MODEL, inputs(), **{"loss": lambda y, x: y.square().mean(), **arguments})


def search(evaluate: Any = lambda model: 0.0, max_drop: Any = 0.1, **arguments: Any) -> Any:
    return lro.search_ranks(MODEL, COVARIANCES, evaluate, max_drop, **arguments)


def reconstruct(batches: Any = None, **settings: Any) -> Any:
    batches = inputs() if batches is None else batches
    return compress(lro.Ranks({"0": 4}), reconstruction=lro.SequentialReconstruction(batches, **settings))


X, DOWN, UP = torch.ones(3, 16), torch.ones(4, 16), torch.ones(8, 4)
SUMS = torch.zeros(16, 16), torch.zeros(16)
ROWS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    # ops
    ("`lowrank_linear`, x a list", lambda: lowrank_linear([1.0], DOWN, UP), TypeError, "x must be a tensor"),
    ("x of 15 features, factors of 16", lambda: lowrank_linear(X[:, 1:], DOWN, UP), ValueError, "down must have shape"),
    ("factors of ranks 4 and 3", lambda: lowrank_linear(X, DOWN, UP[:, 1:]), ValueError, "up must have shape"),
    ("bias of 7 for 8 outputs", lambda: lowrank_linear(X, DOWN, UP, torch.ones(7)), ValueError, "bias must have shape"),
    ("x float32, down float64", lambda: lowrank_linear(X, DOWN.double(), UP), ValueError, "dtype and device of x"),
    ("integers", lambda: lowrank_linear(X.long(), DOWN.long(), UP.long()), ValueError, "floating-point"),
    ("activation 'tanh'", lambda: lowrank_linear(X, DOWN, UP, activation="tanh"), ValueError, "activation must be one"),
    ("backend 'cudnn'", lambda: lowrank_linear(X, DOWN, UP, backend="cudnn"), ValueError, "backend must be one of"),
    (
        "backend 'triton' on a CPU",
        lambda: lowrank_linear(X, DOWN, UP, backend="triton"),
        BackendUnavailableError,
        "auto",
    ),
    ("second moment not square", lambda: covariance_update_(SUMS[0][1:], SUMS[1], X), ValueError, "second_moment must"),
    ("float64 rows, float32 sums", lambda: covariance_update_(*SUMS, X.double()), ValueError, "x is float64"),
    ("float16 sums", lambda: covariance_update_(*(s.half() for s in SUMS), X.half()), ValueError, "share one dtype"),
    ("sums that are rows, too", lambda: covariance_update_(*SUMS, SUMS[0]), ValueError, "second_moment and x share"),
    (
        "expanded sums",
        lambda: covariance_update_(SUMS[1].expand(16, 16), SUMS[1].clone(), X),
        ValueError,
        "share memory",
    ),
    (
        "kernel larger than the image",
        lambda: conv_covariance_update_(
            torch.zeros(1, 9, 9), torch.zeros(1, 9), torch.ones(1, 1, 2, 2), kernel_size=(3, 3)
        ),
        ValueError,
        "larger than the padded",
    ),
    # calibrate
    ("`calibrate`, no batches", lambda: lro.calibrate(MODEL, []), ValueError, "batches was empty"),
    ("one tensor for batches", lambda: lro.calibrate(MODEL, inputs()[0]), TypeError, "batches must be"),
    ("a batch with NaN", lambda: lro.calibrate(MODEL, [X * NAN]), lro.NonFiniteActivationError, "layer '0'.*batch 0"),
    ("inf in the second batch", lambda: lro.calibrate(MODEL, [X, X / 0]), lro.NonFiniteActivationError, "batch 1"),
    ("a model without layers", lambda: lro.calibrate(nn.ReLU(), inputs()), ValueError, "no supported Linear"),
    ("`side='both'`", lambda: lro.calibrate(MODEL, inputs(), side="both"), ValueError, "side must be"),
    ("float16 sums", lambda: lro.calibrate(MODEL, inputs(), dtype=torch.float16), ValueError, "dtype must be"),
    (
        "an unknown sensitivity",
        lambda: lro.calibrate(MODEL, inputs(), sensitivity="hessian"),
        ValueError,
        "sensitivity",
    ),
    ("no probes", lambda: lro.calibrate(MODEL, inputs(), sensitivity="output", num_probes=0), ValueError, "num_probes"),
    ("a compiled model", lambda: lro.calibrate(torch.compile(MODEL), inputs()), ValueError, "compiled"),
    (
        "a mask that the model does not take",
        lambda: lro.calibrate(MODEL, inputs(), mask="attention_mask"),
        ValueError,
        "mask",
    ),
    (
        "a bool returned by a loss function",
        lambda: lro.calibrate(MODEL, inputs(), sensitivity=lambda output, batch: True),
        (ValueError, TypeError),
        "scalar|tensor|loss",
    ),
    # compress_
    ("`compress_`, covariances a dict", lambda: compress(covariances={}), TypeError, "covariances must come from"),
    ("a path for a configuration", lambda: compress("config.json"), TypeError, "config must be"),
    ("covariances of no layer", lambda: compress(covariances=lro.Covariances()), ValueError, "hold none of the layers"),
    (
        "covariances of another model",
        lambda: lro.compress_(nn.Sequential(nn.Linear(4, 4)), COVARIANCES, 2),
        ValueError,
        "do not have|does not have",
    ),
    (
        "NaN in a weight",
        lambda: lro.compress_(holed(lambda m: m[0].weight[0].fill_(NAN)), COVARIANCES, 4),
        ValueError,
        "weight",
    ),
    (
        "inf in a weight",
        lambda: lro.compress_(holed(lambda m: m[2].weight[0].fill_(-torch.inf)), COVARIANCES, 4),
        ValueError,
        "weight",
    ),
    ("NaN in the sums", lambda: compress(4, forged(total=torch.full((16,), NAN).double())), ValueError, "'0'.*NaN"),
    ("sums of other features", lambda: compress(4, forged(total=torch.zeros(3).double())), ValueError, "'0'"),
    ("a negative count", lambda: compress(4, forged(count=-5)), ValueError, "'0'.*count -5"),
    ("rank 17 for 16 features", lambda: compress(lro.Ranks({"0": 17})), ValueError, r"integer in \[0, 16\]"),
    ("a rank for no layer", lambda: compress(lro.Ranks({"fc": 4})), ValueError, "'fc' matches none"),
    ("a broken pattern", lambda: compress(lro.Ranks({"re:(": 4})), ValueError, "regular expression"),
    ("a budget below the smallest ranks", lambda: compress(lro.ParameterBudget(1e-6)), ValueError, "smallest|at least"),
    (
        "allocation by loss, no gradients",
        lambda: compress(lro.ParameterBudget(0.9, "loss")),
        ValueError,
        "output gradients",
    ),
    ("bounds that leave no rank", lambda: compress(config(bounds={"0": (1, 3)})), ValueError, "bounds leave no rank"),
    (
        "reconstruction without batches",
        lambda: compress(config(reconstruction="sequential")),
        ValueError,
        "reconstruction=",
    ),
    (
        "a model that is the layer",
        lambda: lro.compress_(m := nn.Linear(4, 4), lro.calibrate(m, [torch.ones(2, 4)])),
        ValueError,
        "itself the layer",
    ),
    # configurations
    ("`ParameterBudget(0)`", lambda: lro.ParameterBudget(0), ValueError, r"fraction must be a number in \(0, 1\]"),
    ("`ParameterBudget('half')`", lambda: lro.ParameterBudget("half"), (ValueError, TypeError), "fraction"),
    ("`ExplainedVariance(nan)`", lambda: lro.ExplainedVariance(NAN), ValueError, "threshold"),
    ("`allocation='energy'`", lambda: lro.ParameterBudget(0.5, "energy"), ValueError, "allocation must be one of"),
    ("a rank that is True", lambda: config(rank=True), TypeError, "rank must be an int or one of"),
    ("a negative rank", lambda: config(rank=-1), ValueError, "rank must be a positive"),
    ("an unknown projection", lambda: config(projection="svd"), ValueError, "projection must be one of"),
    ("reversed bounds", lambda: config(bounds={"a": (5, 2)}), ValueError, "min <= max"),
    ("JSON that is none", lambda: lro.CompressionConfig.from_json("{"), ValueError, "no JSON"),
    ("JSON of version 99", lambda: lro.CompressionConfig.from_json('{"version": 99}'), ValueError, "version must be"),
    ("100,000 nested brackets", lambda: lro.CompressionConfig.from_json("[" * 100000), ValueError, "nested too deeply"),
    (
        "latencies with NaN",
        lambda: LayerLatencies.from_dict({"curves": {"a": {"dense": NAN, "ranks": [8], "seconds": [1]}}, "layers": {}}),
        ValueError,
        "has times",
    ),
    # layers
    ("`LowRankLinear(rank=17)`", lambda: lro.LowRankLinear(16, 24, rank=17), ValueError, r"rank must be an integer in"),
    ("rank 2.5", lambda: lro.LowRankLinear(16, 24, rank=2.5), (ValueError, TypeError), "rank"),
    (
        "an Embedding for a Linear",
        lambda: lro.LowRankLinear.from_linear(nn.Embedding(4, 4), 2),
        TypeError,
        "linear must be",
    ),
    (
        "covariances for statistics",
        lambda: lro.LowRankLinear.from_linear(MODEL[0], 2, COVARIANCES),
        TypeError,
        "statistics must be",
    ),
    (
        "a write to `.weight`",
        lambda: setattr(lro.LowRankLinear(8, 8, rank=2), "weight", torch.ones(8, 8)),
        (RuntimeError, TypeError, AttributeError, ValueError),
        "weight",
    ),
    ("factors for no layer", lambda: replace_(MODEL, {"no": None}), ValueError, "cannot be replaced"),
    # searches, fine-tuning, reconstruction, errors
    ("an evaluation that is NaN", lambda: search(lambda model: NAN), ValueError, "finite number"),
    ("an evaluation that is text", lambda: search(lambda model: "good"), ValueError, "finite number"),
    ("a negative tolerance", lambda: search(max_drop=-1), ValueError, "max_drop"),
    ("one evaluation", lambda: search(num_evaluations=1), ValueError, "num_evaluations"),
    ("neither loss nor teacher", lambda: finetune(loss=None), ValueError, "needs a loss"),
    ("a student that teaches itself", lambda: finetune(teacher=MODEL), ValueError, "student itself"),
    ("a loss that is NaN", lambda: finetune(loss=lambda y, x: y.sum() * NAN), ValueError, "loss is nan at step 0"),
    (
        "a gradient that is NaN",
        lambda: finetune(loss=lambda y, x: (y * 0).sum().abs().sqrt()),
        ValueError,
        "gradient is not finite",
    ),
    ("half a learning rate of -1", lambda: finetune(lr=-1), ValueError, "lr must be positive"),
    (
        "a frozen student",
        lambda: lro.finetune_(network().requires_grad_(False), inputs(), loss=lambda y, x: y.sum()),
        ValueError,
        "requires gradients",
    ),
    (
        "a float16 student",
        lambda: lro.finetune_(network().half(), inputs(), loss=lambda y, x: y.sum()),
        ValueError,
        "float16",
    ),
    ("reconstruction, no batches", lambda: reconstruct([]), ValueError, "batches was empty"),
    ("a ridge of NaN", lambda: reconstruct(ridge=NAN), ValueError, "ridge must be"),
    ("a block of no name", lambda: reconstruct(blocks="layers"), ValueError, "blocks must name"),
    (
        "errors of a model that is not compressed",
        lambda: measure_errors(MODEL, network(), inputs()),
        ValueError,
        "compressed|replaced",
    ),
]


def damaged(write: Callable[[Path], object], change: Callable[[bytes], bytes], load: Callable[[Path], object]) -> Any:
    def run(folder: Path) -> None:
        path = folder / "model.safetensors"
        write(path)
        path.write_bytes(change(path.read_bytes()))
        load(path)

    return run


def _flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


CHECKPOINT = (
    lambda path: lro.save_pretrained(network(), path.parent),
    lambda path: lro.load_pretrained(network(), path.parent),
)
SAVED = (COVARIANCES.save, lro.Covariances.load)
TUNED = (lambda path: lro.finetune_(network(), inputs(), loss=lambda y, x: y.sum(), checkpoint=path),) * 2
FILES: list[tuple[str, Callable[[Path], Any], type[Exception], str]] = [
    ("checkpoint, one bit flipped", damaged(CHECKPOINT[0], _flipped, CHECKPOINT[1]), lro.CheckpointError, "checksum"),
    ("checkpoint, cut", damaged(CHECKPOINT[0], lambda c: c[:500], CHECKPOINT[1]), lro.CheckpointError, "is damaged"),
    ("checkpoint, empty", damaged(CHECKPOINT[0], lambda c: b"", CHECKPOINT[1]), lro.CheckpointError, "is damaged"),
    (
        "a header of 2^60 bytes",
        damaged(CHECKPOINT[0], lambda c: (2**60).to_bytes(8, "little") + c[8:], CHECKPOINT[1]),
        lro.CheckpointError,
        "is damaged",
    ),
    (
        "a checkpoint for another architecture",
        lambda folder: (lro.save_pretrained(network(), folder), lro.load_pretrained(nn.Linear(2, 2), folder)),
        lro.CheckpointError,
        "Pass the architecture",
    ),
    (
        "no checkpoint",
        lambda folder: lro.load_pretrained(network(), folder),
        lro.CheckpointError,
        "has no model.safeten",
    ),
    ("covariances, one bit flipped", damaged(SAVED[0], _flipped, SAVED[1]), ValueError, "checksum"),
    ("covariances, cut", damaged(SAVED[0], lambda c: c[:-1], SAVED[1]), ValueError, "not a whole file"),
    (
        "covariances that are a checkpoint",
        lambda folder: (CHECKPOINT[0](folder / "a"), SAVED[1](folder / "model.safetensors")),
        ValueError,
        "its format is",
    ),
    ("a fine-tuning checkpoint, flipped", damaged(TUNED[0], _flipped, TUNED[1]), ValueError, "cannot be read"),
    (
        "a pickle for a fine-tuning checkpoint",
        damaged(lambda p: torch.save({}, p), bytes, TUNED[1]),
        ValueError,
        "cannot be read",
    ),
    (
        "a trial cache of JSON",
        damaged(lambda p: p.write_text(json.dumps([])), lambda c: c + b"\n", lambda p: search(cache=p)),
        ValueError,
        "not a trial cache",
    ),
    (
        "saving into a file",
        lambda folder: ((folder / "a").touch(), lro.save_pretrained(network(), folder / "a")),
        OSError,
        "a",
    ),
]


def shown(error: Exception, folder: Path | None = None) -> str:
    text = str(error).split("\n")[0].replace(str(folder), "DIR")
    return text if len(text) <= 200 else text[:197] + "..."


def refused(call: Callable[[], Any], kind: type[Exception], fragment: str) -> Exception:
    before = digest(MODEL.state_dict()), [type(module) for module in MODEL.modules()], MODEL.training
    with pytest.raises(kind, match=fragment) as raised:
        call()
    assert (digest(MODEL.state_dict()), [type(module) for module in MODEL.modules()], MODEL.training) == before
    return raised.value


@pytest.mark.filterwarnings("ignore")
def test_every_bad_input_is_one_clear_error(tmp_path: Path) -> None:
    table = [["input", "error", "message"]]
    for what, call, kind, fragment in ROWS:
        error = refused(call, kind, fragment)
        table.append([what, type(error).__name__, shown(error)])
    for i, (what, run, kind, fragment) in enumerate(FILES):
        folder = tmp_path / str(i)
        folder.mkdir()
        error = refused(lambda run=run, folder=folder: run(folder), kind, fragment)
        table.append([what, type(error).__name__, shown(error, folder)])
    assert len(table) > 60 and len({row[0] for row in table[1:]}) >= len(table) - 2
    if LONG:
        with figures("bad inputs") as counts:
            counts["rows"] = table
