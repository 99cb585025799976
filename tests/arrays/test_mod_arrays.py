"""ScoreMod and MaskMod in attention(): their arrays as params of `forward`, and in NumPy. No GPU."""

# ruff: noqa: F811
import numpy as np
import pytest
from test_dlpack import OFFSETS, A, DLArray, dense, gpu, packed  # noqa: F401

from fa3_cute import FlashAttentionError, MaskMod, ScoreMod, attention


def bias(score, batch, head, query, key, info, aux):
    """By head and distance."""
    return score + aux.load(0, head, query - key + 8) * aux.scalars[0]


def same_document(batch, head, query, key, info, aux):
    """Numbers of documents by key."""
    return aux.load(0, batch, query + info.n_k - info.n_q) == aux.load(0, batch, key)


BIAS = ScoreMod(bias, pointers=[("float32", ("num_heads", 17))], scalars=1)
DOCUMENTS = MaskMod(same_document, pointers=[("int32", ("batch_size", "seqlen_k"))])
FOUR_TABLES = ScoreMod(lambda score, batch, head, query, key, info, aux: score, pointers=BIAS.pointers * 4, key="none")
MODS = {"score_mod": BIAS, "mask_mod": DOCUMENTS, "mod_scalars": (2.0,)}


def table(**facts):
    return DLArray(4, 17, **{"dtype": "float32", "address": 5 * A, **facts})


def documents(rows=2, keys=9, **facts):
    return DLArray(rows, keys, **{"dtype": "int32", "address": 6 * A, **facts})


def test_arrays_become_addresses_and_strides(gpu):
    attention(*dense(), **MODS, mod_arrays=(table(strides=(32, 1)), documents()))
    attention(*packed(), **OFFSETS, **MODS, mod_arrays=[table(), documents()])
    (p, _), (of_packed, _) = gpu.launches
    assert (p.score_mod, p.mask_mod, p.mod_scalars) == (BIAS, DOCUMENTS, (2.0,))
    assert (p.mod_pointers, p.mod_strides) == ((5 * A, 6 * A), (32, 0, 9, 0))
    assert of_packed.mod_strides == (17, 0, 9, 0)  # rows of k in all


def test_a_dimension_of_size_one_has_no_stride(gpu):
    (q, _, _), one = dense(), MaskMod(same_document, pointers=[("uint8", (1, 3, 9))])
    attention(q, *dense()[1:], mask_mod=one, mod_arrays=(DLArray(1, 3, 9, dtype="uint8", strides=(77, 9, 1)),))
    assert gpu.launches[0][0].mod_strides == (0, 9)


REFUSED = {
    "no arrays": (-9, {"mask_mod": DOCUMENTS}, "mod_arrays: must be 1 arrays"),
    "too many": (-9, {"mask_mod": DOCUMENTS, "mod_arrays": (documents(), documents())}, "mod_arrays: must be 1 arrays"),
    "no tuple": (
        -9,
        {"mask_mod": DOCUMENTS, "mod_arrays": documents()},
        "mod_arrays is of type DLArray: must be a tuple",
    ),
    "shape": (-7, {"mask_mod": DOCUMENTS, "mod_arrays": (documents(1),)}, "mod_arrays[0].shape=(1, 9): must be (2, 9)"),
    "element": (-9, {"mask_mod": DOCUMENTS, "mod_arrays": (documents(dtype="int64"),)}, "is int64: must be int32"),
    "columns": (-7, {"mask_mod": DOCUMENTS, "mod_arrays": (documents(strides=(1, 2)),)}, "must be contiguous"),
    "address": (
        -9,
        MODS | {"mod_arrays": (table(), documents(address=A + 2))},
        "mod_arrays[1]: must be aligned to 4 bytes",
    ),
    "one address of many": (
        -9,
        {"score_mod": FOUR_TABLES, "mod_arrays": (table(),) * 3 + (table(address=A + 2),)},
        "mod_arrays[3]: must be aligned to 4 bytes",
    ),
    "too many for a line": (
        -9,
        {"score_mod": FOUR_TABLES, "mod_arrays": (table(),) * 20},
        "mod_arrays: must be 4 arrays",
    ),
    "strides": (
        -9,
        MODS | {"mod_arrays": (table(strides=(-17, 1)), documents())},
        "the strides of mod_arrays=(-17, 0, 9, 0): must be 4 ints from 0 to",
    ),
    "no mod": (-9, {"mask_mod": same_document}, "must be None or a fa3_cute.MaskMod"),
    "scalars": (-9, {"score_mod": BIAS, "mod_arrays": (table(),)}, "mod_scalars=None: must be 1 finite numbers"),
    "for no mod": (-9, {"mod_arrays": (documents(),)}, "mod_arrays: must be 0 arrays"),
}


@pytest.mark.parametrize("code, options, words", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_enqueue_and_allocate_nothing(gpu, code, options, words):
    with pytest.raises(FlashAttentionError) as caught:
        attention(*dense(), **options)
    assert caught.value.code == code and words in caught.value.detail, caught.value.detail
    assert not any(name in caught.value.detail for name in ("mod_pointers", "mod_strides", "None (contiguous)"))
    assert gpu.launches == gpu.allocated == []


# ---- on the host -----------------------------------------------------------------------------------------------------

Q, K, V = (np.random.default_rng(i).standard_normal((2, n, 4, 64)).astype(np.float16) for i, n in enumerate((9, 9, 9)))
HOST_DOCUMENTS = np.array([[0] * 4 + [1] * 5, [2] * 4 + [1] * 5])


def test_documents_are_sequences_of_their_own():
    flat = np.ones((4, 17))
    out = attention(Q, K, V, **MODS, mod_arrays=(flat, HOST_DOCUMENTS))  # the same for all keys changes nothing
    for part in (slice(0, 4), slice(4, 9)):
        own = attention(Q[:, part], K[:, part], V[:, part])
        assert np.abs(out[:, part].astype(float) - own).max() < 1e-3


def test_a_bias_is_added():
    bias_of = np.zeros((4, 17))
    bias_of[:, 8] = 50.0  # the diagonal
    out = attention(Q, K, V, score_mod=BIAS, mod_arrays=(bias_of,), mod_scalars=(1.0,))
    assert np.array_equal(out, V)


@pytest.mark.parametrize(
    "code, arrays, words",
    [
        (-7, (HOST_DOCUMENTS[:1],), "mod_arrays[0].shape=(1, 9): must be (2, 9)"),
        (-9, (HOST_DOCUMENTS.astype(np.float32),), "mod_arrays[0] is float32: must be as int32"),
        (-9, (), "mod_arrays: must be 1 arrays"),
    ],
)
def test_the_host_refuses(code, arrays, words):
    with pytest.raises(FlashAttentionError) as caught:
        attention(Q, K, V, mask_mod=DOCUMENTS, mod_arrays=arrays)
    assert caught.value.code == code and words in caught.value.detail, caught.value.detail


def test_no_array():
    with pytest.raises(TypeError, match=r"mod_arrays\[0\] must be a NumPy array"):
        attention(Q, K, V, mask_mod=DOCUMENTS, mod_arrays=([1],))
