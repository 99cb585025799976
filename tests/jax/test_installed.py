"""Whether the tests of this folder run."""

import pytest


def test_jax_is_installed():
    pytest.importorskip("jax", reason="the tests of fa3_cute.jax need jax: pip install 'fa3_cute[jax]'")
