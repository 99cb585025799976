"""Blocks of rows of many heads in one order: plain arithmetic that also runs on Python ints in the tests."""
from cutlass import Int32

from .arithmetic import minimum


def block_and_head(in_sections: bool, is_reversed: bool, index: Int32, num_blocks: Int32, num_heads: Int32,
                   section: Int32):
    """(block, head) at a place of the order of num_heads heads that have num_blocks blocks each.

    Blocks run fastest; in_sections: heads do, within sections of so many. is_reversed: the last blocks come first.
    """
    if not in_sections:
        head = index // num_blocks
        row = index - head * num_blocks
        return num_blocks - 1 - row if is_reversed else row, head
    first_head = index // (section * num_blocks) * section
    heads = minimum(section, num_heads - first_head)
    within = index - first_head * num_blocks
    row = within // heads
    return num_blocks - 1 - row if is_reversed else row, first_head + within - row * heads
