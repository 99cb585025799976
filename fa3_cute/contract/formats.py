"""Element types and head dims by name, and what everything counts with. Pure Python."""

ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp8_e4m3": 1}  # of Q, K and V
FP8 = "fp8_e4m3"
FP8_OUT_DTYPES = ("bf16", "fp16")  # of O, where Q, K and V are FP8; the first is the default
PARTIAL = "fp32"  # of O that is to be merged with others
OUT_BYTES = 2  # of an element of O, but for partial results
HEAD_DIMS = (64, 96, 128, 192, 256)
FP8_HEAD_DIMS = (64, 96, 128)
UNBOUNDED_WINDOW = 1 << 30  # beyond every length, yet adding it to one stays within int32
MAX_SPLITS = 256
