"""Named-barrier ids of the main kernel, besides those of common/barriers.py.

id  name       threads        who                         protects
10  GRADIENTS  all consumers  each twice per tile of keys  the slots of dS, which dK and dV take
11  LOADED     64             load, schedule               the next tile of keys, not to be taken while one is loaded
"""
import enum


class BarrierId(enum.IntEnum):
    """One each."""
    GRADIENTS = 10
    LOADED = 11
