"""The MLA kernel of calls with q_v: the same, but for what its entry takes besides."""
from ...contract.arguments import DECODE_QV_ENTRY
from ..common.entry import flat_entry
from .kernel import FlashAttentionMla


@flat_entry(DECODE_QV_ENTRY.arguments)
class FlashAttentionMlaWithQv(FlashAttentionMla):
    """Compile `__call__`: its parameters are DECODE_QV_ENTRY.arguments, in order."""
