"""The forward kernel of calls with leftpad_k: the same, but for what its entry takes besides."""
from ...contract.arguments import FORWARD_LEFTPAD_ENTRY
from ..common.entry import flat_entry
from .kernel import FlashAttentionForward


@flat_entry(FORWARD_LEFTPAD_ENTRY.arguments)
class FlashAttentionForwardWithLeftpad(FlashAttentionForward):
    """Compile `__call__`: its parameters are FORWARD_LEFTPAD_ENTRY.arguments, in order."""
