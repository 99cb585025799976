"""Which record a compiler is held to."""

import fingerprints
import pytest

RECORD = {"DSL 4.8.1, CUDA 12.9": {"a": [1]}, "DSL 4.8.3, CUDA 12.9": {"a": [3]}, "DSL 4.8.1, CUDA 13.4": {"a": [13]}}


@pytest.mark.parametrize(
    "key, found",
    [
        ("DSL 4.8.1, CUDA 12.9", {"a": [1]}),
        ("DSL 4.8.0, CUDA 12.9", {"a": [3]}),
        ("DSL 4.8.0, CUDA 13.4", {"a": [13]}),
        ("DSL 4.8.0, CUDA 13.5", {}),
    ],
)
def test_a_release_is_held_to_its_own_record_or_to_one_of_its_flavour(key, found):
    """Releases with the same assembler make the same code; another assembler makes other code."""
    assert fingerprints.nearest(RECORD, key) == found
