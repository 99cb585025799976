"""What the environment asks to see of calls, decided once, when the functions are made: without it they are themselves.

FA3_CUTE_LOG_CALLS   a line of each call before it runs (log.py)
FA3_CUTE_NVTX=1      a range of each call in the domain "fa3_cute", by the package nvtx
FA3_CUTE_STATS=1     calls are counted (stats.py)
"""

import logging
import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

from . import stats
from .log import OFF, CallLog, is_set

log = logging.getLogger("fa3_cute")
Call = TypeVar("Call", bound=Callable)
DOMAIN = "fa3_cute"


def watched(function: Call) -> Call:
    """A function (params, stream) as the environment wants it: the same one, mostly."""
    name = function.__name__
    found: Callable = function
    if is_set("FA3_CUTE_STATS"):
        found = _counted(name, found)
    if calls := _call_log():
        found = _logged(name, found, calls)
    if ranges := _ranges():
        found = _ranged(name, found, ranges)
    return cast(Call, found if found is function else wraps(function)(found))


@cache
def _call_log() -> CallLog | None:
    target = os.environ.get("FA3_CUTE_LOG_CALLS", "")
    return None if target in OFF else CallLog(target, is_set("FA3_CUTE_LOG_LENGTHS"))


@cache
def _ranges() -> Any:
    """The package nvtx, if ranges are wanted and it is there."""
    if not is_set("FA3_CUTE_NVTX"):
        return None
    try:
        import nvtx
    except ImportError as error:
        log.warning("FA3_CUTE_NVTX is set, but there are no ranges without the package nvtx: %s", error)
        return None
    return nvtx


def _counted(name: str, function: Callable) -> Callable:
    count = stats.calls.setdefault(name, stats.Counter()).add

    def call(params, stream=None):
        count()
        return function(params, stream)

    return call


def _logged(name: str, function: Callable, calls: CallLog) -> Callable:
    def call(params, stream=None):
        calls.write(name, params, stream)
        return function(params, stream)

    return call


def _ranged(name: str, function: Callable, ranges: Any) -> Callable:
    def call(params, stream=None):
        with ranges.annotate(name, domain=DOMAIN):
            return function(params, stream)

    return call
