"""Named-barrier ids of the main kernel, besides EPILOGUE and TURN of common/barriers.py.
"all": the consumers and the watch role.

id    name      threads  who                             protects
7..8  STAGED+i  all      consumers arrive, watch syncs   place i of what leaves, until it is written
9     FREE      all      watch arrives, consumers sync   the place before the last, and at the end both, until read
10    SUMS      all      watch arrives, consumers sync   sums of dQ, or of a tile's parts, until they are whole; and
                                                         slots of dS, until read
11    LOADED    64       load arrives, schedule syncs    the order, of which no place is taken before one is loaded
"""
import enum


class BarrierId(enum.IntEnum):
    """First id of each."""
    STAGED = 7
    FREE = 9
    SUMS = 10
    LOADED = 11
