"""Models of timm and torchvision, small ones of their own code: convert, calibrate, compress, save, load."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers import convert_attention_, to_plain_layers

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision").models

FAMILIES = {
    "timm ViT": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2),
    "timm DeiT": lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=2),
    "timm Swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1), embed_dim=32, num_heads=(2, 4)
    ),
    "timm ConvNeXt": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 32, 32, 64)),
    "timm EfficientNet": lambda: timm.create_model("test_efficientnet"),
    "timm ResNet": lambda: timm.create_model("resnet10t", channels=(16, 32, 32, 64), stem_width=8),
    "torchvision Swin": lambda: models.SwinTransformer([4, 4], 32, [2, 1], [2, 4], [4, 4]),
    "torchvision Swin 2": lambda: models.SwinTransformer(
        [4, 4],
        32,
        [2, 1],
        [2, 4],
        [4, 4],
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2,
    ),
    "torchvision ViT": lambda: models.VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_models_are_compressed_saved_and_loaded(family, tmp_path):
    torch.manual_seed(0)
    original = FAMILIES[family]().eval()
    for parameter in original.parameters():
        if parameter.dim() > 1 and not parameter.any():  # heads that start at zero
            nn.init.normal_(parameter, std=0.1)
    batches = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    model = convert_attention_(copy.deepcopy(original))
    torch.testing.assert_close(model(batches[0]), original(batches[0]), atol=1e-6, rtol=1e-5)
    dense = copy.deepcopy(model)
    assert "Swin" not in family or list(dense.state_dict()) == list(original.state_dict())
    covariances = lro.calibrate(model, batches, sensitivity="fisher")
    report = lro.compress_(model, covariances, lro.ParameterBudget(0.6))
    assert report.layer_parameters <= 0.6 * report.layer_parameters_before
    y = model(batches[0])
    assert y.isfinite().all() and not torch.equal(y, dense(batches[0]))
    lro.save_pretrained(model, tmp_path, report)
    assert torch.equal(lro.load_pretrained(dense, tmp_path)(batches[0]), y)
    torch.testing.assert_close(to_plain_layers(model)(batches[0]), y, atol=1e-4, rtol=1e-4)
    attention = [fqn for fqn in covariances if "attn" in fqn or "attention" in fqn]
    assert bool(attention) == (family.rpartition(" ")[2] in ("ViT", "DeiT", "Swin", "2"))
    if "torchvision Swin" in family:
        assert {"features.1.1.attn.qkv", "features.1.1.attn.proj"} <= {row.fqn for row in report.layers}
        words = report.skipped.get("features.1.1.attn", "")
        assert family[-1] == "2" or words.startswith("relative_position_bias_table of WindowAttention is not supported")


@pytest.mark.parametrize("family", ["torchvision Swin", "torchvision Swin 2"])
def test_converted_windows_are_pickled_compiled_and_exported(family):
    torch.manual_seed(0)
    original = FAMILIES[family]().eval()
    for parameter in original.parameters():  # the bias of the keys, which version 2 ignores, as well
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model, x = convert_attention_(copy.deepcopy(original)), torch.randn(2, 3, 40, 56)  # padded to whole windows
    for run in (model, pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(x), original(x), atol=1e-6, rtol=1e-5)
    attention, rows = model.features[1][1].attn, torch.randn(1, 5, 7, 32)
    expected = original.features[1][1].attn(rows)
    exported = torch.export.export(attention, (rows,)).module()
    for run in (exported, torch.compile(attention, backend="eager", fullgraph=True)):
        torch.testing.assert_close(run(rows), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"features\.1\.0\.attn is a ShiftedWindowAttention\w* that .* has hooks"):
        original.features[1][0].attn.register_forward_hook(lambda *args: None)
        convert_attention_(original)
    with pytest.warns(UserWarning, match="calibration skips unsupported modules"):
        covariances = lro.calibrate(original, [x])
    assert "call lowrank_ops.layers.convert_attention_(model)" in covariances.skipped["features.1.1.attn"]
    assert not any("qkv" in fqn for fqn in covariances)
