"""The forward kernel of calls with mods: the same, but for what its entry takes besides."""
from ...contract.arguments import FORWARD_MODS_ENTRY
from ..common.entry import flat_entry
from .kernel import FlashAttentionForward


@flat_entry(FORWARD_MODS_ENTRY.arguments)
class FlashAttentionForwardWithMods(FlashAttentionForward):
    """Compile `__call__`: its parameters are FORWARD_MODS_ENTRY.arguments, in order."""
