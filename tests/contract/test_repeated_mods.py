"""forward's short cut for calls with mods. No GPU."""

from dataclasses import replace

from calls import GOOD, A

from fa3_cute import MaskMod, Status, forward


def near(batch, head, query, key, info, aux):
    """A mask that reads an array and a scalar."""
    return aux.load(0, query) * aux.scalars[0] > key


def mod() -> MaskMod:
    return MaskMod(near, pointers=[("float32", (8,))], scalars=1)


CALL = replace(GOOD, mask_mod=mod(), mod_pointers=(A,), mod_scalars=(2.0,))


def test_a_like_call_repeats_the_last_launch(launches):
    """Also with another mod of the same meaning, and a tuple that is equal."""
    forward(CALL, 7)
    launches.stub.call.can_repeat = True
    assert forward(replace(CALL, q=5 * A, mask_mod=mod(), mod_pointers=(A + 0,), mod_scalars=(2.0,)), 8) is Status.OK
    assert [call[0] for call in launches.calls] == ["launch", "repeat"]


def test_what_mods_read_is_part_of_the_shape(launches):
    forward(CALL, 7)
    launches.stub.call.can_repeat = True
    for change in ({"mod_scalars": (3.0,)}, {"mod_pointers": (A + 4,)}, {"mod_strides": (0, 0)}):
        assert forward(replace(CALL, **change), 7) is Status.OK
    assert [call[0] for call in launches.calls] == ["launch"] * 4


def test_bad_arguments_are_refused_after_good_ones(launches):
    forward(CALL, 7)
    for change in ({"mod_scalars": (float("nan"),)}, {"mod_pointers": (A + 1,)}, {"mod_pointers": None}):
        assert forward(replace(CALL, **change), 7) is Status.INVALID_ARGUMENT
    assert len(launches.calls) == 1
