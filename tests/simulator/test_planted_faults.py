"""Faults planted in the kernels' sources one at a time, of synchronization above all: the tests find each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from planting import plant, run_tests


class Fault(NamedTuple):
    file: str
    right: str
    wrong: str
    kernel: str  # the tests that have to find it
    says: str  # what they say: an error in the values, or the simulated device's own words


VALUES = r"AssertionError: off by|assert tensor\(False\)"
FAULTS = {
    "covariance_sm80: a stage is read before all threads have brought theirs": Fault(
        "covariance/covariance_sm80",
        "__syncthreads();  // everyone's copies",
        "// everyone's copies",
        "covariance_sm80",
        VALUES,
    ),
    "covariance_sm80: one group of copies too few is waited for": Fault(
        "covariance/covariance_sm80",
        "wait_copies<kStages - 2>",
        "wait_copies<kStages - 1>",
        "covariance_sm80",
        f"{VALUES}|not waited for",
    ),
    "covariance_sm80: no zeros past the last token": Fault(
        "covariance/covariance_sm80",
        "valid_features(feature, args.features) : 0;\n      const auto* from = valid ?",
        "valid_features(feature, args.features) : Layout::kChunk;\n      const auto* from = valid ?",
        "covariance_sm80",
        VALUES,
    ),
    "covariance_sm80: factors are not rounded to TensorFloat-32": Fault(
        "covariance/covariance_sm80",
        "return round_to_tf32(*reinterpret_cast<const float*>(operand + offset));",
        "return *reinterpret_cast<const uint32_t*>(operand + offset);",
        "TensorFloat",
        "operands that are rounded",
    ),
    "covariance_sm90: a stage is given back while it is multiplied": Fault(
        "covariance/covariance_sm90",
        "sm90::arrive(pipeline.empty(step - 1))",
        "sm90::arrive(pipeline.empty(step))",
        "covariance_sm90",
        f"{VALUES}|no thread can go on|more threads arrive",
    ),
    "covariance_sm90: a stage is read before it is full": Fault(
        "covariance/covariance_sm90",
        "sm90::wait(pipeline.full(step), Stages::parity(step));",
        "",
        "covariance_sm90",
        VALUES,
    ),
    "covariance_sm90: a stage is overwritten before it is given back": Fault(
        "covariance/covariance_sm90",
        "sm90::wait(pipeline.empty(step), Stages::parity(step) ^ 1);",
        "",
        "covariance_sm90",
        f"{VALUES}|no thread can go on",
    ),
    "covariance_sm90: more bytes are expected than come": Fault(
        "covariance/covariance_sm90",
        "const int operands = block.diagonal() ? 1 : 2;",
        "const int operands = 1;",
        "covariance_sm90",
        f"{VALUES}|no thread can go on",
    ),
    "covariance_sm90: accumulators are read before the products are done": Fault(
        "covariance/covariance_sm90",
        "sm90::wait_products<0>();",
        "",
        "covariance_sm90",
        f"{VALUES}|not waited for",
    ),
    "covariance_sm90: no fence between the accumulators' uses": Fault(
        "covariance/covariance_sm90", "sm90::fence_products();", "", "covariance_sm90", "wgmma.fence"
    ),
    "decode_sm80: t is read before the kernel that writes it has ended": Fault(
        "lowrank_linear/decode_sm80", "wait_for_predecessor();", "", "decode_sm80", VALUES
    ),
    "decode_sm80: the sums take t's place while it is read": Fault(
        "lowrank_linear/decode_sm80",
        "__syncthreads();  // t has been read",
        "// t has been read",
        "decode_sm80",
        VALUES,
    ),
    "covariance_sm90: the copy engine may not know of the barriers": Fault(
        "covariance/covariance_sm90",
        "sm90::fence_barrier_init();",
        "",
        "covariance_sm90",
        "fence.mbarrier_init",
    ),
    "covariance_sm90: one warp of a warpgroup waits differently": Fault(
        "covariance/covariance_sm90",
        "sm90::wait_products<1>();",
        "if (consumer / 32 == 5) sm90::wait_products<0>();\n      sm90::wait_products<1>();",
        "covariance_sm90",
        "four warps of a warpgroup",
    ),
    "covariance_sm90_wide: the other block does not say that it has read a stage": Fault(
        "covariance/covariance_sm90_wide",
        "if (consumer % 32 < kBlocks) sm90::arrive_in_block(sm90::address_in_block(empty, consumer % 32));",
        "if (consumer % 32 < kBlocks) sm90::arrive(empty);",
        "wide",
        VALUES,
    ),
    "covariance_sm90_wide: a stage is overwritten before it is given back": Fault(
        "covariance/covariance_sm90_wide",
        "sm90::wait(pipeline.empty(step), Stages::parity(step) ^ 1);  // the first",
        "// the first",
        "wide",
        f"{VALUES}|no thread can go on|more threads arrive",
    ),
    "covariance_sm90_wide: blocks bring columns to themselves alone": Fault(
        "covariance/covariance_sm90_wide",
        "kBoth = (1 << kBlocks) - 1;",
        "kBoth = 1;",
        "wide",
        f"{VALUES}|no thread can go on|more bytes",
    ),
    "covariance_sm90_wide: nobody waits for the other block to start": Fault(
        "covariance/covariance_sm90_wide",
        "// Nobody may write to a block that has not started.\n  sm90::arrive_cluster();\n  sm90::wait_cluster();",
        "",
        "wide",
        "it may not have started",
    ),
    "covariance_sm90_wide: nobody waits for the other block to end": Fault(
        "covariance/covariance_sm90_wide",
        "for (const int end = step + kStages; step < end; ++step)",
        "while (false)",
        "wide",
        "that has not ended",
    ),
    "covariance_sm90_wide: on the diagonal the rows are looked for where there are none": Fault(
        "covariance/covariance_sm90_wide",
        "wide::a_start(block.diagonal(), block.rank",
        "wide::a_start(false, block.rank",
        "wide",
        VALUES,
    ),
    "decode_sm90: the runtime is not told of clusters of one": Fault(
        "lowrank_linear/decode_sm90",
        "plan.shared_bytes, plan.cluster};",
        "plan.shared_bytes, plan.cluster == 1 ? 0 : plan.cluster};",
        "decode_sm90",
        "launching lowrank_linear of .* failed",
    ),
    "prefill_sm90: a block does not tell the others that it has read a stage": Fault(
        "lowrank_linear/prefill_sm90",
        "if (kBlocks > 1 && (x_is_left || kPeers > 1))",
        "if (false)",
        "test_every_prefill_kernel and (1-256 or 2-128)",
        f"{VALUES}|no thread can go on|not ended",
    ),
    "prefill_sm90: a block tells the others of weights that are not theirs": Fault(
        "lowrank_linear/prefill_sm90",
        "if (kBlocks > 1 && (x_is_left || kPeers > 1))",
        "if (kBlocks > 1)",
        "test_every_prefill_kernel and 8-128",
        f"{VALUES}|no thread can go on|more threads arrive|not ended",
    ),
    "prefill_sm90: a block brings another's rows": Fault(
        "lowrank_linear/prefill_sm90",
        "sm90::copy_box_to_blocks(to + place * rows * p::kRowBytes, map, x, y + place * rows,",
        "sm90::copy_box_to_blocks(to + place * rows * p::kRowBytes, map, x, y + (kSharers - 1 - place) * rows,",
        "test_every_prefill_kernel and 1-256",
        VALUES,
    ),
    "prefill_sm90: nobody waits for a peer to end": Fault(
        "lowrank_linear/prefill_sm90",
        "kPeers > 1 && step < end; ++step",
        "kPeers > 2 && step < end; ++step",
        "test_every_prefill_kernel and 1-256",
        "that has not ended",
    ),
    "decode_sm90: t is read before all blocks have written it": Fault(
        "lowrank_linear/decode_sm90", "cg::this_grid().sync();", "", "decode_sm90", VALUES
    ),
    "decode_sm90: up is read before it is there": Fault(
        "lowrank_linear/decode_sm90",
        "sm90::wait(sm90::shared_address(shared), 0);",
        "",
        "decode_sm90",
        f"{VALUES}|still to write to it",
    ),
    "decode_sm90: sums are read before the cluster has left them": Fault(
        "lowrank_linear/decode_sm90",
        "cluster.sync();",
        "__syncthreads();",
        "decode_sm90",
        f"{VALUES}|it may not have started",
    ),
    "decode_sm90: sums are overwritten while they are read": Fault(
        "lowrank_linear/decode_sm90",
        "__syncthreads();  // the sums have been read",
        "// the sums have been read",
        "decode_sm90",
        VALUES,
    ),
    "decode_sm90: the slab is a tile longer than its memory": Fault(
        "lowrank_linear/decode_sm90",
        "least(args.resident_tiles, slab",
        "least(args.resident_tiles + 1, slab",
        "decode_sm90",
        "within the block's shared memory",
    ),
    "prefill_sm90: t is read before the cluster has handed it over": Fault(
        "lowrank_linear/prefill_sm90",
        "      sm90::arrive_cluster();\n      sm90::wait_cluster();\n#pragma",
        "#pragma",
        "prefill_sm90",
        f"{VALUES}|no thread can go on|cluster's barrier",
    ),
    "prefill_sm90: a stage is given back while it is multiplied": Fault(
        "lowrank_linear/prefill_sm90",
        "sm90::wait_products<0>();\n      give_back(step, consumer, false);",
        "give_back(step, consumer, false);\n      sm90::wait_products<0>();",
        "prefill_sm90",
        VALUES,
    ),
    "prefill_sm90: the first round waits for stages that nobody gives back": Fault(
        "lowrank_linear/prefill_sm90",
        "sm90::wait(pipeline.empty(step), Stages::parity(step) ^ 1);  // the first",
        "sm90::wait(pipeline.empty(step), Stages::parity(step));  // the first",
        "prefill_sm90",
        "no thread can go on; .* wait for a barrier in shared memory",
    ),
    "prefill_sm90: a block is written to that may not have started": Fault(
        "lowrank_linear/prefill_sm90",
        "    sm90::arrive_cluster();\n    sm90::wait_cluster();\n  }\n  if",
        "  }\n  if",
        "prefill_sm90",
        "it may not have started",
    ),
    "prefill_sm90: barriers lie where something else is written": Fault(
        "lowrank_linear/prefill_sm90",
        "p::barrier_offset(ThisBlock::kVariant), first_stage",
        "p::barrier_offset(ThisBlock::kVariant) - 16, first_stage",
        "prefill_sm90",
        "a barrier has been overwritten",
    ),
    "prefill_sm90: stages of three warpgroups are given back by two": Fault(
        "lowrank_linear/prefill_sm90",
        "block.pipeline.init(kBlocks * kConsumers / 32);",
        "block.pipeline.init(kBlocks * 8);",
        "prefill",
        f"{VALUES}|more threads arrive|no thread can go on",
    ),
    "prefill_sm90: a block ends while others write to it": Fault(
        "lowrank_linear/prefill_sm90",
        "    __syncwarp();\n    if constexpr (kCluster > 1) sm90::wait_cluster();",
        "    __syncwarp();",
        "prefill_sm90",
        "between arriving at the cluster's barrier and waiting",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_found(fault: Fault, library: Path, tmp_path: Path) -> None:
    planted = plant(fault.file, fault.right, fault.wrong, library, tmp_path)
    result = run_tests(planted, fault.kernel)
    assert result.returncode == 1, result.stdout
    assert re.search(rf"^E .*({fault.says})", result.stdout, re.MULTILINE), result.stdout
