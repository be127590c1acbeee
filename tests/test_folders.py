"""Folders of safetensors that are compressed without loading the model."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops import folders
from lowrank_ops.folders import compress_folder

transformers = pytest.importorskip("transformers")

LOSS = lro.CompressionConfig(lro.ParameterBudget(0.7))
OUTPUT = lro.CompressionConfig(lro.ParameterBudget(0.6, "variance"), overrides={"model.layers.1.mlp.up_proj": None})
BYTES = lro.CompressionConfig(lro.ByteBudget(0.5, "fp8", "variance"))
PIVOTED = lro.CompressionConfig(lro.ByteBudget(0.45, allocation="variance"), pivoted=True)
UTILIZED = lro.CompressionConfig(lro.ExplainedVariance(0.9), projection="utilized", centered=False, pivoted=True)


def llama(tied: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, attention_bias=True)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def tokens() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(120, (4, 24), generator=torch.Generator().manual_seed(i))} for i in range(3)]


def contents(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bits = (tensor.contiguous().view(torch.uint8) for tensor in (found[name], value))
        assert found[name].dtype == value.dtype and torch.equal(*bits), name


@pytest.mark.parametrize(
    ("config", "tied", "shards"),
    [(LOSS, True, 5), (OUTPUT, False, 5), (UTILIZED, False, 1), (BYTES, False, 5), (PIVOTED, True, 5)],
)
def test_transformers_folder_equals_the_loaded_model(
    tmp_path: Path, config: lro.CompressionConfig, tied: bool, shards: int
) -> None:
    model = llama(tied)
    size = "10KB" if shards > 1 else "1GB"
    model.save_pretrained(tmp_path / "dense", max_shard_size=size)
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) >= shards
    covariances = lro.calibrate(model, tokens(), sensitivity="fisher" if config is LOSS else None)
    report = compress_folder(tmp_path / "dense", tmp_path / "streamed", covariances, config)
    expected = lro.compress_(model, covariances, config)
    model.save_pretrained(tmp_path / "whole", max_shard_size=size)
    assert report == expected
    assert_equal(contents(tmp_path / "streamed"), contents(tmp_path / "whole"))
    files = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "whole")]
    assert files[0] == files[1]
    assert (tmp_path / "streamed" / "tokenizer.json").exists()
    names = sorted(path.name for path in (tmp_path / "dense").glob("model*"))
    assert sorted(path.name for path in (tmp_path / "streamed").glob("model*")) == names
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("streamed", "whole")]
    found, wanted = (loaded(**tokens()[0]).logits for loaded in models)
    assert torch.equal(found, wanted)


def small(head: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(50, 24), nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 24, bias=False),
        nn.Linear(24, 50, bias=False) if head else nn.Identity(),
    )  # fmt: skip


@pytest.mark.parametrize("writer", ["lowrank_ops", "safetensors", "shards"])
def test_state_dict_folder_equals_the_loaded_model(tmp_path: Path, writer: str) -> None:
    model = small()
    model[4].weight = model[0].weight
    model[2].float()
    model[1].half(), model[3].half()
    if writer == "lowrank_ops":
        lro.save_pretrained(model, tmp_path / "dense")
    else:
        (tmp_path / "dense").mkdir()
        if writer == "safetensors":
            safetensors.torch.save_model(model, str(tmp_path / "dense" / "weights.safetensors"))
        else:
            model[4] = nn.Identity()
            for part in ("0", "1", "2", "3"):
                tensors = {name: value for name, value in model.state_dict().items() if name.startswith(part)}
                safetensors.torch.save_file(tensors, tmp_path / "dense" / f"part-{part}.safetensors")

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        for layer in model[:4]:
            x = layer(x.to(next(layer.parameters()).dtype) if not isinstance(layer, nn.Embedding) else x)
        return model[4](x.float())

    covariances = lro.calibrate(model, [torch.randint(50, (200,))], forward=forward)
    covariances.save(tmp_path / "covariances.safetensors")
    packed = lro.Covariances.load(tmp_path / "covariances.safetensors", packed=True)
    assert packed["1"].activations.is_packed
    config = lro.CompressionConfig(lro.ParameterBudget(0.6, "variance"))
    report = compress_folder(tmp_path / "dense", tmp_path / "streamed", packed, config)
    expected = lro.compress_(model, covariances, config)
    assert report.layers == expected.layers
    lro.save_pretrained(model, tmp_path / "whole", expected)
    headers = []
    for name in ("streamed", "whole"):
        headers.append(json.loads((tmp_path / name / "lowrank_config.json").read_text()))
    assert headers[0] == headers[1]
    assert_equal(contents(tmp_path / "streamed"), contents(tmp_path / "whole"))
    fresh = small(head=writer != "shards")
    if writer != "shards":
        fresh[4].weight = fresh[0].weight
    loaded = lro.load_pretrained(fresh, tmp_path / "streamed")
    assert isinstance(loaded[1], lro.LowRankLinear)
    assert_equal(loaded.state_dict(), model.state_dict())


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    covariances = lro.calibrate(model, [torch.randn(100, 32)], sensitivity="output")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    alive: set[int] = set()
    most = reads = 0
    read = folders._Weights.read

    def counted(self: Any, name: str) -> Tensor:
        nonlocal most, reads
        tensor = read(self, name).clone()
        if tensor.dim() == 2:
            reads += 1
            alive.add(id(tensor))
            weakref.finalize(tensor, alive.discard, id(tensor))
            most = max(most, len(alive))
        return tensor

    spaces: list[int] = []
    yielded = folders.factorize_layers

    def watched(subspaces: Any, *args: Any, **kwargs: Any) -> Any:
        for item in yielded(subspaces, *args, **kwargs):
            spaces.append(sum(space.held_bytes() for space in subspaces.values()))
            yield item

    monkeypatch.setattr(folders._Weights, "read", counted)
    monkeypatch.setattr(folders, "factorize_layers", watched)
    report = compress_folder(tmp_path, tmp_path / "out", covariances, lro.ParameterBudget(0.7))
    dense = sum(layer.rank is None for layer in report.layers)
    assert 0 < dense < 6
    assert reads == 12 + dense and most == 1  # for the spectra, for the file, and for the report on dense layers
    assert spaces == [0] * (6 - dense)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    model = small(head=False)
    covariances = lro.calibrate(model, [torch.randint(50, (200,))])
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layer '3': its weight holds NaN or inf"):
        compress_folder(tmp_path, tmp_path / "out", covariances, 4)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    model = small(head=False)
    covariances = lro.calibrate(model, [torch.randint(50, (200,))])
    dense = tmp_path / "dense"
    dense.mkdir()
    with pytest.raises(FileNotFoundError, match="no safetensors files"):
        compress_folder(dense, tmp_path / "out", covariances)
    safetensors.torch.save_file(model.state_dict(), dense / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        compress_folder(dense / "a.safetensors", tmp_path / "out", covariances)
    with pytest.raises(ValueError, match="target is source"):
        compress_folder(dense, dense, covariances, 4)
    other = lro.calibrate(nn.Sequential(nn.Linear(3, 4)), [torch.randn(9, 3)])
    with pytest.raises(ValueError, match="covariances"):
        compress_folder(dense, tmp_path / "out", other)
    renamed = lro.Covariances({"3": covariances["3"], "9": covariances["1"]})
    with pytest.raises(ValueError, match="layers that model does not have: 9"):
        compress_folder(dense, tmp_path / "out", renamed)
    with pytest.raises(ValueError, match="reconstruction"):
        compress_folder(dense, tmp_path / "out", covariances, lro.CompressionConfig(reconstruction="sequential"))
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "other.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds other\.safetensors, of another model"):
        compress_folder(dense, tmp_path / "out", covariances, 4)
    safetensors.torch.save_file({"3.weight": torch.ones(2)}, dense / "b.safetensors")
    with pytest.raises(ValueError, match=r"holds '3\.weight' in two files"):
        compress_folder(dense, tmp_path / "out", covariances)
    (dense / "b.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"b\.safetensors.* is damaged"):
        compress_folder(dense, tmp_path / "out", covariances, 4)
    (dense / "b.safetensors").unlink()
    compress_folder(dense, tmp_path / "smaller", covariances, 4)
    with pytest.raises(ValueError, match="already compressed"):
        compress_folder(tmp_path / "smaller", tmp_path / "again", covariances)


@pytest.mark.parametrize("at", [-1, -600])
def test_a_flipped_bit_is_noticed_where_there_are_checksums(tmp_path: Path, at: int) -> None:
    model = small(head=False)
    covariances = lro.calibrate(model, [torch.randint(50, (200,))])
    lro.save_pretrained(model, tmp_path / "dense")
    content = bytearray((tmp_path / "dense" / "model.safetensors").read_bytes())
    content[at] ^= 1
    (tmp_path / "dense" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"the values of '\d\.\w+' differ from their checksum"):
        compress_folder(tmp_path / "dense", tmp_path / "out", covariances, 4)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("name", ["", ".", "3", "a.", "3..weight", "3.weight.x", "forward.weight", "training"])
@pytest.mark.parametrize("tied", [False, True])
def test_names_that_no_parameter_has_are_refused(tmp_path: Path, name: str, tied: bool) -> None:
    model = small(head=False)
    covariances = lro.calibrate(model, [torch.randint(50, (200,))])
    state = model.state_dict() | ({} if tied else {name: torch.ones(2)})
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", {name: "3.weight"} if tied else None)
    with pytest.raises(ValueError, match=f"holds {name!r}, which cannot be the name of a parameter"):
        compress_folder(tmp_path, tmp_path / "out", covariances, 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [{"architectures": 3}, {"hidden_size": "x"}, {"hidden_size": -4}, {"dtype": "nope"}, {"quantization_config": 3}],
)
def test_a_configuration_that_builds_no_model_is_a_value_error(tmp_path: Path, change: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    model = small(head=False)
    covariances = lro.calibrate(model, [torch.randint(50, (200,))])
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    config = {"model_type": "bert", "architectures": ["BertModel"], **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"transformers cannot build the model of config\.json"):
        compress_folder(tmp_path, tmp_path / "out", covariances, 4)


@pytest.mark.parametrize("name", ["../b.safetensors", "missing.safetensors", "..", "", 1, ["a.safetensors"], None])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: Any) -> None:
    model = small(head=False)
    covariances = lro.calibrate(model, [torch.randint(50, (200,))])
    (tmp_path / "dense").mkdir()
    for path in (tmp_path / "b.safetensors", tmp_path / "dense" / "a.safetensors"):
        safetensors.torch.save_file(model.state_dict(), path)
    for given in (name, str(tmp_path / "b.safetensors")):
        index = {"weight_map": dict.fromkeys(model.state_dict(), given)}
        (tmp_path / "dense" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="which the folder does not hold"):
            compress_folder(tmp_path / "dense", tmp_path / "out", covariances, 4)
    assert_equal(safetensors.torch.load_file(tmp_path / "b.safetensors"), model.state_dict())
    assert not (tmp_path / "out").exists()


def test_other_layers_of_a_state_dict_stay_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(32, 24))
    covariances = lro.calibrate(model, [torch.randn(50, 3, 3, 3)])
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    report = compress_folder(tmp_path, tmp_path / "out", covariances, 4)
    assert "its weight has 4 dimensions" in report.skipped["0"]
    assert [layer.fqn for layer in report.layers] == ["2"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {"0.weight", "2.down"} <= set(file.keys())
    loaded = lro.load_pretrained(model, tmp_path / "out")
    assert isinstance(loaded[0], nn.Conv2d) and isinstance(loaded[2], lro.LowRankLinear)


def test_a_quantized_folder_is_refused(tmp_path: Path) -> None:
    model = llama()
    covariances = lro.calibrate(model, tokens())
    lro.compress_(model, covariances)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantized or compressed \(lowrank\)"):
        compress_folder(tmp_path, tmp_path / "out", covariances, 4)
