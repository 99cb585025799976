"""What reaches the kernel of new keys and rotary positions and attention behind it. On the fake CUDA of conftest.py."""

import pytest

# `send` launches a good call, some of its fields changed; `log` has of each launch its kernel, stream, grid, and which
# of `values` its parameters hold, also as the address of a TMA descriptor.
SENT = """
from fa3_cute import forward, last_error, warmup, workspace_size
ADDRESSES = dict(q=0x7F1234567000, k=0x7E0000000000, v=0x7D0000000000, out=0x7C0000000010)
NEW = dict(k_new=0x7B0000000020, v_new=0x7A0000000030, seqlen_knew=3)
ROTARY = dict(rotary_cos=0x7F2200000040, rotary_sin=0x7F3300000050, rotary_dim=64, rotary_dtype=DataType.FP32)
USED = dict(seqused_k=0x7F4400000014)
DECODE = dict(batch_size=2, seqlen_q=1, seqlen_k=8192, num_heads=16, num_heads_k=2, head_dim=128, dtype=DataType.BF16,
              num_splits=48)
PREFILL = DECODE | dict(seqlen_q=1000, num_splits=0, is_causal=True)
PAGES = dict(page_table=0x7F5500000018, page_size=64, num_pages=999, kv_batch_idx=0x7F6600000024, batch_size_k=7)
LISTS = dict(cu_seqlens_k_new=0x7F7700000028, seqlens_rotary=0x7F880000002C, seqlen_knew=777)
FIELDS = ADDRESSES | USED | DECODE | NEW | ROTARY
log, values = [], dict(ADDRESSES)
def enqueue(self, given, do=module.Call.enqueue):
    places = kernel_parameters(self.buffer.cfg)
    do(self, given)
    found = reached(places, **values)
    found = [name for name in values if found[name] or values[name] in descriptors(places)]
    log.append(dict(kernel=self.buffer.cfg.name, stream=last.stream, grid=list(last.grid), early=last.may_start_early,
                    found=found, scratch=scratch(places)))
module.Call.enqueue = enqueue
def send(stream=STREAM[0], **changes):
    log.clear()
    ok = int(forward(FlashAttentionParams(**FIELDS | changes), stream))
    return [ok, [dict(launch) for launch in log]]
"""
STREAM = (1 << 32) + 0x7770
TENSORS = ["q", "k", "v", "out"]


@pytest.fixture
def told(run):
    """told(script): `run` it behind SENT."""
    return lambda script, **changes: run(SENT + script, **changes)


def test_what_reaches_the_kernels(told):
    """q and the lengths that attention reads are those that were made, in the library's memory."""
    found = told("""
facts = NEW | {name: ROTARY[name] for name in ("rotary_cos", "rotary_sin")} | USED
facts |= dict(k_new_row_stride=2**33 + 8, v_new_head_stride=2**34 + 16, rotary_row_stride=2**35 + 4)
facts.pop("seqlen_knew")
values |= facts | PAGES | LISTS
values.pop("page_size")
ok, launches = send(**{name: value for name, value in (facts | PAGES | LISTS).items()})
tell(ok=ok, launches=launches, all=list(values))
""")
    ahead, attention = found["launches"]
    assert found["ok"] == 0 and ahead["kernel"] == "append_bf16_halves_fp32" and "decode" in attention["kernel"]
    assert {launch["stream"] for launch in found["launches"]} == {STREAM}
    assert ahead["early"] == attention["early"] == 1, "each may start while the kernel before it ends"
    assert set(found["all"]) - set(ahead["found"]) == {"out"}
    # 2 query rows, 777 new ones, the lengths; 16 heads of 16 pieces are one CTA
    assert ahead["grid"] == [2 + 777 + 1, 1, 1]
    missing = {"q", "seqused_k", "k_new", "v_new", "rotary_cos", "rotary_sin", "cu_seqlens_k_new", "seqlens_rotary"}
    missing |= {"k_new_row_stride", "v_new_head_stride", "rotary_row_stride", "seqlen_knew"}
    assert set(found["all"]) - set(attention["found"]) == missing
    assert len(ahead["scratch"]) == 2 and set(ahead["scratch"]) < set(attention["scratch"])


@pytest.mark.parametrize("shape", ["DECODE", "PREFILL | PAGES"])
def test_what_is_not_asked_for_is_the_callers(told, shape):
    found = told(f"""
values |= USED
plain = {shape} | dict.fromkeys(("k_new", "v_new", "rotary_cos", "rotary_sin"))
plain |= dict(seqlen_knew=0, rotary_dim=0, rotary_dtype=None)
tell(none=send(**plain), new=send(**plain | NEW), rotary=send(**plain | ROTARY))
""")
    ok, (alone,) = found["none"]
    assert ok == 0 and set(alone["found"]) == {*TENSORS, "seqused_k"}
    ok, (ahead, attention) = found["new"]
    assert ok == 0 and ahead["kernel"] == "append_bf16" and set(attention["found"]) == set(TENSORS)
    assert len(ahead["scratch"]) == 1 and attention["kernel"] == alone["kernel"]
    ok, (ahead, attention) = found["rotary"]
    assert ok == 0 and ahead["kernel"] == "append_bf16_halves_fp32"
    assert set(attention["found"]) == {"k", "v", "out", "seqused_k"} and len(ahead["scratch"]) == 1


def test_one_row_is_one_launch(told):
    """Of each sequence: the decode kernel takes the caller's q and lengths, what is new, and a partial result's memory;
    also when the call is repeated, with another q and on another stream."""
    found = told("""
facts = NEW | {name: ROTARY[name] for name in ("rotary_cos", "rotary_sin")} | USED
facts |= dict(k_new_batch_stride=2**33 + 8, v_new_head_stride=2**34 + 16, rotary_row_stride=2**35 + 4)
facts |= dict(seqlens_rotary=LISTS["seqlens_rotary"])
facts.pop("seqlen_knew")
other = dict(q=0x7F9900000000, k_new=0x7FAA00000000)
values |= facts | PAGES | dict(other_q=other["q"], other_new=other["k_new"])
values.pop("page_size")
given = facts | PAGES | dict(seqlen_knew=1)
steps = [send(**given), send(**given), send(**given | dict(q=other["q"])), send(**given | dict(k_new=other["k_new"])),
         send(**given), send(STREAM[1], **given)]
tell(steps=steps, all=[name for name in values if "other" not in name])
""")
    steps = [launches for ok, launches in found["steps"] if ok == 0]
    assert len(steps) == 6 and all(len(launches) == 1 for launches in steps)
    first, again, query, new, last, elsewhere = [launch for (launch,) in steps]
    assert first["kernel"] == "decode_bf16_d128_full_ragged_p64w_64x64_append_halves_fp32" and first["early"] == 1
    assert set(first["found"]) == set(found["all"]) and len(first["scratch"]) == 3
    assert first == again == last and elsewhere["found"] == first["found"]
    assert elsewhere["scratch"] != first["scratch"] and elsewhere["stream"] != first["stream"]
    assert set(query["found"]) == {*found["all"], "other_q"} - {"q"}
    assert set(new["found"]) == {*found["all"], "other_new"} - {"k_new"}


def test_descales_reach_both_kernels(told):
    """Where rows are quantised k's and v's, another layer's when the call is repeated; q's nobody reads but attention.
    What is copied needs none."""
    found = told("""
scales = dict(q_descale_ptr=0x7FD100000004, k_descale_ptr=0x7FD200000008, v_descale_ptr=0x7FD30000000C)
other = dict(k_descale_ptr=0x7FD400000010)
values |= scales | dict(other=other["k_descale_ptr"])
given = scales | dict(kv_dtype=DataType.FP8_E4M3, kv_new_dtype=DataType.BF16, num_splits=0)
given |= dict(k_descale_batch_stride=2, k_descale_head_stride=1)
copied = dict(kv_new_dtype=None, rotary_cos=None, rotary_sin=None, rotary_dim=0, rotary_dtype=None)
tell(first=send(**given), again=send(**given), other=send(**given | other),
     absent=send(**given | dict(k_descale_ptr=None, k_descale_batch_stride=0, k_descale_head_stride=0)),
     copied=send(**given | copied))
""")
    ok, (ahead, attention) = found["first"]
    scales = {"k_descale_ptr", "v_descale_ptr"}
    assert ok == 0 and ahead["kernel"] == "append_bf16_into_fp8_e4m3_halves_fp32"
    assert set(ahead["found"]) == {"q", "k", "v", *scales}
    assert set(attention["found"]) == {"k", "v", "out", "q_descale_ptr", *scales} and found["again"] == found["first"]
    ok, (ahead, attention) = found["other"]
    assert ok == 0 and set(ahead["found"]) == {"q", "k", "v", "v_descale_ptr", "other"}
    assert {"other", "v_descale_ptr"} < set(attention["found"])
    assert set(found["absent"][1][0]["found"]) == {"q", "k", "v", "v_descale_ptr"}
    ok, (ahead, attention) = found["copied"]
    assert ok == 0 and ahead["kernel"] == "append_fp8_e4m3" and not scales & set(ahead["found"])
    assert scales < set(attention["found"])


def test_repeated_calls(told):
    """Another q is seen, another layer's new rows; another stream has memory of its own, a grown workspace other
    addresses."""
    found = told("""
other = dict(q=0x7F9900000000, k_new=0x7FAA00000000)
values |= dict(k_new=NEW["k_new"], other_q=other["q"], other_new=other["k_new"])
steps = [send(), send(), send(), send(q=other["q"]), send(k_new=other["k_new"]), send(STREAM[0] + 8), send(STREAM[1])]
steps += [send(**PREFILL | dict(batch_size=40)), send()]
tell(steps=steps)
""")
    steps = [launches for ok, launches in found["steps"] if ok == 0]
    assert len(steps) == 9 and all(len(launches) == 2 for launches in steps)
    assert steps[0] == steps[1] == steps[2]
    assert set(steps[3][0]["found"]) == {"k", "v", "k_new", "other_q"} and steps[3][1] == steps[0][1]
    assert set(steps[4][0]["found"]) == {"q", "k", "v", "other_new"} and steps[4][1] == steps[0][1]
    for launches in steps:
        ahead, attention = launches
        assert set(ahead["scratch"]) <= set(attention["scratch"]) and len(ahead["scratch"]) == 2
    places = [tuple(launches[0]["scratch"]) for launches in steps]
    assert len(set(places[:5])) == 1 and len(set(places)) == 5


def test_a_callers_workspace(told):
    """Behind the partial results; the library has none then but counters."""
    found = told("""
nbytes = workspace_size(FlashAttentionParams(**FIELDS))
partial = workspace_size(FlashAttentionParams(**FIELDS | dict(k_new=None, v_new=None, seqlen_knew=0, rotary_cos=None,
                                                              rotary_sin=None, rotary_dim=0, rotary_dtype=None)))
start = 0x7FBB00000010
values |= dict(partials=start, rotated=start + partial, lengths=start + partial + 2 * 2 * 16 * 128)
given = dict(workspace=start, workspace_bytes=nbytes)
tell(first=send(**given), again=send(**given, q=0x7F9900000000), partial=partial, nbytes=nbytes,
     small=send(workspace=start, workspace_bytes=nbytes - 1))
""")
    assert found["partial"] % 256 == 0 and found["nbytes"] == found["partial"] + 2 * 2 * 16 * 128 + 8
    ok, (ahead, attention) = found["first"]
    assert ok == 0 and {"rotated", "lengths"} < set(ahead["found"]) and ahead["scratch"] == []
    assert {"rotated", "lengths", "partials"} < set(attention["found"])
    assert found["again"][1][1] == attention
    assert found["small"] == [-9, []]


def test_without_queries_only_the_cache_is_updated(told):
    found = told("""
packed = dict(mode=AttentionMode.VARLEN_PREFILL, cu_seqlens_q=0x7FCC00000010, num_splits=0)
none = send(**packed, total_q=0, q=None, out=None)
tell(none=none, some=send(**packed, total_q=5), rotary=send(**packed, total_q=0, k_new=None, v_new=None, seqlen_knew=0))
""")
    ok, (ahead,) = found["none"]
    assert ok == 0 and ahead["kernel"] == "append_bf16_halves_fp32" and ahead["grid"][0] == 6 + 1
    assert found["some"][0] == 0 and found["some"][1][0]["grid"][0] == 5 + 6 + 1
    assert found["rotary"] == [0, []]


def test_captures(told):
    """A cold kernel is refused with nothing enqueued, a warm one makes nothing in a capture and has the workspace that
    later launches of the stream have."""
    found = told("""
def capturing(stream):
    number("capture_state", 1)
    numbers64("capture_stream")[0] = stream
capturing(STREAM[0])
cold = send(), last_error().detail
number("capture_state", 0)
warm = int(warmup(FlashAttentionParams(**FIELDS), STREAM[0]))
made = len(allocations())
capturing(STREAM[0])
captured = [send(), send(q=0x7F9900000000)]
number("capture_state", 0)
tell(cold=cold, warm=warm, captured=captured, made=len(allocations()) - made, broken=number("num_broken"), after=send())
""")
    (status, launches), detail = found["cold"]
    assert (status, launches) == (-103, []) and "append_bf16_halves_fp32" in detail and "warmup()" in detail
    assert (found["warm"], found["broken"], found["made"]) == (0, 0, 0)
    scratch = [launches[0]["scratch"] for ok, launches in found["captured"] if ok == 0]
    assert len(scratch) == 2 and scratch[0] == scratch[1] == found["after"][1][0]["scratch"]


def test_failures_leave_the_next_call_alone(told):
    found = told("""
first = send()
number("launch_result", 700)
failed = [send()[0], send(q=0x7F9900000000)[0]]
number("launch_result", 0)
tell(first=first, failed=failed, again=send())
""")
    assert found["first"] == found["again"] and found["first"][0] == 0 and found["failed"] == [-100, -100]
