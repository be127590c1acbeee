"""calibrate: which rows are summed, that the model is restored, and errors that name the layer."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_ops as lro
from tests.calibration.comparing import of_group
from tests.sums import assert_sums

# --- what is summed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch", [torch.randn(5, 8), (torch.randn(5, 8),), [torch.randn(5, 8)], {"input": torch.randn(5, 8)}]
)
def test_batches_may_be_tensors_sequences_or_mappings(batch):
    model = nn.Linear(8, 3)
    x = batch if isinstance(batch, torch.Tensor) else batch["input"] if isinstance(batch, dict) else batch[0]
    assert_sums(lro.calibrate(model, [batch, batch])[""].activations, torch.cat([x, x]))


def test_forward_replaces_the_call():
    model = nn.Linear(8, 3)
    x = torch.randn(5, 8)
    covariances = lro.calibrate(model, [(x, "label")], forward=lambda model, batch: model(batch[0]))
    assert_sums(covariances[""].activations, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_have_the_requested_dtype(dtype):
    moments = lro.calibrate(nn.Linear(8, 3), [torch.randn(5, 8)], dtype=dtype)[""].activations
    assert moments.second_moment.dtype == moments.total.dtype == dtype


def test_all_calls_of_a_layer_are_summed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x))

    model = Twice()
    x = torch.randn(7, 4)
    assert_sums(lro.calibrate(model, [x])["fc"].activations, torch.cat([x, model.fc(x).detach()]), rtol=1e-6)


def test_empty_batches_add_nothing():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(2, 2, 4, 4)
    with_empty = lro.calibrate(model, [x, x[:0]])
    without = lro.calibrate(model, [x])
    for fqn in without:
        ours, theirs = with_empty[fqn].activations, without[fqn].activations
        assert ours.count == theirs.count and torch.equal(ours.second_moment, theirs.second_moment)


@pytest.mark.parametrize("rows", [(0,), (0, 0), (0, 3)], ids=str)
def test_batches_without_any_row_are_refused(rows):
    model = nn.Sequential(nn.Linear(4, 4))
    mask = lambda args, kwargs: torch.zeros(args[0].shape[:-1]) if args[0].dim() == 3 else None  # noqa: E731
    with pytest.raises(ValueError, match="no row reached a layer"):
        lro.calibrate(model, [torch.randn(*rows, 4)], mask=mask)
    with pytest.raises(ValueError, match="no row reached a layer"), lro.Calibrator(model):
        pass


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "rtol"), [(torch.float64, torch.float64, 1e-12), (torch.bfloat16, torch.float32, 1e-6)]
)
@pytest.mark.parametrize("chunks", [1, 7, 100])
def test_batch_size_and_order_do_not_matter(x_dtype, dtype, rtol, chunks):
    x = (torch.randn(1400, 24) + 1).to(x_dtype)
    model = nn.Linear(24, 8).to(x_dtype)
    parts = list(x.chunk(chunks))
    shuffled = [parts[index] for index in torch.randperm(len(parts))]
    for order in (parts, shuffled):
        assert_sums(lro.calibrate(model, order, dtype=dtype)[""].activations, x, rtol=rtol)


class Conv1D(nn.Module):
    """As in transformers: y = x @ weight + bias."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, out_features, in_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("side", ["input", "output"])
def test_transformers_conv1d(side):
    model = nn.Sequential(Conv1D(3, 8))
    x = torch.randn(2, 5, 8)
    rows = x.flatten(0, 1).double()
    expected = rows if side == "input" else rows @ model[0].weight.detach().double()
    assert_sums(lro.calibrate(model, [x], side=side)["0"].activations, expected, rtol=1e-5)


# --- convolutions -----------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "dilated": {"kernel_size": 3, "dilation": (1, 2), "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, even kernel": {"kernel_size": (4, 2), "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "replicate, same": {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("unbatched", [False, True])
def test_patches_are_those_that_the_convolution_multiplies(options, unbatched):
    """The patches P satisfy W P + b = conv(x), and their sums are those of unfold."""
    conv = nn.Conv2d(4, 8, **options).double()
    x = torch.randn(4, 6, 7, dtype=torch.float64) if unbatched else torch.randn(3, 4, 6, 7, dtype=torch.float64)
    moments = lro.calibrate(nn.Sequential(conv), [x])["0"].activations
    whole = nn.Conv2d(4, 4 * conv.kernel_size[0] * conv.kernel_size[1], **{**options, "groups": 1}, bias=False).double()
    with torch.no_grad():
        whole.weight.copy_(torch.eye(len(whole.weight)).view_as(whole.weight))  # a convolution that copies its patch
        patches = whole(x if x.dim() == 4 else x[None]).movedim(1, -1).flatten(0, 2)
    rows = patches.view(len(patches), conv.groups, -1)
    for group in range(conv.groups):
        assert_sums(of_group(moments, group), rows[:, group])


@pytest.mark.parametrize("options", [CONVOLUTIONS["strided"], CONVOLUTIONS["grouped"]], ids=["strided", "grouped"])
def test_output_side_holds_the_bias_free_output(options):
    conv = nn.Conv2d(4, 8, **options).double()
    x = torch.randn(3, 4, 6, 7, dtype=torch.float64)
    layer = lro.calibrate(nn.Sequential(conv), [x], side="output")["0"]
    y = (conv(x) - conv.bias.view(-1, 1, 1)).detach()
    rows = y.movedim(1, -1).reshape(-1, conv.groups, 8 // conv.groups)
    assert layer.side == "output"
    for group in range(conv.groups):
        assert_sums(of_group(layer.activations, group), rows[:, group], rtol=1e-11)


# --- sides ------------------------------------------------------------------------------------------------------


def test_auto_streams_the_output_beside_huge_patches():
    conv = nn.Conv2d(1024, 128, kernel_size=(64, 1))  # 65,536 patch features: 34 GB of input moment
    covariances = lro.calibrate(nn.Sequential(conv), [torch.randn(1, 1024, 66, 1)])
    assert covariances["0"].side == "output" and covariances["0"].activations.count == 3
    assert covariances.memory() < (128 * 128 + 3 * 128) * 8


@pytest.mark.parametrize("bias", [True, False])
def test_output_side_of_a_linear(bias):
    model = nn.Sequential(nn.Linear(8, 5, bias=bias)).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    moments = lro.calibrate(model, [x], side="output")["0"].activations
    assert_sums(moments, (x @ model[0].weight.T).detach().flatten(0, 1), rtol=1e-11)


def test_output_is_seen_before_user_hooks_change_it():
    model = nn.Sequential(nn.Linear(8, 5, bias=False)).double()
    model[0].register_forward_hook(lambda module, args, y: y * 100)
    x = torch.randn(9, 8, dtype=torch.float64)
    assert_sums(lro.calibrate(model, [x], side="output")["0"].activations, x @ model[0].weight.detach().T)


# --- the model is restored -----------------------------------------------------------------------------------------


def hooks_of(model):
    return [
        len(getattr(module, kind))
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]


def trained_model():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 2)
    )
    model[4].eval()  # mixed flags, as where some layers are frozen
    model[4].weight.requires_grad_(False)
    model(torch.randn(3, 2, 4, 4)).sum().backward()
    model[0].register_forward_hook(lambda module, args, y: None)
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_state_are_restored(fails):
    model = trained_model()
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    grads = [parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    hooks = hooks_of(model)
    random = torch.get_rng_state()

    def batches():
        for _ in range(2):
            yield torch.randn(3, 2, 4, 4)
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            lro.calibrate(model, batches())
    else:
        lro.calibrate(model, batches())

    assert torch.equal(random, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert needs == [parameter.requires_grad for parameter in model.parameters()]
    assert hooks == hooks_of(model)
    for name, tensor in model.state_dict().items():  # batch norm statistics included
        assert torch.equal(tensor, before[name]), name
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert (grad is None and parameter.grad is None) or torch.equal(grad, parameter.grad)


def test_bad_argument_leaves_no_hook():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="side"):
        lro.calibrate(model, [], side="left")
    assert not any(hooks_of(model))


def test_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 4)).train()
    x = torch.randn(20, 4)
    assert_sums(lro.calibrate(model, [x])["1"].activations, x)


def test_calibrator_keeps_the_gradients_of_the_users_loop():
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(6, 4)
    with lro.Calibrator(model) as calibrator:
        model(x).sum().backward()
        assert not hasattr(calibrator, "covariances")
    moments = calibrator.covariances["0"].activations
    assert_sums(moments, x)
    assert model[0].weight.grad is not None and not moments.second_moment.requires_grad


def test_autocast_does_not_round_the_sums():
    model = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(9, 8) + 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_sums(lro.calibrate(model, [x])["0"].activations, x)
        conv = nn.Sequential(nn.Conv2d(2, 3, 1, padding_mode="reflect", padding=1))
        image = torch.randn(2, 2, 3, 3)
        rows = F.pad(image, (1, 1, 1, 1), mode="reflect").movedim(1, -1).flatten(0, 2)
        assert_sums(lro.calibrate(conv, [image])["0"].activations, rows)


# --- errors and skipped layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["input", "output"])
def test_nan_and_inf_name_the_layer_and_the_batch(value, side):
    class Log(nn.Module):
        def forward(self, x):
            return torch.where(x > 5, value, x)

    model = nn.Sequential(nn.Linear(4, 4), Log(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    batches = [torch.zeros(2, 4), torch.zeros(2, 4), torch.full((2, 4), 10.0), torch.zeros(2, 4)]
    with pytest.raises(lro.NonFiniteActivationError, match=rf"layer '2': its {side} holds NaN or inf.*batch 2 "):
        lro.calibrate(model, batches, side=side)
    assert not any(hooks_of(model))


def test_nan_where_the_model_is_the_layer_names_the_batch():
    with pytest.raises(lro.NonFiniteActivationError, match="batch 1 "):
        lro.calibrate(nn.Linear(2, 2), [torch.zeros(1, 2), torch.full((1, 2), torch.nan)], side="output")


def test_nan_outside_the_forward_of_the_model():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(lro.NonFiniteActivationError, match=r"layer '0'.*a call outside the model's forward"):
        lro.calibrate(model, [torch.full((1, 2), torch.nan)], forward=lambda model, batch: model[0](batch))


def test_unreached_layers_are_listed():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.functional, self.idle = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return F.linear(self.used(x), self.functional.weight)  # no hook sees the second

    covariances = lro.calibrate(Unused(), [torch.randn(2, 4)])
    assert list(covariances) == ["used"]
    assert covariances.unreached == ("functional", "idle")


def test_multihead_attention_is_skipped_with_a_warning():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.attention(x, x, x)[0])

    x = torch.randn(2, 3, 8)
    with pytest.warns(UserWarning, match="attention: nn.MultiheadAttention applies its projections without calling"):
        covariances = lro.calibrate(Block(), [x])
    assert list(covariances) == ["fc"] and list(covariances.skipped) == ["attention"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        covariances = lro.calibrate(Block(), [x], filter_fn=lambda module, fqn: fqn == "fc")
    assert list(covariances.skipped) == ["attention"]
    with pytest.raises(ValueError, match=r"(?s)no supported Linear.*\(the model\): nn.MultiheadAttention"):
        lro.calibrate(nn.MultiheadAttention(8, 2), [x])


@pytest.mark.filterwarnings("ignore:calibration skips", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_encoder_with_fast_path_is_calibrated(padded, mode):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    batch = {"src": x, "src_key_padding_mask": padding} if padded else {"src": x}
    with mode():
        covariances = lro.calibrate(model, [batch])
    assert list(covariances) == [f"layers.{index}.linear{which}" for index in (0, 1) for which in (1, 2)]
    assert {layer.activations.count for layer in covariances.values()} == {13 if padded else 15}
    assert not covariances.unreached


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": "left"}, "side must be 'auto', 'input', 'output' or 'smaller'; got 'left'"),
        ({"dtype": torch.bfloat16}, "dtype must be torch.float32 or torch.float64.*got torch.bfloat16"),
        (
            {"filter_fn": lambda module, fqn: False},
            "model has no supported Linear, Conv1d, Conv2d or Conv1D that filter_fn keeps",
        ),
        ({"batches": []}, "batches was empty"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lro.calibrate(**{"model": nn.Linear(4, 4), "batches": [torch.randn(2, 4)], **arguments})


def test_float64_activations_need_float64_sums():
    with pytest.raises(ValueError, match="x is float64 but the state is float32"):
        lro.calibrate(nn.Linear(4, 4).double(), [torch.randn(2, 4).double()], dtype=torch.float32)


def test_filter_with_progress_bar():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    covariances = lro.calibrate(model, [torch.randn(2, 4)], filter_fn=lambda module, fqn: fqn == "1", progress=True)
    assert list(covariances) == ["1"]


def test_batch_of_the_wrong_width_names_the_layer():
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"layer '0' has an input of 8 features; a batch has 5"):
        lro.calibrate(model, [torch.randn(3, 5)])
