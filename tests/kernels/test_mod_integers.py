"""What docs/mods.md says of integers in a user's functions: the DSL's are not NumPy's."""

from importlib import import_module
from typing import Any

import numpy as np
from cutlass import Int32

ir: Any = import_module("cutlass._mlir.ir")
func: Any = import_module("cutlass._mlir.dialects.func")
DISTANCES = np.arange(-7, 8)


def always_positive(distance):
    """The form that docs/mods.md gives: a remainder that is the same in the kernel and in NumPy."""
    return (distance % 3 + 3) % 3


def operations_of(function) -> list[str]:
    """Names of the operations that a function of an Int32 is traced to, without constants."""
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            traced = func.FuncOp("traced", ([ir.IntegerType.get_signless(32)], []))
            block = traced.add_entry_block()
        with ir.InsertionPoint(block):
            function(Int32(block.arguments[0]))
            func.ReturnOp([])
        names = [operation.operation.name for operation in block.operations]
    return [name for name in names if name not in ("arith.constant", "func.return")]


def test_remainders_have_the_sign_of_the_dividend_and_quotients_round_down():
    assert operations_of(lambda x: x % 3) == ["arith.remsi"]
    assert operations_of(lambda x: x // 3) == ["arith.floordivsi"]
    assert (np.fmod(DISTANCES, 3) != DISTANCES % 3).any(), "as C has them, and as NumPy does"


def test_the_form_that_is_the_same_in_both():
    assert operations_of(always_positive) == ["arith.remsi", "arith.addi", "arith.remsi"]
    as_traced = np.fmod(np.fmod(DISTANCES, 3) + 3, 3)
    np.testing.assert_array_equal(as_traced, DISTANCES % 3)
    np.testing.assert_array_equal(as_traced, always_positive(DISTANCES))
