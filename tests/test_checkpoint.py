"""Checkpoints: round trips bit by bit, and every way in which one can be wrong leaving the model as it was."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops import checkpoint
from lowrank_ops.checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError, load_pretrained, save_pretrained
from lowrank_ops.report import CompressionReport


class Net(nn.Module):
    """A convolution, two Linears, a norm with buffers and a buffer that checkpoints do not hold."""

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
    """An embedding tied to the head, and one block that is used under two names."""

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


def images(count: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 4, 6, 6).to(dtype)


def compressed(
    model: nn.Module | None = None, ranks: dict[str, int] | None = None
) -> tuple[nn.Module, CompressionReport]:
    model = (model or Net()).eval()
    dtype = next(model.parameters()).dtype
    covariances = lro.calibrate(model, [images(dtype=dtype) for _ in range(4)])
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
    """A good checkpoint, to be spoilt."""
    return Path(shutil.copytree(original, tmp_path / "saved"))


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """All that loading may change: the modules, their tensors by identity, and the values."""
    modules = [(name, module, module.training) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = list(model.state_dict(keep_vars=True).items())
    return modules, tensors, {name: tensor.detach().clone() for name, tensor in tensors}


def assert_refused(model: nn.Module, path: Path, *parts: str) -> None:
    """Loading fails with all of ``parts`` in its one-line message, and ``model`` is what it was, bit for bit."""
    modules, tensors, values = state_of(model)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(model, path)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    modules_after, tensors_after, values_after = state_of(model)
    assert [name for name, _, _ in modules] == [name for name, _, _ in modules_after]
    assert all(a is b and flag == now for (_, a, flag), (_, b, now) in zip(modules, modules_after, strict=True))
    assert all(n == m and a is b for (n, a), (m, b) in zip(tensors, tensors_after, strict=True))
    assert all(torch.equal(values[name], values_after[name]) for name in values)


def edit(
    folder: Path,
    config: Callable[[dict[str, Any]], object] | None = None,
    tensors: Callable[[dict[str, Tensor]], object] | None = None,
) -> None:
    """Rewrite both files as one consistent save after changing the configuration or the tensors in place."""
    values = json.loads((folder / CONFIG_FILE).read_text())
    weights = load_file(folder / WEIGHTS_FILE)
    if config is not None:
        config(values)
    if tensors is not None:
        tensors(weights)
    text = json.dumps(values)
    (folder / CONFIG_FILE).write_text(text)
    save_file({name: t.clone() for name, t in weights.items()}, folder / WEIGHTS_FILE, {"lowrank_ops": text})


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_outputs_are_equal_bit_by_bit(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model, report = compressed(Net().to(dtype))
        save_pretrained(model, tmp_path, report)
        fresh = Net().eval()
        assert load_pretrained(fresh, tmp_path) is fresh
        x = images(dtype=dtype)
        assert fresh.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert fresh.state_dict()[name].dtype == tensor.dtype
            assert torch.equal(fresh.state_dict()[name], tensor), name
        assert torch.equal(fresh(x), model(x))
        assert [type(module) for module in fresh.modules()] == [type(module) for module in model.modules()]
        assert (fresh.fc1.rank, fresh.fc1.stored_rank, fresh.conv.rank) == (11, 16, 3)

    def test_a_bias_that_centring_added_comes_back(self, tmp_path: Path) -> None:
        model, _ = compressed(Net(bias=False))
        assert model.fc1.bias is not None
        save_pretrained(model, tmp_path)
        fresh = load_pretrained(Net(bias=False).eval(), tmp_path)
        x = images()
        assert torch.equal(fresh(x), model(x))

    def test_rank_zero_and_layers_that_stay_dense(self, tmp_path: Path) -> None:
        model, report = compressed(ranks={"fc1": 0})
        save_pretrained(model, tmp_path, report)
        fresh = load_pretrained(Net().eval(), tmp_path)
        x = images()
        assert torch.equal(fresh(x), model(x))
        assert isinstance(fresh.fc2, nn.Linear) and fresh.fc1.rank == 0

    def test_a_model_without_factorised_layers(self, tmp_path: Path) -> None:
        model = Net().eval()
        save_pretrained(model, tmp_path)
        x = images()
        assert torch.equal(load_pretrained(Net().eval(), tmp_path)(x), model(x))

    def test_a_single_layer_is_returned(self, tmp_path: Path) -> None:
        layer = lro.LowRankLinear.from_linear(nn.Linear(16, 12), 3)
        save_pretrained(layer, tmp_path)
        loaded = load_pretrained(nn.Linear(16, 12), tmp_path)
        x = torch.randn(5, 16)
        assert isinstance(loaded, lro.LowRankLinear) and torch.equal(loaded(x), layer(x))

    def test_flags_come_from_the_dense_model_and_gradients_flow(self, saved: Path) -> None:
        fresh = Net().train()
        fresh.fc1.requires_grad_(False).eval()
        load_pretrained(fresh, saved)
        assert fresh.training and fresh.fc2.training and not fresh.fc1.training
        assert not any(parameter.requires_grad for parameter in fresh.fc1.parameters())
        fresh(images()).sum().backward()
        assert fresh.fc2.down.grad is not None and fresh.norm.weight.grad is not None
        assert not fresh.norm.running_mean.requires_grad

    def test_a_model_on_the_meta_device_comes_to_the_cpu(self, saved: Path) -> None:
        model = Net().eval()
        load_pretrained(model, saved)
        with torch.device("meta"):
            fresh = Net().eval()
        fresh.scale = torch.tensor(0.5)
        x = images()
        assert torch.equal(load_pretrained(fresh, saved)(x), model(x))
        assert all(tensor.device.type == "cpu" for tensor in fresh.state_dict().values())

    def test_loaded_tensors_do_not_depend_on_the_file(self, saved: Path) -> None:
        model = load_pretrained(Net().eval(), saved)
        before = copy.deepcopy(model.state_dict())
        with (saved / WEIGHTS_FILE).open("r+b") as file:
            file.write(b"\xff" * (saved / WEIGHTS_FILE).stat().st_size)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_conv1d_of_transformers(self, tmp_path: Path) -> None:
        def build() -> nn.Module:
            return nn.Sequential(Conv1D(24, 16), nn.ReLU(), Conv1D(10, 24)).eval()

        model = build()
        covariances = lro.calibrate(model, [torch.randn(64, 16)])
        report = lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"0": 6, "2": 5})))
        save_pretrained(model, tmp_path, report)
        loaded = load_pretrained(build(), tmp_path)
        x = torch.randn(3, 16)
        assert isinstance(loaded[0], lro.LowRankLinear) and torch.equal(loaded(x), model(x))


class Conv1D(nn.Module):
    """A linear layer with a transposed weight, recognised by its name and module as transformers' own is."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class TestTies:
    @pytest.fixture
    def tied(self, tmp_path: Path) -> tuple[nn.Module, Path]:
        model = Tied().eval()
        covariances = lro.calibrate(model, [torch.randint(20, (8, 6)) for _ in range(3)])
        report = lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"first": 4})))
        save_pretrained(model, tmp_path, report)
        return model, tmp_path

    @pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
    def test_what_was_tied_is_tied_again(self, tied: tuple[nn.Module, Path], tie: bool) -> None:
        model, path = tied
        fresh = load_pretrained(Tied(tie).eval(), path)
        tokens = torch.randint(20, (2, 5))
        assert torch.equal(fresh(tokens), model(tokens))
        assert fresh.head.weight is fresh.embedding.weight
        assert fresh.first.down is fresh.second.down and isinstance(fresh.second, lro.LowRankLinear)
        assert (fresh.first is fresh.second) is tie

    def test_shared_tensors_are_stored_once(self, tied: tuple[nn.Module, Path]) -> None:
        _, path = tied
        with safe_open(path / WEIGHTS_FILE, framework="pt") as file:
            assert set(file.keys()) == {"embedding.weight", "first.down", "first.up", "first.bias"}

    def test_a_model_that_ties_more_than_the_checkpoint_is_refused(self, tmp_path: Path) -> None:
        save_pretrained(Tied(tie=False), tmp_path)
        assert_refused(Tied(tie=True), tmp_path, "one tensor at 'first.weight' and 'second.weight'", "untie")

    def test_factors_in_the_place_of_a_tied_weight_are_refused(self, tmp_path: Path) -> None:
        model = Tied(tie=False).eval()
        covariances = lro.calibrate(model, [torch.randint(20, (8, 6))])
        lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"head": 4})))
        save_pretrained(model, tmp_path)
        dense = Tied(tie=False)
        dense.head.weight = dense.embedding.weight
        assert_refused(dense, tmp_path, "ties the weight of layer 'head' to 'embedding'")

    def test_overlapping_tensors_are_stored_apart(self, tmp_path: Path) -> None:
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
        assert (config["format"], config["version"], config["tied"]) == ("lowrank_ops.checkpoint", 1, {})
        assert config["compression"]["projection"] == "utilized"
        assert config["compression"]["rank"] == {"policy": "ranks", "ranks": RANKS}
        assert lro.CompressionConfig.from_dict(config["compression"]).projection == "utilized"
        assert config["layers"]["fc1"] == {
            "kind": "linear",
            "in_features": 72,
            "out_features": 24,
            "rank": 11,
            "bias": True,
            "calibration_rows": 128,
        }
        assert config["layers"]["conv"] == {
            "kind": "conv2d",
            "in_channels": 4,
            "out_channels": 8,
            "kernel_size": [3, 3],
            "stride": [2, 2],
            "padding": [1, 1],
            "dilation": [1, 1],
            "groups": 2,
            "padding_mode": "zeros",
            "rank": 3,
            "bias": True,
            "calibration_rows": 128 * 9,
        }

    def test_both_files_have_the_usual_permissions(self, tmp_path: Path) -> None:
        save_pretrained(nn.Linear(2, 2), tmp_path)
        (tmp_path / "usual").touch()
        assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1

    def test_without_a_report_its_entries_are_null(self, tmp_path: Path) -> None:
        model, _ = compressed()
        save_pretrained(model, tmp_path)
        config = json.loads((tmp_path / CONFIG_FILE).read_text())
        assert config["compression"] is None
        assert {entry["calibration_rows"] for entry in config["layers"].values()} == {None}

    def test_saving_again_replaces_and_leaves_nothing_else(self, saved: Path) -> None:
        model, report = compressed(ranks={"fc2": 3})
        save_pretrained(model, saved, report)
        assert sorted(os.listdir(saved)) == sorted([WEIGHTS_FILE, CONFIG_FILE])
        x = images()
        assert torch.equal(load_pretrained(Net().eval(), saved)(x), model(x))

    @pytest.mark.parametrize("fails", ["save_file", "replace"])
    def test_a_failed_save_leaves_the_old_checkpoint(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch, fails: str
    ) -> None:
        before = {file.name: file.read_bytes() for file in saved.iterdir()}

        def full(*args: object, **options: object) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(checkpoint if fails == "save_file" else checkpoint.os, fails, full)
        with pytest.raises(OSError, match="No space left"):
            save_pretrained(Net(), saved)
        assert {file.name: file.read_bytes() for file in saved.iterdir()} == before

    def test_an_overwrite_that_died_between_the_files_is_noticed(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, report = compressed(ranks={"fc2": 3})
        replace = os.replace

        def die(source: Path, target: Path) -> None:
            if Path(target).name == CONFIG_FILE:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(checkpoint.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(model, saved, report)
        assert_refused(Net(), saved, CONFIG_FILE, "does not belong to", "another save")

    def test_a_report_of_another_model_is_refused(self, tmp_path: Path) -> None:
        _, report = compressed()
        other, _ = compressed(ranks={"fc1": 4})
        with pytest.raises(ValueError, match=r"report does not describe model: it gives layer 'conv' rank 3"):
            save_pretrained(other, tmp_path / "new", report)
        assert not (tmp_path / "new").exists()

    def test_state_without_values_is_refused_by_name(self, tmp_path: Path) -> None:
        class Counter(nn.Linear):
            def get_extra_state(self) -> int:
                return 3

            def set_extra_state(self, state: int) -> None:
                pass

        with pytest.raises(ValueError, match=r"model keeps a int in its state dict at '0\._extra_state'"):
            save_pretrained(nn.Sequential(Counter(2, 2)), tmp_path)
        with pytest.raises(ValueError, match=r"model holds no values at 'weight'.*meta device"):
            save_pretrained(nn.Linear(2, 2, device="meta"), tmp_path)
        with pytest.raises(ValueError, match=r"model holds no values at 'weight'.*lazy"):
            save_pretrained(nn.LazyLinear(2), tmp_path)


class TestRefusals:
    """Every bad checkpoint gives one clear error and leaves the model as it was."""

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        assert_refused(Net(), tmp_path / "nowhere", "nowhere", f"holds no {CONFIG_FILE}", "save_pretrained")

    def test_a_file_instead_of_the_folder(self, saved: Path) -> None:
        assert_refused(Net(), saved / WEIGHTS_FILE, f"holds no {CONFIG_FILE}", "pass the folder")

    def test_missing_weights(self, saved: Path) -> None:
        (saved / WEIGHTS_FILE).unlink()
        assert_refused(Net(), saved, f"{WEIGHTS_FILE}' is missing")

    @pytest.mark.parametrize("keep", [0, 5, 200, -1])
    def test_truncated_weights(self, saved: Path, keep: int) -> None:
        data = (saved / WEIGHTS_FILE).read_bytes()
        (saved / WEIGHTS_FILE).write_bytes(data[:keep])
        assert_refused(Net(), saved, f"{WEIGHTS_FILE}' is truncated or no safetensors file", "again")

    def test_truncated_configuration(self, saved: Path) -> None:
        text = (saved / CONFIG_FILE).read_text()
        (saved / CONFIG_FILE).write_text(text[: len(text) // 2])
        assert_refused(Net(), saved, f"{CONFIG_FILE}' cannot be read", "again")

    def test_a_configuration_that_is_no_text(self, saved: Path) -> None:
        (saved / CONFIG_FILE).write_bytes(b"\xff\xfe\x00\x80")
        assert_refused(Net(), saved, f"{CONFIG_FILE}' cannot be read", "again")

    @pytest.mark.parametrize("text", ["[]", "{}", '{"architectures": ["GPT2LMHeadModel"]}', "null"])
    def test_a_foreign_configuration(self, saved: Path, text: str) -> None:
        (saved / CONFIG_FILE).write_text(text)
        assert_refused(Net(), saved, f"{CONFIG_FILE}' was not written by save_pretrained")

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"lowrank_ops": "{"}], ids=["none", "pt", "broken"])
    def test_a_foreign_safetensors_file(self, saved: Path, metadata: dict[str, str] | None) -> None:
        save_file(Net().state_dict(), saved / WEIGHTS_FILE, metadata)
        assert_refused(Net(), saved, f"{WEIGHTS_FILE}' was not written by save_pretrained", "load_state_dict")

    @pytest.mark.parametrize("version", [0, 2, "1", None])
    def test_another_version(self, saved: Path, version: object) -> None:
        edit(saved, lambda config: config.update(version=version))
        assert_refused(Net(), saved, f"format version {version!r}", "reads version 1", "Update lowrank_ops")

    @pytest.mark.parametrize("change", [{"layers": None}, {"layers": {"fc1": 3}}, {"tied": []}, {"tied": {"a": 1}}])
    def test_a_damaged_configuration(self, saved: Path, change: dict[str, Any]) -> None:
        edit(saved, lambda config: config.update(change))
        assert_refused(Net(), saved, f"{CONFIG_FILE}' is damaged")

    def test_an_edited_configuration(self, saved: Path) -> None:
        text = (saved / CONFIG_FILE).read_text()
        (saved / CONFIG_FILE).write_text(text.replace('"rank": 11', '"rank": 12'))
        assert_refused(Net(), saved, f"{CONFIG_FILE} does not belong to", "edited")

    def test_another_architecture(self, saved: Path) -> None:
        assert_refused(nn.Sequential(nn.Linear(4, 4)), saved, "'conv'", "has no module of that name", "architecture")

    def test_another_kind_of_module(self, saved: Path) -> None:
        dense = Net()
        dense.fc1 = nn.Embedding(24, 72)
        assert_refused(dense, saved, "factorised linear layer 'fc1'", "has a Embedding there")

    def test_a_layer_that_cannot_be_replaced(self, saved: Path) -> None:
        dense = Net()
        nn.utils.parametrizations.weight_norm(dense.fc1)
        assert_refused(dense, saved, "'fc1'", "remove_parametrizations")

    def test_another_width(self, saved: Path) -> None:
        assert_refused(Net(width=32), saved, "layer 'fc1' has out_features 24 in the checkpoint and 32 in dense_model")

    def test_another_stride(self, saved: Path) -> None:
        dense = Net()
        dense.conv = nn.Conv2d(4, 8, 3, stride=1, padding=1, groups=2)
        assert_refused(dense, saved, "layer 'conv' has stride [2, 2] in the checkpoint and [1, 1] in dense_model")

    def test_another_bias(self, tmp_path: Path) -> None:
        layer = lro.LowRankLinear.from_linear(nn.Linear(8, 8, bias=False), 3)
        save_pretrained(layer, tmp_path)
        assert_refused(nn.Linear(8, 8), tmp_path, "has bias False in the checkpoint and True in dense_model")

    def test_a_compressed_model(self, saved: Path) -> None:
        model, _ = compressed(ranks={"fc2": 4})
        assert_refused(model, saved, "dense_model is compressed already: fc2 is a LowRankLinear", "anew")

    def test_hooks_that_would_be_dropped(self, saved: Path) -> None:
        dense = Net()
        dense.fc1.register_forward_hook(lambda *args: None)
        assert_refused(dense, saved, "layer 'fc1' of dense_model has hooks", "remove them first")

    def test_missing_tensors(self, saved: Path) -> None:
        edit(saved, tensors=lambda tensors: [tensors.pop("norm.running_var"), tensors.pop("fc1.up")])
        assert_refused(Net(), saved, "lacks 'norm.running_var', 'fc1.up' of dense_model")

    def test_many_missing_tensors_are_counted(self, tmp_path: Path) -> None:
        save_pretrained(nn.Sequential(), tmp_path)
        assert_refused(nn.Sequential(*(nn.Linear(2, 2) for _ in range(5))), tmp_path, "'2.weight' and 5 more")

    def test_extra_tensors(self, saved: Path) -> None:
        edit(saved, tensors=lambda tensors: tensors.update(extra=torch.zeros(2)))
        assert_refused(Net(), saved, "holds 'extra', for which dense_model has no place")

    def test_wrong_shape(self, saved: Path) -> None:
        edit(saved, tensors=lambda tensors: tensors.update({"norm.weight": torch.zeros(7)}))
        assert_refused(Net(), saved, "'norm.weight' has shape (7,)", "but (8,)")

    def test_rank_that_the_factors_do_not_have(self, saved: Path) -> None:
        edit(saved, lambda config: config["layers"]["fc1"].update(rank=5))
        assert_refused(Net(), saved, "'fc1.down' has shape (16, 72)", "but (8, 72)", f"ranks of {CONFIG_FILE}")

    @pytest.mark.parametrize("rank", [25, -1, "8", None, True])
    def test_rank_out_of_range(self, saved: Path, rank: object) -> None:
        edit(saved, lambda config: config["layers"]["fc1"].update(rank=rank))
        assert_refused(Net(), saved, "layer 'fc1'", "rank must be an integer in [0, 24]", f"got {rank!r}")

    def test_integers_in_the_place_of_floats(self, saved: Path) -> None:
        edit(saved, tensors=lambda tensors: tensors.update({"fc2.up": tensors["fc2.up"].to(torch.int32)}))
        assert_refused(Net(), saved, "'fc2.up' has dtype I32", "torch.float32 in dense_model")

    def test_floats_in_the_place_of_integers(self, saved: Path) -> None:
        edit(saved, tensors=lambda tensors: tensors.update({"norm.num_batches_tracked": torch.tensor(1.5)}))
        assert_refused(Net(), saved, "'norm.num_batches_tracked' has dtype F32", "torch.int64")

    def test_factors_of_several_dtypes(self, saved: Path) -> None:
        edit(saved, tensors=lambda tensors: tensors.update({"fc2.up": tensors["fc2.up"].half()}))
        assert_refused(Net(), saved, "layer 'fc2' has tensors of dtypes F16, F32", "must share one")

    def test_lazy_modules(self, saved: Path) -> None:
        dense = Net()
        dense.fc3 = nn.LazyLinear(3)
        with pytest.raises(CheckpointError, match=r"no tensor at 'fc3\.weight'.*running the model once"):
            load_pretrained(dense, saved)
        assert isinstance(dense.fc1, nn.Linear)

    def test_a_meta_buffer_that_checkpoints_do_not_hold(self, saved: Path) -> None:
        with torch.device("meta"):
            dense = Net()
        with pytest.raises(CheckpointError, match=r"buffer 'scale' of dense_model is on the meta device"):
            load_pretrained(dense, saved)
        assert isinstance(dense.fc1, nn.Linear) and dense.fc2.weight.is_meta
