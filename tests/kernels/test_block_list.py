"""The walk over block lists on Python ints, and kernels that have them."""

from types import SimpleNamespace

import pytest
from device_code import as_python
from mod_cases import CAPPED, DOCUMENTS

from fa3_cute.kernels.common import block_list
from fa3_cute.kernels.common.block_list import BlockList, BlockLists
from fa3_cute.planning.tables import forward_config
from fa3_cute.runtime.report import compile_report

FIRST = {"partial_count": 1000, "partial_index": 2000, "full_count": 5000, "full_index": 6000}  # addresses


@pytest.fixture
def memory(monkeypatch):
    """{address: int32}, which the module reads; its integers are Python's."""
    found: dict[int, int] = {}
    monkeypatch.setattr(block_list, "int_at", found.__getitem__)
    monkeypatch.setattr(block_list, "Int64", int)
    monkeypatch.setattr(block_list, "Int32", int)
    select = SimpleNamespace(select_=lambda condition, yes, no: yes if condition else no)
    monkeypatch.setattr(block_list, "cutlass", select)
    monkeypatch.setattr(
        block_list, "cute", SimpleNamespace(arch=SimpleNamespace(make_warp_uniform=lambda value: value))
    )
    return found


def put(memory: dict[int, int], name: str, row: int, numbers: list[int], length: int) -> None:
    """A row of a list, and its count."""
    memory[FIRST[f"{name}_count"] + 4 * row] = len(numbers)
    for i in range(length):
        memory[FIRST[f"{name}_index"] + 4 * (row * length + i)] = numbers[i] if i < len(numbers) else -99


@pytest.mark.parametrize(
    "partial, full", [([7, 2], [5, 4, 3]), ([], [1, 0]), ([6], []), ([], []), ([4, 3, 2, 1, 0, 5, 6, 7], [])], ids=str
)
def test_partial_blocks_come_first(memory, partial, full):
    """Of a row that sequence, head and Q tile choose."""
    lists = BlockLists(**FIRST, batch_stride=12, head_stride=4, row_length=8, tiles_per_row=2)
    put(memory, "partial", 12 * 3 + 4 * 2 + 1, partial, 8)
    put(memory, "full", 12 * 3 + 4 * 2 + 1, full, 8)
    tile = SimpleNamespace(sequence=3, head=2, m_block=3, seqlen_k=1000)
    own = as_python(BlockLists.of)(lists, SimpleNamespace(tile_n=128), tile)
    assert (own.num_partial, own.num_blocks, own.last) == (len(partial), len(partial + full), 7)
    assert [own.block(i) for i in range(own.num_blocks)] == partial + full
    if partial + full:
        assert own.block(own.num_blocks) == (partial + full)[-1]  # what is read ahead stays in the list


def test_bad_lists_stay_in_memory(memory):
    """Counts are at most a row, blocks those of the sequence."""
    for i in range(8):
        memory[2000 + 4 * i], memory[6000 + 4 * i] = 1 << 30, -5
    memory[1000], memory[5000] = 1 << 20, -7
    lists = BlockLists(**FIRST, batch_stride=0, head_stride=0, row_length=8, tiles_per_row=1)
    tile = SimpleNamespace(sequence=3, head=2, m_block=0, seqlen_k=300)
    own = as_python(BlockLists.of)(lists, SimpleNamespace(tile_n=128), tile)
    assert (own.num_partial, own.num_blocks) == (8, 8) and {own.block(i) for i in range(8)} == {2}
    assert BlockList(0, 1, 2000, 6000, 2).block(0) == 0


def features(*cases) -> frozenset:
    return frozenset([("has_block_lists", True), *((case.mod.kind, case.mod.id) for case in cases)])


@pytest.mark.parametrize(
    "cfg",
    [
        forward_config("fp8_e4m3", 128, "full", False, False, "bf16", features=features(DOCUMENTS)),
        forward_config("fp16", 64, "local", True, False, features=features(CAPPED, DOCUMENTS)),
    ],
    ids=lambda cfg: cfg.name,
)
def test_kernels_compile_clean(cfg):
    assert not compile_report(cfg).problems()


def test_only_dense_ones():
    with pytest.raises(ValueError, match="has_block_lists: with mods, not is_varlen"):
        forward_config("bf16", 128, "causal", True, True, features=features(DOCUMENTS))
    with pytest.raises(ValueError, match="has_block_lists: with mods"):
        forward_config("bf16", 128, "causal", True, False, features=features())
