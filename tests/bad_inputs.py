"""Bad inputs and their errors: the list that tests/test_bad_inputs.py checks and docs/bad-inputs.md shows.

``python -m tests.bad_inputs`` writes the page.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import lowrank_ops as lro
from lowrank_ops import cli
from lowrank_ops.files import digest

PAGE = Path(__file__).parents[1] / "docs" / "bad-inputs.md"

SETUP = '''\
import copy, json
from pathlib import Path
import torch
from torch import nn
import lowrank_ops as lro

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24))
batches = [torch.randn(40, 16) for _ in range(2)]
loss = model(batches[0]).square().sum()
covariances = lro.calibrate(model, batches, sensitivity="fisher")
plain = lro.calibrate(model, batches)  # without output gradients
latencies = lro.measure_latency(model, batches[0], points=2, rounds=1)
compressed = copy.deepcopy(model)
report = lro.compress_(compressed, covariances, lro.Ranks({"0": 8}))
convolution = nn.Conv2d(4, 8, 3)
layer = lro.LowRankLinear(16, 24, rank=8)
other = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 24))

used_up = iter(batches)
list(used_up)
nan, inf = float("nan"), float("inf")
with_nan = copy.deepcopy(model)
with_nan[2].weight.data[3, 4] = nan
patched = copy.deepcopy(model)
run = patched[0].forward
patched[0].forward = lambda x: 2 * run(x)

lro.save_pretrained(compressed, "folder", report)
diverged = copy.deepcopy(compressed)
diverged[0].up.data[3, 4] = nan
lro.save_pretrained(diverged, "with_nan")
covariances.save("covariances.safetensors")
Path("text.txt").write_text("text")
Path("list.json").write_text("[1, 2]")
Path("cut.safetensors").write_bytes(Path("covariances.safetensors").read_bytes()[:-100])
Path("my_project.py").write_text("""
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 24))

def batches():
    return [torch.randn(40, 16)]

def one_batch():
    return torch.randn(40, 16)

number = 3
""")
'''

FOREIGN = "Messages of Python, torch or safetensors"  # which differ between versions: only the type is compared

BAD: dict[str, list[tuple[str, str]]] = {
    "Calibration": [
        ("lro.calibrate(None, batches)", "TypeError"),
        ("lro.calibrate(batches, model)", "TypeError"),
        ("lro.calibrate(model, None)", "TypeError"),
        ("lro.calibrate(model, 8)", "TypeError"),
        ("lro.calibrate(model, 'data')", "TypeError"),
        ("lro.calibrate(model, batches[0])", "TypeError"),
        ("lro.calibrate(model, batches[0].numpy())", "TypeError"),
        ("lro.calibrate(model, {'input': batches[0]})", "TypeError"),
        ("lro.calibrate(model, lambda: batches)", "TypeError"),
        ("lro.calibrate(model, [])", "ValueError"),
        ("lro.calibrate(model, used_up)", "ValueError"),
        ("lro.calibrate(model, [torch.ones(0, 16)])", "ValueError"),
        ("lro.calibrate(model, [torch.ones(40, 12)])", "ValueError"),
        ("lro.calibrate(model, [torch.full((40, 16), nan)])", "NonFiniteActivationError"),
        ("lro.calibrate(with_nan, batches)", "ValueError"),
        ("lro.calibrate(model, [torch.tensor(1.0)])", "ValueError"),
        ("lro.calibrate(model, [torch.ones(3, 16).long()])", "ValueError"),
        ("lro.calibrate(model, [torch.ones(3, 16).to_sparse()])", "ValueError"),
        ("lro.calibrate(model, [torch.ones(7, 7)], mask=lambda args, kwargs: torch.ones(2, 2))", "ValueError"),
        ("lro.calibrate(model, batches, dtype=torch.float16)", "ValueError"),
        ("lro.calibrate(model, batches, dtype='float64')", "TypeError"),
        ("lro.calibrate(model, batches, side='both')", "ValueError"),
        ("lro.calibrate(model, batches, side=None)", "TypeError"),
        ("lro.calibrate(model, batches, filter_fn='0')", "TypeError"),
        ("lro.calibrate(model, batches, filter_fn=lambda module, fqn: False)", "ValueError"),
        ("lro.calibrate(nn.Sequential(nn.ReLU()), batches)", "ValueError"),
        ("lro.calibrate(model, batches, mask=torch.ones(40, 16))", "TypeError"),
        ("lro.calibrate(model, batches, mask=1)", "TypeError"),
        ("lro.calibrate(model, batches, mask=lambda args, kwargs: 1)", "ValueError"),
        ("lro.calibrate(model, batches, unmasked_rows='error')", "ValueError"),
        ("lro.calibrate(model, batches, mask='keep', unmasked_rows='skip')", "ValueError"),
        ("lro.calibrate(model, batches, mask='attention_mask')", "ValueError"),
        ("lro.calibrate(model, batches, forward='forward')", "TypeError"),
        ("lro.calibrate(model, batches, forward=model)", "TypeError"),
        ("lro.calibrate(model, batches, sensitivity='hessian')", "ValueError"),
        ("lro.calibrate(model, batches, sensitivity=True)", "TypeError"),
        ("lro.calibrate(model, batches, sensitivity=lambda output, batch: 1.0)", "ValueError"),
        ("lro.calibrate(model, batches, num_probes=4)", "ValueError"),
        ("lro.calibrate(model, batches, sensitivity='fisher', num_probes=0)", "ValueError"),
        ("lro.calibrate(model, batches, sensitivity='fisher', token_weights='no')", "TypeError"),
        ("lro.calibrate(model, batches, max_state_bytes='2GB')", "TypeError"),
        ("lro.calibrate(model, batches, max_state_bytes=-1)", "ValueError"),
        ("lro.calibrate(model, batches, sensitivity='fisher', max_state_bytes=8)", "ValueError"),
        ("lro.calibrate(model, batches, progress='yes')", "TypeError"),
        ("lro.plan_calibration(None)", "TypeError"),
        ("lro.calibrate(model, batches, max_memory='much')", "ValueError"),
        ("lro.calibrate(model, batches, max_memory=2.5)", "TypeError"),
        ("lro.calibrate(model, batches, offload=True)", "TypeError"),
        ("lro.Calibrator(model, output_gradients='fisher')", "TypeError"),
        ("lro.Calibrator(model).covariances", "AttributeError"),
        ("lro.Calibrator(model, output_gradients=True).observe(loss, 40)", "RuntimeError"),
        ("lro.Calibrator(model).observe(3.0, 40)", "TypeError"),
        ("lro.recalibrate(model, plain, batches, sensitivity='fisher')", "ValueError"),
        ("lro.recalibrate(model, covariances, batches, 8)", "ValueError"),
        ("lro.recalibrate(model, covariances, batches, 8, sensitivity='fisher', layers=2)", "TypeError"),
        ("lro.recalibrate(model, covariances, batches, 8, sensitivity='fisher', forward=3)", "TypeError"),
        ("lro.recalibrate(model, covariances, batches[0], 8, sensitivity='fisher')", "TypeError"),
        ("lro.recalibrate(model, covariances, [torch.ones(0, 16)], 8, sensitivity='fisher')", "ValueError"),
        ("lro.calibrate(model, batches, tokens=0)", "ValueError"),
        ("lro.calibrate(model, batches, tokens='half')", "TypeError"),
        ("lro.correct_predictions(model, plain, batches)", "ValueError"),
        ("lro.correct_predictions(model, covariances, batches[0])", "TypeError"),
        ("lro.correct_predictions(model, covariances, [])", "ValueError"),
        ("lro.correct_predictions(model, covariances, [torch.ones(0, 16)])", "ValueError"),
        ("lro.correct_predictions(model, covariances, batches, max_state_bytes=0)", "ValueError"),
        ("lro.correct_predictions(model, covariances, batches, num_probes=0)", "ValueError"),
    ],
    "Statistics": [
        ("covariances.merge([covariances])", "TypeError"),
        ("covariances.merge(plain)", "ValueError"),
        ("covariances.save(None)", "TypeError"),
        ("covariances.damped(-0.1)", "ValueError"),
        ("covariances.damped(nan)", "ValueError"),
        ("covariances.damped('10%')", "TypeError"),
        ("covariances.damped(0.1, inf)", "ValueError"),
        ("lro.calibrate(model, batches, side='output').damped(0.1)", "ValueError"),
        ("covariances.save('')", "ValueError"),
        ("covariances.save('no/such/folder/file')", "FileNotFoundError"),
        ("covariances.save('folder')", "OSError"),
        ("lro.Covariances.load(covariances)", "TypeError"),
        ("lro.Covariances.load('folder/model.safetensors')", "ValueError"),
        ("lro.Covariances.load('covariances.safetensors', verify='no')", "TypeError"),
        ("lro.Covariances({'0': 3})", "TypeError"),
        ("lro.utilization(model, batches)", "TypeError"),
        ("lro.utilization(covariances, model)", "TypeError"),
        ("lro.utilization(model, covariances, 99)", "ValueError"),
        ("lro.utilization(model, covariances, '0.99')", "TypeError"),
        ("lro.utilization(model, covariances, nan)", "ValueError"),
        ("lro.utilization(other, covariances)", "ValueError"),
        ("lro.utilization(model, lro.Covariances())", "ValueError"),
        ("lro.utilization(model, covariances).to_html(3)", "TypeError"),
    ],
    "Ranks and configurations": [
        ("lro.ParameterBudget(0)", "ValueError"),
        ("lro.ParameterBudget(50)", "ValueError"),
        ("lro.ParameterBudget('50%')", "TypeError"),
        ("lro.FlopBudget(nan)", "ValueError"),
        ("lro.ParameterBudget(0.5, 'energy')", "ValueError"),
        ("lro.ExplainedVariance(True)", "TypeError"),
        ("lro.LatencyBudget(0.5, 0.01)", "TypeError"),
        ("lro.Ranks(['0', '2'])", "TypeError"),
        ("lro.CompressionConfig(0.5)", "TypeError"),
        ("lro.CompressionConfig(projection='pca')", "ValueError"),
        ("lro.CompressionConfig(centered=0)", "TypeError"),
        ("lro.CompressionConfig(overrides=['0'])", "TypeError"),
        ("lro.CompressionConfig(bounds={'0': 8})", "ValueError"),
        ("lro.CompressionConfig(projection='weight', reconstruction='sequential')", "ValueError"),
        ("lro.CompressionConfig.from_json('[]')", "ValueError"),
        ("lro.CompressionConfig.from_json(None)", "TypeError"),
        ("lro.CompressionConfig.from_dict({'version': 99})", "ValueError"),
        ("lro.measure_latency(None, batches[0])", "TypeError"),
        ("lro.measure_latency(model, torch.ones(0, 16))", "ValueError"),
        ("lro.measure_latency(model, batches[0], points=1)", "ValueError"),
        ("lro.measure_latency(model, batches[0], rounds=2.5)", "TypeError"),
        ("latencies.save(latencies)", "TypeError"),
        ("type(latencies).load('list.json')", "ValueError"),
        ("lro.search_ranks(model, covariances, 0.9, 0.01)", "TypeError"),
        ("lro.search_ranks(model, covariances, model, 0.01)", "TypeError"),
        ("lro.search_ranks(model, covariances, lambda m: nan, 0.01)", "ValueError"),
        ("lro.search_ranks(model, covariances, lambda m: None, 0.01)", "ValueError"),
        ("lro.search_ranks(model, covariances, lambda m: float(model(batches[0])[0, 0]), 0.01)", "ValueError"),
        ("lro.search_ranks(patched, covariances, lambda m: float(m(batches[0])[0, 0]), 0.01)", "ValueError"),
        ("lro.search_ranks(model, covariances, lambda m: 1.0, -0.01)", "ValueError"),
        ("lro.search_ranks(model, covariances, lambda m: 1.0, '1%')", "TypeError"),
        ("lro.search_ranks(model, covariances, lambda m: 1.0, 0.01, by='rank')", "ValueError"),
        ("lro.search_ranks(model, covariances, lambda m: 1.0, 0.01, by='layers', allocation='loss')", "ValueError"),
        ("lro.search_ranks(model, covariances, lambda m: 1.0, 0.01, by='layers', num_evaluations=5)", "ValueError"),
        ("lro.search_ranks(model, covariances, lambda m: 1.0, 0.01, num_evaluations=1)", "ValueError"),
        ("lro.search_ranks(model, covariances, lambda m: 1.0, 0.01, config=lro.ParameterBudget(0.5))", "TypeError"),
        ("lro.search_ranks(model, covariances, lambda m: 1.0, 0.01, cache='folder')", "ValueError"),
        ("lro.search_ranks(model, covariances, lambda m: 1.0, 0.01, cache='text.txt')", "ValueError"),
        ("lro.measured_ranks(model, covariances, None, 0.8)", "TypeError"),
        ("lro.measured_ranks(model, covariances, batches, 80)", "ValueError"),
        ("lro.measured_ranks(model, covariances, batches, 0.8, rounds=0)", "ValueError"),
        ("lro.measured_ranks(model, covariances, batches, 0.8, sensitivity='hessian')", "ValueError"),
        ("lro.measured_ranks(model, covariances, batches, 0.8, forward=lambda m, x: m(x).detach())", "ValueError"),
        ("lro.measured_ranks(model, plain, batches, 0.8)", "ValueError"),
        ("lro.measured_ranks(model, covariances, [], 0.8)", "ValueError"),
        ("lro.measured_ranks(model, covariances, [torch.ones(0, 16)], 0.8)", "ValueError"),
        (
            "lro.search_ranks(model, covariances, lambda m: 1.0, 0.01, by='layers', "
            "config=lro.CompressionConfig(group=True))",
            "ValueError",
        ),
        ("lro.ByteBudget(0.5, 'int4')", "ValueError"),
        ("lro.ByteBudget(0.5, 8)", "TypeError"),
        ("lro.CompressionConfig(pivoted='yes')", "TypeError"),
        ("lro.CompressionConfig(pivoted=True, group=True)", "ValueError"),
        ("lro.CompressionConfig(lro.ByteBudget(0.5), group=True)", "ValueError"),
        ("lro.CompressionConfig(lro.LatencyBudget(0.5, latencies), pivoted=True)", "ValueError"),
        ("lro.compress_(model, covariances, lro.ByteBudget(0.01))", "ValueError"),
    ],
    "Compression": [
        ("lro.compress_(covariances, model)", "TypeError"),
        ("lro.compress_(model, batches)", "TypeError"),
        ("lro.compress_(model, 'covariances.safetensors')", "TypeError"),
        ("lro.compress_(model, covariances, 0.5)", "TypeError"),
        ("lro.compress_(model, covariances, True)", "TypeError"),
        ("lro.compress_(model, covariances, 0)", "ValueError"),
        ("lro.compress_(model, covariances, lro.ParameterBudget(0.01))", "ValueError"),
        ("lro.compress_(model, covariances, lro.Ranks({'1': 8}))", "ValueError"),
        ("lro.compress_(model, covariances, lro.Ranks({'0': 17}))", "ValueError"),
        ("lro.compress_(model, plain, lro.CompressionConfig(8, projection='loss'))", "ValueError"),
        ("lro.compress_(model, covariances, lro.Ranks({'0': 8.0}))", "ValueError"),
        ("lro.compress_(model, plain, lro.ParameterBudget(0.8, 'loss'))", "ValueError"),
        ("lro.compress_(model, covariances, lro.CompressionConfig(8, reconstruction='sequential'))", "ValueError"),
        ("lro.compress_(model, covariances, 8, filter_fn=['0'])", "TypeError"),
        ("lro.compress_(model, covariances, 8, filter_fn=lambda module, fqn: False)", "ValueError"),
        ("lro.compress_(model, covariances, 8, subspaces={'0': covariances['0']})", "TypeError"),
        ("lro.compress_(model, covariances, 8, reconstruction=batches)", "TypeError"),
        ("lro.compress_(model, covariances, 8, progress=1)", "TypeError"),
        ("lro.compress_(model, covariances, 8, max_memory='1kB')", "ValueError"),
        ("lro.compress_(other, covariances, 8)", "ValueError"),
        ("lro.compress_(with_nan, covariances, 8)", "ValueError"),
        ("lro.compress_(model, lro.Covariances(), 8)", "ValueError"),
        ("lro.compress_(nn.DataParallel(model), covariances, 8)", "ValueError"),
        ("lro.compress_(copy.deepcopy(model).to('meta'), covariances, 8)", "ValueError"),
        ("report.with_measured([0.1])", "TypeError"),
        ("report.with_measured({'9': 0.1})", "ValueError"),
        ("report.with_measured({'0': nan})", "ValueError"),
        ("report.with_measured({'0': '1%'})", "TypeError"),
        ("report.to_html(report)", "TypeError"),
        ("lro.measure_errors(model, compressed, batches[0])", "TypeError"),
        ("lro.measure_errors(model, batches, compressed)", "TypeError"),
        ("lro.measure_errors(compressed, model, batches)", "ValueError"),
        ("lro.measure_errors(model, model, batches)", "ValueError"),
        ("lro.measure_errors(model, compressed, 3)", "TypeError"),
        ("lro.measure_errors(other, compressed, batches)", "ValueError"),
        ("lro.measure_errors(model, compressed, used_up)", "ValueError"),
        ("lro.measure_errors(model, compressed, [torch.ones(0, 16)])", "ValueError"),
        ("lro.measure_errors(model, compressed, batches, centered='no')", "TypeError"),
    ],
    "Reconstruction": [
        ("lro.SequentialReconstruction(None)", "TypeError"),
        ("lro.SequentialReconstruction(batches[0])", "TypeError"),
        ("lro.SequentialReconstruction(batches, ridge=-1)", "ValueError"),
        ("lro.SequentialReconstruction(batches, ridge=nan)", "ValueError"),
        ("lro.SequentialReconstruction(batches, ridge='auto')", "TypeError"),
        ("lro.SequentialReconstruction(batches, blocks=2)", "TypeError"),
        ("lro.SequentialReconstruction(batches, sensitivity='hessian')", "ValueError"),
        ("lro.SequentialReconstruction(batches, checkpoint=3)", "TypeError"),
        ("lro.SequentialReconstruction(batches, max_state_bytes=0)", "ValueError"),
        ("lro.BlockReconstruction(batches[0])", "TypeError"),
        ("lro.BlockReconstruction(batches, epochs=0)", "ValueError"),
        ("lro.BlockReconstruction(batches, lr=nan)", "ValueError"),
        ("lro.BlockReconstruction(batches, held_out=1)", "ValueError"),
        ("lro.BlockReconstruction(batches, held_out='half')", "TypeError"),
        ("lro.BlockReconstruction(batches, target='loss')", "ValueError"),
        ("lro.BlockReconstruction(batches, target='logits', sensitivity='fisher')", "ValueError"),
        ("lro.BlockReconstruction(batches, together=0)", "ValueError"),
        ("lro.BlockReconstruction(batches, autocast=torch.float16)", "ValueError"),
        (
            "lro.compress_(model, covariances, 8, reconstruction=lro."
            "BlockReconstruction([torch.ones(0, 16)] * 2))",
            "ValueError",
        ),
        (
            "lro.compress_(model, covariances, 8, reconstruction=lro."
            "SequentialReconstruction([torch.ones(0, 16)]))",
            "ValueError",
        ),
        (
            "lro.compress_(model, covariances, lro.CompressionConfig(8, reconstruction='sequential'), "
            "reconstruction=lro.BlockReconstruction(batches))",
            "ValueError",
        ),
        ("lro.compress_(model, covariances, 8, reconstruction=lro.BlockReconstruction(batches[:1]))", "ValueError"),
        ("lro.compress_(model, covariances, 8, reconstruction=lro.SequentialReconstruction([]))", "ValueError"),
        ("lro.compress_(model, covariances, 8, reconstruction=lro.SequentialReconstruction(used_up))", "ValueError"),
        (
            "lro.compress_(model, covariances, 8, reconstruction=lro.SequentialReconstruction(batches, blocks='0'))",
            "ValueError",
        ),
    ],
    "Layers": [
        ("lro.LowRankLinear(16, 24, rank=17)", "ValueError"),
        ("lro.LowRankLinear(16, 24, rank=-1)", "ValueError"),
        ("lro.LowRankLinear(16, 24, rank=8.0)", "TypeError"),
        ("lro.LowRankLinear(-16, 24, rank=8)", "ValueError"),
        ("lro.LowRankLinear(16, 24, rank=8, bias=None)", "TypeError"),
        ("lro.LowRankLinear(16, 24, rank=8, dtype='float32')", "TypeError"),
        ("lro.LowRankConv2d(4, 8, 'large', rank=2)", "TypeError"),
        ("lro.LowRankConv2d(4, 8, 3, rank=9)", "ValueError"),
        ("lro.LowRankLinear.from_linear(convolution, 2)", "TypeError"),
        ("lro.LowRankLinear.from_linear(nn.LazyLinear(8), 4)", "ValueError"),
        ("lro.LowRankLinear.from_linear(copy.deepcopy(model[0]).to('meta'), 4)", "ValueError"),
        ("lro.LowRankLinear.from_linear(model[0], '8')", "TypeError"),
        ("lro.LowRankLinear.from_linear(model[0], 8, covariances)", "TypeError"),
        ("lro.LowRankLinear.from_linear(model[0], 8, covariances['2'])", "ValueError"),
        ("lro.LowRankLinear.from_linear(model[0], 8, projection='output')", "ValueError"),
        ("lro.LowRankLinear.from_linear(model[0], 8, plain['0'], projection='loss')", "ValueError"),
        ("lro.LowRankConv2d.from_conv2d(model[0], 2)", "TypeError"),
        ("lro.layers.group_(compressed, [('0', '2')])", "ValueError"),
        ("lro.layers.group_(compressed, ['0', '2'])", "ValueError"),
        ("lro.layers.quantize_(compressed, 'int4')", "ValueError"),
        ("lro.layers.quantize_(compressed, 8)", "TypeError"),
        ("layer(None)", "TypeError"),
        ("layer(torch.ones(3, 12))", "ValueError"),
        ("layer(torch.ones(3, 16, dtype=torch.float64))", "ValueError"),
        ("layer(torch.ones(3, 16, device='meta'))", "ValueError"),
        ("layer(torch.ones(3, 16).long())", "ValueError"),
        ("layer.weight.zero_()", "RuntimeError"),
    ],
    "Fine-tuning": [
        ("lro.finetune_(compressed, batches)", "ValueError"),
        ("lro.finetune_(batches, compressed, teacher=model)", "TypeError"),
        ("lro.finetune_(compressed, batches[0], teacher=model)", "TypeError"),
        ("lro.finetune_(compressed, None, teacher=model)", "TypeError"),
        ("lro.finetune_(compressed, [], teacher=model)", "ValueError"),
        ("lro.finetune_(compressed, used_up, teacher=model, steps=1)", "ValueError"),
        ("lro.finetune_(compressed, [torch.ones(0, 16)], teacher=model)", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher='dense')", "TypeError"),
        ("lro.finetune_(compressed, batches, teacher=compressed)", "ValueError"),
        ("lro.finetune_(compressed, batches, loss='mse')", "TypeError"),
        ("lro.finetune_(compressed, batches, loss=lambda output, batch: None)", "ValueError"),
        ("lro.finetune_(compressed, batches, loss=lambda output, batch: output)", "ValueError"),
        ("lro.finetune_(compressed, batches, loss=lambda output, batch: output.sum().detach())", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=nn.Sequential(model[0]))", "ValueError"),
        ("lro.finetune_(copy.deepcopy(compressed).to('meta'), batches, teacher=model)", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=model, checkpoint='folder')", "ValueError"),
        ("lro.finetune_(compressed, batches, loss=lambda output, batch: output.sum() * nan)", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=model, lr=0)", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=model, lr=inf)", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=model, lr='fast')", "TypeError"),
        ("lro.finetune_(compressed, batches, teacher=model, weight_decay=-1)", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=model, epochs=1.5)", "TypeError"),
        ("lro.finetune_(compressed, batches, teacher=model, epochs=2, steps=5)", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=model, warmup=1)", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=model, soft_weight=2)", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=model, match='0')", "TypeError"),
        ("lro.finetune_(compressed, batches, teacher=model, match=['encoder'])", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=model, match_weight=2.0)", "ValueError"),
        ("lro.finetune_(compressed, batches, loss=lambda output, batch: output.sum(), temperature=4.0)", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=model, autocast='bf16')", "TypeError"),
        ("lro.finetune_(compressed, batches, teacher=model, autocast=torch.float16)", "ValueError"),
        ("lro.finetune_(compressed, batches, teacher=model, checkpoint='no/such/folder/file')", "ValueError"),
    ],
    "Checkpoints": [
        ("lro.save_pretrained('new', compressed)", "TypeError"),
        ("lro.save_pretrained(compressed, None)", "TypeError"),
        ("lro.save_pretrained(compressed, '')", "ValueError"),
        ("lro.save_pretrained(compressed, 'text.txt')", "FileExistsError"),
        ("lro.save_pretrained(compressed, 'new', {'0': 8})", "TypeError"),
        ("lro.save_pretrained(model, 'new', report)", "ValueError"),
        ("lro.save_pretrained(copy.deepcopy(model).to('meta'), 'new')", "ValueError"),
        ("lro.load_pretrained('folder', model)", "TypeError"),
        ("lro.load_pretrained(model, 3)", "TypeError"),
        ("lro.load_pretrained(model, 'missing')", "CheckpointError"),
        ("lro.load_pretrained(other, 'folder')", "CheckpointError"),
        ("lro.load_pretrained(compressed, 'folder')", "CheckpointError"),
        ("lro.load_pretrained(model, 'with_nan')", "CheckpointError"),
        ("lro.load_pretrained(model, 'folder', verify=None)", "TypeError"),
    ],
    "Ops": [
        ("lro.ops.lowrank_linear(None, layer.down, layer.up)", "TypeError"),
        ("lro.ops.lowrank_linear(batches[0], layer.up, layer.down)", "ValueError"),
        ("lro.ops.lowrank_linear(batches[0], layer.down, layer.up, 1.0)", "TypeError"),
        ("lro.ops.lowrank_linear(batches[0], layer.down, layer.up, activation='tanh')", "ValueError"),
        ("lro.ops.lowrank_linear(batches[0], layer.down, layer.up, activation=['relu'])", "TypeError"),
        ("lro.ops.lowrank_linear(batches[0], layer.down, layer.up, backend='cudnn')", "ValueError"),
        ("lro.ops.lowrank_linear(batches[0], layer.down.half(), layer.up)", "ValueError"),
        ("lro.ops.lowrank_linear_grouped(batches[0], [layer.down], [layer.up, layer.up])", "ValueError"),
        ("lro.ops.lowrank_linear_grouped(batches[0], layer.down, layer.up)", "TypeError"),
        (
            "lro.ops.lowrank_experts(batches[0], torch.tensor([9, 3]), [layer.down] * 2, [layer.up] * 2, [None] * 2)",
            "ValueError",
        ),
        ("lro.ops.lowrank_experts(batches[0], torch.tensor([40]), [None], [layer.up], [None])", "TypeError"),
        ("lro.ops.covariance_update_(torch.zeros(16, 16), torch.zeros(16), 'x')", "TypeError"),
        ("lro.ops.covariance_update_(torch.zeros(8, 8), torch.zeros(16), batches[0])", "ValueError"),
        ("lro.ops.covariance_update_(torch.zeros(16, 16).half(), torch.zeros(16).half(), batches[0])", "ValueError"),
        ("lro.ops.covariance_update_(torch.zeros(16, 16), torch.zeros(16), batches[0], backend=1)", "TypeError"),
        ("lro.ops.covariance_finalize_(torch.zeros(3, 4))", "ValueError"),
        ("lro.ops.covariance_finalize_(None)", "TypeError"),
        ("lro.ops.explain('linear')", "ValueError"),
        ("lro.ops.explain(3)", "TypeError"),
        ("lro.ops.explain('lowrank_linear', 1, 2, 3)", "TypeError"),
    ],
    "Command line": [
        ("lowrank-ops", "exit code 2"),
        ("lowrank-ops analyze my_project:build", "exit code 2"),
        ("lowrank-ops analyze my_project --batches my_project:batches", "exit code 2"),
        ("lowrank-ops analyze no_such_module:build --batches my_project:batches", "exit code 2"),
        ("lowrank-ops analyze my_project:missing --batches my_project:batches", "exit code 2"),
        ("lowrank-ops analyze my_project:number --batches my_project:batches", "exit code 2"),
        ("lowrank-ops analyze my_project:batches --batches my_project:batches", "exit code 2"),
        ("lowrank-ops analyze my_project:build --batches my_project:one_batch", "exit code 2"),
        ("lowrank-ops analyze my_project:build --batches my_project:batches --explained-variance 99", "exit code 2"),
        ("lowrank-ops analyze my_project:build --batches my_project:batches --mask keep", "exit code 1"),
        ("lowrank-ops analyze my_project:build --batches my_project:batches --html no/page.html", "exit code 2"),
        ("lowrank-ops analyze my_project:build --covariances covariances.safetensors --mask keep", "exit code 2"),
        ("lowrank-ops compress my_project:build --batches my_project:batches", "exit code 2"),
        ("lowrank-ops compress my_project:build --batches my_project:batches --out text.txt", "exit code 2"),
        ("lowrank-ops compress my_project:build --batches my_project:batches --budget 2 --out new", "exit code 2"),
        ("lowrank-ops compress my_project:build --batches my_project:batches --budget 0.01 --out new", "exit code 2"),
        ("lowrank-ops compress my_project:build --batches my_project:batches --ranks list.json --out a", "exit code 2"),
        (
            "lowrank-ops compress my_project:build --covariances covariances.safetensors --reconstruct sequential "
            "--out new",
            "exit code 2",
        ),
        (
            "lowrank-ops compress my_project:build --batches my_project:batches --allocation loss "
            "--explained-variance 0.9 --out new",
            "exit code 2",
        ),
        ("lowrank-ops compress my_project:build --batches my_project:batches --recalibrate --out new", "exit code 2"),
    ],
    FOREIGN: [
        (
            "lro.compress_(model, covariances, 8, reconstruction=lro.SequentialReconstruction(batches, "
            "checkpoint='text.txt'))",
            "ValueError",
        ),
        ("lro.calibrate(model)", "TypeError"),
        ("lro.calibrate(model, batch=batches)", "TypeError"),
        ("lro.calibrate(model, [3])", "TypeError"),
        ("lro.calibrate(model, [batches[0].double()])", "RuntimeError"),
        ("lro.measure_latency(model, None)", "TypeError"),
        ("lro.Covariances.load('missing')", "FileNotFoundError"),
        ("lro.Covariances.load('text.txt')", "ValueError"),
        ("lro.Covariances.load('cut.safetensors')", "ValueError"),
        ("type(latencies).load('text.txt')", "ValueError"),
        ("lro.CompressionConfig.from_json('{')", "ValueError"),
        ("lro.LowRankLinear(16, 24)", "TypeError"),
        ("lro.finetune_(compressed, batches, teacher=model, checkpoint='text.txt')", "ValueError"),
        ("lro.load_pretrained('folder')", "TypeError"),
        ("lro.compress_(model, covariances, 8, reconstruction=lro.SequentialReconstruction([None]))", "TypeError"),
        ("lowrank-ops shrink", "exit code 2"),
        ("lowrank-ops analyze my_project:build --batches my_project:batches --device wrong", "exit code 2"),
        ("lowrank-ops analyze my_project:build --covariances text.txt", "exit code 2"),
        ("lowrank-ops analyze my_project:build --covariances missing", "exit code 2"),
        ("lowrank-ops compress my_project:build --batches my_project:batches --ranks text.txt --out a", "exit code 2"),
        ("lro.compress_(model, covariances, lro.Ranks({'re:(': 8}))", "ValueError"),
    ],
}  # fmt: skip

_INTRO = f"""\
# Bad inputs

The errors for wrong arguments and files. `make bad-inputs` writes this page. A test runs every line, compares the error
with this page, and checks that models, statistics, random states and files are unchanged afterwards.

A wrong type is a TypeError, a wrong value a ValueError. Types are checked before a function does anything. Exceptions
from the user's own code, such as a model that gets a batch of another dtype, are passed on unchanged; in Python 3.11
and newer a note names the batch.

The lines use these names:

```python
{SETUP}```
"""


def world() -> dict[str, Any]:
    """The names that the lines use, and their files in the working folder."""
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(SETUP, names)
    return names


def outcome(names: dict[str, Any], line: str) -> tuple[str, str]:
    """The kind and the message of the error that a line raises; ("nothing", "") if it raises none."""
    quiet = io.StringIO()
    with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if line.startswith("lowrank-ops"):
            random = torch.get_rng_state()  # which the functions in my_project change
            code = cli.main(shlex.split(line)[1:])
            torch.set_rng_state(random)
            last = quiet.getvalue().strip().splitlines()[-1]
            return f"exit code {code}", last.replace(os.getcwd(), ".")
        try:
            eval(line, names)
        except Exception as error:
            return type(error).__name__, " ".join(str(error).split())
    return "nothing", ""


def own_parameters(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A module's parameters, without those of its children."""
    return list(module.named_parameters(recurse=False))


def state(names: dict[str, Any]) -> dict[str, str]:
    """Digests of everything that an error must leave unchanged."""
    found = {"random numbers": digest(torch.get_rng_state())}
    for name, value in names.items():
        if isinstance(value, torch.nn.Module):
            parts = {
                fqn: [
                    type(module).__name__,
                    module.training,
                    [len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")],
                    [[key, part, part.requires_grad, id(part), part.grad] for key, part in own_parameters(module)],
                ]
                for fqn, module in value.named_modules()
            }
            found[name] = digest(parts)
        elif isinstance(value, lro.Covariances):
            found[name] = digest({fqn: layer.moments() for fqn, layer in value.items()})
    for path in sorted(Path().rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            found[str(path)] = digest(path.read_bytes())
    return found


def row(line: str, kind: str, message: str) -> str:
    """A line of the page's tables."""
    cells = (f"`{line}`", kind, f"`{message}`" if message else "")
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def page(rows: Mapping[str, str]) -> str:
    """The page with these rows, ``{line: row}``."""
    parts = [_INTRO]
    for section, lines in BAD.items():
        table = ["| given | error | message |", "|---|---|---|", *(rows[line] for line, _ in lines)]
        parts.append(f"## {section}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        names = world()
        rows = {line: row(line, *outcome(names, line)) for lines in BAD.values() for line, _ in lines}
        PAGE.write_text(page(rows), encoding="utf-8")
