"""Context parallelism: one layer's attention over sequences that several GPUs hold, by all-gather, ring and Ulysses.

    python context_parallel.py                                 4 ranks simulated, on one GPU or in NumPy: checked
    python context_parallel.py --ranks 2                       one process a GPU, over NCCL: checked
    python context_parallel.py --ranks 2 --bench 16k 64k 128k  times of each scheme beside one GPU alone

Over several machines each rank is started by hand, with --rank and a new folder that all of them see as --meet. Needs
libnccl.so.2: pip install nvidia-nccl-cu12. docs/context-parallel.md says how the schemes work.
"""

import argparse
import sys

from parallel.check import compare
from parallel.comm import SimulatedComm
from parallel.launch import Meeting, start_ranks
from parallel.plan import Problem

from fa3_cute.arrays.memory import hopper_device_problem

SIMULATED = 4


def tokens(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=0, help="GPUs, a process each; 0: simulate 4 of them")
    parser.add_argument(
        "--bench", nargs="+", type=tokens, metavar="TOKENS", help="measure, at so many tokens: 16k, 65536"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp8_e4m3"])
    parser.add_argument("--margins", nargs="+", type=int, default=[0, 8, 16], help="SMs left to the exchange")
    parser.add_argument("--backward", action="store_true", help="measure the backward pass of all-gather too")
    parser.add_argument("--timeout", type=float, default=300, help="seconds until all ranks are ended")
    parser.add_argument("--rank", type=int, help="be this rank, instead of starting all of them")
    parser.add_argument("--device", type=int, help="of this rank; its number by default")
    parser.add_argument("--meet", metavar="FOLDER", help="where ranks meet")
    return parser.parse_args()


def problem_of(ranks: int) -> Problem:
    heads = max(4, ranks)
    return Problem(seqlens=(256,), num_ranks=ranks, num_heads=2 * heads, num_heads_k=heads, head_dim=128)


def simulate() -> int:
    problem = problem_of(SIMULATED)
    if reason := hopper_device_problem():
        from fa3_cute.planning.merge import merge_config
        from fa3_cute.runtime.compiler import compile_report
        from parallel.host import HostEngine

        print(f"No Hopper GPU here ({reason}): compiling the ring's merge, simulating {SIMULATED} ranks in NumPy.")
        report = compile_report(merge_config("fp32", "fp32"))
        print(f"{report.name} for sm_90a: {report.registers} registers, {report.stack_bytes} bytes spilled")
        engine = HostEngine(problem)
    else:
        from parallel.gpu import GpuEngine

        engine = GpuEngine(problem)
        print(f"{engine.device.name}: {SIMULATED} ranks simulated on one GPU")
    return compare(SimulatedComm(engine, SIMULATED), engine, problem, is_brief=True)


def be_rank(options) -> int:
    from parallel.gpu import GpuEngine
    from parallel.nccl import NcclComm, make_unique_id, version

    rank, size = options.rank, options.ranks
    meeting, problem = Meeting(options.meet, rank, size, options.timeout), problem_of(size)
    engine = GpuEngine(problem, rank if options.device is None else options.device)
    unique_id = bytes.fromhex(meeting.tell(make_unique_id().hex() if rank == 0 else None)[0])
    comm = NcclComm(engine, rank, size, unique_id)
    if rank == 0:
        print(f"{size} x {engine.device.name}, NCCL {version()}", flush=True)
    if not options.bench:
        status = compare(comm, engine, problem, meeting)
        comm.close()
        return status
    from parallel.bench import Bench

    say = (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
    of_layer = Problem(seqlens=(), num_ranks=size, num_heads=32, num_heads_k=8, head_dim=128)
    Bench(comm, engine, meeting, tuple(options.margins), say).run(
        of_layer, options.bench, options.dtypes, options.backward
    )
    comm.close()
    return 0


def main() -> int:
    options = arguments()
    if options.rank is not None:
        return be_rank(options)
    if options.ranks:
        if reason := hopper_device_problem(options.ranks - 1 if options.device is None else options.device):
            raise SystemExit(f"--ranks {options.ranks}: {reason}")
        return start_ranks(sys.argv[1:], options.ranks, options.timeout)
    return simulate()


if __name__ == "__main__":
    raise SystemExit(main())
