"""Packed calls without a key, whose k and v have no address: what reaches the kernel. Fake CUDA driver, no GPU."""


def test_descriptors_of_k_and_v_have_an_address(run):
    """Nothing is read through them, but a descriptor of address 0 cannot be made: they get q's. Calls with keys, after
    it or before, get their own."""
    told = run("""
from fa3_cute import forward
cfg = forward_config("bf16", 128, "causal", True, True)
places = kernel_parameters(cfg)
packed = PACKED | {"total_q": 7, "batch_size": 2, "seqlen_q": 0, "seqlen_k": 0}
given = dict(is_causal=True, dtype=DataType.BF16, mode=AttentionMode.VARLEN_PREFILL)
def descriptors_of(**changes):
    before = last.count
    forward(params(**packed | given | changes), STREAM[0]).check()
    return [last.count - before, sorted(descriptors(places))]
told = [descriptors_of(total_k=total, k=k, v=v) for total, k, v in (
    (9, POINTERS["k"], POINTERS["v"]), (0, None, None), (0, 0, POINTERS["v"]), (9, POINTERS["k"], POINTERS["v"]),
    (0, None, None))]
count = last.count
nothing = forward(params(**packed | given | dict(total_q=0, q=None, out=None, total_k=9)), STREAM[0])
tell(told=told, nothing=[int(nothing), last.count - count], **POINTERS)
""")
    q, k, v, out = (told[name] for name in ("q", "k", "v", "out"))
    assert [launches for launches, _ in told["told"]] == [1] * 5
    own, none, one, again, once_more = (found for _, found in told["told"])
    assert own == again == sorted((q, k, v, out))
    assert set(none) == set(once_more) == {q, out} and set(one) == {q, v, out}
    assert told["nothing"] == [0, 0]
