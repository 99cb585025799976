"""What the frames of the kernels have in common: arguments, shared memory from a config's rings, and two kinds of
GEMMs."""
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from ...planning.backward import FLOAT_BYTES, BackwardConfig, GradientFields
from ...planning.config import ROWS_PER_WARPGROUP
from ...planning.pair import PairConfig
from ...planning.rings import by_name
from ..common.arithmetic import LOG2_E
from ..common.block_range import Window
from ..common.layout import element_type, tensor_view
from ..common.sequences import Sequences
from ..common.tma import tma_load
from .blocks import Extents


def shared_params(cfg: BackwardConfig | PairConfig, a, sequences: Sequences, shapes: Extents, layouts) -> dict:
    """The fields that BwdParams and PairParams have in common, from a kernel's arguments."""
    return {
        "q": tma_load(tensor_view(a, "q", shapes.q), layouts.sQ, cfg.tile_m),
        "do": tma_load(tensor_view(a, "dout", shapes.do), layouts.sdO, cfg.tile_m),
        "k": tma_load(tensor_view(a, "k", shapes.k), layouts.sK, cfg.tile_n),
        "v": tma_load(tensor_view(a, "v", shapes.v), layouts.sV, cfg.tile_n),
        "shift": cute.make_tensor(a.shift, shapes.vector), "delta": cute.make_tensor(a.delta, shapes.vector),
        "window": Window.create(cfg, a), "sequences": sequences, "q_blocks": shapes.q_blocks,
        "k_blocks": shapes.k_blocks, "section": a.section, "num_heads_k": a.num_heads_k,
        "group": a.num_heads // a.num_heads_k, "scale": a.softmax_scale,
        "scale_log2": a.softmax_scale * Float32(LOG2_E)}


class SharedMemory:
    """A CTA's, while a kernel is traced: first the mbarriers of the rings that are named, then what is asked for, in
    that order. cfg.rings has slots, bytes and arrival counts."""

    def __init__(self, cfg: GradientFields, names: tuple[str, ...]):
        self.cfg, self.rings, self.allocator = cfg, by_name(cfg.rings), cutlass.memory.SmemAllocator()
        self.bars = {name: self.allocator.allocate_array(Int64, 2 * self.rings[name].slots) for name in names}

    def tensor(self, layout: cute.ComposedLayout) -> cute.Tensor:
        """A ring of tiles, with its swizzle."""
        return self.allocator.allocate_tensor(
            element_type(self.cfg), layout.outer, byte_alignment=1024, swizzle=layout.inner)

    def floats(self, name: str, alignment: int = 128) -> cute.Tensor:
        """(floats of a slot, slots) of a ring that has nothing else."""
        ring = self.rings[name]
        layout = cute.make_layout((ring.slot_bytes // FLOAT_BYTES, ring.slots))
        return self.allocator.allocate_tensor(Float32, layout, byte_alignment=alignment)

    def ring(self, name: str) -> pipeline.PipelineAsync:
        """A ring that threads fill."""
        return pipeline.PipelineAsync.create(**self.facts(name))

    def tma_ring(self, *names: str) -> pipeline.PipelineTmaAsync:
        """A ring that the load role fills; its barrier counts the bytes of others' slots that come with its own."""
        nbytes = sum(self.rings[name].slot_bytes for name in names)
        return pipeline.PipelineTmaAsync.create(**self.facts(names[0]), tx_count=nbytes)

    def facts(self, name: str) -> dict:
        """What every pipeline is created from."""
        ring, group = self.rings[name], lambda arrivals: pipeline.CooperativeGroup(pipeline.Agent.Thread, arrivals)
        return {"num_stages": ring.slots, "producer_group": group(ring.full), "consumer_group": group(ring.empty),
                "barrier_storage": self.bars[name], "defer_sync": True}


def publish_barriers():
    """Once all rings are made: their mbarriers become visible to the other threads and to TMA."""
    cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()


def scores_mma(cfg: GradientFields, warpgroups: int, columns: int) -> cute.TiledMma:
    """Of S or dP, or their transposes: both operands lie in shared memory, with their contiguous dimension on K."""
    element, k_major = element_type(cfg), OperandMajorMode.K
    return sm90.make_trivial_tiled_mma(element, element, k_major, k_major, Float32, (warpgroups, 1, 1),
                                       (ROWS_PER_WARPGROUP, columns))


def gradient_mma(cfg: GradientFields, warpgroups: int, columns: int) -> cute.TiledMma:
    """Of a gradient, += P or dS from registers times the rows of a tile, read MN-major from the slots that scores_mma
    reads K-major."""
    element = element_type(cfg)
    return sm90.make_trivial_tiled_mma(element, element, OperandMajorMode.K, OperandMajorMode.MN, Float32,
                                       (warpgroups, 1, 1), (ROWS_PER_WARPGROUP, columns), warpgroup.OperandSource.RMEM)
