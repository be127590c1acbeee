"""Channels that a model reads outside their MLP are not dropped."""

import contextlib

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.models.layers import find_layers
from lowrank_ops.models.mlps import check_channels_apart, find_mlps
from tests.models.test_running import in_thread
from tests.test_compress_channels import Mlp, Net


class Around(nn.Module):
    """Uses an MLP in another way than its own forward does."""

    def __init__(self, use):
        super().__init__()
        self.stem, self.mlp, self.use = nn.Linear(20, 16), Mlp(), use

    def forward(self, x):
        return self.use(self.mlp, self.stem(x))


def mixed(mlp, x):
    return x + mlp.down(mlp.gate(x).softmax(-1) * mlp.up(x))


def normalized(mlp, x):
    return x + mlp.down(nn.functional.rms_norm(mlp.gate(x) * mlp.up(x), (48,)))


def read_by_another(mlp, x):
    return mlp(x) * mlp.up(x).mean(-1, keepdim=True).sigmoid()


def read_in_one_sample(mlp, x):
    return mlp(x) + mlp.gate(x[:1]).amax()


def product_with_a_weight(mlp, x):
    return mlp(x) + nn.functional.linear(x, mlp.up.weight).mean(-1, keepdim=True)


def transposed_weight(mlp, x):
    return mlp(x) + (x @ mlp.gate.weight.T).amax(-1, keepdim=True)


def norm_of_the_consumer(mlp, x):
    return mlp(x) / mlp.down.weight.data.norm()


def dtype_of_a_weight(mlp, x):
    return mlp(x.to(mlp.up.weight.dtype)) / mlp.up.weight.dim()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (mixed, "channels of mlp.down cannot be dropped: the model's output depends on them"),
        (normalized, "channels of mlp.down cannot be dropped"),
        (product_with_a_weight, "channels of mlp.down cannot be dropped"),
        (transposed_weight, "channels of mlp.down cannot be dropped"),
        (norm_of_the_consumer, "channels of mlp.down cannot be dropped"),
        (dtype_of_a_weight, None),
        (read_by_another, "the model has no MLP whose channels could be dropped.*nothing else runs them"),
        (read_in_one_sample, "the model has no MLP"),
    ],
)
@pytest.mark.parametrize("function", [lro.correct_predictions, lro.measured_ranks])
def test_channels_that_are_read_elsewhere_are_refused(use, message, function):
    torch.manual_seed(0)
    model, batches = Around(use).eval(), [torch.randn(32, 20) for _ in range(2)]
    covariances = lro.calibrate(model, batches, sensitivity="output")
    options = {"channels": True}
    if function is lro.measured_ranks:
        options = {"fraction": 0.6, "config": lro.CompressionConfig(channels=True)}
    state = torch.get_rng_state()
    with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message):
        function(model, covariances, batches, sensitivity="output", **options)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


class Counting(nn.Module):
    """Its output depends on how often it was called: by a buffer, or by an attribute."""

    def __init__(self, use, buffer):
        super().__init__()
        self.around, self.buffer, self.calls = Around(use), buffer, 0
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.last = self.last + 1
        return self.around(x) + (self.count * self.last if self.buffer else self.calls)


@pytest.mark.parametrize(
    ("use", "buffer", "message"),
    [
        (lambda mlp, x: x + mlp(x), True, None),
        (mixed, True, "channels of around.mlp.down cannot be dropped"),
        (lambda mlp, x: x + mlp(x), False, "output differs from call to call"),
        (mixed, False, "output differs from call to call"),
    ],
)
def test_channels_of_models_that_change_with_every_call(use, buffer, message):
    torch.manual_seed(0)
    model, batches = Counting(use, buffer).eval(), [torch.randn(32, 20)]
    covariances = lro.calibrate(model, batches, sensitivity="output")
    with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message):
        lro.correct_predictions(model, covariances, batches, sensitivity="output", channels=True)
    assert model.count == model.last == 2 - (message is not None)  # calls whose outputs count


@pytest.mark.parametrize("function", [lro.correct_predictions, lro.measured_ranks])
def test_other_threads_are_served_as_before(function):
    model, batches = Net().eval(), [torch.randn(32, 20)]
    covariances = lro.calibrate(model, batches, sensitivity="output")
    served = []

    def run(model_or_copy, batch):
        served.append(in_thread(lambda: model(batches[0])))
        return model_or_copy(batch)

    options = {"channels": True}
    if function is lro.measured_ranks:
        options = {"fraction": 0.6, "config": lro.CompressionConfig(channels=True), "rounds": 1}
    function(model, covariances, batches, sensitivity="output", forward=run, **options)
    assert len(served) > 2 and all(torch.equal(output, model(batches[0])) for output in served)


class Output:
    def __init__(self, **parts):
        vars(self).update(parts)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda y: Output(y=y), "channels of mlp.down cannot be dropped"),
        (lambda y: {"parts": [Output(y=y)]}, "channels of mlp.down cannot be dropped"),
        (lambda y: float(y.sum()), "no tensor was found in the model's output, a float"),
    ],
)
def test_outputs_that_are_objects_are_compared(wrap, message):
    torch.manual_seed(0)
    model, x = Around(mixed).eval(), torch.randn(32, 20)
    mlps = find_mlps(model, find_layers(model)[0])
    with pytest.raises(ValueError, match=message):
        check_channels_apart(model, mlps, lambda: wrap(model(x)))


def by_keyword(mlp, x):
    return x + mlp.down(input=nn.functional.silu(mlp.gate(input=x)) * mlp.up(x))


def test_layers_may_be_called_by_keyword_and_in_nested_encoders():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 48, batch_first=True), 2)
    model = nn.ModuleDict({"around": Around(by_keyword), "encoder": encoder}).eval().requires_grad_(False)
    x, padding = torch.randn(4, 6, 20), torch.arange(6) > torch.tensor([[5], [3], [2], [5]])

    def run(model, batch):
        return model["encoder"](model["around"](batch), src_key_padding_mask=padding)

    covariances = lro.calibrate(model, [x], sensitivity="output", forward=run)
    options = {"sensitivity": "output", "forward": run, "channels": ["around.mlp.down", "encoder.layers.1.linear2"]}
    spaces = lro.correct_predictions(model, covariances, [x], **options)
    assert all(spaces[name].channels is not None for name in options["channels"])


def test_only_the_mlp_that_is_read_elsewhere_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(Around(mixed), nn.Linear(16, 20), Around(lambda mlp, x: mlp(x))).eval()
    batches = [torch.randn(32, 20) for _ in range(2)]
    covariances = lro.calibrate(model, batches, sensitivity="output")
    with pytest.raises(ValueError, match=r"^channels of 0\.mlp\.down cannot"):
        lro.correct_predictions(model, covariances, batches, sensitivity="output", channels=True)
    lro.correct_predictions(model, covariances, batches, sensitivity="output", channels=["2.mlp.down"])
