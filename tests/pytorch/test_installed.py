"""Whether the tests of this folder run."""

import pytest


def test_torch_is_installed():
    pytest.importorskip("torch", reason="the tests of fa3_cute.torch need torch: pip install 'fa3_cute[torch]'")
