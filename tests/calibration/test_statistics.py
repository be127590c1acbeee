"""Moments and Covariances: means, merge, files, several processes."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowrank_ops as lro
from lowrank_ops.calibration import Moments
from tests.calibration.comparing import assert_same_statistics, shared_inputs
from tests.rewriting import rewrite


class Model(nn.Module):
    """Two layers that share their input, a grouped convolution, a layer never reached and one that is skipped."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 2, groups=2)
        self.a, self.b = nn.Linear(16, 5), nn.Linear(16, 3)
        self.idle = nn.Linear(2, 2)
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        x = self.conv(x).flatten(1)
        return self.a(x), self.b(x)


def calibrated(x, model=None, **options):
    model = model or Model()
    return lro.calibrate(model, [x], filter_fn=lambda module, fqn: True, **options)


def images(count=6):
    return torch.randn(count, 4, 3, 3)


# --- moments ----------------------------------------------------------------------------------------------------


def test_moments_are_means_over_the_rows():
    rows = torch.randn(50, 6, dtype=torch.float64) + 3
    moments = lro.calibrate(nn.Linear(6, 2).double(), [rows])[""].activations
    torch.testing.assert_close(moments.mean, rows.mean(0))
    torch.testing.assert_close(moments.moment(centered=False), rows.T @ rows / 50)
    torch.testing.assert_close(moments.moment(centered=True), torch.cov(rows.T, correction=0))
    torch.testing.assert_close(moments.about(None).second_moment, rows.T @ rows)  # moment() changed nothing


def test_moments_without_rows_are_zero():
    moments = Moments(torch.zeros(3, 3), torch.zeros(3))
    assert moments.mean.abs().sum() == 0 and moments.moment(centered=True).abs().sum() == 0


def test_variance_below_rounding_is_zero():
    rows = torch.full((1000, 3), 0.1, dtype=torch.float64)
    rows[:, 0] += torch.linspace(-1e-3, 1e-3, 1000)
    moment = lro.calibrate(nn.Linear(3, 2).double(), [rows])[""].activations.moment(centered=True)
    assert moment[0, 0] > 1e-7 and torch.count_nonzero(moment) == 1


# --- the mapping ------------------------------------------------------------------------------------------------


def test_shared_moments_are_stored_once():
    covariances = calibrated(images())
    assert list(covariances) == ["conv", "a", "b"] and len(covariances) == 3
    assert shared_inputs(covariances) == [["conv"], ["a", "b"]]
    assert covariances.memory() == 8 * ((2 * 8 * 8 + 2 * 8) + (16 * 16 + 16))
    assert repr(covariances) == "Covariances(3 layers, 1 shared, 0.0 MiB)"
    assert covariances.unreached == ("idle",)
    assert list(covariances.skipped) == ["attention"]


# --- damping ----------------------------------------------------------------------------------------------------


def assert_own_memory(new, old):
    """``all_reduce_`` sums in place, which must not change the statistics that others were made from."""
    for fqn, layer in new.items():
        for name, moments in layer.moments().items():
            for key in ("second_moment", "total"):
                pointers = {part.tensors()[key].data_ptr() for part in (moments, old[fqn].moments()[name])}
                assert len(pointers) == 2, (fqn, name, key)


@pytest.mark.parametrize("place", ["memory", "packed", "disk"])
def test_damped_adds_noise_to_every_feature(place):
    covariances = calibrated(images(), sensitivity="output")
    before = {fqn: copy.deepcopy(layer.moments()) for fqn, layer in covariances.items()}
    if place != "memory":
        covariances.pack_("disk" if place == "disk" else None)
    damped = covariances.damped(0.1, output_gradients=0.02)
    assert damped.unreached == covariances.unreached and shared_inputs(damped) == [["conv"], ["a", "b"]]
    for fqn, layer in damped.items():
        for name, moments in layer.moments().items():
            old, centered = before[fqn][name], name != "output_gradients"
            of_features = old.moment(centered=centered).diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
            noise = (0.02 if name == "output_gradients" else 0.1) * of_features
            expected = old.moment(centered=centered) + torch.diag_embed(noise.expand(old.mean.shape))
            torch.testing.assert_close(moments.moment(centered=centered), expected)
            torch.testing.assert_close(moments.mean, old.mean)
            assert moments.is_packed == (place != "memory")
            assert covariances[fqn].moments()[name].equals(before[fqn][name]) or moments.is_packed  # not changed
    assert_own_memory(damped, covariances)


def test_damped_factors_bear_noise_better():
    model, rows = nn.Sequential(nn.Linear(32, 32)), torch.randn(400, 4) @ torch.randn(4, 32)
    rows += 1e-3 * torch.randn_like(rows)
    noisy = rows + 0.3 * rows.std() * torch.randn_like(rows)
    covariances, errors = lro.calibrate(model, [rows]), []
    for given in (covariances, covariances.damped(0.09)):
        compressed = copy.deepcopy(model)
        lro.compress_(compressed, given, lro.CompressionConfig(8))
        errors.append((compressed(noisy) - model(noisy)).square().mean().item())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("arguments", [(-0.1,), (float("inf"),), (0.1, -1.0), (0.1, float("nan"))])
def test_damping_refuses_impossible_noise(arguments):
    with pytest.raises(ValueError, match="must be a finite number >= 0"):
        calibrated(images()).damped(*arguments)


def test_damping_refuses_streamed_outputs():
    covariances = calibrated(images(), side="output")
    with pytest.raises(ValueError, match=r'only the outputs of these layers.*conv, a, b.*side="input"'):
        covariances.damped(0.1)


# --- merge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output"])
def test_merge_equals_calibrating_on_both(side):
    model, x = Model(), images(10)
    parts = [calibrated(part, model, side=side) for part in x.split(4)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert_same_statistics(merged, calibrated(x, model, side=side), 1e-6)
    assert parts[0]["a"].activations.count == 4  # the parts are unchanged
    assert_own_memory(parts[0].merge(parts[1]), parts[0])
    none = lro.Covariances({}, tuple(parts[0]))
    assert_own_memory(none.merge(parts[0]), parts[0])  # of layers that only one of them has reached


def test_merge_of_other_sides_names_the_layers():
    model = Model()
    with pytest.raises(ValueError, match=r"other and this one must hold the same layers.*they differ at conv, a, b\."):
        calibrated(images(), model).merge(calibrated(images(), model, side="output"))
    with pytest.raises(ValueError, match=r"other and this one must all hold output gradients, or none"):
        calibrated(images(), model).merge(
            calibrated(images(), model, sensitivity=lambda output, batch: output[0].sum())
        )


def test_merge_with_other_sharing_shares_what_both_share():
    model, x = Model(), images()
    alone = calibrated(x, model, share_inputs=False)
    merged, whole = calibrated(x, model).merge(alone), calibrated(torch.cat([x, x]), model)
    assert shared_inputs(merged) == [["conv"], ["a"], ["b"]]
    for fqn in whole:
        torch.testing.assert_close(merged[fqn].activations.second_moment, whole[fqn].activations.second_moment)


def test_merge_names_missing_layers():
    model = Model()
    less = lro.calibrate(model, [images()], filter_fn=lambda module, fqn: fqn != "conv")
    with pytest.raises(ValueError, match=r"they differ at conv\."):
        less.merge(calibrated(images(), model))


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"side": "output"}, {"dtype": torch.float32}])
def test_save_and_load(tmp_path, options):
    covariances = calibrated(images(), **options)
    covariances.save(tmp_path / "c.safetensors")
    loaded = lro.Covariances.load(str(tmp_path / "c.safetensors"))
    assert_same_statistics(loaded, covariances, 0)
    assert_same_statistics(loaded.merge(covariances), covariances.merge(covariances), 0)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-10])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:20])


def empty(path):
    path.write_bytes(b"")


def a_pickle(path):
    torch.save({"a": torch.ones(2)}, path)


def foreign(path):
    save_file({"a": torch.ones(2)}, path)


def of_another_format(path):
    save_file({"a": torch.ones(2)}, path, metadata={"lowrank_ops": json.dumps({"format": "lowrank_ops.covariances/9"})})


def without_layers(path):
    header = {"format": "lowrank_ops.covariances/2", "counts": []}
    save_file({"a": torch.ones(2)}, path, metadata={"lowrank_ops": json.dumps(header)})


def without_layers_in_version_1(path):
    header = {"format": "lowrank_ops.covariances/1", "entries": []}
    save_file({"a": torch.ones(2)}, path, metadata={"lowrank_ops": json.dumps(header)})


@pytest.mark.parametrize(
    "spoil",
    [
        truncated,
        cut_in_the_header,
        empty,
        a_pickle,
        foreign,
        of_another_format,
        without_layers,
        without_layers_in_version_1,
    ],
)
def test_unreadable_file_is_a_value_error(tmp_path, spoil):
    path = tmp_path / "c.safetensors"
    calibrated(images()).save(path)
    spoil(path)
    with pytest.raises(ValueError, match=r"path '.*c\.safetensors' is not a whole file written by Covariances\.save: "):
        lro.Covariances.load(path)


def entry(**values):
    return lambda header, tensors: header["layers"]["a"].update(values)


def sums(name, change):
    return lambda header, tensors: tensors.update({name: change(tensors[name])})


def at(value, *index):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


IMPOSSIBLE = {
    "negative count": (lambda header, tensors: header["counts"].__setitem__(1, -5), "layer 'a'.*count -5"),
    "count as text": (lambda header, tensors: header["counts"].__setitem__(1, "7"), "count '7'"),
    "no count": (lambda header, tensors: header["counts"].__setitem__(1, None), "count None"),
    "half a count": (lambda header, tensors: header["counts"].__setitem__(1, 1.5), "count 1.5"),
    "count as bool": (lambda header, tensors: header["counts"].__setitem__(1, True), "count True"),
    "counts as mapping": (lambda header, tensors: header.update(counts={}), "'counts' or 'layers'"),
    "layers as text": (lambda header, tensors: header.update(layers="abc"), "'counts' or 'layers'"),
    "entry as list": (lambda header, tensors: header["layers"].update(a=[1]), "entry of layer 'a'"),
    "index from the end": (entry(activations=-1), "'a' has activations -1"),
    "index as bool": (entry(activations=True), "'a' has activations True"),
    "index too large": (entry(activations=2), "'a' has activations 2"),
    "other side": (entry(side="left"), "layer 'a': side is 'left'"),
    "unknown field": (entry(sigma=1), "entry of layer 'a'"),
    "moments of no layer": (lambda header, tensors: header["layers"].pop("conv"), "moments of no layer"),
    "unreached as text": (lambda header, tensors: header.update(unreached="idle"), "'unreached'"),
    "skipped as list": (lambda header, tensors: header.update(skipped=["attention"]), "'skipped'"),
    "rectangular moment": (sums("1.second_moment", lambda t: t[:5]), r"a second_moment has shape \(5,\)"),
    "integers": (sums("1.second_moment", torch.Tensor.long), "second_moment of torch.int64"),
    "complex": (sums("1.total", lambda t: t.to(torch.complex64)), "torch.complex64"),
    "half precision": (sums("1.total", torch.Tensor.half), "torch.float16"),
    "two dtypes": (sums("1.total", torch.Tensor.float), "both float32"),
    "NaN beside the diagonal": (sums("1.second_moment", at(float("nan"), 8)), "NaN or inf in its second_moment"),
    "short shift": (sums("1.shift", lambda t: t[:5]), r"a shift of shape \(5,\)"),
    "NaN in the shift": (sums("1.shift", at(float("nan"), 2)), "NaN or inf in its shift"),
    "inf in the total": (sums("1.total", at(float("inf"), 2)), "NaN or inf in its total"),
    "negative square": (sums("1.second_moment", at(-1.0, 5)), "negative sum of squares"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_sums_that_no_rows_have_are_refused(tmp_path, name):
    change, message = IMPOSSIBLE[name]
    path = tmp_path / "c.safetensors"
    covariances = calibrated(images())
    covariances["a"].activations.shift = torch.zeros(16)
    covariances.save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=f"not a whole file written by Covariances.save: .*{message}"):
        lro.Covariances.load(path)


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "c.safetensors"
    calibrated(images()).save(path)
    content, expected, loaded = path.read_bytes(), lro.Covariances.load(path), 0
    for position in torch.randint(len(content), (150,)).tolist():
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            found = lro.Covariances.load(path)
        except ValueError:
            continue
        loaded += 1  # a flip in what is not read
        assert_same_statistics(found, expected, 0)
        assert found.unreached == expected.unreached and found.skipped == expected.skipped
    assert loaded < 5
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="differ from their checksum"):
        lro.Covariances.load(path)
    lro.Covariances.load(path, verify=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["second_moment", "total", "weight"])
def test_what_is_not_finite_is_not_compressed(value, where):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    covariances = lro.calibrate(model, [torch.randn(40, 16)], sensitivity="output")
    before = copy.deepcopy(list(model.named_modules()))
    with torch.no_grad():
        if where == "weight":
            model[2].weight[3, 3] = value
        else:
            getattr(covariances["2"].output_gradients, where)[..., 3] = value
    for use in (lambda: lro.compress_(model, covariances, 8), lambda: lro.utilization(model, covariances)):
        with pytest.raises(ValueError, match=r"covariances\['2'\]: .*NaN or inf"):
            use()
    assert [name for name, _ in before] == [name for name, _ in model.named_modules()]


def test_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        lro.Covariances.load(tmp_path / "none.safetensors")


# --- several processes ------------------------------------------------------------------------------------------


def test_all_reduce_over_one_process_changes_nothing(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        covariances = calibrated(images())
        before = copy.deepcopy(covariances)
        assert covariances.all_reduce_() is covariances
        assert_same_statistics(covariances, before, 0)
    finally:
        torch.distributed.destroy_process_group()
