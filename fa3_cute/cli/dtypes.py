"""Element types as options: which head dims a type has, and what the type of O may be."""

from ..contract.formats import ELEMENT_BYTES, FP8, FP8_HEAD_DIMS, FP8_OUT_DTYPES, HEAD_DIMS

DEFAULT = "bf16"


def add_dtypes(parser) -> None:
    """--dtype and --out-dtype of one kernel."""
    parser.add_argument("--dtype", choices=ELEMENT_BYTES, default=DEFAULT, help=f"of Q, K and V; default {DEFAULT}")
    parser.add_argument(
        "--out-dtype",
        choices=FP8_OUT_DTYPES,
        help=f"of O, a choice with --dtype {FP8} only: default {FP8_OUT_DTYPES[0]}",
    )


def head_dims(dtype: str | None) -> tuple[int, ...]:
    """The head dims that a type has; None is the default type."""
    return FP8_HEAD_DIMS if dtype == FP8 else HEAD_DIMS


def out_dtype_of(dtype: str, asked: str | None = None) -> str | None:
    """The `out_dtype` of the configs of a type, whatever --out-dtype said: None where O has Q's type.

    Raises ValueError if there are no such kernels.
    """
    if dtype == FP8:
        return asked or FP8_OUT_DTYPES[0]
    if asked not in (None, dtype):
        raise ValueError(f"out_dtype={asked}: O is {dtype}, as Q, K and V are; only {FP8} has a choice")
    return None
