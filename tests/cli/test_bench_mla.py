"""The benchmark of MLA decode: its cases are good calls of one launch, and count what is read and computed."""

from argparse import ArgumentParser
from types import SimpleNamespace

import pytest

from fa3_cute.cli import bench
from fa3_cute.cli.latent import LatentTensors, vllm_launch
from fa3_cute.cli.suites import mla
from fa3_cute.planning.mla import MlaConfig
from fa3_cute.planning.operations import operation_of, problems
from fa3_cute.planning.problem import ProblemShape


def parsed(*argv: str):
    parser = ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(argv)


def params_of(case):
    pointers = dict.fromkeys(("q", "k", "v", "out", *case.index_shapes()), 1 << 20)
    return LatentTensors.params(SimpleNamespace(pointers=lambda case, kv_set: dict(pointers)), case)


def test_cases_are_good_calls():
    cases = mla.cases(parsed())
    of_mla = len(mla.PROBLEMS) + len(mla.IN_PARTS)
    assert len({case.name for case in cases}) == len(cases) == 2 * (of_mla + len(mla.LARGE_PROBLEMS))
    assert all(case.kv_bytes == 1 << 30 for case in cases if case.head_dim == 512)
    for case in cases:
        params = params_of(case)
        assert problems(params) == [] and case.head_dim in bench.served(case)
        (launch,) = operation_of(ProblemShape.of(params)).launches
        assert type(launch.config) is MlaConfig and bool(launch.config.page_box) == bool(case.page_size)
    assert not any(bench.served(case) for case in mla.cases(parsed("--dtype", "fp8_e4m3")))


def test_what_is_read_and_computed():
    by_name = {case.name: case for case in mla.cases(parsed())}
    dense, paged = (
        by_name[f"bf16 d576:512 causal h128:1 32x(2:4096) {keys} warm"] for keys in ("contiguous", "page 64")
    )
    assert dense.nbytes == paged.nbytes == 32 * (4096 * 1152 + 2 * 128 * 2 * 1088)
    assert dense.flops == paged.flops == 2 * 32 * 128 * 1088 * (4096 + 4095)
    assert dense.out_shape == (32, 2, 128, 512) and paged.out_shape == (64, 128, 512)


def test_we_get_k_in_two_parts():
    """Of a row the last columns are Q and K, the others q_v and V; rows are as far apart as ever."""
    dense, paged = (case for case in mla.cases(parsed()) if case.dims.endswith("q_v") and case.batch_size == 32)
    for case in (dense, paged):
        params = params_of(case)
        assert (params.head_dim, params.head_dim_v) == (64, 512)
        assert params.q - params.q_v == params.k - params.v == 1024 and params.v == 1 << 20
        assert params.q_head_stride == params.q_v_head_stride == 576
        assert params.q_row_stride == params.q_v_row_stride == 128 * 576
        assert params.k_row_stride == params.v_row_stride == 576
    params = params_of(dense)
    assert params.q_v_batch_stride == 2 * 128 * 576 and params.v_batch_stride == 4096 * 576
    params = params_of(paged)
    assert params.q_v_batch_stride is None and params.v_batch_stride == 64 * 576


def test_the_peer_gets_k_in_two_parts():
    """Of pages, without a copy."""
    torch = pytest.importorskip("torch")

    case = next(case for case in mla.cases(parsed()) if case.page_size and case.batch_size == 16)
    calls = []
    interface = SimpleNamespace(flash_attn_varlen_func=lambda **given: calls.append(given) or torch.zeros(16, 16, 512))
    q, k = torch.zeros(case.q_shape), torch.arange(case.kv_shape[0] * 64 * 576, dtype=torch.float32).view(case.kv_shape)
    indices = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in case.index_shapes().items()}
    assert vllm_launch(interface, torch, case, q, k, indices)().shape == case.out_shape
    (given,) = calls
    assert given["v"].data_ptr() == k.data_ptr() and given["k"].data_ptr() == k.data_ptr() + 4 * 512
    assert given["q_v"].shape[-1] == given["v"].shape[-1] == 512 and given["q"].shape[-1] == 64
