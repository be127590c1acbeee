"""nn.MultiheadAttention with separate Linears: the same function, and layers that can be compressed."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lowrank_ops as lro
from lowrank_ops.layers import convert_attention_, to_plain_layers

B, L, S, E, H = 3, 5, 7, 16, 4
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.arange(S) >= torch.tensor([[7], [4], [2]])


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H, **options).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module, convert_attention_(copy.deepcopy(module))


def inputs(module, key=E, value=E, batched=True):
    tensors = torch.randn(B, L, E), torch.randn(B, S, key), torch.randn(B, S, value)
    if not batched:
        return [tensor[0] for tensor in tensors]
    return [tensor if module.batch_first else tensor.transpose(0, 1) for tensor in tensors]


def assert_same(first, second):
    for one, two in zip(first, second, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True, "batch_first": True}, {"add_zero_attn": True},
        {"kdim": 6, "vdim": 9, "add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=str,
)  # fmt: skip
def test_outputs_and_weights_are_those_of_torch(options, need_weights):
    dense, converted = attention(**options)
    x = inputs(dense, options.get("kdim", E), options.get("vdim", E))
    masks = [None, torch.randn(L, S), torch.rand(L, S) < 0.2, torch.randn(B * H, L, S)]
    for mask, padding, average in itertools.product(masks, [None, PADDING], [True, False]):
        if mask is not None and mask.dtype != torch.bool and padding is not None:
            padding = torch.zeros(B, S).masked_fill(PADDING, -torch.inf)
        arguments = {"attn_mask": mask, "key_padding_mask": padding, "average_attn_weights": average}
        assert_same(
            dense(*x, need_weights=need_weights, **arguments), converted(*x, need_weights=need_weights, **arguments)
        )
    single = inputs(dense, options.get("kdim", E), options.get("vdim", E), batched=False)
    assert_same(dense(*single, key_padding_mask=PADDING[1]), converted(*single, key_padding_mask=PADDING[1]))


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_hints_mean_what_they_mean_in_torch(need_weights):
    dense, converted = attention(batch_first=True)
    x = torch.randn(B, L, E)
    for padding in (None, PADDING[:, :L]):
        arguments = {"attn_mask": CAUSAL, "is_causal": True, "need_weights": need_weights, "key_padding_mask": padding}
        assert_same(dense(x, x, x, **arguments), converted(x, x, x, **arguments))
    with pytest.raises(RuntimeError, match="pass attn_mask"):
        converted(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match=r"bool or float; got torch.int64"):
        converted(x, x, x, attn_mask=torch.zeros(L, L, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attn_mask": torch.zeros(1, S)}, r"attn_mask must have shape \[5, 7\] or \[12, 5, 7\]; got \[1, 7\]"),
        ({"attn_mask": torch.zeros(S)}, r"got \[7\]"),
        ({"key_padding_mask": PADDING[:1]}, r"key_padding_mask must have shape \[3, 7\].* got \[1, 7\]"),
        ({"key": torch.zeros(1, S, E), "value": torch.zeros(1, S, E)}, "must be of one batch"),
        ({"value": torch.zeros(B, S + 1, E)}, "key and value of one length"),
    ],
)
def test_shapes_that_torch_refuses_are_not_broadcast(change, reason):
    dense, converted = attention(batch_first=True)
    arguments = dict(zip(("query", "key", "value"), inputs(dense), strict=True)) | change
    with pytest.raises((RuntimeError, AssertionError)):
        dense(**arguments)
    with pytest.raises(ValueError, match=reason):
        converted(**arguments)


def test_gradients_and_dropout_are_those_of_torch():
    dense, converted = attention(batch_first=True, dropout=0.5)
    x = torch.randn(B, L, E)
    for module in (dense.train(), converted.train()):
        torch.manual_seed(1)
        module(x, x, x, need_weights=True)[0].square().sum().backward()
    gradients = [layer.weight.grad for layer in (converted.q_proj, converted.k_proj, converted.v_proj)]
    torch.testing.assert_close(torch.cat(gradients), dense.in_proj_weight.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(converted.out_proj.weight.grad, dense.out_proj.weight.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_fast_path_does_not_bypass_compressed_projections(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x, padding, real = torch.randn(B, S, E), PADDING, ~PADDING
    with torch.no_grad():
        expected, masked = encoder(x), encoder(x, src_key_padding_mask=padding)
        converted = convert_attention_(copy.deepcopy(encoder))
        torch.testing.assert_close(converted(x), expected, atol=1e-6, rtol=1e-6)
        found = converted(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[real], masked[real], atol=1e-6, rtol=1e-6)
        covariances = lro.calibrate(converted, [torch.randn(16, S, E)])
        assert len(covariances) == 2 * 6
        assert (
            covariances["layers.0.self_attn.q_proj"].activations is covariances["layers.0.self_attn.v_proj"].activations
        )
        lro.compress_(converted, covariances, lro.Ranks({"re:.*proj": 4}))
        assert not torch.allclose(converted(x), expected, atol=1e-3)  # the low-rank projections are used
        torch.testing.assert_close(converted(x), to_plain_layers(converted)(x), atol=1e-5, rtol=1e-5)


def test_decoder_compresses_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 32), 1).eval()
    dense = convert_attention_(copy.deepcopy(decoder))
    x, memory = torch.randn(L, B, E), torch.randn(S, B, E)
    torch.testing.assert_close(dense(x, memory), decoder(x, memory), atol=1e-6, rtol=1e-6)
    model = copy.deepcopy(dense)
    covariances = lro.calibrate(model, [(x, memory)])
    assert covariances["layers.0.self_attn.q_proj"].activations.count == B * L
    lro.compress_(model, covariances, lro.Ranks({"re:.*_proj": 4}))
    lro.save_pretrained(model, tmp_path)
    assert torch.equal(lro.load_pretrained(dense, tmp_path)(x, memory), model(x, memory))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_converted_attention_can_be_scripted_and_exported():
    _, converted = attention(batch_first=True, add_bias_kv=True)
    x = torch.randn(B, L, E)
    assert_same(torch.jit.script(converted)(x, x, x), converted(x, x, x))
    assert_same(torch.export.export(converted, (x, x, x)).module()(x, x, x), converted(x, x, x))


def test_flags_dtype_and_places_are_kept():
    shared = nn.MultiheadAttention(8, 2).to(torch.bfloat16)
    shared.in_proj_weight.requires_grad_(False)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})}).train()
    assert convert_attention_(model) is model and model["a"] is model["b"]["c"]
    assert model["a"].training and model["a"].q_proj.weight.dtype == torch.bfloat16
    assert not model["a"].q_proj.weight.requires_grad and model["a"].q_proj.bias.requires_grad
    assert model["a"].out_proj.weight is shared.out_proj.weight
    assert model["a"].q_proj.weight.untyped_storage().nbytes() == 8 * 8 * 2
    assert convert_attention_(nn.Linear(2, 2)).weight.shape == (2, 2)


class Own(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


def with_hook(module):
    module.out_proj.register_forward_hook(lambda *args: None)


def tied(module):
    module.other = nn.Linear(8, 8)
    module.other.weight = module.out_proj.weight


def pruned(module):
    prune.l1_unstructured(module, "in_proj_weight", 0.5)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (Own, lambda module: None, "overrides forward"),
        (nn.MultiheadAttention, with_hook, "has hooks"),
        (nn.MultiheadAttention, tied, "tied to 'bad.other'"),
        (nn.MultiheadAttention, pruned, "not plain parameters"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_would_change_is_refused_with_nothing_done(kind, change, reason):
    model = nn.ModuleDict({"good": nn.MultiheadAttention(8, 2), "bad": kind(8, 2)})
    change(model["bad"])
    with pytest.raises(ValueError, match=f"bad is a {kind.__name__} that cannot be converted: .*{reason}"):
        convert_attention_(model)
    assert type(model["good"]) is nn.MultiheadAttention


def test_skipped_attention_names_the_conversion():
    model = nn.ModuleList([nn.Linear(4, 4), nn.MultiheadAttention(8, 2)])
    with pytest.warns(UserWarning, match=r"layers.convert_attention_\(model\) first"):
        lro.Calibrator(model)
