"""The kernels of a backward pass as configs, and the entries that they take. Pure Python.

A BackwardConfig chooses for all of them. Each compiles from those of its choices that change its code: one prepare
kernel serves all masks, for instance.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

from ..contract.arguments import Entry
from ..contract.backward_params import ARGUMENTS
from ..contract.formats import PARTIAL
from .backward import (
    BACKWARD_ARGUMENTS,
    CLEAR_ARGUMENTS,
    FLOAT_BYTES,
    PREPARE_ARGUMENTS,
    PREPARE_THREADS,
    SINKS_ARGUMENTS,
    BackwardConfig,
)
from .backward_tables import FEATURED, FEATURES_OF_ALL, SHORT, TABLE, VARLEN, has_registers
from .one_side import ONE_SIDE_ARGUMENTS, OneSideConfig, OneSidePass
from .one_side import TABLE as ONE_SIDE
from .pair import PAIR_ARGUMENTS, PairConfig
from .rings import WARP
from .score_features import NO_FEATURES, Features

MASKS = ("full", "causal", "local")
ROWS = tuple(dict.fromkeys((*TABLE, *product(ONE_SIDE, MASKS))))  # (head_dim, mask) of all passes

CLEAR_THREADS = 128
GRADIENT = "gradient"  # what SideConfig's kernel calls its own
# Parts of the workspace: element, bytes of it, alignment that kernels count on.
SCRATCH = {
    "shift": ("float32", 4, 16),
    "delta": ("float32", 4, 16),
    "dq_sum": ("float32", 4, 16),
    "progress": ("int32", 4, 4),
    "order": ("int32", 4, 4),
    "tile_counter": ("int32", 4, 4),
    "shared_sums": ("float32", 4, 16),
    "sink_sums": ("float32", 4, 16),
}


def _entry(arguments: tuple[tuple[str, str], ...]) -> Entry:
    """Of a kernel's arguments: what they point at, and which are other ones in every call, follow from the fields."""
    pointers = tuple(name for name, kind in arguments if kind == "pointer")
    changing = tuple(name for name in pointers if name in (*SCRATCH, GRADIENT) or ARGUMENTS[name].changes)
    return Entry(arguments, (*changing, "stream"), frozenset(), (), tuple((name, *_pointed(name)) for name in pointers))


def _pointed(name: str) -> tuple[str, int]:
    """(element, alignment) of a pointer; `gradient` is one of dq, dk and dv."""
    name = "dq" if name == GRADIENT else name
    if name in SCRATCH:
        element, _, alignment = SCRATCH[name]
        return element, alignment
    return ARGUMENTS[name].element, ARGUMENTS[name].alignment


PREPARE_ENTRY, MAIN_ENTRY, SIDE_ENTRY, PAIR_ENTRY, SINKS_ENTRY, CLEAR_ENTRY = map(
    _entry,
    (
        PREPARE_ARGUMENTS,
        BACKWARD_ARGUMENTS,
        ONE_SIDE_ARGUMENTS,
        PAIR_ARGUMENTS,
        SINKS_ARGUMENTS,
        CLEAR_ARGUMENTS,
    ),
)


class MainConfig(BackwardConfig):
    """Of the main kernel: the choices as they are."""

    entries = {"": MAIN_ENTRY}
    has_leftpad = False
    kernel_class = "backward", "FlashAttentionBackward"

    @property
    def name(self) -> str:
        """Names cache entries and kernels."""
        return f"bwd_{super().name}"


class _Around:
    """What the configs of the kernels without GEMMs have in common: one role."""

    is_fp8 = has_descales = False
    uses_setmaxnreg = False
    has_gemms = False
    dtype: str

    @property
    def element_out(self) -> str:
        """The element type of the gradients."""
        return self.dtype

    def as_dict(self) -> dict:
        """The fields as plain values: a cache key, a JSON row."""
        return dict(vars(self))


@dataclass(frozen=True)
class PrepareConfig(_Around):
    """Of the kernel before it; fields as in BackwardConfig, but for head_dim, the columns of O, and of dQ's sums."""

    dtype: str
    head_dim: int
    tile_m: int
    has_sums: bool = True  # which it zeroes
    is_padded: bool = False

    entry = PREPARE_ENTRY
    arguments = PREPARE_ENTRY.arguments
    kernel = "fa3_cute.kernels.backward.prepare.PrepareBackward"
    num_threads = PREPARE_THREADS

    @property
    def smem_bytes(self) -> int:
        """A sum for each row."""
        return FLOAT_BYTES * self.tile_m

    @property
    def name(self) -> str:
        """Names cache entries and kernels."""
        dims = f"d{self.head_dim}{'_padded' * self.is_padded}"
        return f"bwd_prepare_{self.dtype}_{dims}_{self.tile_m}{'' if self.has_sums else '_no_sums'}"


class SideConfig(OneSideConfig):
    """Of the kernel of one gradient: the choices as they are."""

    entries = {"": SIDE_ENTRY}
    has_leftpad = False

    @property
    def kernel(self) -> str:
        return "fa3_cute.kernels.backward.one_side.OneSideBackward"


class KeysConfig(PairConfig):
    """Of the kernel of dK and dV: the choices as they are."""

    entries = {"": PAIR_ENTRY}
    has_leftpad = False

    @property
    def kernel(self) -> str:
        return "fa3_cute.kernels.backward.pair.PairBackward"


class _OfAll(_Around):
    """Of a kernel that is one for all passes, of no element type and without shared memory."""

    dtype = PARTIAL
    smem_bytes = 0


@dataclass(frozen=True)
class SinksConfig(_OfAll):
    """Of the kernel that adds up what the prepare kernel has left of d_s_aux."""

    entry = SINKS_ENTRY
    arguments = SINKS_ENTRY.arguments
    kernel = "fa3_cute.kernels.backward.sinks.SinkGradients"
    name = "bwd_sinks"
    num_threads = WARP


@dataclass(frozen=True)
class ClearConfig(_OfAll):
    """Of the kernel that zeroes d_bias, whose other kernel visits what some row sees and may add up."""

    entry = CLEAR_ENTRY
    arguments = CLEAR_ENTRY.arguments
    kernel = "fa3_cute.kernels.backward.clear.ClearBias"
    name = "bwd_clear"
    num_threads = CLEAR_THREADS


KernelOfPass = PrepareConfig | MainConfig | SideConfig | KeysConfig | SinksConfig | ClearConfig


def pass_config(
    dtype: str,
    head_dim: int,
    mask: str,
    is_varlen: bool,
    is_deterministic: bool,
    features: Features = NO_FEATURES,
    is_short: bool = False,
    dims: Features = NO_FEATURES,
) -> BackwardConfig | OneSidePass:
    """The pass of a row of the tables; one without sums has the same bits in every call, asked for or not."""
    if not has_one_kernel(head_dim, features, is_deterministic, dims):
        return OneSidePass(dtype, head_dim, mask, is_varlen, features, **dict(dims))
    table = TABLE | (VARLEN if is_varlen else SHORT if is_short else {})
    row = FEATURED[head_dim] if features else table[head_dim, mask]
    choices = row.tile_m, row.is_dq_transposed, row.is_dq_behind, row.is_split
    return BackwardConfig(dtype, head_dim, mask, is_varlen, is_deterministic, *choices, **dict(features | dims))


def has_one_kernel(head_dim: int, features: Features, is_deterministic: bool, dims: Features) -> bool:
    """Of all gradients."""
    if (head_dim, "full") not in TABLE or not has_registers(head_dim, features):
        return False
    return not TABLE[head_dim, "full"].is_split or not (is_deterministic or dict(dims).get("head_dim_v"))


def reason_of(cfg: BackwardConfig | OneSidePass) -> str:
    """Why the tables have it."""
    if isinstance(cfg, OneSidePass):
        return cfg.row.reason
    if any(getattr(cfg, field) for field in FEATURES_OF_ALL):
        return FEATURED[cfg.head_dim].reason
    tables = (TABLE | VARLEN,) if cfg.is_varlen else (TABLE, TABLE | SHORT)
    rows = (table[cfg.head_dim, cfg.mask] for table in tables)
    return next(row.reason for row in rows if (row.tile_m, row.is_dq_behind) == (cfg.tile_m, cfg.is_dq_behind))


@cache
def kernels_of(cfg: BackwardConfig | OneSidePass) -> tuple[KernelOfPass, ...]:
    """The kernels of a pass, in the order of their launches."""
    if isinstance(cfg, OneSidePass):
        prepare = PrepareConfig(cfg.dtype, cfg.dim_v, cfg.tile_m, has_sums=False, is_padded=cfg.is_padded)
        *others, last = (SideConfig(**side.as_dict()) for side in cfg.sides)
        pair = [KeysConfig(**cfg.pair.as_dict())] if cfg.pair else []
        return (prepare, *others, *[ClearConfig()] * cfg.has_bias, last, *pair)
    return (
        PrepareConfig(cfg.dtype, cfg.head_dim, cfg.tile_m, is_padded=cfg.is_padded),
        MainConfig(**cfg.as_dict()),
    )


def has_work(cfg: KernelOfPass, has_queries: bool, has_keys: bool) -> bool:
    """Where a gradient that it writes has rows."""
    if isinstance(cfg, MainConfig):
        return has_queries or has_keys
    is_of_queries = isinstance(cfg, ClearConfig) or isinstance(cfg, SideConfig) and cfg.is_of_queries
    return has_queries if is_of_queries else has_keys
