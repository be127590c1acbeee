"""Groups of low-rank layers: the outputs of one call serve the other members, and never where they might be stale."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.layers import group_
from lowrank_ops.layers.group import groups_in


class Attention(nn.Module):
    def __init__(self, members=3, **options):
        super().__init__()
        torch.manual_seed(0)
        for name in "qkv"[:members]:
            setattr(self, name, lro.LowRankLinear(24, 16, 8, **options))

    def forward(self, x):
        return [layer(x) for layer in self.children()]


@pytest.fixture
def model():
    return group_(Attention(), ["qkv"])


def alone(layer, x):
    """What the layer computes without a group."""
    return lro.ops.lowrank_linear(x, layer.down, layer.up, layer.bias)


def assert_right(model, x):
    ys = model(x)
    torch.testing.assert_close(ys, [alone(layer, x) for layer in model.children()], rtol=0, atol=0)
    return ys


@torch.no_grad()
def test_one_call_serves_all_members(group_calls, model):
    for _ in range(3):
        ys = assert_right(model, torch.randn(5, 24))
    assert len(group_calls) == 3
    assert len({y.untyped_storage().data_ptr() for y in ys}) == 3
    x = torch.randn(5, 24)
    assert_right(model, x)
    assert_right(model, x)  # the outputs were taken: the same x is computed again
    assert len(group_calls) == 5


def test_without_kernels_every_member_runs_alone(model):
    with torch.no_grad():
        assert_right(model, torch.randn(5, 24))
    assert not hasattr(model.q.group._local, "left")


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model, x: x.add_(1),
        lambda model, x: x.resize_(4, 24),
        lambda model, x: x.set_(torch.randn(5, 24)),
        lambda model, x: setattr(x, "data", torch.randn(5, 24)),
        lambda model, x: model.k.up.add_(1),
        lambda model, x: setattr(model.k.bias, "data", torch.randn(16)),
        lambda model, x: setattr(model.k, "down", nn.Parameter(torch.randn(8, 24))),
        lambda model, x: model.k.load_state_dict(lro.LowRankLinear(24, 16, 8).state_dict()),
        lambda model, x: setattr(model, "k", lro.LowRankLinear(24, 16, 8)),
        lambda model, x: setattr(model, "k", copy.deepcopy(model.k).requires_grad_(False)),
    ],
    ids=["add_", "resize_", "set_", "data of x", "factor", "data of a bias", "parameter", "load", "replaced", "copied"],
)
def test_changes_between_two_calls_are_noticed(group_calls, model, change):
    x = torch.randn(5, 24)
    model.q(x)
    change(model, x)
    for layer in (model.k, model.v):
        torch.testing.assert_close(layer(x), alone(layer, x), rtol=0, atol=0)
    assert_right(model, torch.randn(5, 24))


@torch.no_grad()
def test_address_of_a_freed_input_is_not_mistaken(group_calls, model):
    for _ in range(20):
        x = torch.randn(5, 24)
        model.q(x)
        group_calls.clear()
        del x  # the next one probably gets its address
        x = torch.randn(5, 24)
        torch.testing.assert_close(model.k(x), alone(model.k, x), rtol=0, atol=0)


@torch.no_grad()
def test_outputs_are_freed_with_the_input(group_calls, model):
    x = torch.randn(5, 24)
    model.q(x)
    outputs = model.q.group._local.left.outputs
    assert len(outputs) == 2
    del x, group_calls[:]
    gc.collect()
    assert not outputs


def test_gradients_are_those_of_single_layers(group_calls, model):
    x = torch.randn(5, 24, requires_grad=True)
    with torch.no_grad():
        model.q(x)
    q, k, _ = model(x)
    q.sum().backward()
    k.sum().backward()  # layers of one graph would have freed it
    assert model.k.up.grad is not None and model.v.up.grad is None and len(group_calls) == 1


@torch.no_grad()
def test_modes_run_members_alone(group_calls, model):
    x = torch.randn(5, 24)
    model.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.k(x).dtype is torch.bfloat16
    with torch.profiler.profile():
        model.k(x)
    torch.testing.assert_close(torch.func.vmap(model.v)(x), alone(model.v, x))
    with torch.inference_mode():
        assert model.k(x).is_inference()
        inner = torch.randn(5, 24)
        count = len(group_calls)
        model.q(inner)
        inner.add_(1)  # has no version by which that could be noticed
        torch.testing.assert_close(model.k(inner), alone(model.k, inner))
        assert len(group_calls) == count
    assert not model.v(x).is_inference()


@torch.no_grad()
def test_compiled_and_exported_graphs_hold_single_ops(group_calls, model):
    x = torch.randn(5, 24)
    model.q(x)
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1])
    expected = [alone(layer, x) for layer in model.children()]
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(model, (x,))
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert targets == ["lowrank_ops.lowrank_linear"] * 3
    torch.testing.assert_close(exported.module()(x + 1), [alone(layer, x + 1) for layer in model.children()])
    traced = torch.jit.trace(model, x, check_trace=False, strict=False)
    torch.testing.assert_close(traced(x + 1), [alone(layer, x + 1) for layer in model.children()])
    assert len(group_calls) == 1


@torch.no_grad()
def test_threads_do_not_share_outputs(group_calls, model):
    model.requires_grad_(False)  # the grad mode is that of each thread
    x, wrong = torch.randn(5, 24), []

    def run():
        for _ in range(50):
            y = torch.randn(5, 24)
            for value in (x, y):
                if any(
                    not torch.equal(out, alone(layer, value)) for layer in model.children() for out in [layer(value)]
                ):
                    wrong.append(value)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    model.q(x)
    other = threading.Thread(target=lambda: model.k(x))
    count = len(group_calls)
    other.start()
    other.join()
    assert len(group_calls) == count + 1


@torch.no_grad()
def test_a_group_whose_outputs_are_left_stops(group_calls, model):
    for _ in range(10):
        for layer in model.children():
            layer(torch.randn(5, 24))
    assert len(group_calls) == 4
    assert_right(model, torch.randn(5, 24))


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies_of_all_members_are_a_group(group_calls, model, make):
    x = torch.randn(5, 24)
    model.q(x)
    twin = make(model)
    assert twin.q.group is twin.v.group is not model.q.group
    twin.k.up.add_(1)
    assert_right(twin, x)
    assert len(group_calls) == 2
    single = make(model.q)
    torch.testing.assert_close(single(x), alone(model.q, x))
    copy.copy(model.k)  # does not take the place of the original
    assert_right(model, torch.randn(5, 24))
    assert len(group_calls) == 3
    assert model.state_dict().keys() == Attention().state_dict().keys()


@torch.no_grad()
def test_moved_members_and_other_shapes(group_calls, model):
    assert_right(model.double(), torch.randn(5, 24).double())
    assert_right(model, torch.randn(2, 3, 24).double())
    with pytest.raises(ValueError, match=r"down must have shape \(rank, 23\)"):
        model.q(torch.randn(5, 23).double())
    model.k.float()  # members that no longer fit run alone
    torch.testing.assert_close(model.q(x := torch.randn(5, 24).double()), alone(model.q, x))
    assert len(group_calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("how", ["parametrized", "8-bit"])
def test_members_with_other_factors_run_alone(group_calls, model, how):
    if how == "8-bit":
        model.k.quantize_()
    else:
        nn.utils.parametrizations.weight_norm(model.k, "up")
    x = torch.randn(5, 24)
    torch.testing.assert_close(model.q(x), alone(model.q, x))
    torch.testing.assert_close(model.k(x), x @ model.k.product().T + model.k.bias)
    assert not group_calls


@torch.no_grad()
def test_a_new_group_ends_the_old_one(group_calls, model):
    group_(model, ["qk"])
    assert_right(model, torch.randn(5, 24))
    assert len(group_calls) == 1 and model.v.group.members() == [model.v]
    assert groups_in(model) == [["q", "k"]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["q", "head"]], "groups names 'head', a Linear; it must be a LowRankLinear."),
        ([["q", "no"]], "groups names 'no', no such layer; it must be a LowRankLinear."),
        ([["q", "k"], ["k", "v"]], "groups names the layer 'k' twice; a layer can be in one group."),
        ([["q"]], "groups must hold 2 to 3 layers each; got ['q']."),
        ([["q", "k"], ["v", "wide"]], "the layers ['v', 'wide'] differ in in_features, dtype or device: "),
    ],
)
def test_wrong_groups_change_nothing(groups, message):
    model = Attention()
    model.head, model.wide = nn.Linear(24, 16), lro.LowRankLinear(32, 16, 8)
    with pytest.raises(ValueError) as raised:
        group_(model, groups)
    assert str(raised.value).startswith(message)
    assert all(layer.group is None for layer in (model.q, model.k, model.v))


@torch.no_grad()
def test_a_transformers_model_calls_each_group_once(group_calls, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(50, (2, 9))
    covariances = lro.calibrate(model, [{"input_ids": torch.randint(50, (8, 16))}])
    report = lro.compress_(model, covariances, lro.CompressionConfig(8, group=True))
    single = copy.deepcopy(model)
    for layer in single.modules():
        if isinstance(layer, lro.LowRankLinear):
            layer.group = None
    expected, count = single(tokens).logits, len(group_calls)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)
    assert len(group_calls) - count == len(report.groups) == 4
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **options), single.generate(tokens, **options))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert groups_in(loaded) == groups_in(model) == [list(group) for group in report.groups]
    assert torch.equal(loaded(tokens).logits, expected)
