"""Element types and head dims by name, and what everything counts with. Pure Python."""

ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp8_e4m3": 1}  # of Q, K and V
FP8 = "fp8_e4m3"
FP8_OUT_DTYPES = ("bf16", "fp16")  # of O, where Q, K and V are FP8; the first is the default
PARTIAL = "fp32"  # of O that is to be merged with others
OUT_BYTES = 2  # of an element of O, but for partial results
# Columns of the kernels' tiles. Other dims are served by the next larger ones: TMA fills the columns that a tensor does
# not have with zeros, and does not store them.
HEAD_DIMS = (64, 96, 128, 192, 256)
FP8_HEAD_DIMS = (64, 96, 128, 192, 256)
FP8_CACHE_HEAD_DIMS = (64, 128)  # of 16-bit queries over FP8 keys, no others
# {(bytes per element, columns of Q and K): fewer columns of V and O, which have kernels of their own}
VALUE_DIMS = {(2, 192): 128}
# (head_dim, head_dim_v) of MLA decode: V is the first columns of K; or beside 512 columns of q_v, which meet V.
MLA_DIMS, QV_DIMS = (576, 512), (64, 512)
LARGE_DIM = 512  # of Q and K, and of V and O
WIDE_DIMS = (MLA_DIMS, (LARGE_DIM, LARGE_DIM), QV_DIMS)  # the columns of kernels/mla
DIM_STEP, FP8_DIM_STEP = 8, 16  # 16 bytes, for TMA
SERVED_DIMS = frozenset(range(DIM_STEP, HEAD_DIMS[-1] + 1, DIM_STEP))
FP8_SERVED_DIMS = frozenset(range(FP8_DIM_STEP, FP8_HEAD_DIMS[-1] + 1, FP8_DIM_STEP))
UNBOUNDED_WINDOW = 1 << 30  # beyond every length, yet adding it to one stays within int32
MAX_SPLITS = 256


def tile_dims(element_bytes: int, head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """Columns of the Q and K tiles, and of the V and O tiles, of the kernel for dims that are served.

    Tiles of Q and K have room for V, and those of V as many columns, unless there is a kernel of fewer.
    """
    if (head_dim, head_dim_v or head_dim) in WIDE_DIMS:
        return head_dim, head_dim_v or head_dim
    dims = FP8_HEAD_DIMS if element_bytes == 1 else HEAD_DIMS
    head_dim_v = head_dim_v or head_dim
    columns = next(dim for dim in dims if dim >= max(head_dim, head_dim_v))
    fewer = VALUE_DIMS.get((element_bytes, columns), 0)
    return columns, fewer if head_dim_v <= fewer else columns
