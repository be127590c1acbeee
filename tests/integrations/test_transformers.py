"""transformers' save_pretrained and from_pretrained of models with low-rank layers."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowrank_ops as lro

transformers = pytest.importorskip("transformers")
from huggingface_hub import ModelCard  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from lowrank_ops.integrations.transformers import LowRankConfig, model_card  # noqa: E402
from lowrank_ops.layers import to_dense_layers, to_plain_layers  # noqa: E402
from tests.compatibility.families import FAMILIES  # noqa: E402
from tests.compatibility.table import output  # noqa: E402


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


def dense() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()  # fmt: skip


def tokens() -> Tensor:
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> LlamaForCausalLM:
    model = dense()
    covariances = lro.calibrate(model, [{"input_ids": torch.randint(50, (8, 16))}])
    lro.compress_(model, covariances, lro.ParameterBudget(0.6))
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(tokens()).logits


def description(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text()).get("quantization_config", {})


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_round_trip_to_the_bit(model: LlamaForCausalLM, tmp_path: Path, max_shard_size: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = {path.name for path in tmp_path.iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) == (1 if max_shard_size == "50GB" else 3)
    assert all(name.endswith((".json", ".safetensors")) for name in files) and "lowrank_config.json" not in files
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(loaded.model.layers[0].mlp.up_proj, lro.LowRankLinear)
    assert torch.equal(logits(loaded), logits(model))
    loaded.half().float()  # transformers refuses these for quantized models
    transformers.trainer_utils.validate_quantization_for_training(loaded)


def test_pivoted_layers_load_whole_or_not_at_all(model: LlamaForCausalLM, tmp_path: Path) -> None:
    mlp = model.model.layers[0].mlp
    mlp.up_proj = lro.layers.PivotedLinear.from_lowrank(mlp.up_proj)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, lro.layers.PivotedLinear)
    assert torch.equal(logits(loaded), logits(model))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16).model.layers[0].mlp.up_proj
    assert (half.down.dtype, half.order.dtype) == (torch.float16, torch.int32)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.order"] //= 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(lro.CheckpointError, match=r"up_proj\.order of the checkpoint is not a permutation"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    del tensors["model.layers.0.mlp.up_proj.order"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(lro.CheckpointError, match=r"the checkpoint lacks model\.layers\.0\.mlp\.up_proj\.order"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {}])
def test_channels_of_mlps_load_to_the_bit(tmp_path: Path, options: dict) -> None:
    model = dense()
    covariances = lro.calibrate(model, [{"input_ids": torch.randint(50, (8, 16))}])
    report = lro.compress_(model, covariances, lro.CompressionConfig(lro.ParameterBudget(0.6), channels=True))
    kept = {row.fqn: row.channels for row in report.layers if row.channels}
    assert set(kept) == {
        f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")
    }  # attention is no MLP
    model.save_pretrained(tmp_path, **options)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and torch.equal(logits(loaded), logits(model))
    assert loaded.config.intermediate_size == 48
    assert loaded.model.layers[1].mlp.down_proj.in_features == kept["model.layers.1.mlp.down_proj"]
    assert "Layers of MLPs with fewer channels" in model_card(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    for other in (to_plain_layers(loaded), to_dense_layers(loaded)):
        assert not any(isinstance(part, lro.layers.NarrowLinear) for part in other.modules())
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_one_description_of_the_layers(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "transformers")
    lro.save_pretrained(model, tmp_path / "own")
    own = json.loads((tmp_path / "own" / "lowrank_config.json").read_text())
    shared = ("format", "version", "layers")
    assert {name: own[name] for name in shared} | {"quant_method": "lowrank"} == description(tmp_path / "transformers")
    with pytest.raises(lro.CheckpointError, match="use from_pretrained"):
        lro.load_pretrained(dense(), tmp_path / "transformers")


def test_base_model_from_a_head_and_back(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        expected = model.model(tokens()).last_hidden_state
        assert torch.equal(base(tokens()).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        head = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # with a new lm_head
        assert torch.equal(head.model(tokens()).last_hidden_state, expected)


def test_dtype_of_loading(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    values = loaded.state_dict()
    assert all(torch.equal(values[name], tensor.bfloat16()) for name, tensor in model.state_dict().items())


def test_device_map_and_disk_offload(model: LlamaForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="auto")), logits(model)
    )
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places | {"model.layers.1": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    assert offloaded.model.layers[1].mlp.up_proj.up.is_meta
    assert torch.equal(logits(offloaded), logits(model))
    offloaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_description_follows_the_layers(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "all")
    layer = model.model.layers[0].mlp
    layer.up_proj = layer.up_proj.to_dense()
    model.save_pretrained(tmp_path / "fewer")
    assert set(description(tmp_path / "all")["layers"]) - set(description(tmp_path / "fewer")["layers"]) == {
        "model.layers.0.mlp.up_proj"
    }
    plain = to_dense_layers(model)
    for attention in plain.model.layers:  # Llama's layers have no bias; ours hold the mean of the output
        for child in attention.modules():
            if isinstance(child, torch.nn.Linear):
                child.bias = None
    plain.lm_head.bias = None
    plain.save_pretrained(tmp_path / "dense")
    saved = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in saved and "fusion_config" not in saved
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "dense")), logits(plain))


def test_a_compressed_submodule_is_described(tmp_path: Path) -> None:
    model = dense()
    covariances = lro.calibrate(model.model, [{"input_ids": torch.randint(50, (8, 16))}])
    lro.compress_(model.model, covariances, lro.ParameterBudget(0.6))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_bad_checkpoints_are_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    layers = description(tmp_path)["layers"]
    for changes, message in (
        ({"version": 99}, "format version 99"),
        ({"format": "other"}, "its format is not"),
        ({"layers": []}, "'layers' has the wrong type"),
        ({"layers": None}, "'layers' has the wrong type"),
        ({"layers": layers | {"lm_head": {}}}, "has kind None"),
        ({"layers": layers | {"model.other": layers["lm_head"]}}, "has no module of that name"),
        ({"layers": layers | {"lm_head": layers["lm_head"] | {"in_features": 7}}}, "has in_features 7"),
    ):
        edit(tmp_path, **{"format": "lowrank_ops.checkpoint", "version": 2, "layers": layers} | changes)
        with pytest.raises(lro.CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    edit(tmp_path, layers=layers)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.down"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lro.CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.down"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_quantization_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=LowRankConfig({}, "lowrank_ops.checkpoint", 2))
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="quantized by gptq"):
        model.save_pretrained(tmp_path)
    assert description(tmp_path) == {}


def test_a_tie_that_is_none_any_more_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.config.tie_word_embeddings = True  # as of a model whose lm_head was untied by hand, then compressed
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is low-rank.*tie_word_embeddings = False"):
        model.save_pretrained(tmp_path)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_model_card_section(model: LlamaForCausalLM) -> None:
    section = model_card(model)
    layers = [layer for layer in model.modules() if isinstance(layer, lro.LowRankLinear)]
    parameters = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    assert f": {len(layers)}\n" in section and f"parameters: {parameters:,}," in section
    assert "LlamaForCausalLM.from_pretrained" in section
    with pytest.raises(ValueError, match="no low-rank layers"):
        model_card(dense())
    rounded = torch.nn.Sequential(lro.layers.EightBitLinear(8, 6))  # as a ByteBudget may leave all layers
    assert f"8-bit weights, by `lowrank_ops` {lro.__version__}: 1\n" in model_card(rounded)
    assert "ranks:" not in model_card(rounded)


def test_copies_are_saved_as_well(model: LlamaForCausalLM, tmp_path: Path) -> None:
    copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.filterwarnings("ignore:the router sent fewer")
@pytest.mark.parametrize("family", ["Llama", "Mixtral", "GPT-2"])
def test_dense_copies_load_where_nothing_is_lost(family: str, tmp_path: Path) -> None:
    architecture = FAMILIES[family]
    model, batch = architecture.build(), architecture.batch(3)
    covariances = lro.calibrate(model, [architecture.batch(8)])
    centered = copy.deepcopy(model)
    lro.compress_(centered, covariances, lro.ParameterBudget(0.6))
    lro.compress_(model, covariances, lro.CompressionConfig(lro.ParameterBudget(0.6), centered=False))
    model.save_pretrained(tmp_path / "compressed")
    for compressed in (model, architecture.load(str(tmp_path / "compressed"))):
        copied = to_dense_layers(compressed)
        assert copied.state_dict().keys() == architecture.build().state_dict().keys()
        copied.save_pretrained(tmp_path / "dense")
        loaded = architecture.load(str(tmp_path / "dense"))
        assert torch.equal(output(loaded, batch), output(copied, batch))
        torch.testing.assert_close(output(loaded, batch), output(model, batch), atol=1e-5, rtol=1e-4)
    lro.compress_(copied, covariances, lro.ParameterBudget(0.6))
    copied.save_pretrained(tmp_path / "again")
    assert torch.equal(output(architecture.load(str(tmp_path / "again")), batch), output(copied, batch))
    with pytest.raises(ValueError, match=r"would not load .*0\.weight.* Save the compressed model itself"):
        to_plain_layers(model).save_pretrained(tmp_path / "plain")
    if family == "Llama":
        with pytest.raises(ValueError, match=r"would not load .*q_proj\.bias.* compress with .*centered=False"):
            to_dense_layers(centered).save_pretrained(tmp_path / "centered")
    elif family == "Mixtral":
        with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: 4 of 4 experts have a bias in gate_up_proj"):
            to_dense_layers(centered)
    assert not (tmp_path / "plain").exists() and not (tmp_path / "centered").exists()


def test_without_the_package_loading_is_an_error(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """And with it, loading works also where transformers was imported first."""
    model.save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["lowrank_ops"] = None
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
except ValueError as error:
    print(error)
del sys.modules["lowrank_ops"]
import lowrank_ops
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).lm_head).__name__)
"""
    lines = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert "lowrank_ops (install this package" in lines[0]
    assert lines[1] == "LowRankLinear"


def test_push_to_hub_uploads_a_loadable_folder(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub:
        """Stores what is uploaded."""

        def create_repo(self, repo_id: str, **options: object) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations: list[Any], **options: object) -> None:
            for operation in operations:
                shutil.copy(operation.path_or_fileobj, tmp_path / operation.path_in_repo)

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Hub)
    monkeypatch.setattr(
        transformers.utils.hub, "create_and_tag_model_card", lambda *args, **options: ModelCard("# Card")
    )
    model.push_to_hub("someone/llama", max_shard_size="10KB")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "lowrank"
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded.eval()), logits(model))
