"""Named-barrier ids of the main kernel, besides those of common/barriers.py.

id  name       threads        who                   protects
10  KEYS_READ  all consumers  each once, at its end  K and V, whose slots dK and dV take
11  DS         all consumers  each once per Q tile   dS, until every warpgroup's is written; unless cfg.is_dv_early
"""
import enum


class BarrierId(enum.IntEnum):
    """One each."""
    KEYS_READ = 10
    DS = 11
