"""What stats() tells of a process. On the fake CUDA of conftest.py."""

import json

from fa3_cute import stats
from fa3_cute.runtime.tracing import watch
from fa3_cute.runtime.tracing import stats as module
from fa3_cute.runtime.tracing.stats import Counter

SCRIPT = """
from fa3_cute import forward, stats
before = stats()
forward(prefill_params(), STREAM[0]).check()
for _ in range(3):
    forward(prefill_params(), STREAM[0]).check()
one = stats()
forward(decode_params(num_splits=24), STREAM[0]).check()
forward(prefill_params(q=1), STREAM[0])
tell(before=before, one=one, after=stats(), allocations=allocations(), names=[CFG.name, DECODE_CFG.name])
"""


def test_what_a_process_has_done(run):
    found = run(SCRIPT)
    nothing = {"number": 0, "bytes": 0}
    assert found["before"] == {
        "calls": None,
        "first_calls": 0,
        "compiles": 0,
        "compile_seconds": 0,
        "disk_hits": 0,
        "kernels": [],
        "workspaces": nothing,
        "counters_bytes": 0,
    }
    # What is equal to the first call is repeated.
    assert found["one"]["first_calls"] == 1 and found["one"]["workspaces"] == nothing
    assert len(found["one"]["kernels"]) == 1 and found["one"]["kernels"][0].startswith("fwd_bf16_d128_causal")
    after = found["after"]
    assert after["first_calls"] == 3, "the decode, and what is refused"
    assert after["kernels"] == sorted(found["one"]["kernels"] + found["names"][1:])
    made = sum(nbytes for _, nbytes, _ in found["allocations"])
    assert after["workspaces"]["number"] == 1 and after["workspaces"]["bytes"] > 0
    assert after["workspaces"]["bytes"] + after["counters_bytes"] == made


KERNEL = """
from fa3_cute import forward, stats
forward(prefill_params(), STREAM[0]).check()
forward(prefill_params(seqlen_q=77), STREAM[0]).check()
tell(**stats())
"""


def test_where_kernels_come_from(run, tmp_path):
    """The first process compiles, the next one reads; a second shape does neither."""
    first, second = (run(KERNEL, FA3_CUTE_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert (first["compiles"], first["disk_hits"]) == (1, 0) and first["compile_seconds"] > 0
    assert (second["compiles"], second["disk_hits"], second["compile_seconds"]) == (0, 1, 0)


def test_calls_are_counted_on_request(run):
    found = run(SCRIPT, FA3_CUTE_STATS="1")
    assert found["before"]["calls"] == {"forward": 0, "merge_attention": 0, "backward": 0}
    assert found["one"]["calls"]["forward"] == 4 and found["after"]["calls"]["forward"] == 6


def test_counts_are_of_functions(monkeypatch):
    monkeypatch.setenv("FA3_CUTE_STATS", "1")
    monkeypatch.setattr(module, "calls", {})

    def f(params, stream=None):
        raise TypeError

    call = watch.watched(f)
    for _ in range(2):
        try:
            call(1)
        except TypeError:
            pass
    assert module.calls["f"].value == 2
    assert json.loads(json.dumps(stats()))["calls"] == {"f": 2}


def test_a_counter():
    counter = Counter()
    counter.add()
    counter.add(1.5)
    assert (counter.value, counter.seconds) == (2, 1.5)
