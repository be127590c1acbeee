"""What a newcomer gets wrong, and what models bring that is not a plain tensor."""

import collections
import copy

import pytest
import torch
from torch import nn

import lowrank_ops as lro


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


BATCHES = [torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) for _ in range(3)]


def test_encoder_layers_run_their_factors_and_not_the_fast_path(monkeypatch) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, pad = torch.randn(4, 6, 32), torch.zeros(4, 6, dtype=torch.bool)
    pad[0, 3:] = True
    covariances = lro.calibrate(model, [torch.randn(50, 6, 32), x])
    dense = copy.deepcopy(model)
    fqns = [fqn for fqn in covariances if "linear" in fqn]
    full = dict.fromkeys(fqns, 32)
    lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks(full)))
    calls = []
    for module in model.modules():
        if isinstance(module, lro.LowRankLinear):
            monkeypatch.setattr(module, "forward", lambda y, own=module.forward: (calls.append(1), own(y))[1])
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)
        assert len(calls) == len(fqns) == 4
        found, expected = model(x, src_key_padding_mask=pad), dense(x, src_key_padding_mask=pad)
        torch.testing.assert_close(found[~pad], expected[~pad], rtol=1e-4, atol=1e-4)


def test_nested_tensors_go_through_a_factorised_layer() -> None:
    layer = lro.LowRankLinear(8, 6, 4)
    parts = [torch.randn(3, 8), torch.randn(5, 8)]
    nested = layer(torch.nested.nested_tensor(parts))
    for found, part in zip(nested.unbind(), parts, strict=True):
        torch.testing.assert_close(found, layer(part))


def test_made_in_inference_mode_it_can_still_be_trained() -> None:
    model = small()
    with torch.inference_mode():
        covariances = lro.calibrate(model, BATCHES)
        lro.compress_(model, covariances, lro.CompressionConfig(lro.ParameterBudget(0.8)))
    model(BATCHES[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_packed_sequences_and_named_tuples_are_one_argument() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, packed):
            return self.head(self.lstm(packed)[0].data)

    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 4), torch.randn(3, 4)])
    assert lro.calibrate(Recurrent(), [packed])["head"].count == 8

    pair = collections.namedtuple("pair", "left right")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, both):
            return self.head(both.left + both.right)

    assert lro.calibrate(Two(), [pair(torch.randn(3, 4), torch.randn(3, 4))])["head"].count == 3


def test_from_linear_checks_what_it_is_given() -> None:
    model = small()
    covariances = lro.calibrate(model, BATCHES)
    for covariance in (None, covariances["0"]):
        with pytest.raises(ValueError, match=r"projection must be one of .*got 'zzz'"):
            lro.LowRankLinear.from_linear(model[0], 8, covariance, projection="zzz")
    with pytest.raises(TypeError, match=r"covariances\['name'\]; got Covariances"):
        lro.LowRankLinear.from_linear(model[0], 8, covariances)


@pytest.mark.parametrize("shape", [(8, 1), (4, 3, 5, 5)])
def test_fisher_needs_classes_in_the_last_dimension(shape) -> None:
    model = nn.Sequential(nn.Linear(32, 10))
    with pytest.raises(ValueError, match=r"logits of shape \(\.\.\., classes\)"):
        lro.calibrate(
            model,
            BATCHES,
            sensitivity="fisher",
            forward=lambda m, b: m(b).sum() + torch.zeros(shape, requires_grad=True),
        )


def test_calibrate_says_what_is_wrong_with_its_arguments() -> None:
    model = small()
    for batches, kind in ((BATCHES[0], "Tensor"), ({"input": BATCHES[0]}, "dict")):
        with pytest.raises(TypeError, match=rf"got one {kind}\. Pass \[batch\]"):
            lro.calibrate(model, batches)
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        lro.calibrate(torch.compile(model), BATCHES)
    in_place = small()
    in_place.compile()
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        lro.calibrate(in_place, BATCHES)


def test_compress_says_what_is_wrong_with_its_arguments() -> None:
    model = small()
    covariances = lro.calibrate(model, BATCHES)
    with pytest.raises(TypeError, match=r"config must be a CompressionConfig; got ParameterBudget\. Wrap"):
        lro.compress_(model, covariances, lro.ParameterBudget(0.5))
    with pytest.raises(TypeError, match=r"must come from calibrate\(model, batches\); got list"):
        lro.compress_(model, BATCHES)
    for wrong in (["0"], {0: 3}):
        with pytest.raises(TypeError, match=r"overrides must be a mapping"):
            lro.CompressionConfig(overrides=wrong)
        with pytest.raises(TypeError, match=r"ranks must be a mapping"):
            lro.Ranks(wrong)
    lro.compress_(model, covariances, lro.CompressionConfig(lro.Ranks({"0": 8, "2": 8})))
    with pytest.raises(ValueError, match=r"can be replaced and that filter_fn keeps"):
        lro.compress_(model, lro.Covariances())


@pytest.mark.parametrize("returned", [float("nan"), None, "good"])
def test_accuracy_has_to_be_a_number_and_training_flags_stay(returned) -> None:
    model = small().train()
    covariances = lro.calibrate(model, BATCHES)

    def evaluate(compressed):
        compressed.eval()
        return returned

    config = lro.CompressionConfig(lro.AccuracyGuided(evaluate, 0.1, allocation="variance"))
    before = [type(module) for module in model]
    with pytest.raises(ValueError, match=r"evaluate must return the model's accuracy as a finite number"):
        lro.compress_(model, covariances, config)
    assert [type(module) for module in model] == before
    assert all(module.training for module in model.modules())


def test_finetuning_refuses_what_would_ruin_the_weights(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the gradient is not finite at step 0"):
        lro.finetune_(model, [torch.randn(3, 4)], loss=lambda output, batch: (output * 0).abs().sqrt().sum())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    loss = lambda output, batch: output.square().mean()  # noqa: E731
    with pytest.raises(ValueError, match=r"float16 parameters.*student\.float\(\)"):
        lro.finetune_(copy.deepcopy(model).half(), [torch.randn(3, 4)], loss=loss)
    with pytest.raises(ValueError, match=r"in a folder that does not exist"):
        lro.finetune_(model, [torch.randn(3, 4)], loss=loss, checkpoint=tmp_path / "none" / "x.pt")
    lro.finetune_(model, [torch.randn(3, 4)], loss=loss, checkpoint=tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"is of a run with"):
        lro.finetune_(model, [torch.randn(3, 4)], loss=loss, clip=2.0, checkpoint=tmp_path / "x.pt")
