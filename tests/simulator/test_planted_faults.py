"""Faults planted in the kernels' sources one at a time, most of them in the synchronization: the tests find each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from planting import Runner, plant


class Fault(NamedTuple):
    file: str
    right: str
    wrong: str
    tests: str  # that have to find it
    says: str  # what they say: an error in the values, or the simulated device's message
    header: str = ""  # where the fault is, if not in the file


VALUES = r"AssertionError: off by|assert tensor\(False\)|assert \(?False"
SM80, SM90, WIDE = (f"covariance/covariance_{name}" for name in ("sm80", "sm90", "sm90_wide"))
DECODE80, DECODE90, PREFILL = (f"lowrank_linear/{name}" for name in ("decode_sm80", "decode_sm90", "prefill_sm90"))
PARTIALS = "covariance/add_partials"
PIPELINE, TILES, WGMMA_TILES = "arch/pipeline.cuh", "covariance/tiles.h", "covariance/wgmma_tiles.h"
DECODE = "lowrank_linear/decode.cuh"
DECODE_LAYOUT, PREFILL_LAYOUT = "lowrank_linear/decode_layout.h", "lowrank_linear/prefill_layout.h"

FAULTS = {
    # ---- covariance_sm80 ----
    "covariance_sm80: a stage is read before all copies arrived": Fault(
        SM80, "__syncthreads();  // all threads' copies", "// all threads' copies", "covariance_sm80 and stages", VALUES
    ),
    "covariance_sm80: waits for one cp.async group too few": Fault(
        SM80,
        "cp_async_wait_group<kStages - 2>",
        "cp_async_wait_group<kStages - 1>",
        "covariance_sm80 and stages",
        f"{VALUES}|not waited for",
    ),
    "covariance_sm80: no zeros past the last token": Fault(
        SM80,
        "valid_features(feature, args.features) : 0;\n      const auto* from = valid ?",
        "valid_features(feature, args.features) : Layout::kChunk;\n      const auto* from = valid ?",
        "covariance_sm80 and stages",
        VALUES,
    ),
    "covariance_sm80: factors are not rounded to tf32": Fault(
        SM80,
        "return arch::cvt_rna_tf32(*reinterpret_cast<const float*>(operand + offset));",
        "return *reinterpret_cast<const uint32_t*>(operand + offset);",
        "covariance_sm80-tf32-splits",
        "operands that are rounded",
    ),
    "covariance_sm80: factors are truncated to tf32": Fault(
        SM80,
        "return arch::cvt_rna_tf32(*reinterpret_cast<const float*>(operand + offset));",
        "return *reinterpret_cast<const uint32_t*>(operand + offset) & ~0x1FFFu;",
        "covariance_sm80-tf32-splits",
        VALUES,
    ),
    "covariance_sm80: column sums of rounded tf32": Fault(
        SM80,
        "return *reinterpret_cast<const float2*>(part + offset);",
        "{\n    const auto at = [&](int i) {\n      const uint32_t bits = tf32_at(part, offset + 4 * i);\n"
        "      return reinterpret_cast<const float&>(bits);\n    };\n    return float2{at(0), at(1)};\n  }",
        "covariance_sm80-tf32-splits",
        VALUES,
    ),
    "covariance_sm80: tf32 operands disagree about tokens": Fault(
        SM80,
        "return Layout<4>::feature_offset(tf32_token(lane, step, i), feature);",
        "return Layout<4>::feature_offset(step * 8 + lane % 4 + i * 4, feature);",
        "covariance_sm80-tf32-splits",
        VALUES,
        TILES,
    ),
    "covariance_sm80: float32 without its low part": Fault(
        SM80,
        "pack(__float2bfloat16_rn(a - __bfloat162float(high_a)),",
        "0 * pack(__float2bfloat16_rn(a - __bfloat162float(high_a)),",
        "covariance_sm80-float32",
        VALUES,
    ),
    "covariance_sm80: the last tile is left out": Fault(
        SM80,
        "const dim3 grid(static_cast<unsigned>(args.tiles),",
        "const dim3 grid(static_cast<unsigned>(args.tiles - 1),",
        "covariance_sm80-4",
        VALUES,
    ),
    "covariance_sm80: one accumulation over all chunks": Fault(
        SM80,
        "shared + step % kStages * kStageBytes<Element>, cta.diagonal());\n    if ((step + 1) % kChunkSteps == 0 ||",
        "shared + step % kStages * kStageBytes<Element>, cta.diagonal());\n    if (",
        "flushed_every_chunk and covariance_sm80",
        VALUES,
    ),
    "add_partials: the last split is left out": Fault(
        PARTIALS,
        "split < args.splits; ++split)\n      sum",
        "split < args.splits - 1; ++split)\n      sum",
        "covariance_sm80-splits and not flushed",
        VALUES,
    ),
    # ---- covariance_sm90 ----
    "covariance_sm90: a stage is released while it is read": Fault(
        SM90,
        "pipeline.consumer_release(step - 1, consumer)",
        "pipeline.consumer_release(step, consumer)",
        "covariance_sm90",
        f"{VALUES}|deadlock|more threads arrive",
    ),
    "covariance_sm90: a stage is read before it is full": Fault(
        SM90, "pipeline.consumer_wait(step);", "", "covariance_sm90", VALUES
    ),
    "covariance_sm90: a stage is overwritten too early": Fault(
        SM90,
        "    mbarrier_wait(empty(step), parity(step) ^ 1);\n    mbarrier_arrive",
        "    mbarrier_arrive",
        "covariance_sm90",
        f"{VALUES}|deadlock",
        PIPELINE,
    ),
    "covariance_sm90: more bytes are expected than loaded": Fault(
        SM90,
        "const int operands = cta.diagonal() ? 1 : 2;",
        "const int operands = 1;",
        "covariance_sm90",
        f"{VALUES}|deadlock",
    ),
    "covariance_sm90: accumulators are read before the MMAs end": Fault(
        SM90, "arch::wgmma_wait_group<0>();", "", "covariance_sm90", f"{VALUES}|not waited for"
    ),
    "covariance_sm90: no fence between uses of accumulators": Fault(
        SM90, "arch::wgmma_fence();", "", "covariance_sm90", "wgmma.fence"
    ),
    "covariance_sm90: TMA may not see the mbarriers": Fault(
        SM90, "arch::fence_mbarrier_init();", "", "covariance_sm90", "fence.mbarrier_init"
    ),
    "covariance_sm90: one warp of a warpgroup waits differently": Fault(
        SM90,
        "arch::wgmma_wait_group<1>();",
        "if (consumer / 32 == 5) arch::wgmma_wait_group<0>();\n      arch::wgmma_wait_group<1>();",
        "covariance_sm90",
        "four warps of a warpgroup",
    ),
    "covariance_sm90: the row operand is used for the columns": Fault(
        SM90, "cta.diagonal() ? rows : rows + kOperandBytes;", "rows;", "covariance_sm90 and not used", VALUES
    ),
    "covariance_sm90: column sums ignore the swizzle": Fault(
        SM90, "((chunk ^ (token & 7)) * 16)", "(chunk * 16)", "covariance_sm90", VALUES, WGMMA_TILES
    ),
    "covariance_sm90: the last step is left out": Fault(
        SM90,
        "static_cast<int>(ceil_div(cta.tokens.end - cta.tokens.begin, w::kTokens));",
        "static_cast<int>((cta.tokens.end - cta.tokens.begin) / w::kTokens);",
        "covariance_sm90",
        VALUES,
    ),
    "covariance_sm90: pairs across the diagonal": Fault(
        SM90,
        "to.last[0] >= kLastCol && to.last[1] >= kLastCol &&",
        "",
        "covariance_sm90-stages-used-twice or covariance_sm90-chunks",
        VALUES,
        "covariance/state.cuh",
    ),
    "covariance_sm90: one accumulation over all chunks": Fault(
        SM90,
        "constexpr int kChunkSteps = 2048 / kTokens;",
        "constexpr int kChunkSteps = 8192 / kTokens;",
        "flushed_every_chunk and covariance_sm90",
        VALUES,
        WGMMA_TILES,
    ),
    # ---- covariance_sm90_wide ----
    "covariance_sm90_wide: a stage is not released to the peer": Fault(
        WIDE, "if (kCtas > 1 && multicast)", "if (false)", "wide", VALUES, PIPELINE
    ),
    "covariance_sm90_wide: a stage is overwritten too early": Fault(
        WIDE,
        "    mbarrier_wait(empty(step), parity(step) ^ 1);\n    mbarrier_arrive",
        "    mbarrier_arrive",
        "wide",
        f"{VALUES}|deadlock|more threads arrive",
        PIPELINE,
    ),
    "covariance_sm90_wide: columns are not multicast": Fault(
        WIDE,
        "kBothCtas = (1 << kClusterCtas) - 1;",
        "kBothCtas = 1;",
        "wide",
        f"{VALUES}|deadlock|more bytes|overflows",
    ),
    "covariance_sm90_wide: a peer may not have started": Fault(
        WIDE,
        "  arch::cluster_arrive();\n  arch::cluster_wait();",
        "",
        "wide",
        "it may not have started",
    ),
    "covariance_sm90_wide: a CTA exits before its peer": Fault(
        WIDE, "pipeline.producer_tail(step);", "", "wide", "that has not exited"
    ),
    "covariance_sm90_wide: rows on the diagonal are elsewhere": Fault(
        WIDE, "wide::a_offset(cta.diagonal(),", "wide::a_offset(false,", "wide", VALUES
    ),
    # ---- decode_sm80 ----
    "decode_sm80: t is read before its kernel has completed": Fault(
        DECODE80, "arch::griddepcontrol_wait();", "", "decode_sm80", VALUES
    ),
    "decode_sm80: sums overwrite t while it is read": Fault(
        DECODE80, "__syncthreads();  // t has been read", "// t has been read", "decode_sm80", VALUES
    ),
    "decode_sm80: the last split is left out": Fault(
        DECODE80,
        "split < args.splits; ++split)",
        "split < args.splits - 1; ++split)",
        "first_calls and decode_sm80",
        "RuntimeWarning: The kernel decode_sm80 of lowrank_linear is wrong",
    ),
    "decode_sm80: counters start anywhere": Fault(
        DECODE80,
        "check(cudaMemsetAsync(counters, 0, bytes, launch.stream), launch);",
        "static_cast<void>(bytes);",
        "decode_sm80-splits",
        VALUES,
    ),
    "decode_sm80: the first CTA to arrive adds the splits": Fault(
        DECODE80, "if (arrived != args.splits - 1) return;", "if (arrived != 0) return;", "decode_sm80-splits", VALUES
    ),
    "decode_sm80: vectors of t in the row before": Fault(
        DECODE80, "row += rows_apart + (vector >= vectors);", "row += rows_apart;", "decode_sm80-64", VALUES, DECODE
    ),
    "decode_sm80: rows of a neighboring CTA": Fault(
        DECODE80,
        "const int64_t first_row = at.index * kRowTiles * kRows;",
        "const int64_t first_row = (at.index ^ 1) * kRowTiles * kRows + (at.index & 1);",
        "decode_sm80",
        VALUES,
    ),
    "decode_sm80: lanes disagree about features": Fault(
        DECODE80,
        "return lane % 4 * kVector; }",
        "return lane % 4 * kVector ^ lane / 4 % 2 * 8; }",
        "decode_sm80",
        VALUES,
        DECODE_LAYOUT,
    ),
    "decode_sm80: the rank of the last member": Fault(
        DECODE80,
        "const int steps = static_cast<int>(ceil_div(args.rank, kFeatures));",
        "const int steps = static_cast<int>(ceil_div(group.members[group.count - 1].rank, kFeatures));",
        "decode_sm80-group-splits",
        VALUES,
    ),
    "decode_sm80: a tile of up straddles two members": Fault(
        DECODE80,
        "return ceil_div(group.members[member].out_features, kRowTiles * kRows);",
        "return group.members[member].out_features / (kRowTiles * kRows);",
        "decode_sm80-group",
        VALUES,
    ),
    "decode_sm80: members' t in the same memory": Fault(
        DECODE80, "next += floats(group.members[i].rank);", "next += 0 * floats(group.members[i].rank);",
        "decode_sm80-group", VALUES, "lowrank_linear/lowrank_linear.h",
    ),
    "decode_sm80: members count in the same counters": Fault(
        DECODE80,
        "next += scratch_units(tokens, group.members[i].rank, plan.token_tile);",
        "next += 0 * scratch_units(tokens, group.members[i].rank, plan.token_tile);",
        "decode_sm80-group-splits",
        VALUES,
    ),
    "decode_sm80: only the first member's counters are cleared": Fault(
        DECODE80,
        "static_cast<size_t>(next - counters) * sizeof(unsigned)",
        "static_cast<size_t>(next > counters) * sizeof(unsigned)",
        "decode_sm80-group-splits",
        VALUES,
    ),
    # ---- decode_sm90 ----
    "decode_sm90: t of the member before": Fault(
        DECODE90,
        "gather_t<kTokens>(reinterpret_cast<const uint4*>(args.scratch)",
        "gather_t<kTokens>(reinterpret_cast<const uint4*>(group.members[0].scratch)",
        "decode_sm90-group",
        VALUES,
    ),
    "decode_sm90: the last rows of a member are left out": Fault(
        DECODE90,
        "const int64_t tiles = ceil_div(group.members[i].out_features, kRows);\n    const Span own",
        "const int64_t tiles = group.members[i].out_features / kRows;\n    const Span own",
        "decode_sm90-group",
        f"{VALUES}|deadlock",
    ),
    "decode_sm90: a member's rows where the slab begins": Fault(
        DECODE90,
        "slab_offset + (index * kRows + row)",
        "slab_offset + (0 * index * kRows + row)",
        "decode_sm90-group",
        VALUES,
    ),
    "decode_sm90: rows at the pitch of the member's own rank": Fault(
        DECODE90,
        "(index * kRows + row) * rank_pitch(group.rank)",
        "(index * kRows + row) * rank_pitch(args.rank)",
        "decode_sm90-group",
        VALUES,
    ),
    "decode_sm90: bytes of one member are expected": Fault(
        DECODE90, "bytes += rows_of(args, tiles)", "bytes = rows_of(args, tiles)", "decode_sm90-group",
        f"{VALUES}|deadlock|still to write|more bytes",
    ),
    "decode_sm90: work units of the largest rank only": Fault(
        DECODE90, "member < group.downs; ++member) units +=", "member < 1; ++member) units +=", "decode_sm90-group",
        VALUES,
    ),
    "decode_sm90: t is read before all CTAs have written it": Fault(
        DECODE90, "cg::this_grid().sync();", "", "decode_sm90", VALUES
    ),
    "decode_sm90: up is read before it has arrived": Fault(
        DECODE90,
        "arch::mbarrier_wait(arch::cast_smem_ptr_to_uint(shared), 0);",
        "",
        "decode_sm90",
        f"{VALUES}|still to write to it",
    ),
    "decode_sm90: sums are read before the cluster wrote them": Fault(
        DECODE90,
        "cluster.sync();",
        "__syncthreads();",
        "decode_sm90",
        f"{VALUES}|it may not have started",
    ),
    "decode_sm90: sums are overwritten while they are read": Fault(
        DECODE90,
        "__syncthreads();  // the sums have been read",
        "// the sums have been read",
        "decode_sm90",
        VALUES,
    ),
    "decode_sm90: the slab is a tile longer than its memory": Fault(
        DECODE90,
        "min64(resident_tiles, slab",
        "min64(resident_tiles + 1, slab",
        "decode_sm90",
        "within the CTA's shared memory",
    ),
    "decode_sm90: row tiles share their weights": Fault(
        DECODE90,
        "const int64_t row = first_row + tile * kRows + lane_row(threadIdx.x % 32) + half * 8;",
        "const int64_t row = first_row + lane_row(threadIdx.x % 32) + half * 8;",
        "decode_sm90-shared",
        VALUES,
        DECODE,
    ),
    "decode_sm90: streamed rows are left out": Fault(
        DECODE90,
        "mma_streamed<Element, kTokenGroups>(acc, args, first_row, shared + at.t, pitch);",
        "(void)0;",
        "decode_sm90",
        VALUES,
    ),
    "decode_sm90: rows of the slab at another pitch": Fault(
        DECODE90, "load_shared(tile + row * pitch,", "load_shared(tile + row * (pitch - 64),", "decode_sm90", VALUES
    ),
    "decode_sm90: the last features are left out": Fault(
        DECODE90,
        "return {begin, min64(begin + split_features, in_features)};",
        "return {begin, min64(begin + split_features, in_features - 8)};",
        "decode_sm90",
        VALUES,
        DECODE_LAYOUT,
    ),
    # ---- prefill_sm90 ----
    "prefill_sm90: a stage is not released to other CTAs": Fault(
        PREFILL,
        "if (kCtas > 1 && multicast)",
        "if (false)",
        "test_every_prefill_variant and (1-256 or 2-128)",
        f"{VALUES}|deadlock|not exited",
        PIPELINE,
    ),
    "prefill_sm90: weights are released to other CTAs": Fault(
        PREFILL,
        "pipeline.consumer_release(step, consumer, kPeers > 1);",
        "pipeline.consumer_release(step, consumer);",
        "test_every_prefill_variant and 8-128",
        f"{VALUES}|deadlock|more threads arrive|not exited",
    ),
    "prefill_sm90: a CTA loads another one's rows": Fault(
        PREFILL,
        "map, x, y + cluster_rank * rows,",
        "map, x, y + (kSharers - 1 - cluster_rank) * rows,",
        "test_every_prefill_variant and 1-256",
        VALUES,
    ),
    "prefill_sm90: a CTA exits before its peer": Fault(
        PREFILL,
        "if (kPeers > 1) pipeline.producer_tail(step);",
        "",
        "test_every_prefill_variant and 1-256",
        "that has not exited",
    ),
    "prefill_sm90: t is read before its exchange": Fault(
        PREFILL,
        "      arch::cluster_arrive();\n      arch::cluster_wait();\n#pragma",
        "#pragma",
        "test_every_prefill_variant and (4-128 or 2-192)",
        f"{VALUES}|deadlock|cluster barrier",
    ),
    "prefill_sm90: t is not exchanged": Fault(
        PREFILL,
        "for (int cta = 0; cta < kCluster; ++cta)",
        "for (int cta = tile_rank; cta <= tile_rank; ++cta)",
        "test_every_prefill_variant and (4-128 or 2-192)",
        VALUES,
    ),
    "prefill_sm90: a stage is released while it is read": Fault(
        PREFILL,
        "arch::wgmma_wait_group<0>();\n      pipeline.consumer_release(step, consumer, kPeers > 1);",
        "pipeline.consumer_release(step, consumer, kPeers > 1);\n      arch::wgmma_wait_group<0>();",
        "prefill_sm90",
        VALUES,
    ),
    "prefill_sm90: the first round waits for a release": Fault(
        PREFILL,
        "    mbarrier_wait(empty(step), parity(step) ^ 1);\n    mbarrier_arrive",
        "    mbarrier_wait(empty(step), parity(step));\n    mbarrier_arrive",
        "prefill_sm90",
        "deadlock: .* wait for an mbarrier",
        PIPELINE,
    ),
    "prefill_sm90: a CTA may not have started": Fault(
        PREFILL,
        "    arch::cluster_arrive();\n    arch::cluster_wait();\n  }\n  if",
        "  }\n  if",
        "test_every_prefill_variant",
        "it may not have started",
    ),
    "prefill_sm90: mbarriers where something else is written": Fault(
        PREFILL,
        "p::mbarrier_offset(kVariant), first_stage",
        "p::mbarrier_offset(kVariant) - 16, first_stage",
        "prefill_sm90",
        "an mbarrier has been overwritten",
    ),
    "prefill_sm90: two of three warpgroups release stages": Fault(
        PREFILL,
        "cta.pipeline.init(kConsumers / 32);",
        "cta.pipeline.init(8);",
        "test_every_prefill_variant and 192",
        f"{VALUES}|more threads arrive|deadlock",
    ),
    "prefill_sm90: a CTA exits while others write to it": Fault(
        PREFILL,
        "    __syncwarp();\n    if constexpr (kCluster > 1) arch::cluster_wait();",
        "    __syncwarp();",
        "test_every_prefill_variant and (4-128 or 2-192)",
        "between arriving at the cluster barrier and waiting",
    ),
    "prefill_sm90: descriptors of half the stride": Fault(
        PREFILL,
        "smem_descriptor(address, 16, 1024)",
        "smem_descriptor(address, 16, 512)",
        "prefill_sm90",
        "whole patterns of the swizzle",
        "arch/fragment.h",
    ),
    "prefill_sm90: vectors of y are not transposed": Fault(
        PREFILL, "int round = 0; round < 2; ++round", "int round = 0; round < 1; ++round", "prefill_sm90", VALUES
    ),
    "prefill_sm90: down of the first member": Fault(
        PREFILL, "&maps.down[member], step", "&maps.down[0], step", "prefill_sm90-group", VALUES
    ),
    "prefill_sm90: members that follow each other in blocks": Fault(
        PREFILL,
        "static_cast<int>(cluster % group.count);",
        "static_cast<int>(blockIdx.x % group.count);",
        "prefill_sm90-group",
        f"{VALUES}|deadlock",
    ),
    "prefill_sm90: token tiles of a single layer": Fault(
        PREFILL, "token_tile = cluster / group.count;", "token_tile = cluster;", "prefill_sm90-group", VALUES
    ),
    "prefill_sm90: the last tile of K is left out": Fault(
        PREFILL,
        "static_cast<int>(ceil_div(args.in_features, p::kTileK))",
        "static_cast<int>(max64(1, args.in_features / p::kTileK))",
        "prefill_sm90-two",
        VALUES,
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_found(fault: Fault, library: Path, runner: Runner, tmp_path: Path) -> None:
    planted = plant(fault.file, fault.right, fault.wrong, library, tmp_path, fault.header)
    status, output = runner.run(planted, fault.tests)
    assert status == 1, output
    assert re.search(rf"^E .*({fault.says})", output, re.MULTILINE), output
