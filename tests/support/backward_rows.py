"""Which kernels serve a backward case: half of those of short sequences are run as if their sequences were long."""

import zlib
from contextlib import contextmanager

from backward_cases import BackwardCase

from fa3_cute.contract.formats import tile_dims
from fa3_cute.planning import backward_launch as planning
from fa3_cute.planning.backward import BackwardConfig
from fa3_cute.planning.backward_kernels import pass_config
from fa3_cute.planning.backward_tables import SHORT_QUERIES
from fa3_cute.planning.one_side import OneSidePass
from fa3_cute.planning.selections import backward_configs

# Those that tests run: a selection, and with short sequences every mask, dense or with lengths, in BF16.
KERNELS = set(backward_configs()) | {
    pass_config("bf16", 128, mask, is_varlen, False, is_short=True)
    for mask, is_varlen in (("full", True), ("causal", False), ("local", True))
}


def mask_of(case: BackwardCase) -> str:
    return "causal" if case.forward.is_causal else "local" if max(case.forward.window) >= 0 else "full"


def config_of(case: BackwardCase, is_deterministic: bool = False) -> BackwardConfig | OneSidePass:
    """Of the kernels that serve a case within `rows_of(case)`."""
    return _config(case, is_deterministic, is_short(case) and not runs_as_long(case))


def is_short(case: BackwardCase) -> bool:
    """By its queries, in the mean."""
    rows = case.forward.seqlen_q
    return (rows // case.forward.batch if case.layout else rows) <= SHORT_QUERIES


def runs_as_long(case: BackwardCase) -> bool:
    """Every other case, and those that have no kernel of short sequences in KERNELS."""
    return _config(case, False, True) not in KERNELS or zlib.crc32(str(case).encode()) % 2 == 1


def _config(case: BackwardCase, is_deterministic: bool, is_short: bool) -> BackwardConfig | OneSidePass:
    forward = case.forward
    columns, columns_v = tile_dims(2, forward.head_dim, forward.dim_v)
    dims = {"is_padded": (columns, columns_v) != (forward.head_dim, forward.dim_v)}
    dims |= {"head_dim_v": columns_v if columns_v != columns else 0}
    facts = forward.dtype, columns, mask_of(case), bool(case.lengths), is_deterministic
    return pass_config(*facts, is_short=is_short, dims=frozenset(item for item in dims.items() if item[1]))


def dim_config_of(case: BackwardCase) -> BackwardConfig | OneSidePass:
    """Of a case of dim_cases, run as if its sequences were long where they have lengths of their own."""
    return _config(case, False, not case.lengths)


@contextmanager
def as_if_long(is_wanted: bool = True):
    """Calls are planned as if their sequences were long: none has so few queries as short ones have."""
    _forget()
    planning.SHORT_QUERIES = -1 if is_wanted else SHORT_QUERIES
    try:
        yield
    finally:
        planning.SHORT_QUERIES = SHORT_QUERIES
        _forget()


def rows_of(case: BackwardCase):
    """Calls are planned as config_of(case) says."""
    return as_if_long(runs_as_long(case))


def _forget() -> None:
    """Plans are remembered by their calls."""
    planning.pass_of.cache_clear()
    planning._known.clear()
