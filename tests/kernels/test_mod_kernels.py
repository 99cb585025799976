"""Kernels with a user's functions, without a GPU: their configs, their arguments, what the compiler makes of them."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from mod_cases import BY_DISTANCE, CAPPED, DOCUMENTS, EVEN_KEYS, T5, capped_on_host
from split_calls import ONE_TOKEN

from fa3_cute import DataType, FlashAttentionParams, ScoreMod
from fa3_cute.api import kernel_config
from fa3_cute.contract.arguments import DECODE_MODS_ENTRY, FORWARD_MODS_ENTRY
from fa3_cute.contract.mods import short_name
from fa3_cute.contract.plain import plain
from fa3_cute.contract.reference import attention_reference
from fa3_cute.planning.operations import launch_of, operation_of
from fa3_cute.planning.problem import ProblemShape
from fa3_cute.planning.selections import all_configs
from fa3_cute.planning.tables import decode_config, forward_config
from fa3_cute.runtime import compiler
from fa3_cute.runtime.arguments import layout_of
from fa3_cute.runtime.compile_process import described
from fa3_cute.runtime.report import compile_and_read

A = 1 << 20
CALL = FlashAttentionParams(
    q=A,
    k=A,
    v=A,
    out=A,
    batch_size=2,
    seqlen_q=512,
    seqlen_k=700,
    num_heads=8,
    num_heads_k=2,
    head_dim=128,
    dtype=DataType.BF16,
    is_causal=True,
)
BOTH = replace(
    CALL, score_mod=BY_DISTANCE.mod, mask_mod=DOCUMENTS.mod, mod_pointers=(A + 2, A + 4), mod_scalars=(0.25,)
)


def test_configs_and_names():
    cfg = kernel_config(BOTH)
    assert (cfg.score_mod, cfg.mask_mod) == (BY_DISTANCE.mod.id, DOCUMENTS.mod.id)
    assert f"_score_mod_{short_name(BY_DISTANCE.mod.id)}_mask_mod_{short_name(DOCUMENTS.mod.id)}_" in cfg.name
    assert cfg.name.isidentifier() and cfg.mod_names == "score_mod by_distance and mask_mod documents"
    assert cfg is kernel_config(replace(BOTH, mod_scalars=(2.0,)))  # run-time values are none of its business
    assert cfg.entry is FORWARD_MODS_ENTRY and kernel_config(CALL).entry is not cfg.entry
    assert compiler.cache_key(cfg) != compiler.cache_key(replace(cfg, score_mod=T5.mod.id))
    assert not any(cfg.has_mods for cfg in all_configs())


def test_decode_takes_mods_too():
    fields = {name: getattr(BOTH, name) for name in ("score_mod", "mask_mod", "mod_pointers", "mod_scalars")}
    (launch,) = operation_of(ProblemShape.of(plain(replace(ONE_TOKEN, **fields)))).launches
    assert launch.config.entry is DECODE_MODS_ENTRY and launch.config.has_mods


def test_what_mods_read_lies_in_the_buffer():
    shape = ProblemShape.of(plain(BOTH))
    cfg = kernel_config(BOTH)
    layout, launch = layout_of(cfg.entry, cfg.is_fp8), launch_of(cfg, shape)
    values = dict(zip(layout.per_shape, layout.values(shape, launch.counts(132)), strict=True))
    pointers, strides = ([values[f"mod_{kind}_{i}"] for i in range(n)] for kind, n in (("pointer", 4), ("stride", 8)))
    assert pointers == [A + 2, A + 4, 0, 0] and strides == [96, 0, 700, 0, 0, 0, 0, 0]
    assert [values[f"mod_scalar_{i}"] for i in range(4)] == [0.25, 0, 0, 0]
    assert values["softmax_scale"] == pytest.approx(128**-0.5) and values["seqlen_k"] == 700
    assert len(layout.pack(shape, launch.counts(132))) == layout.per_shape_struct.size


def test_they_are_compiled_in_this_process(monkeypatch):
    """Another one has no functions of this one's."""
    cfg = kernel_config(BOTH)
    assert described(cfg) is None and described(kernel_config(CALL)) is not None
    monkeypatch.setattr(compiler, "compile_elsewhere", None)
    monkeypatch.setattr(compiler, "object_of", lambda cfg: cfg)
    assert compiler._object(cfg) is cfg


def test_a_softcap_as_a_mod_is_the_softcap():
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 40, 2, 64))
    twin = CAPPED.mod.on_host((), CAPPED.scalars)
    for as_mod, built_in in zip(
        attention_reference(q, k, v, score_mod=twin),
        attention_reference(q, k, v, softcap=CAPPED.scalars[0]),
        strict=True,
    ):
        assert np.allclose(as_mod, built_in, atol=1e-12)
    assert CAPPED.mod.numpy is capped_on_host


def features(*cases) -> frozenset:
    return frozenset((case.mod.kind, case.mod.id) for case in cases)


CONFIGS = {
    "softcap": forward_config("bf16", 128, "causal", True, False, features=features(CAPPED)),
    "arrays": forward_config("fp16", 64, "full", True, True, features=features(T5)),
    "fp8": forward_config("fp8_e4m3", 128, "full", False, True, "bf16", features=features(EVEN_KEYS)),
    "decode": decode_config("bf16", 128, True, features=features(BY_DISTANCE, DOCUMENTS)),
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_kernels_compile_clean(cfg):
    report, _ = compile_and_read(cfg)
    assert not report.problems(), report


def test_a_function_that_spills_is_named(caplog, monkeypatch, tmp_path):
    def greedy(score, batch, head, query, key, info, aux):
        for i in range(8):
            score = score + aux.load(0, query, key + i * 3) * aux.load(0, key + i, query)
        return score

    mod = ScoreMod(greedy, name="greedy", pointers=[("float32", (4096, 4096))])
    cfg = replace(forward_config("bf16", 256, "full", True, False), score_mod=mod.id)
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_kernels", {})
    with caplog.at_level(logging.WARNING, "fa3_cute"):
        compiler.get_kernel(cfg)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "spills" in said and "score_mod greedy must keep fewer values" in said
