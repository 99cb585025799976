"""What the sizes, strides, windows and scales of a call may be. Pure Python."""

from .formats import UNBOUNDED_WINDOW

DIMS = ("batch", "row", "head")
# Lengths are int32 on the device, and rounding one up to a whole tile (at most 256 rows) must not overflow.
MAX_SIZE = 2**31 - 256
MAX_TILES = 2**31 - 1
MAX_WINDOW = 2**31 - 1
SMALLEST_TILE_M = 64
MAX_ROWS = MAX_TILES * SMALLEST_TILE_M  # of all heads together
# What TMA takes (CUtensorMap): addresses and strides that are multiples of 16 bytes, strides below 2^40 bytes.
TMA_ALIGNMENT = 16
TMA_STRIDE_BYTES = 2**40
# How far a query may be from a key where that matters, which is at most their numbers together: kernels count from the
# diagonal with int32, an unbounded side as UNBOUNDED_WINDOW more, and round up to whole tiles (at most 256 x 256).
MAX_MASKED_ROWS = UNBOUNDED_WINDOW - 512
# Below, a float32 softmax_scale is zero or denormal; above, it is infinite with the factor log2(e) of kernels.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127
