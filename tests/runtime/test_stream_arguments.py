"""What a stream may be: resolve_stream, and what objects with a broken protocol get."""

from types import SimpleNamespace

import pytest

from fa3_cute.runtime.cuda_driver import resolve_stream


def raising(*_):
    raise RuntimeError("gone")


class Broken:
    __int__ = raising


@pytest.mark.parametrize(
    "stream",
    [
        SimpleNamespace(__cuda_stream__=lambda: (0, 7, 9)),
        SimpleNamespace(__cuda_stream__=lambda: 7),
        SimpleNamespace(__cuda_stream__=raising),
        SimpleNamespace(__cuda_stream__=lambda: (0, "7")),
        SimpleNamespace(__cuda_stream__=7),
        Broken(),
        SimpleNamespace(),
        "7",
        7.0,
    ],
)
def test_what_is_no_stream_is_a_type_error_that_says_so(stream):
    with pytest.raises(TypeError, match="stream"):
        resolve_stream(stream)


def test_streams():
    assert [resolve_stream(stream) for stream in (None, 0, 7, 2**64 - 1)] == [0, 0, 7, 2**64 - 1]
    assert resolve_stream(SimpleNamespace(__cuda_stream__=lambda: (0, 7))) == 7
