"""log2(e); min, max and ceiling division for Python ints and run-time Int32 alike: the CPU tests device arithmetic."""
import math

import cutlass

LOG2_E = math.log2(math.e)


def minimum(a, b):
    """The smaller one."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else cutlass.min(a, b)


def maximum(a, b):
    """The larger one."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else cutlass.max(a, b)


def ceil_div(a, b):
    """ceil(a / b) for a >= 0, b > 0."""
    return (a + b - 1) // b
