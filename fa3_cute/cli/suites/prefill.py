"""Dense prefill at a fixed number of tokens: FlashAttention-3's own benchmark grid.

16384 tokens in all, hidden size 2048: batch = 16384 / seqlen, heads = 2048 / head_dim. Two head dims do not divide
2048: 96 has 16 heads and 192 has 12.
"""

from collections.abc import Sequence

from ..case import Case
from ..dtypes import DEFAULT, head_dims
from ..shown import ARITHMETIC

TITLE = "Dense prefill, 16384 tokens in all"
SHOWN = ARITHMETIC
FIXED = ()
TOKENS, HIDDEN = 16384, 2048
HEADS = {96: 16, 192: 12}
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)


def cases(args) -> list[Case]:
    """Every case that the command line leaves in: by head_dim, then mask, then length."""
    return [
        case(args, head_dim, seqlen, is_causal)
        for head_dim in args.head_dim or head_dims(args.dtype)
        for is_causal in args.masks or (False, True)
        for seqlen in args.seqlen or SEQLENS
    ]


def case(args, head_dim: int, seqlen: int, is_causal: bool, window: tuple[int, int] = (-1, -1)) -> Case:
    """One case of the grid."""
    num_heads = args.num_heads or HEADS.get(head_dim, HIDDEN // head_dim)
    return Case(
        dtype=args.dtype or DEFAULT,
        head_dim=head_dim,
        is_causal=is_causal,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        batch_size=args.batch_size or max(1, TOKENS // seqlen),
        num_heads=num_heads,
        num_heads_k=args.num_heads_k or num_heads,
        window=window,
    )


def conclusions(times: dict[Case, float], rows: Sequence[dict] = ()) -> list[str]:
    """None: the table says it all."""
    return []
