"""Checkpoints: exact round trips, and a clear error that leaves the model unchanged for every bad checkpoint."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import lowrank_ops as lro
from lowrank_ops import checkpoint
from lowrank_ops.checkpoint import WEIGHTS_FILE, CheckpointError, load_pretrained, save_pretrained
from lowrank_ops.description import CONFIG_FILE
from lowrank_ops.files import digests
from lowrank_ops.layers import EightBitLinear
from lowrank_ops.report import CompressionReport
from tests.conv1d import Conv1D


class Net(nn.Module):
    """A Conv2d, two Linears, a norm with buffers, and a buffer that is not persistent."""

    def __init__(self, width: int = 24, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=bias)
        self.norm = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8 * 9, width, bias=bias)
        self.fc2 = nn.Linear(width, 10)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4, 6, 6) -> (batch, 10)
        return self.fc2(torch.relu(self.fc1(self.norm(self.conv(x)).flatten(1)))) * self.scale


class Tied(nn.Module):
    """An embedding tied to the head, and one Linear under two names."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.first = nn.Linear(16, 16)
        self.second = self.first if tie else nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(self.embedding(tokens))))))


RANKS = {"conv": 3, "fc1": 11, "fc2": 8}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield
    torch.set_num_threads(threads)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(32, 4, 6, 6).to(dtype)


def compressed(
    model: nn.Module | None = None, ranks: dict[str, int] | None = None
) -> tuple[nn.Module, CompressionReport]:
    model = (model or Net()).eval()
    dtype = next(model.parameters()).dtype
    covariances = lro.calibrate(model, [images(dtype) for _ in range(4)])
    config = lro.CompressionConfig(rank=lro.Ranks(ranks or RANKS), projection="utilized")
    return model, lro.compress_(model, covariances, config)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model, report = compressed()
    save_pretrained(model, folder, report)
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    """A good checkpoint that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "saved"))


def assert_same_output(first: nn.Module, second: nn.Module, x: Tensor | None = None) -> None:
    """Bit by bit."""
    x = images() if x is None else x
    assert torch.equal(first(x), second(x))


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Everything that loading may change: modules and tensors by identity, flags, and values."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = model.state_dict(keep_vars=True)
    values = {name: None if is_lazy(t) or t.is_meta else t.tolist() for name, t in tensors.items()}
    return modules, [(name, id(tensor)) for name, tensor in tensors.items()], values


def assert_refused(model: nn.Module, path: Path, *parts: str) -> None:
    """Loading fails with all of ``parts`` in a one-line message and leaves ``model`` unchanged."""
    before = state_of(model)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(model, path)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state_of(model) == before


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_every_dtype_is_restored_exactly(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model, report = compressed(Net().to(dtype))
        save_pretrained(model, tmp_path, report)
        fresh = Net().eval()
        assert load_pretrained(fresh, tmp_path) is fresh
        assert fresh.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert fresh.state_dict()[name].dtype == tensor.dtype
            assert torch.equal(fresh.state_dict()[name], tensor), name
        assert_same_output(fresh, model, images(dtype))
        assert [type(module) for module in fresh.modules()] == [type(module) for module in model.modules()]
        assert (fresh.fc1.rank, fresh.fc1.stored_rank, fresh.conv.rank) == (11, 16, 3)

    @pytest.mark.parametrize("bias", [True, False])
    def test_eight_bit_layers_have_the_dtype_of_the_file(self, tmp_path: Path, bias: bool) -> None:
        options = {"bias": bias, "dtype": torch.bfloat16}
        model = nn.Sequential(lro.LowRankLinear(16, 16, 8, **options).quantize_(), EightBitLinear(16, 16, **options))
        save_pretrained(model, tmp_path)
        loaded = load_pretrained(nn.Sequential(*(nn.Linear(16, 16, bias) for _ in range(2))), tmp_path)
        assert [layer.dtype for layer in loaded] == [torch.bfloat16, torch.bfloat16]
        x = torch.randn(3, 16, dtype=torch.bfloat16)
        assert torch.equal(loaded(x), model(x))

    @pytest.mark.parametrize(
        ("bias", "ranks"),
        [(False, RANKS), (True, {"fc1": 0})],
        ids=["bias added by centering", "rank 0, other layers dense"],
    )
    def test_other_layers_are_restored(self, tmp_path: Path, bias: bool, ranks: dict[str, int]) -> None:
        model, _ = compressed(Net(bias=bias), ranks)
        assert model.fc1.bias is not None
        save_pretrained(model, tmp_path)
        fresh = load_pretrained(Net(bias=bias).eval(), tmp_path)
        assert_same_output(fresh, model)
        assert fresh.fc1.rank == ranks["fc1"] and type(fresh.fc2) is type(model.fc2)

    def test_dense_models_are_restored(self, tmp_path: Path) -> None:
        model = Net().eval()
        save_pretrained(model, tmp_path)
        assert_same_output(load_pretrained(Net().eval(), tmp_path), model)

    def test_a_model_that_is_one_layer_is_returned(self, tmp_path: Path) -> None:
        layer = lro.LowRankLinear.from_linear(nn.Linear(16, 12), 3)
        save_pretrained(layer, tmp_path)
        loaded = load_pretrained(nn.Linear(16, 12), tmp_path)
        assert isinstance(loaded, lro.LowRankLinear)
        assert_same_output(loaded, layer, torch.randn(5, 16))

    def test_flags_follow_the_dense_model(self, saved: Path) -> None:
        fresh = Net().train()
        fresh.fc1.requires_grad_(False).eval()
        load_pretrained(fresh, saved)
        assert fresh.training and fresh.fc2.training and not fresh.fc1.training
        assert not any(parameter.requires_grad for parameter in fresh.fc1.parameters())
        fresh(images()).sum().backward()
        assert fresh.fc2.down.grad is not None and fresh.norm.weight.grad is not None
        assert not fresh.norm.running_mean.requires_grad

    def test_meta_models_are_loaded_to_the_cpu(self, saved: Path) -> None:
        with torch.device("meta"):
            fresh = Net().eval()
        fresh.scale = torch.tensor(0.5)
        assert_same_output(load_pretrained(fresh, saved), load_pretrained(Net().eval(), saved))
        assert all(tensor.device.type == "cpu" for tensor in fresh.state_dict().values())

    def test_loaded_tensors_do_not_depend_on_the_file(self, saved: Path) -> None:
        model = load_pretrained(Net().eval(), saved)
        before = copy.deepcopy(model.state_dict())
        with (saved / WEIGHTS_FILE).open("r+b") as file:
            file.write(b"\xff" * (saved / WEIGHTS_FILE).stat().st_size)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_conv1d_of_transformers_is_restored(self, tmp_path: Path) -> None:
        def build() -> nn.Module:
            return nn.Sequential(Conv1D(24, 16), nn.ReLU(), Conv1D(10, 24)).eval()

        model = build()
        covariances = lro.calibrate(model, [torch.randn(64, 16)])
        report = lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"0": 6, "2": 5})))
        save_pretrained(model, tmp_path, report)
        loaded = load_pretrained(build(), tmp_path)
        assert isinstance(loaded[0], lro.LowRankLinear)
        assert_same_output(loaded, model, torch.randn(3, 16))


class TestTies:
    @pytest.fixture
    def tied(self, tmp_path: Path) -> tuple[nn.Module, Path]:
        model = Tied().eval()
        covariances = lro.calibrate(model, [torch.randint(20, (8, 6)) for _ in range(3)])
        report = lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"first": 4})))
        save_pretrained(model, tmp_path, report)
        return model, tmp_path

    @pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
    def test_ties_are_restored(self, tied: tuple[nn.Module, Path], tie: bool) -> None:
        model, path = tied
        fresh = load_pretrained(Tied(tie).eval(), path)
        assert_same_output(fresh, model, torch.randint(20, (2, 5)))
        assert fresh.head.weight is fresh.embedding.weight
        assert fresh.first.down is fresh.second.down and isinstance(fresh.second, lro.LowRankLinear)
        assert (fresh.first is fresh.second) is tie

    def test_shared_tensors_are_stored_once(self, tied: tuple[nn.Module, Path]) -> None:
        with safe_open(tied[1] / WEIGHTS_FILE, framework="pt") as file:
            assert set(file.keys()) == {"embedding.weight", "first.down", "first.up", "first.bias"}

    def test_models_with_more_ties_are_refused(self, tmp_path: Path) -> None:
        save_pretrained(Tied(tie=False), tmp_path)
        assert_refused(Tied(tie=True), tmp_path, "'first.weight' and 'second.weight' are one tensor", "untie")

    def test_factors_in_place_of_a_tied_weight_are_refused(self, tmp_path: Path) -> None:
        model = Tied(tie=False).eval()
        covariances = lro.calibrate(model, [torch.randint(20, (8, 6))])
        lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"head": 4})))
        save_pretrained(model, tmp_path)
        dense = Tied(tie=False)
        dense.head.weight = dense.embedding.weight
        assert_refused(dense, tmp_path, "ties the weight of layer 'head' to 'embedding'")

    def test_overlapping_tensors_are_stored_separately(self, tmp_path: Path) -> None:
        def build() -> nn.Module:
            model = nn.Module()
            model.weight = nn.Parameter(torch.randn(4, 4))
            model.register_buffer("transposed", model.weight.detach().T)
            model.register_buffer("row", model.weight.detach()[1])
            model.register_buffer("same", model.weight.detach())
            return model

        model = build()
        save_pretrained(model, tmp_path)
        loaded = load_pretrained(build(), tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert isinstance(loaded.weight, nn.Parameter) and not isinstance(loaded.same, nn.Parameter)
        assert loaded.same.data_ptr() == loaded.weight.data_ptr() != loaded.transposed.data_ptr()


class TestSaving:
    def test_the_configuration_records_every_layer(self, saved: Path) -> None:
        config = json.loads((saved / CONFIG_FILE).read_text())
        assert (config["format"], config["version"], config["tied"]) == ("lowrank_ops.checkpoint", 2, {})
        assert lro.CompressionConfig.from_dict(config["compression"]).projection == "utilized"
        assert config["compression"]["rank"] == {"policy": "ranks", "ranks": RANKS, "channels": {}}
        assert config["layers"]["fc1"] == {
            "kind": "linear", "in_features": 72, "out_features": 24, "rank": 11, "bias": True, "calibration_rows": 128,
        }  # fmt: skip
        assert config["layers"]["conv"] == {
            "kind": "conv2d", "in_channels": 4, "out_channels": 8, "kernel_size": [3, 3], "stride": [2, 2],
            "padding": [1, 1], "dilation": [1, 1], "groups": 2, "padding_mode": "zeros", "rank": 3, "bias": True,
            "calibration_rows": 128 * 9,
        }  # fmt: skip

    def test_both_files_have_the_default_permissions(self, tmp_path: Path) -> None:
        save_pretrained(nn.Linear(2, 2), tmp_path)
        (tmp_path / "default").touch()
        assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1

    def test_without_a_report_its_entries_are_null(self, tmp_path: Path) -> None:
        model, _ = compressed()
        save_pretrained(model, tmp_path)
        config = json.loads((tmp_path / CONFIG_FILE).read_text())
        assert config["compression"] is None
        assert {entry["calibration_rows"] for entry in config["layers"].values()} == {None}

    def test_saving_again_replaces_both_files(self, saved: Path) -> None:
        model, report = compressed(ranks={"fc2": 3})
        save_pretrained(model, saved, report)
        assert sorted(os.listdir(saved)) == sorted([WEIGHTS_FILE, CONFIG_FILE])
        assert_same_output(load_pretrained(Net().eval(), saved), model)

    @pytest.mark.parametrize("fails", ["write_tensors", "fsync", "replace"])
    def test_a_failed_save_keeps_the_old_checkpoint(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch, fails: str
    ) -> None:
        before = {file.name: file.read_bytes() for file in saved.iterdir()}

        def full(*args: object, **options: object) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(checkpoint if fails == "write_tensors" else os, fails, full)
        with pytest.raises(OSError, match="No space left"):
            save_pretrained(Net(), saved)
        assert {file.name: file.read_bytes() for file in saved.iterdir()} == before

    @pytest.mark.parametrize("new", [False, True])
    def test_a_save_killed_between_the_renames_loads(self, saved: Path, tmp_path: Path, new: bool) -> None:
        model, report = compressed(ranks={"fc2": 3})
        folder = tmp_path / "new" if new else saved
        process = os.fork()
        if not process:
            replace = os.replace

            def killed(source: Path, target: Path) -> None:
                replace(source, target)
                os.kill(os.getpid(), signal.SIGKILL)

            os.replace = killed  # type: ignore[assignment]
            save_pretrained(model, folder, report)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        with pytest.warns(UserWarning, match="is missing, was edited, or is of another save"):
            assert_same_output(load_pretrained(Net().eval(), folder), model)
        save_pretrained(model, folder, report)
        assert sorted(os.listdir(folder)) == sorted([WEIGHTS_FILE, CONFIG_FILE])
        assert_same_output(load_pretrained(Net().eval(), folder), model)

    def test_a_report_of_another_model_is_refused(self, tmp_path: Path) -> None:
        _, report = compressed()
        other, _ = compressed(ranks={"fc1": 4})
        with pytest.raises(ValueError, match=r"report does not describe model: it has layer 'conv' at rank 3"):
            save_pretrained(other, tmp_path / "new", report)
        assert not (tmp_path / "new").exists()

    def test_state_that_cannot_be_stored_is_named(self, tmp_path: Path) -> None:
        class Counter(nn.Linear):
            def get_extra_state(self) -> int:
                return 3

            def set_extra_state(self, state: int) -> None:
                pass

        for model, message in (
            (nn.Sequential(Counter(2, 2)), r"model has a int in its state dict at '0\._extra_state'"),
            (nn.Linear(2, 2, device="meta"), r"model has no values at 'weight'.*meta device"),
            (nn.LazyLinear(2), r"model has no values at 'weight'.*lazy"),
        ):
            with pytest.raises(ValueError, match=message):
                save_pretrained(model, tmp_path)


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name: str, end: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end])


def foreign_weights(metadata: dict[str, str] | None) -> Callable[[Path], object]:
    return lambda folder: save_file(Net().state_dict(), folder / WEIGHTS_FILE, metadata)


def edited(folder: Path) -> None:
    text = (folder / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(text.replace('"rank": 11', '"rank": 12'))


COPIES: dict[str, Callable[[Path], object]] = {
    "missing": lambda folder: (folder / CONFIG_FILE).unlink(),
    "edited": edited,
    "cut": truncate(CONFIG_FILE, -50),
    "binary": overwrite(CONFIG_FILE, b"\xff\xfe\x00\x80"),
    "nested deeply": overwrite(CONFIG_FILE, b"[" * 100000 + b"]" * 100000),
    "of transformers": overwrite(CONFIG_FILE, b'{"architectures": ["A"]}'),
}


def edit(change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """Change the configuration and the tensors, and write both files as one consistent save."""

    def damage(folder: Path) -> None:
        config, tensors = json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)
        checksums = config["checksums"]
        change(config, tensors)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        if config.get("checksums") is checksums:
            config["checksums"] = digests(tensors)
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        save_file(tensors, folder / WEIGHTS_FILE, {"lowrank_ops": json.dumps(config)})

    return damage


def edit_config(**values: object) -> Callable[[Path], object]:
    return edit(lambda config, tensors: config.update(values))


def edit_rank(rank: object) -> Callable[[Path], object]:
    return edit(lambda config, tensors: config["layers"]["fc1"].update(rank=rank))


def edit_tensors(**changes: Callable[[Tensor], Tensor]) -> Callable[[Path], object]:
    """Double underscores in the names stand for dots."""
    names = {name.replace("__", "."): change for name, change in changes.items()}
    return edit(lambda config, tensors: tensors.update({name: change(tensors[name]) for name, change in names.items()}))


def drop_tensors(*names: str) -> Callable[[Path], object]:
    return edit(lambda config, tensors: [tensors.pop(name) for name in names])


def net_with(**modules: nn.Module) -> Net:
    model = Net()
    for name, module in modules.items():
        setattr(model, name, module)
    return model


def hooked() -> Net:
    model = Net()
    model.fc1.register_forward_hook(lambda *args: None)
    return model


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


DAMAGED = f"{WEIGHTS_FILE}' is damaged"
FOREIGN = f"{WEIGHTS_FILE}' is damaged or was not written by save_pretrained"
RANGE = "rank must be an integer in [0, 24]"
# fmt: off
DAMAGES: dict[str, tuple[Any, ...]] = {
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), f"has no {WEIGHTS_FILE}", "again"),
    "empty weights": (truncate(WEIGHTS_FILE, 0), FOREIGN, "again"),
    "half a header length": (truncate(WEIGHTS_FILE, 5), FOREIGN, "again"),
    "half a header": (truncate(WEIGHTS_FILE, 200), FOREIGN, "again"),
    "weights without the last byte": (truncate(WEIGHTS_FILE, -1), FOREIGN, "again"),
    "weights without metadata": (foreign_weights(None), FOREIGN, "load_state_dict"),
    "weights of torch": (foreign_weights({"format": "pt"}), FOREIGN, "load_state_dict"),
    "broken metadata": (foreign_weights({"lowrank_ops": "{"}), FOREIGN, "load_state_dict"),
    "newer version": (edit_config(version=6), "format version 6", "versions 1 to 5", "Update lowrank_ops"),
    "version as bool": (edit_config(version=True), "format version True", "versions 1 to 5"),
    "version as text": (edit_config(version="1"), "format version '1'", "versions 1 to 5"),
    "no version": (edit_config(version=None), "format version None", "versions 1 to 5"),
    "no layers": (edit_config(layers=None), DAMAGED, "'layers'"),
    "layer that is a number": (edit_config(layers={"fc1": 3}), DAMAGED, "'layers'"),
    "no checksums": (edit_config(checksums=None), DAMAGED, "'checksums'"),
    "no checksum of a tensor": (edit_config(checksums={}), DAMAGED, "differ from their checksum"),
    "header nested deeply": (foreign_weights({"lowrank_ops": "[" * 100000 + "]" * 100000}), FOREIGN, "nested too deep"),
    "header that is a number": (foreign_weights({"lowrank_ops": "3"}), FOREIGN, "header is a int"),
    "list of ties": (edit_config(tied=[]), DAMAGED, "'tied'"),
    "tie to a number": (edit_config(tied={"a": 1}), DAMAGED, "'tied'"),
    "missing tensors": (drop_tensors("norm.running_var", "fc1.up"), "lacks 'norm.running_var', 'fc1.up'"),
    "extra tensor": (edit(lambda _, tensors: tensors.update(extra=torch.zeros(2))), "has 'extra', which dense_model"),
    "wrong shape": (edit_tensors(norm__weight=lambda t: t[:7]), "'norm.weight' has shape (7,)", "but (8,)"),
    "rank of other factors": (edit_rank(5), "'fc1.down' has shape (16, 72)", "but (8, 72)", f"ranks of {CONFIG_FILE}"),
    "rank too large": (edit_rank(25), "layer 'fc1'", RANGE, "got 25"),
    "negative rank": (edit_rank(-1), "layer 'fc1'", RANGE, "got -1"),
    "rank as text": (edit_rank("8"), "layer 'fc1'", "rank must be an integer; got '8'"),
    "no rank": (edit_rank(None), "layer 'fc1'", "rank must be an integer; got None"),
    "rank as bool": (edit_rank(True), "layer 'fc1'", "rank must be an integer; got True"),
    "integers for floats": (edit_tensors(fc2__up=Tensor.int), "'fc2.up' has dtype I32", "torch.float32 in dense_model"),
    "floats for integers": (edit_tensors(norm__num_batches_tracked=Tensor.float), "has dtype F32", "torch.int64"),
    "factors of two dtypes": (edit_tensors(fc2__up=Tensor.half), "layer 'fc2' has tensors of dtypes F16, F32"),
}
MODELS: dict[str, tuple[Any, ...]] = {
    "architecture": (lambda: nn.Sequential(nn.Linear(4, 4)), "'conv'", "has no module of that name", "architecture"),
    "kind of module": (lambda: net_with(fc1=nn.Embedding(24, 72)), "low-rank linear layer 'fc1'", "type Embedding"),
    "parametrized layer": (
        lambda: net_with(fc1=nn.utils.parametrizations.weight_norm(nn.Linear(72, 24))), "'fc1'", "remove_parametriz"
    ),
    "width": (lambda: Net(width=32), "layer 'fc1' has out_features 24 in the checkpoint and 32 in dense_model"),
    "stride": (lambda: net_with(conv=nn.Conv2d(4, 8, 3, stride=1, padding=1, groups=2)),
               "layer 'conv' has stride [2, 2] in the checkpoint and [1, 1] in dense_model"),
    "compressed": (lambda: compressed(ranks={"fc2": 4})[0], "is already compressed: fc2 is a LowRankLinear"),
    "hooks": (hooked, "layer 'fc1' of dense_model has hooks", "remove them first"),
    "lazy module": (lambda: net_with(fc3=nn.LazyLinear(3)), "no tensor at 'fc3.weight'", "running the model once"),
    "meta buffer": (on_meta, "buffer 'scale' of dense_model is on the meta device"),
}
# fmt: on


class TestRefusals:
    """Every bad checkpoint gives one clear error and leaves the model unchanged."""

    @pytest.mark.parametrize("name", DAMAGES)
    def test_damaged_checkpoints_are_refused(self, saved: Path, name: str) -> None:
        damage, *parts = DAMAGES[name]
        damage(saved)
        assert_refused(Net(), saved, *parts)

    @pytest.mark.parametrize("name", MODELS)
    def test_other_models_are_refused(self, saved: Path, name: str) -> None:
        build, *parts = MODELS[name]
        assert_refused(build(), saved, *parts)

    @pytest.mark.parametrize("name", COPIES)
    def test_the_header_decides_what_is_loaded(self, saved: Path, name: str) -> None:
        expected = load_pretrained(Net().eval(), saved)
        COPIES[name](saved)
        with pytest.warns(UserWarning, match=rf"{CONFIG_FILE}' is missing, was edited, or is of another save"):
            assert_same_output(load_pretrained(Net().eval(), saved), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = Net()
            before = state_of(model)
            with pytest.raises(UserWarning):
                load_pretrained(model, saved)
        assert state_of(model) == before

    def test_every_flipped_bit_is_noticed(self, saved: Path) -> None:
        content = (saved / WEIGHTS_FILE).read_bytes()
        reference, loaded = load_pretrained(Net(), saved).state_dict(), 0
        for position in torch.randint(len(content), (150,)).tolist():
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            (saved / WEIGHTS_FILE).write_bytes(changed)
            model = Net()
            try:
                load_pretrained(model, saved)
            except CheckpointError:
                continue
            loaded += 1  # a flip in what is not read, such as the padding of the header
            assert all(torch.equal(tensor, reference[name]) for name, tensor in model.state_dict().items())
        assert loaded < 5

    def test_verification_can_be_left_out(self, saved: Path) -> None:
        content = bytearray((saved / WEIGHTS_FILE).read_bytes())
        content[-1] ^= 1
        (saved / WEIGHTS_FILE).write_bytes(content)
        assert_refused(Net(), saved, "differ from their checksum", "verify=False")
        load_pretrained(Net(), saved, verify=False)

    def test_paths_without_a_checkpoint_are_refused(self, saved: Path) -> None:
        for path in (saved / "nowhere", saved / WEIGHTS_FILE):
            assert_refused(Net(), path, path.name, f"has no {WEIGHTS_FILE}", "pass the folder that save_pretrained")

    def test_a_bias_that_the_checkpoint_lacks_is_refused(self, tmp_path: Path) -> None:
        layer = lro.LowRankLinear.from_linear(nn.Linear(8, 8, bias=False), 3)
        save_pretrained(layer, tmp_path)
        assert_refused(nn.Linear(8, 8), tmp_path, "has bias False in the checkpoint and True in dense_model")

    def test_many_missing_tensors_are_counted(self, tmp_path: Path) -> None:
        save_pretrained(nn.Sequential(), tmp_path)
        assert_refused(nn.Sequential(*(nn.Linear(2, 2) for _ in range(5))), tmp_path, "'2.weight', and 5 more")
