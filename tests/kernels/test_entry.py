"""The entry that flat_entry writes: in a process without docstrings, too."""

import os
import subprocess
import sys


def test_kernels_are_made_where_docstrings_are_dropped():
    """`python -OO`, also set by PYTHONOPTIMIZE: the line that it takes from `launch` is not there."""
    script = """
import fa3_cute.runtime.dsl
from fa3_cute.kernels.forward.kernel import FlashAttentionForward
from fa3_cute.kernels.decode.kernel import FlashAttentionDecode
assert FlashAttentionForward.__call__.__doc__ is None
print(FlashAttentionDecode.__call__.__qualname__)
"""
    environment = os.environ | {"PYTHONOPTIMIZE": "2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "FlashAttentionDecode.__call__", done.stderr
