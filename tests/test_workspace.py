"""The tile counters: which launches share one, and that they reach the kernel. On the fake CUDA of test_launch.py."""
from test_launch import fake_cuda, run  # noqa: F401  (fixtures)


def test_tile_counters(run):  # noqa: F811
    """One per stream, of the stream's device; a captured launch gets one of its own, repeated or not."""
    told = run("""
from fa3_cute import DataType, FlashAttentionParams, forward
places = kernel_parameters()
call = FlashAttentionParams(**POINTERS | SIZES | dict(is_causal=True, dtype=DataType.BF16))
def counter():
    base = 0x500000000000
    words = {w for p in recorded(places) for w in struct.unpack(f"<{len(p) // 8}Q", p[:len(p) // 8 * 8])}
    found = [w for w in words if base <= w < base + (3 << 32)]
    return found[0] if len(found) == 1 else found
def after(stream):
    forward(call, stream).check()
    return counter()
eager = [after(stream) for stream in (STREAM[0], STREAM[0], STREAM[0] + 1, STREAM[1], STREAM[0])]
number("capture_state", 1)
captured = [after(STREAM[0]) for _ in range(3)]
number("capture_state", 0)
again = after(STREAM[0])
threads = []
def on_thread():
    threads.append(after(2))       # the per-thread default stream: one handle, a stream for each thread
for _ in range(2):
    t = threading.Thread(target=on_thread); t.start(); t.join()
tell(eager=eager, captured=captured, again=again, threads=threads)
""")
    first, repeated, second, elsewhere, last = told["eager"]
    assert first == repeated == last == told["again"] and len({first, second, elsewhere}) == 3
    assert elsewhere - first >= 1 << 31      # the other device's memory
    assert len({first, second, *told["captured"], *told["threads"]}) == 7
