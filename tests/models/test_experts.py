"""Fused experts as Linears: found, run, calibrated, compressed, saved."""

import copy
import pickle
from pathlib import Path
from threading import current_thread, main_thread

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.calibration import Calibrator
from lowrank_ops.files import digest
from lowrank_ops.layers.replace import replace_
from lowrank_ops.models.experts import MIN_ROWS, ExpertLinear, ListedExperts, experts_listed, list_experts
from lowrank_ops.models.layers import find_layers
from tests.mixtures import FAMILIES, ListOfExperts, experts_of, mixture, tokens
from tests.models.test_running import in_thread

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:the router sent fewer", "ignore:fewer calibration rows", "ignore:calibration skips"
)


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).logits


def only_experts(module: nn.Module, fqn: str) -> bool:
    return ".experts." in fqn


def without_expert_0(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("router.bias"):
            parameter.data[0] = -1e9
    return model


class TestListing:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_listed_experts_compute_the_same_bits(self, family: str) -> None:
        model, x = mixture(family), tokens()
        expected, before = logits(model, x), dict(model.named_modules())
        names = [name for name, _ in experts_of(model)]
        with experts_listed(model):
            assert all(isinstance(module, ListedExperts) for _, module in experts_of(model))
            layers, _ = find_layers(model, only_experts)
            parts = ("gate_up_proj", "down_proj")
            assert list(layers) == [
                f"{name}.{expert}.{part}" for name in names for expert in range(4) for part in parts
            ]
            assert torch.equal(logits(model, x), expected)
            assert not any(module.training for module in model.modules())
        assert dict(model.named_modules()) == before

    @pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
    def test_grouped_and_batched_products_agree(self, family: str) -> None:
        x = tokens()
        for implementation in ("grouped_mm", "batched_mm"):
            torch.manual_seed(1)
            model = mixture(family, experts=implementation)
            expected = logits(model, x)
            with experts_listed(model):
                torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-5)

    def test_gradients_are_those_of_the_fused_parameters(self) -> None:
        model, x = mixture(layers=1), tokens(1)
        fused = experts_of(model)[0][1]
        model(x, labels=x).loss.backward()
        with experts_listed(model):
            model(x, labels=x).loss.backward()
            mine = [experts_of(model)[0][1].projections(expert)["down_proj"].weight.grad for expert in range(4)]
        torch.testing.assert_close(torch.stack(mine), fused.down_proj.grad)

    def test_only_the_named_modules_are_listed(self) -> None:
        model = mixture()
        listed = list_experts(model, names=["model.layers.1.mlp.experts.0.down_proj", "lm_head"])
        assert list(listed) == [experts_of(model)[1][1]]

    @pytest.mark.parametrize(
        "change, words",
        [
            (lambda experts: experts.register_forward_hook(lambda *_: None), "it has hooks"),
            (lambda experts: setattr(experts, "forward", lambda *_: None), "was replaced"),
            (lambda experts: setattr(experts, "_is_expert_parallel", True), "distributed over processes"),
            (lambda experts: setattr(experts, "_hf_hook", object()), "accelerate"),
            (lambda experts: experts.to(torch.float8_e4m3fn), "not a plain float tensor"),
        ],
        ids=["hooks", "forward", "parallel", "offloaded", "quantized"],
    )
    def test_experts_that_stay_fused_say_why(self, change, words: str) -> None:
        model = mixture(layers=1)
        name, experts = experts_of(model)[0]
        change(experts)
        _, skipped = find_layers(model)
        assert words in skipped[name] and not list_experts(model)

    def test_the_model_cannot_be_the_experts_themselves(self) -> None:
        experts = experts_of(mixture(layers=1))[0][1]
        batch = (torch.randn(8, 32), torch.zeros(8, 2, dtype=torch.long), torch.rand(8, 2))
        with pytest.raises(ValueError, match="pass a module that contains it"):
            lro.calibrate(experts, [batch])

    def test_tied_experts_stay_fused(self) -> None:
        model = mixture(layers=2)
        first, second = (module for _, module in experts_of(model))
        first.down_proj = second.down_proj
        assert not list_experts(model)

    def test_unknown_fused_experts_are_named_with_their_share(self) -> None:
        class Fused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x @ self.gate_up_proj[0]

        model = nn.Sequential(nn.Linear(8, 8, bias=False), Fused())
        report = lro.compress_(model, lro.calibrate(model, [torch.randn(64, 8)]), 2)
        assert "Fused is not supported; it holds 80.0% of the model's parameters" in report.skipped["1"]


class TestCalibration:
    def test_rows_are_those_that_the_router_sends(self) -> None:
        model, x = mixture(layers=1), tokens(16)
        inputs, routes = [], []
        experts = experts_of(model)[0][1]
        handle = experts.register_forward_pre_hook(lambda _, args: (inputs.append(args[0]), routes.append(args[1]))[0])
        logits(model, x)
        handle.remove()
        covariances = lro.calibrate(model, x.split(4))
        for expert in range(4):
            rows = inputs[0][(routes[0] == expert).any(1)].double().numpy()
            moments = covariances[f"model.layers.0.mlp.experts.{expert}.gate_up_proj"].activations
            assert moments.count == len(rows) >= MIN_ROWS
            np.testing.assert_allclose(moments.second_moment, rows.T @ rows, rtol=1e-4, atol=1e-4)

    def test_experts_are_served_in_the_middle_of_a_call(self) -> None:
        """Another thread runs the same experts while one of them is calibrated, with and without rows of its own."""
        model, x = mixture(layers=1), tokens(4)
        mask = torch.ones_like(x)
        mask[:2, 20:] = 0
        batches = [{"input_ids": x, "attention_mask": mask}]
        alone, expected, served = lro.calibrate(model, batches, mask="attention_mask"), logits(model, x), []

        def serve(module: nn.Module, args: tuple) -> None:
            if isinstance(module, ExpertLinear) and current_thread() is main_thread():
                served.append(in_thread(lambda: logits(model, x)))

        with torch.nn.modules.module.register_module_forward_pre_hook(serve):
            found = lro.calibrate(model, batches, mask="attention_mask")
        assert len(served) == 8 and all(torch.equal(each, expected) for each in served)
        assert {fqn: digest(layer.moments()) for fqn, layer in found.items()} == {
            fqn: digest(layer.moments()) for fqn, layer in alone.items()
        }

    def test_padding_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("calibration", "models"):
            monkeypatch.setattr(f"lowrank_ops.{module}.experts.MIN_ROWS", 0)
        model, x, lengths = mixture(layers=1), tokens(3, 32), (32, 20, 9)
        mask = torch.stack([(torch.arange(32) < length).long() for length in lengths])
        batch = {"input_ids": x, "attention_mask": mask, "labels": x}
        found = lro.calibrate(model, [batch], mask="attention_mask", sensitivity="fisher")
        alone = lro.calibrate(model, [row[None, :length] for row, length in zip(x, lengths, strict=True)])
        for fqn in filter(lambda fqn: ".experts." in fqn, alone):
            assert found[fqn].activations.count == alone[fqn].activations.count
            torch.testing.assert_close(found[fqn].activations.total, alone[fqn].activations.total, rtol=1e-4, atol=1e-4)
            assert found[fqn].token_weighted.count == alone[fqn].activations.count

    def test_a_mask_of_other_tokens_is_refused(self) -> None:
        model, x = mixture(layers=1), tokens(2, 8)
        with pytest.raises(ValueError, match=r"mask of shape \(2, 4\) does not fit"):
            lro.calibrate(model, [x], filter_fn=only_experts, mask=lambda args, kwargs: torch.ones(2, 4))

    @pytest.mark.parametrize("sensitivity", [None, "fisher"])
    def test_an_expert_without_rows_takes_those_of_others(self, sensitivity: str | None) -> None:
        model, x = without_expert_0(mixture("GptOss", layers=1)), tokens(16)
        with pytest.warns(UserWarning, match=r"fewer than 256 rows to some experts.*experts\.0\.gate_up_proj \(0\)"):
            covariances = lro.calibrate(model, x.split(8), sensitivity=sensitivity, filter_fn=only_experts)
        statistics = covariances["model.layers.0.mlp.experts.0.down_proj"]
        assert statistics.activations.count == MIN_ROWS and not covariances.unreached
        others = covariances["model.layers.0.mlp.experts.1.down_proj"]
        assert others.activations.count > MIN_ROWS
        if sensitivity:
            assert statistics.output_gradients.count == others.output_gradients.count
            mine, theirs = (
                float(s.output_gradients.second_moment.trace()) / s.activations.count for s in (statistics, others)
            )
            assert 0.2 < mine / theirs < 5
        report = lro.compress_(model, covariances, lro.ParameterBudget(0.5))
        assert next(row for row in report.layers if "experts.0.down" in row.fqn).rank is not None

    def test_rows_of_others_do_not_change_the_model(self) -> None:
        model, x = without_expert_0(mixture("GptOss")), tokens(2)
        expected = model(x, labels=x).loss
        with Calibrator(model, output_gradients=True) as calibrator:
            loss = model(x, labels=x).loss
            torch.testing.assert_close(loss, expected, rtol=0, atol=0)
            calibrator.observe(loss, samples=2)

    def test_rows_of_others_do_not_change_gradients_elsewhere(self) -> None:
        model, x = without_expert_0(mixture("GptOss", layers=2)), tokens(2)
        parts = []
        for keep in (only_experts, lambda module, fqn: "layers.0.self_attn.q_proj" in fqn):
            torch.manual_seed(3)
            parts.append(lro.calibrate(model, [x], sensitivity="fisher", filter_fn=keep))
        torch.manual_seed(3)
        whole = lro.calibrate(model, [x], sensitivity="fisher")
        fqn = "model.layers.0.self_attn.q_proj"
        torch.testing.assert_close(
            whole[fqn].output_gradients.second_moment, parts[1][fqn].output_gradients.second_moment
        )

    def test_lists_of_expert_modules_have_their_own_rows(self) -> None:
        model, x = ListOfExperts(), torch.randn(100, 8)
        routes = (torch.arange(100) < 30).long()
        covariances = lro.calibrate(model, [(x, routes)], sensitivity="output")
        report = lro.compress_(model, covariances, 4)
        assert covariances["experts.1.0"].activations.count == 30
        np.testing.assert_allclose(covariances["experts.0.0"].activations.total, x[30:].double().sum(0), rtol=1e-5)
        assert covariances.unreached == ("experts.2.0", "experts.2.2", "experts.3.0", "experts.3.2")
        assert report.skipped["experts.3.0"] == "no calibration batch reached it"


class TestCompression:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_half_of_expert_and_attention_parameters(self, family: str, tmp_path: Path) -> None:
        model, x = mixture(family), tokens(8)
        keep = lambda module, fqn: ".experts." in fqn or ".self_attn." in fqn  # noqa: E731
        numbers = {name: p.numel() for name, p in model.named_parameters() if keep(None, name) and p.dim() > 1}
        total = sum(parameter.numel() for parameter in model.parameters())
        report = lro.compress_(model, lro.calibrate(model, [x], filter_fn=keep), lro.ParameterBudget(0.5), keep)
        assert 0.45 < report.layer_parameters / report.layer_parameters_before <= 0.5
        biases = report.layer_parameters_before - sum(numbers.values())
        assert 0 <= biases < 0.05 * sum(numbers.values())  # all weights of experts and attention are considered
        assert sum(parameter.numel() for parameter in model.parameters()) == report.model_parameters
        assert report.model_parameters_before == total
        lro.save_pretrained(model, tmp_path, report)
        loaded = lro.load_pretrained(mixture(family), tmp_path)
        assert torch.equal(logits(loaded, x), logits(model, x))

    def test_errors_are_the_optimum_of_each_expert(self) -> None:
        model, x = mixture(layers=1), tokens(32)
        dense = copy.deepcopy(model)
        calls: dict[str, np.ndarray] = {}
        with experts_listed(dense):
            for fqn, layer in find_layers(dense, only_experts)[0].items():
                layer.register_forward_pre_hook(lambda _, args, fqn=fqn: calls.update({fqn: args[0].double().numpy()}))
            logits(dense, x)
        lro.compress_(model, lro.calibrate(model, [x], filter_fn=only_experts), 8)
        fused = experts_of(dense)[0][1]
        for expert in range(4):
            for name in ("gate_up_proj", "down_proj"):
                fqn = f"model.layers.0.mlp.experts.{expert}.{name}"
                rows, weight = calls[fqn], getattr(fused, name)[expert].detach().double().numpy()
                y = rows @ weight.T
                optimum = (np.linalg.svd(y - y.mean(0), compute_uv=False)[8:] ** 2).sum()
                layer = model.get_submodule(fqn)
                up, down, bias = (getattr(layer, part).detach().double().numpy() for part in ("up", "down", "bias"))
                assert layer.rank == 8
                error = ((y - (rows @ down.T @ up.T + bias)) ** 2).sum()
                np.testing.assert_allclose(error, optimum, rtol=1e-3)

    def test_experts_that_stay_dense_free_the_fused_memory(self) -> None:
        model, x = mixture(layers=2), tokens(16)
        covariances = lro.calibrate(model, [x])
        report = lro.compress_(model, covariances, lro.Ranks({"model.layers.0.mlp.experts.1.down_proj": 8}))
        (_, listed), (_, fused) = experts_of(model)
        assert isinstance(listed, ListedExperts) and not isinstance(fused, ListedExperts)
        assert report.layers[-1].fqn == "lm_head"
        for parameter in listed.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
            assert parameter.is_contiguous() and parameter.requires_grad

    @pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
    def test_a_partly_dense_mixture_is_saved_and_copied(self, family: str, tmp_path: Path) -> None:
        model, x = mixture(family), tokens(16)
        lro.compress_(model, lro.calibrate(model, [x]), lro.Ranks({"model.layers.0.mlp.experts.1.down_proj": 8}))
        expected = logits(model, x)
        lro.save_pretrained(model, tmp_path / "ours")
        model.save_pretrained(tmp_path / "theirs")
        with torch.device("meta"):
            empty = mixture(family, layers=1)
        with pytest.raises(lro.checkpoint.CheckpointError):
            lro.load_pretrained(empty, tmp_path / "ours")
        assert not any(isinstance(module, ListedExperts) for module in empty.modules())
        loaded = lro.load_pretrained(mixture(family), tmp_path / "ours")
        of_transformers = type(model).from_pretrained(tmp_path / "theirs")
        for other in (loaded, of_transformers, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other, x), expected)
            assert isinstance(experts_of(other)[0][1], ListedExperts)
            assert not isinstance(experts_of(other)[1][1], ListedExperts)

    @pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
    def test_a_compressed_mixture_is_exported(self, family: str) -> None:
        block, x = mixture(family, layers=1).model.layers[0].mlp, torch.randn(2, 64, 32)
        lro.compress_(block, lro.calibrate(block, [x]), lro.ParameterBudget(0.5))
        exported = torch.export.export(block, (x,), strict=False).module()
        other = torch.randn(2, 64, 32)
        torch.testing.assert_close(exported(other), block(other), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
    def test_a_dense_copy_has_fused_experts(self, family: str) -> None:
        model, x = mixture(family, layers=1), tokens(16)
        before = {name: (value.shape, value.requires_grad) for name, value in model.named_parameters()}
        config = lro.CompressionConfig(lro.ParameterBudget(0.5), centered=False)
        lro.compress_(model, lro.calibrate(model, [x], filter_fn=only_experts), config)
        copied = lro.layers.to_dense_layers(model)
        assert {name: (value.shape, value.requires_grad) for name, value in copied.named_parameters()} == before
        torch.testing.assert_close(logits(copied, x), logits(model, x), rtol=1e-4, atol=1e-5)
        again = lro.calibrate(copied, [x], filter_fn=only_experts)  # its experts are found as those of any mixture
        assert len(again) == 8 and not isinstance(experts_of(copied)[0][1], ListedExperts)
        with torch.no_grad():
            experts_of(copied)[0][1].down_proj.zero_()
        assert isinstance(experts_of(model)[0][1], ListedExperts) and logits(model, x).isfinite().all()

    @pytest.mark.parametrize(
        "family, form", [("Mixtral", ""), ("GptOss", ""), ("Mixtral", "pivoted"), ("Qwen3Moe", "8-bit")]
    )
    def test_compiled_experts_are_one_op_per_projection(self, family: str, form: str) -> None:
        model, x = mixture(family, layers=1), tokens(16)
        config = lro.CompressionConfig(lro.ParameterBudget(0.7), pivoted=form == "pivoted")
        lro.compress_(model, lro.calibrate(model, [x], filter_fn=only_experts), config)
        experts = experts_of(model)[0][1]
        if form == "8-bit":
            lro.layers.quantize_(experts)
        weights, index = torch.rand(20, 4).topk(2)
        index[3:5] = torch.tensor([4, 1])  # 4 is no expert
        args = torch.randn(20, 32), index, weights
        one_by_one = copy.deepcopy(experts)
        one_by_one.factors = lambda: None
        graphs = []
        torch.compiler.reset()
        compiled = torch.compile(
            experts, fullgraph=True, dynamic=True, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1]
        )
        for run in (compiled, experts):
            torch.testing.assert_close(run(*args), one_by_one(*args), atol=1e-5, rtol=1e-4)
        assert sum("lowrank_experts" in str(node.target) for node in graphs[0].graph.nodes) == 2
        mine, eager, theirs = (
            torch.autograd.grad(run(*args).sum(), [part for part in module.parameters() if part.requires_grad])
            for run, module in ((compiled, experts), (experts, experts), (one_by_one, one_by_one))
        )
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(eager, theirs, atol=1e-4, rtol=1e-3)

    def test_layers_with_hooks_are_called_under_compile(self) -> None:
        model, x = mixture(layers=1), tokens(16)
        lro.compress_(model, lro.calibrate(model, [x], filter_fn=only_experts), lro.ParameterBudget(0.5))
        experts, calls = experts_of(model)[0][1], []
        experts.projections(1)["down_proj"].register_forward_hook(lambda *_: calls.append(1))
        assert experts.factors() is None
        index, weights = torch.rand(8, 4).topk(2)[1], torch.rand(8, 2)
        torch.compile(experts, backend="eager")(torch.randn(8, 32), index, weights)
        assert calls

    def test_a_compressed_mixture_is_exported_and_traced(self) -> None:
        model, x = mixture(layers=1), tokens(16)
        lro.compress_(model, lro.calibrate(model, [x], filter_fn=only_experts), lro.ParameterBudget(0.5))
        experts, x = experts_of(model)[0][1], torch.randn(8, 32)
        routes = [(x, torch.rand(8, 4).topk(2)[1], torch.rand(8, 2)) for _ in range(2)]
        for run in (torch.export.export(experts, routes[0]).module(), torch.jit.trace(experts, routes[0])):
            for args in routes:
                torch.testing.assert_close(run(*args), experts(*args), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
    def test_plain_copies_need_no_package(self, family: str) -> None:
        model, x = mixture(family, layers=1), tokens(16)
        lro.compress_(model, lro.calibrate(model, [x]), lro.ParameterBudget(0.6))
        plain = lro.layers.to_plain_layers(model)
        data = pickle.dumps(plain)
        assert b"lowrank_ops." not in data
        loaded, x = pickle.loads(data), tokens(2, 7)
        torch.testing.assert_close(logits(loaded, x), logits(model, x), atol=1e-5, rtol=1e-4)
        quantized = torch.ao.quantization.quantize_dynamic(loaded, {nn.Linear}, torch.qint8)
        name, experts = experts_of(quantized)[0]
        assert "Dynamic" in str(experts.get_submodule("0.down_proj")) and ".experts" in name
        assert (logits(quantized, x) - logits(model, x)).norm() < 0.1 * logits(model, x).norm()
        experts, args = experts_of(plain)[0][1], (torch.randn(6, 32), torch.rand(6, 4).topk(2)[1], torch.rand(6, 2))
        exported = torch.export.export(experts, args).module()
        args = args[0], args[1].flip(0), args[2]
        torch.testing.assert_close(exported(*args), experts(*args), atol=1e-5, rtol=1e-4)

    def test_an_error_leaves_the_experts_fused(self) -> None:
        model, x = mixture(layers=1), tokens()
        expected, before = logits(model, x), dict(model.named_modules())
        factors = factors_of(model, x)
        with pytest.raises(ValueError, match=r"experts\.9"):
            replace_(model, {**factors, "model.layers.0.mlp.experts.9.down_proj": next(iter(factors.values()))})
        assert dict(model.named_modules()) == before and torch.equal(logits(model, x), expected)

    def test_trials_and_reports_work_on_fused_experts(self) -> None:
        model, x = mixture(layers=1), tokens(16)
        dense, before = copy.deepcopy(model), dict(model.named_modules())
        batches = [{"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)}]
        options = {"sensitivity": "fisher", "mask": "attention_mask", "filter_fn": only_experts}
        covariances = lro.calibrate(model, batches, **options)
        covariances = lro.recalibrate(model, covariances, batches, lro.ParameterBudget(0.6), **options)
        assert len(lro.utilization(model, covariances).layers) == 8
        evaluate = lambda model: -float(model(x, labels=x).loss)  # noqa: E731
        ranks = lro.search_ranks(model, covariances, evaluate, 0.05, num_evaluations=3)
        assert dict(model.named_modules()) == before
        report = lro.compress_(model, covariances, lro.ParameterBudget(0.6))
        errors = lro.measure_errors(dense, model, batches, mask="attention_mask")
        for row in report.layers:
            if row.rank is not None and row.rows > 2 * MIN_ROWS:
                assert errors[row.fqn] == pytest.approx(row.relative_error, rel=0.2)
        assert set(ranks.ranks) <= {row.fqn for row in report.layers}

    def test_reconstruction_leaves_experts_and_says_so(self) -> None:
        model, x = mixture(layers=1), tokens(16)
        covariances = lro.calibrate(model, [x])
        reconstruction = lro.SequentialReconstruction([x])
        with pytest.warns(UserWarning, match=r"experts\.0\.down_proj: a router chooses its rows"):
            report = lro.compress_(model, covariances, lro.ParameterBudget(0.6), reconstruction=reconstruction)
        assert {row.reconstructed for row in report.layers if row.rank is not None} == {True, False}


def factors_of(model: nn.Module, x: torch.Tensor) -> dict[str, lro.factors.Factors]:
    covariances = lro.calibrate(model, [x], filter_fn=only_experts)
    with experts_listed(model):
        spaces = lro.subspaces.layer_subspaces(find_layers(model, only_experts)[0], covariances)
    return {fqn: lro.factors.factorize(space, 8).to(space.dtype) for fqn, space in spaces.items()}
