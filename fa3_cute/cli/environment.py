"""What the benchmark's numbers depend on besides the code, and which code it was."""

import shlex
from datetime import UTC, datetime


def describe(device, monitor, peers: dict, args) -> dict:
    """A JSON object; `args` are bench's, with `argv`, the command line that they came from."""
    import cutlass

    from ..runtime.compiler import source_hash  # the DSL takes half a second to import

    flavour = cutlass.CUDA_VERSION
    return {
        "suite": args.suite,
        "command": shlex.join(["python", "-m", "fa3_cute", *args.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": device.name,
        "sms": device.properties.multiprocessor_count,
        **monitor.limits(),
        "clock_problem": monitor.problem,
        "dsl": cutlass.__version__,
        "dsl_cuda": f"{flavour.major}.{flavour.minor}",
        "sources": source_hash(),
        "peers": {name: peer.version for name, peer in peers.items()},
        "rounds": args.rounds,
        "batch_ms": args.batch_ms,
        "settle_ms": args.settle_ms,
    }


def sentence(known: dict) -> str:
    """The same on one line, for the head of a table; without the command, and what has no version of its own."""
    parts = [known["gpu"], f"{known['sms']} SMs"]
    if known["clock_problem"]:
        parts.append(f"no clocks ({known['clock_problem']})")
    else:
        parts.append(f"at most {known['max_clock_mhz']} MHz and {known['power_limit_watts']:.0f} W")
        parts.append(f"driver {known['driver']}")
    parts.append(f"CuTe DSL {known['dsl']} for CUDA {known['dsl_cuda']}")
    return "; ".join([*parts, *filter(None, known["peers"].values()), known["date"]])
