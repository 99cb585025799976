"""The decode kernel of calls with mods: the same, but for what its entry takes besides."""
from ...contract.arguments import DECODE_MODS_ENTRY
from ..common.entry import flat_entry
from .kernel import FlashAttentionDecode


@flat_entry(DECODE_MODS_ENTRY.arguments)
class FlashAttentionDecodeWithMods(FlashAttentionDecode):
    """Compile `__call__`: its parameters are DECODE_MODS_ENTRY.arguments, in order."""
