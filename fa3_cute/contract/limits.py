"""What the sizes, strides, windows and scales of a call may be. Pure Python."""

TENSORS = ("q", "k", "v", "out")
DIMS = ("batch", "row", "head")
# Lengths are int32 on the device, and rounding one up to a whole tile (at most 256 rows) must not overflow.
MAX_SIZE = 2**31 - 256
MAX_TILES = 2**31 - 1
MAX_WINDOW = 2**31 - 1
SMALLEST_TILE_M = 64
# What TMA takes (CUtensorMap): addresses and strides that are multiples of 16 bytes, strides below 2^40 bytes.
TMA_ALIGNMENT = 16
TMA_STRIDE_BYTES = 2**40
# Beyond these a float32 softmax_scale is zero, denormal or infinite.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, (2 - 2.0**-23) * 2.0**127
