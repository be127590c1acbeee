"""LoRA and DoRA of PEFT itself on low-rank layers: adapt, merge, unmerge, save, load."""

import copy

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers import LowRankConv1d, group_, to_dense_layers, to_plain_layers

pytest.importorskip("peft")
import peft
from peft.tuners import lora

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = lro.LowRankConv2d(3, 8, 3, rank=5, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.line = LowRankConv1d(8, 8, 3, rank=5, padding=1)
        self.wide = lro.LowRankLinear(32, 24, rank=5)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(2)
        return self.head(self.wide((x + self.line(x)).flatten(1)).relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def adapted(model, adapters=1, **options):
    """A PEFT model with random adapters on the low-rank layers."""
    options = {"target_modules": ["conv", "line", "wide"], "r": 4, "init_lora_weights": False, **options}
    result = peft.get_peft_model(model, peft.LoraConfig(**options))
    for index in range(1, adapters):
        result.add_adapter(str(index), peft.LoraConfig(**{**options, "r": 4 + index}))
    result.base_model.set_adapter(["default", *map(str, range(1, adapters))])
    for name, parameter in result.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    return result.eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


KINDS = [
    {},
    {"use_dora": True},
    {"lora_bias": True},
    {"use_rslora": True, "lora_dropout": 0.1},
    {"use_dora": True, "lora_dropout": 0.1},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_adapters_compute_what_they_compute_on_dense_layers(net, options):
    model, dense = adapted(copy.deepcopy(net), **options), adapted(to_dense_layers(net), **options)
    dense.load_state_dict({name: tensor for name, tensor in state(model).items() if "lora" in name}, strict=False)
    torch.testing.assert_close(model(X), dense(X))
    assert (model(X) - net(X)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "adapters"), [*((kind, 1) for kind in KINDS), (KINDS[0], 2), (KINDS[1], 2)], ids=str
)
def test_merge_is_exact_and_unmerge_restores_the_bits(net, options, adapters):
    model = adapted(net, adapters, **options)
    before, expected = state(model), model(X)
    with torch.no_grad():
        model.merge_adapter()
        torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-5)
        assert model.base_model.model.wide.base_layer.rank == 5 + 4 + 5 * (adapters - 1)
        model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    after = state(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_rounds_once_in_half_precision(net, dtype):
    model = adapted(net.to(dtype))
    expected = model(X.to(dtype)).float()
    merged = model.merge_and_unload(safe_merge=True)
    assert merged.wide.down.dtype == dtype
    error = (merged(X.to(dtype)).float() - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_merged_model_is_compressed_and_saves_and_loads(net, tmp_path):
    merged = adapted(net).merge_and_unload()
    assert type(merged.conv) is lro.LowRankConv2d and type(merged.wide) is lro.LowRankLinear
    lro.save_pretrained(merged, tmp_path)
    loaded = lro.load_pretrained(to_dense_layers(Net().eval()), tmp_path)
    assert loaded.wide.rank == 9 and torch.equal(loaded(X), merged(X))


def test_merge_beyond_full_rank_stays_at_full_rank():
    torch.manual_seed(0)
    net = nn.Sequential(lro.LowRankLinear(12, 8, 7), lro.LowRankLinear(8, 12, 5)).eval()
    x, model = torch.randn(3, 12), adapted(net, target_modules=["0", "1"])
    expected = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert [layer.rank for layer in merged] == [8, 8]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_saved_adapter_loads_to_the_bit(net, options, tmp_path):
    base = copy.deepcopy(net)
    model = adapted(net, **options)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(X), model(X))
    assert type(loaded.base_model.model.wide).__mro__[1:] == type(model.base_model.model.wide).__mro__[1:]


def test_training_changes_only_the_adapter(net):
    model = adapted(net, use_dora=True).train()
    before = state(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if "lora_" not in name and "norm" not in name} == set()
    assert {name.split(".")[-3] for name in changed if "conv" in name or "line" in name} == {
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
    }


def test_disabled_and_second_adapters_work_as_in_peft(net):
    expected = net(X)
    model = adapted(copy.deepcopy(net), adapters=2)
    with torch.no_grad():
        both = model(X)
        model.merge_adapter(["1"])
        model.set_adapter("1")
        only = model(X)
        with model.disable_adapter():
            assert torch.equal(model(X), expected)  # PEFT unmerges
        torch.testing.assert_close(model(X), only)
        assert not torch.allclose(both, only)
        mixed = model(X, adapter_names=["default", "1", "__base__"] * 2)
        torch.testing.assert_close(mixed[1::3], only[1::3])
        torch.testing.assert_close(mixed[2::3], expected[2::3])


def test_all_linear_means_low_rank_layers_but_not_the_head():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(32).reshape(2, 16)
    lro.compress_(model, lro.calibrate(model, [ids]), lro.Ranks({"re:.*": 4, "re:.*v_proj": None}))
    assert isinstance(model.lm_head, lro.LowRankLinear)
    result = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    wrapped = {
        name.split(".")[-1]: type(module) for name, module in result.named_modules() if hasattr(module, "lora_A")
    }
    assert "lm_head" not in wrapped and wrapped.pop("v_proj") is lora.Linear
    assert len(wrapped) == 6 and all(
        issubclass(kind, lora.Linear) and kind is not lora.Linear for kind in wrapped.values()
    )


def test_fan_in_fan_out_of_gpt2_does_not_transpose_factors(net):
    model = adapted(net, target_modules=["wide"], fan_in_fan_out=True, use_dora=True)
    expected = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_registration_by_hand_with_a_class_of_peft_merges_too(net):
    config = peft.LoraConfig(target_modules=["wide"], init_lora_weights=False)
    config._register_custom_module({lro.LowRankLinear: lora.Linear})
    model = peft.get_peft_model(net, config).eval()
    expected = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def grouped(**options):
    return nn.Sequential(lro.LowRankConv2d(4, 8, 3, rank=2, **options))


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        (Net(), peft.LoraConfig(target_modules=["wide"], init_lora_weights="pissa"), "'pissa' .* layer 'wide'"),
        (Net(), peft.LoraConfig(target_modules="all-linear", init_lora_weights="olora"), "'olora' .* layer 'wide'"),
        (grouped(groups=2), peft.LoraConfig(target_modules=["0"]), "layer '0' has groups=2"),
        (grouped(dilation=2), peft.LoraConfig(target_modules=["0"]), r"dilation=\(2, 2\)"),
        (grouped(padding_mode="circular", padding=1), peft.LoraConfig(target_modules=["0"]), "padding_mode='circular'"),
        (
            Net(),
            peft.LoraConfig(target_modules=["wide"], alora_invocation_tokens=[1]),
            "'wide' .* got alora_invocation",
        ),
        (Net(), peft.LoraConfig(target_modules=[], target_parameters=["wide.up"]), "'wide.up' of the low-rank layer"),
        (Net(), peft.IA3Config(target_modules=["wide"], feedforward_modules=[]), "LowRankLinear.* is not supported"),
        (Net(), peft.IA3Config(target_modules="all-linear", feedforward_modules=[]), "LowRankLinear.* not supported"),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_refused_before_any_change(model, config, reason):
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=reason):
        peft.get_peft_model(model, config)
    if isinstance(config, peft.LoraConfig):
        assert [type(module) for module in model.modules()] == before


def test_merge_refuses_what_is_not_finite_and_a_missing_bias(net):
    model = adapted(net)
    before = model.base_model.model.wide.base_layer.down.clone()
    model.base_model.model.wide.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.base_model.model.wide.merge(safe_merge=True)
    assert torch.equal(model.base_model.model.wide.base_layer.down, before)
    without = adapted(nn.Sequential(lro.LowRankLinear(8, 8, 2, bias=False)), target_modules=["0"], lora_bias=True)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        without.merge_adapter()


@pytest.mark.parametrize("dense", [True, False])
def test_a_model_with_adapters_is_not_compressed(net, dense):
    covariances = lro.calibrate(to_dense_layers(net), [X])
    model = adapted(to_dense_layers(net) if dense else net)
    actions = [
        lambda: lro.calibrate(model, [X]),
        lambda: lro.compress_(model, covariances),
        lambda: lro.save_pretrained(model, "never"),
        lambda: to_plain_layers(model),
        lambda: to_dense_layers(model),
    ]
    for action in actions:
        with pytest.raises(ValueError, match=r"layer 'base_model.model.conv' has a PEFT adapter.*merge_and_unload\(\)"):
            action()
    merged = model.merge_and_unload()
    assert lro.calibrate(to_dense_layers(merged), [X])


def test_layers_with_fewer_channels_are_adapted_as_linears():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 6)).eval()
    x = torch.randn(64, 12)
    lro.compress_(model, lro.calibrate(model, [x]), lro.Ranks({}, channels={"2": 24}))
    result = adapted(model, target_modules=["0", "2"])
    merged, y = result.merge_and_unload(), result(x)
    torch.testing.assert_close(merged(x), y)
    assert isinstance(merged[2], lro.layers.NarrowLinear) and merged[2].in_features == 24


def test_a_pivoted_layer_is_refused(net):
    net.wide = lro.layers.PivotedLinear.from_lowrank(net.wide)
    for targets in (["wide"], "all-linear"):
        with pytest.raises(ValueError, match=r"layer 'wide' is pivoted.*layer\.to_lowrank\(\)"):
            peft.get_peft_model(net, peft.LoraConfig(target_modules=targets))


def test_members_of_a_group_are_adapted_and_merged(group_calls):
    """The group computes the base layers' outputs; a merge between two calls is noticed."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: lro.LowRankLinear(24, 16, rank=5) for name in "qk"})
    group_(model, ["qk"])
    single = copy.deepcopy(model)
    single["q"].group = single["k"].group = None
    nets = [adapted(part, target_modules=["q", "k"]) for part in (model, single)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours, theirs = ([net.base_model.model[name] for name in "qk"] for net in nets)
    with torch.no_grad():
        for change in ("merge", "unmerge"):
            x = torch.randn(5, 24)
            torch.testing.assert_close([layer(x) for layer in ours], [layer(x) for layer in theirs], rtol=0, atol=0)
            ours[0](x)
            for layer in (*ours, *theirs):
                getattr(layer, change)()
            torch.testing.assert_close(ours[1](x), theirs[1](x), rtol=0, atol=0)
    assert len(group_calls) == 6  # twice one for both, one that is left, and one after the change
