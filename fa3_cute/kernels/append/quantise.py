"""The append kernel of 16-bit rows for an FP8 cache: the same, but for what its entry takes besides."""
from ...contract.append import QUANTISE_ENTRY
from ..common.entry import flat_entry
from .kernel import AppendKeys


@flat_entry(QUANTISE_ENTRY.arguments)
class QuantiseKeys(AppendKeys):
    """Compile `__call__`: its parameters are QUANTISE_ENTRY.arguments, in order."""
