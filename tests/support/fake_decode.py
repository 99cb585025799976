"""Split decode on the fake CUDA of fake_cuda.c: `from fake_decode import *` in a script of the launch tests."""

from fake_cuda import *  # noqa: F403
from fake_cuda import DECODE_CFG, STREAM, decode_params, kernel_parameters, number, numbers64, scratch

from fa3_cute import forward, warmup

places = kernel_parameters(DECODE_CFG)


def status(stream=STREAM[0], **changes):
    """Of a decode call whose splits merge through global memory."""
    return int(forward(decode_params(**{"num_splits": 48} | changes), stream))


def memory(stream=STREAM[0], **changes):
    """(O, LSE, arrivals) in the order of their addresses, or the status of what is wrong."""
    return status(stream, **changes) or scratch(places)


def warm(stream=None, **changes):
    """Warm such a call up."""
    warmup(decode_params(**{"num_splits": 48} | changes), stream).check()


def capturing(stream):
    """Let this stream capture, its handle; None: no stream captures."""
    number("capture_state", int(stream is not None))
    numbers64("capture_stream")[0] = stream or 0
