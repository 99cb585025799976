"""Named-barrier ids of the main kernel, besides those of common/barriers.py. "all": the consumers and the watch role.

id    name      threads  who                             protects
4..5  STAGED+i  all      consumers arrive, watch syncs   place i of what leaves, until it is written
6     FREE      all      watch arrives, consumers sync   the place before the last, and at the end both, until read
7     SUMS      all      watch arrives, consumers sync   sums of dQ, until they are whole; and slots of dS, until read
8     LOADED    64       load arrives, schedule syncs    the order, of which no place is taken before one is loaded
"""
import enum


class BarrierId(enum.IntEnum):
    """First id of each."""
    STAGED = 4
    FREE = 6
    SUMS = 7
    LOADED = 8
