"""The decode kernel of calls with leftpad_k: the same, but for what its entry takes besides."""
from ...contract.arguments import DECODE_LEFTPAD_ENTRY
from ..common.entry import flat_entry
from .kernel import FlashAttentionDecode


@flat_entry(DECODE_LEFTPAD_ENTRY.arguments)
class FlashAttentionDecodeWithLeftpad(FlashAttentionDecode):
    """Compile `__call__`: its parameters are DECODE_LEFTPAD_ENTRY.arguments, in order."""
