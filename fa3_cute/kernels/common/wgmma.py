"""One asynchronous WGMMA GEMM: fence, issue over k, commit. The caller waits (PTX ISA, "wgmma.mma_async")."""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Boolean, Float32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from ...planning.config import KernelConfig, ROWS_PER_WARPGROUP
from .layout import operand_type


@dataclass(frozen=True)
class Mmas:
    """The two GEMMs, over all consumer warpgroups."""
    qk: cute.TiledMma              # S = Q K^T
    pv: cute.TiledMma              # O += P V


def make_mmas(cfg: KernelConfig) -> Mmas:
    """S = Q K^T with both operands in shared memory, or Q in registers; O += P V with P in registers and V read
    transposed: by WGMMA itself in 16 bit; FP8's V^T has been transposed already."""
    element, warpgroups = operand_type(cfg), (cfg.num_consumer_wgs, 1, 1)
    v_major = OperandMajorMode.K if cfg.values.is_transposed else OperandMajorMode.MN
    q_source = warpgroup.OperandSource.RMEM if cfg.has_q_in_registers else warpgroup.OperandSource.SMEM
    return Mmas(
        qk=sm90.make_trivial_tiled_mma(element, element, OperandMajorMode.K, OperandMajorMode.K, Float32, warpgroups,
                                       (ROWS_PER_WARPGROUP, cfg.tile_n), q_source),
        pv=sm90.make_trivial_tiled_mma(element, element, OperandMajorMode.K, v_major, Float32, warpgroups,
                                       (ROWS_PER_WARPGROUP, cfg.dim_v // cfg.num_value_parts),
                                       warpgroup.OperandSource.RMEM))


@cute.jit
def issue_gemm(tiled_mma: cute.TiledMma, acc: cute.Tensor, tCrA: cute.Tensor, tCrB: cute.Tensor, zero_init: Boolean):
    """acc (+)= A @ B, left in flight as one commit group."""
    warpgroup.fence()
    mma = cute.make_mma_atom(tiled_mma.op)
    mma.set(warpgroup.Field.ACCUMULATE, not zero_init)
    for k in cutlass.range_constexpr(cute.size(tCrA.shape[2])):
        cute.gemm(mma, acc, tCrA[None, None, k], tCrB[None, None, k], acc)
        mma.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


def in_flight(n: int):
    """Block until at most n committed GEMMs of this warpgroup are still running."""
    warpgroup.wait_group(n)


def part_of(X: cute.Tensor, mode: int, part: int) -> cute.Tensor:
    """One of the WGMMAs along a mode, 1 or 2, of a fragment of three modes, which it keeps."""
    if cute.size(X, mode=[mode]) == 1:
        return X
    index = [None, None, None]
    index[mode] = part
    rest = X[tuple(index)]
    shape, stride = [rest.shape[0], rest.shape[1]], [rest.stride[0], rest.stride[1]]
    shape.insert(mode, 1)
    stride.insert(mode, 0)
    return cute.make_tensor(rest.iterator, cute.make_layout(tuple(shape), stride=tuple(stride)))
