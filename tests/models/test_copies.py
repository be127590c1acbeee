"""A copy that shares the parameters computes the same and is independent, or the model is refused."""

import functools
import types
import weakref
from threading import Lock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lowrank_ops.models.copies import filter_of_original, shared_copy

X = torch.ones(4, 8)


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)).eval()


class Around(nn.Module):
    """A model that reads what its ``prepare`` has arranged."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kept = base(), []
        self.prepare()

    def prepare(self) -> None:
        pass

    def forward(self, x):
        self.kept.clear()
        y = self.body(x)
        return self.kept[0] if self.kept else y


class BoundHook(Around):
    def prepare(self) -> None:
        self.body[2].register_forward_hook(self.keep)

    def keep(self, module, args, output) -> None:
        self.kept.append(2 * output)


class PartialHook(Around):
    def prepare(self) -> None:
        self.body[2].register_forward_hook(functools.partial(PartialHook.keep, self))

    keep = BoundHook.keep


class ClosureHook(Around):
    def prepare(self) -> None:
        self.body[2].register_forward_hook(lambda module, args, output: self.kept.append(output))


class ListInClosure(Around):
    def prepare(self) -> None:
        kept = self.kept
        self.body[2].register_forward_hook(lambda module, args, output: kept.append(output))


class MethodOfAList(Around):
    def prepare(self) -> None:
        self.add = self.kept.append


class ForwardInClosure(Around):
    def prepare(self) -> None:
        old = self.body[0].forward
        self.body[0].forward = lambda x: 2 * old(x)


class BoundForward(Around):
    def prepare(self) -> None:
        self.body.forward = types.MethodType(lambda self, x: self[2](self[0](x)), self.body)


class Cached(Around):
    def prepare(self) -> None:
        self.run = functools.lru_cache(self.body.forward)


class InAList(Around):
    def prepare(self) -> None:
        self.body[2].parents = [self]
        self.hidden = [base()]


class WeakParent(Around):
    def prepare(self) -> None:
        self.body[2].parent = weakref.ref(self)


class ProxyOfParent(Around):
    def prepare(self) -> None:
        self.body[2].parent = [weakref.proxy(self)]


class Locked(Around):
    def prepare(self) -> None:
        self.body[2].state = {"lock": Lock()}


GLOBAL: dict[str, nn.Module] = {}  # as names of a notebook


def doubled(x):
    return 2 * GLOBAL["layer"].forward(x)


class GlobalInAFunction(Around):
    def prepare(self) -> None:
        GLOBAL["layer"] = self.body[0]
        self.body[1].forward = lambda x: doubled(x)


class GlobalInForward(Around):
    def prepare(self) -> None:
        GLOBAL["layer"] = self.body[0]

    def forward(self, x):
        return GLOBAL["layer"](x)


class Fresh(nn.Linear):
    def __deepcopy__(self, memo):
        return Fresh(8, 8)


class Itself(nn.Linear):
    def __deepcopy__(self, memo):
        return self


def holding(layer: nn.Module) -> nn.Module:
    return nn.Sequential(base(), layer)


def ran(model: nn.Module) -> nn.Module:
    """``kept`` holds a result with a graph."""
    model(X)
    return model


def tied() -> nn.Module:
    model = base()
    model[2].weight = model[0].weight
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "make",
    [
        base, tied, Around, lambda: ran(BoundHook()), PartialHook, BoundForward, InAList,
        lambda: holding(nn.utils.weight_norm(nn.Linear(8, 8))),
        lambda: holding(parametrizations.spectral_norm(nn.Linear(8, 8))),
        lambda: holding(prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)),
        lambda: holding(torch.fx.symbolic_trace(base())),
    ],
)  # fmt: skip
def test_a_copy_computes_the_same_and_is_independent(make) -> None:
    model = make().eval()
    with torch.no_grad():
        expected = model(X)
        copied = shared_copy(model)
        assert torch.equal(copied(X), expected)
        mine = {parameter.data_ptr(): parameter for parameter in model.parameters()}
        for parameter in copied.parameters():
            own = mine[parameter.data_ptr()]
            assert own is not parameter and own.requires_grad == parameter.requires_grad
        for module in copied.modules():  # new parameters, as in new layers
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter + 1)
        copied.double().train()
        assert not torch.equal(copied(X.double()).float(), expected)
        assert torch.equal(model(X), expected)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ClosureHook, r"in the copy, body\.2\._forward_hooks would still refer to the model's own ClosureHook"),
        (ListInClosure, r"in the copy, body\.2\._forward_hooks would still refer to the model's own list"),
        (MethodOfAList, r"in the copy, model\.add would still refer to the model's own list"),
        (ForwardInClosure, r"in the copy, body\.0\.forward would still refer to the model's own Linear"),
        (GlobalInAFunction, r"in the copy, body\.1\.forward would still refer to the model's own Linear"),
        (GlobalInForward, r"in the copy, model\.forward would still refer to the model's own Linear"),
        (Cached, r"in the copy, model\.run would still refer to the model's own Sequential"),
        (WeakParent, r"in the copy, body\.2\.parent would still refer to the model's own WeakParent"),
        (ProxyOfParent, r"body\.2\.parent holds a weak proxy"),
        (Locked, r"body\.2\.state raises TypeError"),
        (lambda: holding(Fresh(8, 8)), r"copy.deepcopy returns another parameter '1\.(weight|bias)'"),
        (lambda: holding(Itself(8, 8)), r"in the copy, model\._modules would still refer to the model's own Itself"),
    ],
)
def test_a_model_that_cannot_be_copied_is_refused(make, message) -> None:
    model = make()
    GLOBAL["other"] = base()
    with pytest.raises(ValueError, match=f"model cannot be copied: {message}"):
        shared_copy(model)


def test_inference_tensors_are_shared() -> None:
    with torch.inference_mode():
        model = base()
    with torch.no_grad():
        assert torch.equal(shared_copy(model)(X), model(X))
    plain = base()
    with torch.inference_mode():
        copied = shared_copy(plain)
    copied(X).sum().backward()
    assert copied[0].weight.grad is not None and plain[0].weight.grad is None


def test_buffers_are_copied_and_views_of_each_other_stay_views() -> None:
    model = base()
    model[1].register_buffer("window", model[1].running_mean[2:6])
    copied = shared_copy(model)
    copied[1].running_mean += 1
    assert torch.equal(copied[1].window, torch.ones(4)) and not model[1].running_mean.any()


def test_a_filter_gets_the_layers_of_the_model() -> None:
    model = base()
    chosen = filter_of_original(model, lambda module, fqn: module is model[2])
    assert [fqn for fqn, module in shared_copy(model).named_modules() if chosen(module, fqn)] == ["2"]
    assert filter_of_original(model, None) is None
