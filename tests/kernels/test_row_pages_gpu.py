"""Pages that TMA has no boxes for, on the GPU: their rows come one by one, and all that is not used is NaN."""

import numpy as np
import pytest
from cases import FP8, Case
from check import Problem, check, make_problem, run
from images import contiguous

pytestmark = pytest.mark.gpu

USED = (600, 1, 0, 333)  # keys of each sequence, of at most 600
# Decode and forward kernels, each mask, rows of one to four stretches of 128 bytes and of three shorter ones.
CASES = [
    (Case("bf16", 128, False, 8, 2, 1, 600, batch=4), 1),
    (Case("fp16", 96, False, 8, 2, 3, 600, batch=4, window=(70, 0)), 12),
    (Case(FP8, 64, False, 8, 2, 1, 600, batch=4, out_dtype="bf16"), 5),
    (Case("bf16", 128, True, 4, 2, 150, 600, batch=4), 1),
    (Case("fp16", 256, False, 2, 1, 150, 600, batch=4), 3),
    (Case(FP8, 96, False, 2, 2, 200, 600, batch=4, window=(90, 5), out_dtype="fp16"), 2),
]


def in_pages(problem: Problem, page_size: int) -> dict:
    """The used keys and values of a dense problem in pages in random order, as overrides of its params.

    Rows that nobody uses are NaN; no page is behind the used keys, nor before all that the queries see.
    """
    case, used = problem.case, problem.options["seqused_k"]
    width = -(-case.seqlen_k // page_size)
    table = contiguous("page_table", (case.batch, width), "int32")
    table.array[...] = -1
    first = np.maximum(used - case.seqlen_q - case.window[0], 0) if case.window[0] >= 0 else np.zeros_like(used)
    wanted = [(b, page) for b in range(case.batch) for page in range(first[b] // page_size, -(-used[b] // page_size))]
    num_pages = len(wanted) + 2
    shape = (num_pages, page_size, case.num_heads_k, case.head_dim)
    pools = {name: contiguous(name, shape, case.dtype) for name in ("k", "v")}
    for (b, page), number in zip(wanted, np.random.default_rng(page_size).permutation(num_pages), strict=False):
        table.array[b, page] = number
        rows = np.arange(page * page_size, min((page + 1) * page_size, used[b]))
        for pool, rows_of in ((pools["k"], problem.k), (pools["v"], problem.v)):
            pool.array[number, : len(rows)] = rows_of.array[b, rows]
    for tensor in (table, *pools.values()):
        tensor.image.upload()
    sizes = {"page_size": page_size, "num_pages": num_pages, "seqlen_k": width * page_size}
    return {"page_table": table, **pools, **sizes}


@pytest.mark.parametrize("case, page_size", CASES, ids=str)
def test_rows_of_pages(case, page_size, stream):
    problem = make_problem(case, lengths={"seqused_k": USED})
    call = in_pages(problem, page_size)
    addresses = {name: call[name].address for name in ("page_table", "k", "v")}
    check(problem, *run(problem, stream, **{**call, **addresses}))
