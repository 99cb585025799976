"""What reaches the kernels of `backward`, and what a repeated call costs. On the fake CUDA of conftest.py."""

import pytest

# `send` launches a good call, some of its fields changed. `log` has of each launch its kernel, grid, block and stream;
# with `values`, whether its parameters hold them, and the addresses that its TMA descriptors begin at.
SENT = """
from fa3_cute import BackwardParams, backward, backward_workspace_size, explain, last_error, warmup
from fa3_cute.planning.backward_kernels import kernels_of, pass_config
ADDRESSES = dict(q=0x7F1234567000, k=0x7E0000000010, v=0x7D0000000020, out=0x7C0000000030, dout=0x7B0000000040,
                 softmax_lse=0x7F2200000014, dlse=0x7F3300000018,
                 dq=0x7F4400000020, dk=0x7F5500000030, dv=0x7F6600000040)
WORKSPACE = 0x7A0000000050
CALL = dict(batch_size=3, seqlen_q=1000, seqlen_k=700, num_heads=12, num_heads_k=4, head_dim=64, dtype=DataType.BF16,
            is_causal=True)
PACKED = dict(mode=AttentionMode.VARLEN_PREFILL, cu_seqlens_q=0x7F0011223344, cu_seqlens_k=0x7F0055667788,
              seqused_q=0x7F0099AABBCC, seqused_k=0x7F00DDEEFF10, total_q=3000, total_k=2100)
FIELDS = ADDRESSES | CALL | dict(workspace=WORKSPACE, workspace_bytes=1 << 40)
log, values = [], {}
def kind(cfg):
    return type(cfg).__name__.removesuffix("Config")
def enqueue(self, given, do=module.Call.enqueue):
    places = kernel_parameters(self.buffer.cfg) if values else ()
    do(self, given)
    fact = dict(kernel=kind(self.buffer.cfg), grid=list(last.grid), block=list(last.block), stream=last.stream)
    if values:
        fact |= dict(given=reached(places, **values), tma=sorted(descriptors(places)))
    log.append(fact)
module.Call.enqueue = enqueue
def send(stream=STREAM[0], **changes):
    return int(backward(BackwardParams(**FIELDS | changes), stream))
"""
KERNELS = ["Prepare", "Main"]
STREAM = (1 << 32) + 0x7770
TILE_N = 128
SMS = 132


@pytest.fixture
def told(run):
    """told(script): `run` it behind SENT."""
    return lambda script, **changes: run(SENT + script, **changes)


def blocks(tile: int, rows: int, is_packed: bool) -> int:
    """Tiles of three sequences."""
    return rows // tile + 3 if is_packed else 3 * -(-rows // tile)


@pytest.mark.parametrize("lengths", ["{}", "PACKED"])
def test_what_reaches_the_kernels(told, lengths):
    found = told(f"""
call = {lengths} | dict(softmax_scale=0.3)
if not {lengths}:
    call |= dict(out_batch_stride=2**32 + 1024, dk_batch_stride=2**32 + 2048, dq_batch_stride=2**32 + 4096)
cfg = pass_config("bf16", 64, "causal", {lengths} != {{}}, False)
nbytes = backward_workspace_size(BackwardParams(**FIELDS | call))
rows = (3000 // cfg.tile_m + 3 if {lengths} else 3 * -(-1000 // cfg.tile_m)) * 12
parts = dict(shift=0, delta=4 * rows * cfg.tile_m, dq_sum=8 * rows * cfg.tile_m)
parts |= dict(progress=(8 + 256) * rows * cfg.tile_m)
parts |= dict(order=parts["progress"] + -(-8 * (4 if {lengths} else 12) // 16) * 16)
parts |= dict(tile_counter=-(-(parts["order"] + 4 * rows) // 16) * 16)
parts = {{name: WORKSPACE + start for name, start in parts.items()}}
lengths = {{name: at for name, at in {lengths}.items() if name[:2] in ("cu", "se")}}
values |= ADDRESSES | parts | lengths | {{name: stride for name, stride in call.items() if "stride" in name}}
values |= dict(scale=struct.unpack("<I", struct.pack("<f", 0.3))[0])
ok = send(**call)
tell(ok=ok, log=log, end=parts["tile_counter"] + 4 - WORKSPACE, nbytes=nbytes, tile_m=cfg.tile_m, lengths=list(lengths),
     addresses=ADDRESSES)
""")
    assert found["ok"] == 0 and [launch["kernel"] for launch in found["log"]] == KERNELS
    assert {launch["stream"] for launch in found["log"]} == {STREAM}
    prepare, main = found["log"]
    is_packed, tile_m = lengths == "PACKED", found["tile_m"]
    rows_q = 3000 if is_packed else 1000
    assert prepare["grid"] == [blocks(tile_m, rows_q, is_packed) * 12, 1, 1]
    assert main["grid"] == [SMS, 1, 1]  # more tiles and duties
    assert 0 <= found["nbytes"] - found["end"] < 16, "the parts fill the workspace"
    given = [{name for name, is_there in launch["given"].items() if is_there} for launch in found["log"]]
    # Of each kernel what it is given, and what it has to know nothing of.
    wanted = (
        ("out dout softmax_lse dlse shift delta dq_sum progress order tile_counter", "q k v dq dk dv"),
        ("dq dk dv shift delta dq_sum progress order tile_counter scale", "out softmax_lse dlse"),
    )
    for those, (there, absent) in zip(given, wanted, strict=True):
        assert those >= set(there.split()) and not those & set(absent.split())
    assert set(main["tma"]) == {found["addresses"][name] for name in ("q", "k", "v", "dout", "dq", "dk", "dv")}
    assert given[1] >= set(found["lengths"])
    assert all(those >= set(found["lengths"]) & {"cu_seqlens_q", "seqused_q"} for those in given)
    if not is_packed:
        strides = {"out_batch_stride"}, {"dk_batch_stride", "dq_batch_stride"}
        assert all(those & set.union(*strides) == own for those, own in zip(given, strides, strict=True))


def test_the_main_kernel_has_a_cta_per_sm(told):
    """Places of the order are handed out; few of them have a CTA each. The kernel before it has one per Q tile and
    head."""
    found = told("""
assert send(batch_size=40) == 0
assert send(batch_size=1, seqlen_k=300) == 0
tell(grids=[fact["grid"][0] for fact in log])
""")
    assert found["grids"] == [40 * 8 * 12, SMS, 8 * 12, 3 * 4 + 3 * 12]


def test_gradients_that_are_not_wanted(told):
    """They are null pointers that the main kernel does not write to."""
    found = told("""
values |= ADDRESSES
def launched(**changes):
    log.clear()
    assert send(**changes) == 0
    return [[fact["kernel"], *(name for name in ("dq", "dk", "dv") if fact["given"][name])] for fact in log]
tell(all=launched(), none_of_q=launched(dq=None), none_of_k=launched(dk=None), only_q=launched(dk=0, dv=0),
     only_v=launched(dq=None, dk=None), again=launched())
""")
    main = {calls: found[calls][1] for calls in found}
    assert all(found[calls] == [["Prepare"], main[calls]] for calls in found)
    assert main["all"] == main["again"] == ["Main", "dq", "dk", "dv"]
    assert main["none_of_q"] == ["Main", "dk", "dv"] and main["none_of_k"] == ["Main", "dq", "dv"]
    assert main["only_q"] == ["Main", "dq"] and main["only_v"] == ["Main", "dv"]


@pytest.mark.parametrize("lengths", ["{}", "PACKED"])
def test_kernels_without_sums(told, lengths):
    """Each has its own gradients and is left out if none is wanted."""
    found = told(f"""
call = {lengths} | dict(head_dim=192, softmax_scale=0.3, deterministic=True)
if not {lengths}:
    call |= dict(dk_batch_stride=2**32 + 2048, dq_batch_stride=2**32 + 4096, dv_batch_stride=2**32 + 8192)
rows = (3000 // 128 + 3 if {lengths} else 3 * 8) * 12 * 128
values |= ADDRESSES | dict(shift=WORKSPACE, delta=WORKSPACE + 4 * rows)
values |= {{name: stride for name, stride in call.items() if "stride" in name}}
values |= dict(scale=struct.unpack("<I", struct.pack("<f", 0.3))[0])
def launched(**changes):
    log.clear()
    assert send(**call | changes) == 0
    return list(log)
nbytes = backward_workspace_size(BackwardParams(**FIELDS | call))
tell(log=launched(), again=launched(), only_v=launched(dq=None, dk=0),
     only_q=launched(dk=0, dv=None), without_k=launched(dk=None), nbytes=nbytes, of_vectors=8 * rows,
     addresses=ADDRESSES,
     no_queries=launched(total_q=0, q=None, out=None, dout=None, softmax_lse=None, dlse=None, dq=None, workspace=None,
                         workspace_bytes=0) if {lengths} else [])
""")
    log, of_k, is_packed = found["log"], ["k", "v", "q", "dout"], lengths == "PACKED"
    assert found["again"] == log and found["nbytes"] == found["of_vectors"]
    assert [launch["kernel"] for launch in log] == ["Prepare", "Side", "Keys"]
    rows_q, rows_k = (3000, 2100) if is_packed else (1000, 700)
    of_queries, of_keys = blocks(128, rows_q, is_packed) * 12, blocks(64, rows_k, is_packed) * 4
    assert [launch["grid"] for launch in log] == [[grid, 1, 1] for grid in (of_queries, of_queries, of_keys)]
    given = [{name for name, is_there in launch["given"].items() if is_there} for launch in log]
    for own, launch, those in zip(({"dq"}, {"dk", "dv"}), log[1:], given[1:], strict=True):
        assert those >= own | {"shift", "delta", "scale"}
        assert not those & ({"dq", "dk", "dv", "out", "softmax_lse", "dlse"} - own)
        assert set(launch["tma"]) == {found["addresses"][tensor] for tensor in of_k}
        if not is_packed:
            assert {stride for stride in those if "stride" in stride} == {f"{name}_batch_stride" for name in own}
    kernels = {calls: [launch["kernel"] for launch in found[calls]] for calls in ("only_v", "only_q", "without_k")}
    assert kernels == {
        "only_v": ["Prepare", "Keys"],
        "only_q": ["Prepare", "Side"],
        "without_k": ["Prepare", "Side", "Keys"],
    }
    assert not found["only_v"][1]["given"]["dk"] and not found["without_k"][2]["given"]["dk"]
    assert [launch["grid"] for launch in found["no_queries"]] == [launch["grid"] for launch in log[2:]] * is_packed


def test_empty_problems(told):
    """No grid without a CTA: where there is no query dk and dv are zeroed, where there is no key dq is."""
    found = told("""
def launched(**changes):
    log.clear()
    ok = send(**PACKED | changes)
    return [ok, *((fact["kernel"], *fact["grid"]) for fact in log)]
none = dict.fromkeys(("q", "out", "dout", "softmax_lse", "dlse", "dq", "workspace"))
values |= ADDRESSES
no_queries = launched(total_q=0, workspace_bytes=0, **none)
described = log[0]["tma"]
tell(no_queries=no_queries, described=described, there=[ADDRESSES[name] for name in ("k", "v", "dk", "dv")],
     no_keys=launched(total_k=0, **dict.fromkeys(("k", "v", "dk", "dv"))),
     size=backward_workspace_size(BackwardParams(**FIELDS | PACKED | dict(total_q=0))))
""")
    assert found["no_queries"] == [0, ["Main", blocks(TILE_N, 2100, True) * 4, 1, 1]] and found["size"] == 0
    # q, dout and dq have no address: descriptors are made of k's.
    assert set(found["described"]) == set(found["there"])
    assert [fact[0] for fact in found["no_keys"][1:]] == ["Prepare", "Main"] and found["no_keys"][0] == 0
    assert all(min(fact[1:]) > 0 for fact in found["no_keys"][1:])


def test_sinks(told):
    """The prepare kernel is given them, and leaves sums for a launch that d_s_aux has, without queries too."""
    found = told("""
nbytes = backward_workspace_size(BackwardParams(**FIELDS | dict(s_aux=ADDRESSES["q"])))
cfg = pass_config("bf16", 64, "causal", False, False)
rows = 3 * -(-1000 // cfg.tile_m) * 12
sinks = dict(s_aux=0x7F7700000044, d_s_aux=0x7F7800000048)
values |= sinks | dict(sums=WORKSPACE + nbytes - 16 * rows)
def launched(**changes):
    log.clear()
    assert send(**changes) == 0
    return [[fact["kernel"], fact["grid"], *(name for name in values if fact["given"][name])] for fact in log]
none = dict.fromkeys(("q", "out", "dout", "softmax_lse", "dlse", "dq", "workspace"))
tell(both=launched(**sinks), again=launched(**sinks), no_gradient=launched(s_aux=sinks["s_aux"]), without=launched(),
     empty=launched(**PACKED | none | sinks | dict(total_q=0, workspace_bytes=0)))
""")
    grids = [launch[1] for launch in found["without"]]
    prepare, *others = [[name, grid] for name, grid in zip(KERNELS, grids, strict=True)]
    assert found["without"] == [[*prepare, "sums"], *others]  # where they would begin
    assert found["no_gradient"] == [[*prepare, "s_aux", "sums"], *others]
    assert found["both"] == found["again"] == [*found["no_gradient"], ["Sinks", [12, 1, 1], "d_s_aux", "sums"]]
    assert [launch[0] for launch in found["empty"]] == ["Main", "Sinks"] and "d_s_aux" in found["empty"][1]


def test_repeated_calls(told):
    """A shape that has come before is neither planned nor checked anew; what changed is seen."""
    found = told("""
from fa3_cute.planning import backward_launch as planning
from fa3_cute.runtime import backward as running
made, checked = [], []
def counted(*arguments, launch=running.launch):
    made.append(1)
    return launch(*arguments)
def plain(*arguments, of=planning.plain_backward):
    checked.append(1)
    return of(*arguments)
running.launch, planning.plain_backward = counted, plain
other = 0x7F7700000040
values |= ADDRESSES | dict(other=other)
steps = []
def step(stream=STREAM[0], **changes):
    log.clear()
    ok = send(stream, **changes)
    there = {name: any(fact["given"][name] or values[name] in fact["tma"] for fact in log) for name in values}
    steps.append([ok, len(made), len(checked), [fact["stream"] for fact in log], there])
first = number("num_allocations")
step()
allocated = number("num_allocations")
step()
step(k=other)
step(dq=other)
step(dlse=None)
step(STREAM[0] + 8)
step(STREAM[1])
step(workspace=WORKSPACE + 64)
step(batch_size=4)
step()
step(deterministic=True)
step(dq=other + 8)
step(dq=ADDRESSES["k"] + 16)
step(workspace=0, workspace_bytes=0)
step(workspace_bytes=64)
step(pack_gqa=True)
tell(steps=steps, allocated=number("num_allocations") - allocated)
""")
    steps = found["steps"]
    assert [step[0] for step in steps] == [0] * 11 + [-9, -9, -1, -9, -16]
    assert [step[1] for step in steps] == [2] * 8 + [4, 4] + [6] * 6
    assert [step[2] for step in steps] == [1] * 8 + [2, 2, 3, 4, 5, 6, 7, 8]
    offsets = [0, 0, 0, 0, 0, 8, 1 << 32, 0, 0, 0, 0]
    assert [step[3] for step in steps[:11]] == [[STREAM + offset] * 2 for offset in offsets]
    assert all(step[3] == [] for step in steps[11:]), "refused calls launch nothing"
    everything = dict.fromkeys(steps[0][4], True) | {"other": False}
    changed = {2: {"k": False, "other": True}, 3: {"dq": False, "other": True}, 4: {"dlse": False}}
    for index, step in enumerate(steps[:11]):
        assert step[4] == everything | changed.get(index, {}), index
    assert found["allocated"] == 1, "but for the counters of another device no memory is made"


def test_a_capture_needs_warm_kernels(told):
    """If one of the two is missing nothing is captured: prepare's kernel is that of another mask, which ran."""
    found = told("""
send()
cold = dict(is_causal=False)
log.clear()
number("capture_state", 1)
refused = send(**cold), last_error().detail, len(log)
number("capture_state", 0)
warm = int(warmup(BackwardParams(**FIELDS | cold), STREAM[0])), len(log)
number("capture_state", 1)
tell(refused=refused, warm=warm, captured=[send(**cold), len(log)], broken=number("num_broken"))
""")
    status, detail, launched = found["refused"]
    assert status == -103 and "bwd_bf16_d64_full" in detail and "warmup()" in detail and launched == 0
    assert found["warm"] == [0, 0] and found["captured"] == [0, 2] and found["broken"] == 0


def test_failures_leave_the_next_call_alone(told):
    found = told("""
first = send()
number("launch_result", 700)
failed = [send(), send(k=0x7F7700000040)]
number("launch_result", 0)
log.clear()
tell(first=first, failed=failed, again=send(), log=[fact["kernel"] for fact in log])
""")
    assert found["first"] == found["again"] == 0 and found["failed"] == [-100, -100]
    assert found["log"] == KERNELS
