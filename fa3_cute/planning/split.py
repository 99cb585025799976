"""Where the consumer warpgroups of the backward main kernel have a GEMM each (kernels/backward/split.py), besides 64
columns of dV and dK. Pure Python."""

from .rings import WARP, WARPS_PER_WARPGROUP, Ring, Role

CONSUMER_WGS = 3
TILE_N = 96  # keys of a CTA: dV^T and dK^T of 192 columns take 96 registers of each consumer thread
# Per thread of the producer, and of the roles scores, products and queries: together 4 * 128, all that the 512 threads
# of a CTA start with. Accumulators begin at register 24: 24 + 24 (half of S) + 3 * 48 (blocks of dV and dK), 24 + 48
# (dP) + 2 * 48, 24 + 32 (a third of dQ) + 48, and 8 that ptxas wants besides.
REGISTERS = (24, 200, 176, 112)
DQ_SLOTS = 2  # of a third each
TILE_SLOTS = 2  # tiles of keys that a CTA knows of


def rings_of(cfg) -> tuple[Ring, ...]:
    """In the order of their slots in shared memory. cfg: a BackwardConfig."""
    warps, row, wg = cfg.num_consumer_warps, cfg.head_dim * 2, WARPS_PER_WARPGROUP
    tile, vector = cfg.tile_m * TILE_N * 2, 4 * cfg.tile_m
    return (
        Ring("tiles", TILE_SLOTS, 0, WARP, warps + 3),
        Ring("k", 1, TILE_N * row, 1, warps, "K"),
        Ring("v", 1, TILE_N * row, 1, warps, "V"),
        Ring("q", cfg.num_q_stages, cfg.tile_m * row, 1, warps, "Q"),
        Ring("do", cfg.num_do_stages, cfg.tile_m * row, 1, 2 * wg, "dO"),  # scores and products read it
        Ring("p", 1, tile, wg, 2 * wg, "P"),  # scores and products read it
        Ring("ds", 1, tile, wg, 2 * wg, "dS"),  # scores and queries; products by way of P, whose next it waits for
        Ring("dq", DQ_SLOTS, 4 * cfg.dq_part, wg, 1, "dQ"),
        Ring("shift", cfg.num_q_stages, vector, 0, 0, "shift"),
        Ring("delta", cfg.num_do_stages, vector, 0, 0, "delta"),
    )


def consumer_roles() -> tuple[Role, ...]:
    """A warpgroup each, behind the producer's."""
    names, wg = ("scores", "products", "queries"), WARPS_PER_WARPGROUP
    return tuple(
        Role(name, range(wg * (1 + number), wg * (2 + number)), REGISTERS[1 + number])
        for number, name in enumerate(names)
    )
