"""ScoreMod and MaskMod: what their hash tells apart, what is refused, what they compute on the host."""

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from types import ModuleType

import numpy as np
import pytest
from rule_calls import A, DENSE, PACKED, first_problem

from fa3_cute import FlashAttentionParams, MaskMod, ScoreMod
from fa3_cute.contract.mods import ModArray, registered, short_name
from fa3_cute.contract.plain import plain
from fa3_cute.contract.reference import attention_reference
from fa3_cute.contract.status import Status
from fa3_cute.planning.operations import problems
from fa3_cute.planning.problem import ProblemShape

SLOPE = 0.5
ARGUMENTS = "score, batch, head, query, key, info, aux"


def made(source: str, name: str = "f", **scope):
    """A function of a module of its own, which has a source."""
    import linecache

    file = f"<{made.number}.py>"
    made.number += 1
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    scope["__name__"] = "a_module"
    exec(compile(source, file, "exec"), scope)
    return scope[name]


made.number = 0


def scaled(by: float):
    """A function with a closure."""

    def f(score, batch, head, query, key, info, aux):
        return score * by

    return f


def with_slope(score, batch, head, query, key, info, aux):
    """A function that refers to a constant of its module."""
    return score - SLOPE * (query + info.n_k - info.n_q - key)


def helped(score, batch, head, query, key, info, aux):
    """A function that calls another."""
    return with_slope(score, batch, head, query, key, info, aux) * math.pi


def test_equal_functions_are_equal_mods():
    mods = [ScoreMod(scaled(2.0)) for _ in range(2)]
    assert mods[0] == mods[1] and len(set(mods)) == 1
    assert mods[0].id == mods[1].id and registered(mods[0].id).id == mods[0].id
    assert short_name(mods[0].id) == "f_" + mods[0].id[2:10]


def test_a_hash_is_the_same_in_another_process(tmp_path):
    (tmp_path / "their_mods.py").write_text(
        "S = frozenset(('a', 'b', 'c'))\n"
        "def g(x):\n    return x + (1 if 'a' in S else 2)\n"
        f"def f({ARGUMENTS}):\n    return g(score) if query in {{'x', 'y', 'z'}} else score\n"
    )
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; import their_mods as m, fa3_cute as fa; print(fa.ScoreMod(m.f).id)"
    )
    ids = {
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(ids) == 1


BODY = f"def f({ARGUMENTS}, k=1):\n    return score + C + k\n"
DIFFERENT = {
    "source": lambda: made(BODY.replace("+ k", "- k"), C=1.0),
    "constant": lambda: made(BODY, C=2.0),
    "type of a constant": lambda: made(BODY, C=1),
    "default": lambda: made(BODY.replace("k=1", "k=2"), C=1.0),
    "closure": lambda: scaled(2.0),
    "closure's value": lambda: scaled(3.0),
    "closure's sign": lambda: scaled(-0.0),
    "closure's zero": lambda: scaled(0.0),
    "lambda": lambda: eval_free_lambdas()[0],
    "lambda of the same line": lambda: eval_free_lambdas()[1],
    "helper's constant": lambda: made(
        f"def g(x):\n    return x * D\ndef f({ARGUMENTS}):\n    return g(score)\n", D=1.0
    ),
    "helper's other constant": lambda: made(
        f"def g(x):\n    return x * D\ndef f({ARGUMENTS}):\n    return g(score)\n", D=2.0
    ),
    "module's constant": lambda: made(f"def f({ARGUMENTS}):\n    return score * m.x\n", m=module_with(1.0)),
    "module's other constant": lambda: made(f"def f({ARGUMENTS}):\n    return score * m.x\n", m=module_with(2.0)),
    "inner function's constant": lambda: made(
        f"def f({ARGUMENTS}):\n    def g():\n        return C\n    return score * g()\n", C=1.0
    ),
    "inner function's other constant": lambda: made(
        f"def f({ARGUMENTS}):\n    def g():\n        return C\n    return score * g()\n", C=2.0
    ),
}


def eval_free_lambdas():
    """Two functions that share a line of source."""
    return (lambda *a: a[0] + 1.0), (lambda *a: a[0] + 2.0)


def module_with(x: float) -> ModuleType:
    """A module with a constant."""
    module = ModuleType("settings_of_a_model")
    module.x = x
    return module


def test_functions_that_differ_have_different_hashes():
    ids = {name: ScoreMod(make(), name="f").id for name, make in DIFFERENT.items()}
    ids["base"] = ScoreMod(made(BODY, C=1.0), name="f").id
    ids["arrays"] = ScoreMod(made(BODY, C=1.0), name="f", pointers=[("int32", (4,))]).id
    ids["extents"] = ScoreMod(made(BODY, C=1.0), name="f", pointers=[("int32", (5,))]).id
    ids["scalars"] = ScoreMod(made(BODY, C=1.0), name="f", scalars=1).id
    ids["key"] = ScoreMod(made(BODY, C=1.0), name="f", key="second").id
    ids["mask"] = MaskMod(made(BODY, C=1.0), name="f").id
    assert len(set(ids.values())) == len(ids), ids


def test_the_place_of_a_function_is_no_part_of_its_hash():
    indented = "if True:\n" + "\n".join("    " + line for line in BODY.splitlines()) + "\n"
    assert ScoreMod(made(BODY, C=1.0)).id == ScoreMod(made("\n\n" + indented, C=1.0)).id


def test_jit_functions_hash_as_they_were_written():
    """The DSL rewrites a function's code when it first traces it."""
    cute = pytest.importorskip("cutlass.cute")
    f = cute.jit(made(f"def f({ARGUMENTS}):\n    return score + 1.0\n"))
    mod = ScoreMod(f)
    written = f.__wrapped__.__code__
    f.__wrapped__._original_code, f.__wrapped__.__code__ = written, (lambda *a: None).__code__
    assert registered(mod.id) is mod


class Thing:
    """Of a type that is no constant."""


NO_HASH = {
    "object": (lambda: made(f"def f({ARGUMENTS}):\n    return score * THING\n", THING=Thing()), "THING", "Thing"),
    "module": (lambda: made(f"def f({ARGUMENTS}):\n    return m\n", m=module_with(1.0)), "m, which f", "module"),
    "object in a tuple": (lambda: made(f"def f({ARGUMENTS}):\n    return T[0]\n", T=(Thing(),)), "T, which f", "Thing"),
    "default": (
        lambda: made(f"def f({ARGUMENTS}, k=THING):\n    return k\n", THING=Thing()),
        "a default of f",
        "Thing",
    ),
    "import": (lambda: made(f"def f({ARGUMENTS}):\n    import json\n    return json\n"), "json", "module"),
    "callable": (lambda: Thing.__call__, "it is of type", "method"),
    "partial": (lambda: __import__("functools").partial(with_slope), "it is of type", "partial"),
}


@pytest.mark.parametrize("case", NO_HASH)
def test_what_has_no_hash_needs_a_key(case):
    make, where, what = NO_HASH[case]
    fn = make()
    with pytest.raises(ValueError) as caught:
        ScoreMod(fn, name="theirs")
    for words in ("score_mod theirs: ", where, what, "key="):
        assert words in str(caught.value)
    first, second = ScoreMod(fn, name="theirs", key="1"), ScoreMod(fn, name="theirs", key="2")
    assert first != second and first == ScoreMod(fn, name="theirs", key="1")


def test_no_source_needs_a_key():
    scope: dict = {}
    exec(f"def f({ARGUMENTS}):\n    return score\ndef g({ARGUMENTS}):\n    return score + 1\n", scope)
    with pytest.raises(ValueError, match="score_mod f: f has no source: give key="):
        ScoreMod(scope["f"])
    assert ScoreMod(scope["f"], name="f", key="a") != ScoreMod(scope["g"], name="f", key="a")


def test_names_without_a_value_are_named():
    with pytest.raises(ValueError, match="LATER, which f refers to, has no value yet"):
        ScoreMod(made(f"def f({ARGUMENTS}):\n    return score + LATER\n"))


def test_values_that_change_after_it_was_made():
    f = made(f"def f({ARGUMENTS}):\n    return score + C\n", C=1.0)
    mod = ScoreMod(f)
    f.__globals__["C"] = 2.0
    with pytest.raises(
        ValueError, match="score_mod f has changed since it was made, or its file or what it refers to has"
    ):
        registered(mod.id)
    assert registered(ScoreMod(f).id).fn is f
    with pytest.raises(ValueError, match="no ScoreMod or MaskMod theirs_0 was made"):
        registered("theirs_0")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "no name"}, "name='no name': must be an identifier"),
        ({"name": "n" * 41}, "at most 40"),
        ({"key": 1}, "key=1: must be a str"),
        ({"scalars": 5}, "scalars=5: must be an int from 0 to 4"),
        ({"scalars": True}, "scalars=True"),
        ({"pointers": [("int32", (1,))] * 5}, "5 pointers: must be at most 4"),
        ({"pointers": [("int33", (1,))]}, "element='int33': must be one of uint8"),
        ({"pointers": [("int32", ())]}, "must have 1 to 3 extents"),
        ({"pointers": [("int32", (1, 2, 3, 4))]}, "must have 1 to 3 extents"),
        ({"pointers": [("int32", (0,))]}, "extent=0: must be a positive int32"),
        ({"pointers": [("int32", ("rows",))]}, "extent='rows': must be a positive int32 or one of batch_size"),
    ],
)
def test_bad_declarations(given, words):
    with pytest.raises(ValueError) as caught:
        MaskMod(with_slope, **given)
    assert str(caught.value).startswith("mask_mod ") and words in str(caught.value)


def test_types():
    with pytest.raises(TypeError, match="fn must be a function, not int"):
        ScoreMod(3)
    with pytest.raises(FrozenInstanceError):
        ScoreMod(with_slope).name = "other"


def test_strides_of_contiguous_arrays():
    assert ModArray("int32", (7,)).strides((7,)) == (0, 0)
    assert ModArray("int32", (7, 5)).strides((7, 5)) == (5, 0)
    assert ModArray("int32", (7, 5, 3)).strides((7, 5, 3)) == (15, 3)


# ---- the contract ----------------------------------------------------------------------------------------------------

BIAS = ScoreMod(with_slope, name="bias", pointers=[("float32", ("num_heads", 32)), ("uint8", (9,))], scalars=1)
DOCUMENTS = MaskMod(helped, name="documents", pointers=[("int32", ("batch_size", "seqlen_k"))], scalars=2)
GOOD = {"score_mod": BIAS, "mask_mod": DOCUMENTS, "mod_pointers": (A, A + 1, A + 4), "mod_scalars": (1, 2.0, -3.5)}


@pytest.mark.parametrize("call", [DENSE, PACKED])
def test_good_calls(call):
    assert not problems(replace(call, **GOOD))
    assert not problems(replace(call, **GOOD | {"mod_pointers": list(GOOD["mod_pointers"]), "mod_strides": [0] * 6}))
    assert not problems(replace(call, mask_mod=MaskMod(scaled(1.0))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score_mod": with_slope}, ("score_mod=", "None or a fa3_cute.ScoreMod")),
        ({"score_mod": DOCUMENTS}, ("score_mod=", "None or a fa3_cute.ScoreMod")),
        ({"mask_mod": BIAS}, ("mask_mod=", "None or a fa3_cute.MaskMod")),
        ({"mod_pointers": None}, ("mod_pointers=None", "3 device addresses")),
        ({"mod_pointers": (A, A)}, ("mod_pointers=", "3 device addresses")),
        ({"mod_pointers": (A + 2, A, A)}, ("mod_pointers=", "the one at 0 aligned to 4 bytes")),
        ({"mod_pointers": (A, A, 0)}, ("mod_pointers=", "the one at 2 aligned")),
        ({"mod_pointers": (A, A, 2**64)}, ("mod_pointers=", "the one at 2 aligned")),
        ({"mod_pointers": A}, ("mod_pointers=", "a tuple or None")),
        ({"mod_strides": (1,)}, ("mod_strides=(1,)", "6 ints", "2 of each array")),
        ({"mod_strides": (1, 0, 0, 0, 0, -1)}, ("mod_strides=", "from 0 to")),
        ({"mod_strides": (1.0, 0, 0, 0, 0, 1)}, ("mod_strides=", "ints")),
        ({"mod_scalars": ()}, ("mod_scalars=()", "3 finite numbers")),
        ({"mod_scalars": (1, 2, math.inf)}, ("mod_scalars=", "3 finite numbers")),
        ({"mod_scalars": (1, 2, math.nan)}, ("mod_scalars=", "3 finite numbers")),
        ({"mod_scalars": (1, 2, 1e39)}, ("mod_scalars=", "3 finite numbers")),
        ({"mod_scalars": (1, 2, "3")}, ("mod_scalars=", "3 finite numbers")),
    ],
)
def test_bad_calls(change, words):
    problem = first_problem(replace(DENSE, **GOOD | change))
    assert problem.status is Status.INVALID_ARGUMENT
    assert all(word in problem.detail for word in words), problem.detail


class Handle:
    """A pointer object of a framework."""

    def __init__(self, address: int):
        self.address = address

    def __int__(self) -> int:
        return self.address


def test_numbers_of_any_kind():
    """As in other fields; what is kept for a repeated call are plain numbers."""
    given = {
        "mod_pointers": [Handle(A), np.uint64(A + 1), A + 4],
        "mod_scalars": (np.float32(0.5), np.int8(3), 1),
        "mod_strides": np.arange(6).tolist(),
    }
    params = replace(DENSE, **GOOD | given)
    assert not problems(params) and plain(params) is not params
    shape = ProblemShape.of(plain(params))
    assert shape.mod_values[:12] == (A, A + 1, A + 4, 0, 0, 1, 2, 3, 4, 5, 0, 0)
    assert shape.mod_values[12:16] == (0.5, 3.0, 1, 0)
    assert {*map(type, shape.mod_values)} <= {int, float}
    good = replace(DENSE, **GOOD)
    assert plain(good) is good
    with_handle = replace(DENSE, **GOOD | {"mod_pointers": (Handle(A), A, A)})
    assert plain(with_handle) is not with_handle and not problems(with_handle)


def test_arguments_of_no_mod():
    for change in ({"mod_pointers": (A,)}, {"mod_scalars": (1.0,)}, {"mod_strides": (1, 1)}):
        assert first_problem(replace(DENSE, **change)).status is Status.INVALID_ARGUMENT, change
    both = {"mask_mod": MaskMod(helped, name="four", scalars=4), "mod_pointers": (A, A), "mod_scalars": (1,) * 5}
    assert "5 scalars: must be at most 4" in first_problem(replace(DENSE, **GOOD | both)).detail


# ---- on the host -----------------------------------------------------------------------------------------------------


def test_twins_read_arrays_at_indices_within_them():
    def table(score, batch, head, query, key, info, aux):
        return score + aux.load(0, head, query - key) * aux.scalars[0]

    twin = ScoreMod(table, pointers=[("float32", (2, 3))], scalars=1).on_host(
        (np.array([[1, 2, 4], [8, 16, 32]]),), (10.0,)
    )
    queries, keys = np.arange(5)[:, None], np.arange(4)[None, :]
    found = twin(np.zeros((5, 4)), 0, 1, queries, keys, None)
    assert found.tolist() == [[10.0 * (8, 16, 32)[min(max(q - k, 0), 2)] for k in range(4)] for q in range(5)]


def test_a_twin_of_its_own():
    mod = ScoreMod(with_slope, numpy=lambda score, *rest: score + 1.0)
    assert mod.on_host()(2.0, 0, 0, 0, 0, None) == 3.0


def test_mods_are_what_the_reference_computes():
    """Two documents as a mask are two sequences."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 12, 2, 64)) for _ in range(3))

    def same(batch, head, query, key, info, aux):
        return aux.load(0, batch, query) == aux.load(0, batch, key)

    documents = np.array([[0] * 5 + [1] * 7], np.int32)
    mod = MaskMod(same, pointers=[("int32", ("batch_size", "seqlen_k"))])
    out, lse = attention_reference(q, k, v, mask_mod=mod.on_host((documents,)))
    for part in (slice(0, 5), slice(5, 12)):
        own, own_lse = attention_reference(q[:, part], k[:, part], v[:, part])
        assert np.allclose(out[:, part], own, atol=1e-12) and np.allclose(lse[:, :, part], own_lse, atol=1e-12)


def test_the_table_of_strides_goes_to_the_shape():
    shape = ProblemShape.of(plain(replace(DENSE, **GOOD)))
    strides = (32, 0, 0, 0, DENSE.seqlen_k, 0, 0, 0)
    assert shape.mod_values == (A, A + 1, A + 4, 0, *strides, 1, 2.0, -3.5, 0, *[0] * 8)
    assert (shape.score_mod, shape.mask_mod) == (BIAS.id, DOCUMENTS.id)
    assert ProblemShape.of(plain(DENSE)).mod_values == ()
    assert isinstance(DENSE, FlashAttentionParams) and json.dumps(shape.mod_values)


def helper(score):
    return score


helper.factor = 2.0


def scaled_by_an_attribute(score, batch, head, query, key, info, aux):
    return helper(score) * helper.factor


def test_attributes_of_functions_need_a_key():
    """They may be anything at any time, and are no part of the function's code."""
    with pytest.raises(ValueError, match="helper.factor, which scaled_by_an_attribute refers to"):
        ScoreMod(scaled_by_an_attribute)
    assert ScoreMod(scaled_by_an_attribute, key="2").id != ScoreMod(scaled_by_an_attribute, key="3").id


@pytest.mark.parametrize("pointers", [("float32", (4,)), [("float32", 4)], 7, [("float32",)]], ids=str)
def test_bad_arrays_are_one_sentence(pointers):
    with pytest.raises(ValueError, match=r"pointers=.*: must be a sequence of \(element, shape\)"):
        ScoreMod(scaled_by_an_attribute, key="2", pointers=pointers)
