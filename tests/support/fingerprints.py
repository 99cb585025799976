"""What the compiler made of every config, kept in fingerprints.json: a change of structure must not change a kernel.

    python tests/support/fingerprints.py            make it anew, all configs (300 take 9 minutes on 2 cores)
    python tests/support/fingerprints.py --check    compare instead; exit status 1 and the differences if there are any

Either one prints what of a kernel must not ship, and ends with exit status 1 if there is any.

A fingerprint is registers, bytes of stack, of spill stores and loads, of shared memory, instructions, and a hash of the
instructions in order, without the places of kernel parameters in constant memory. Of the backward kernels of one
gradient or two the hash is of how often each opcode occurs: of the same PTX the assembler makes one of two orders of
theirs, another one in some processes. Keyed by DSL version and flavour; versions of one flavour share an assembler, and
4.8.0 and 4.8.1 make the same code of every kernel.
"""

import hashlib
import json
import multiprocessing
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

FILE = Path(__file__).with_name("fingerprints.json")
FIELDS = ("registers", "stack_bytes", "spill_store_bytes", "spill_load_bytes", "smem_bytes", "instructions")
# Forms of an instruction that read constant memory, by bits 8 to 11 of its first word; where it reads, bits 38 to 53.
CONSTANT_FORMS = (0x6, 0x7, 0xA, 0xB)
CONSTANT_OFFSET = 0xFFFF << 38


def fingerprint(cfg) -> tuple:
    """(Report, fingerprint) of one config, compiled past every cache."""
    from fa3_cute.runtime.compiler import compile_and_read

    report, kernel = compile_and_read(cfg)
    return report, of_compiled(cfg, report, kernel)


def of_compiled(cfg, report, kernel) -> list:
    """The fingerprint of what compile_and_read returns."""
    from fa3_cute.planning.one_side import OneSideConfig
    from fa3_cute.planning.pair import PairConfig

    has_orders = isinstance(cfg, OneSideConfig | PairConfig)
    of_code = opcode_hash(kernel.opcodes) if has_orders else code_hash(kernel.code)
    return [*(getattr(report, field) for field in FIELDS), of_code]


def code_hash(code: bytes) -> str:
    """16 digits of SHA-256 over the instructions, whatever lies where in constant memory."""
    digest = hashlib.sha256()
    for start in range(0, len(code), 16):
        low, high = code[start : start + 8], code[start + 8 : start + 16]
        word = int.from_bytes(low, "little")
        if word >> 8 & 0xF in CONSTANT_FORMS:
            low = (word & ~CONSTANT_OFFSET).to_bytes(8, "little")
        digest.update(low + high)
    return digest.hexdigest()[:16]


def opcode_hash(opcodes: Counter) -> str:
    """16 digits of SHA-256 over how often each opcode occurs."""
    return hashlib.sha256(repr(sorted(opcodes.items())).encode()).hexdigest()[:16]


def recorded() -> list:
    """The configs whose fingerprints are kept: those of the tables, of 512 columns of V, of backward, merge and append
    of all types, and some of decode steps that append."""
    from fa3_cute.planning.append import all_append_configs
    from fa3_cute.planning.merge import all_merge_configs
    from fa3_cute.planning.selections import all_configs, appending_configs, backward_kernels, mla_configs

    beside = *all_merge_configs(), *all_append_configs(), *appending_configs()
    return [*all_configs(), *mla_configs(), *backward_kernels(), *beside]


def environment() -> str:
    """The key of this machine's compiler."""
    import cutlass

    return f"DSL {cutlass.__version__}, CUDA {cutlass.CUDA_VERSION.major}.{cutlass.CUDA_VERSION.minor}"


def known() -> dict[str, list]:
    """{config name: fingerprint} of this compiler, else of another DSL of its flavour; {} where there are none."""
    everything = json.loads(FILE.read_text()) if FILE.exists() else {}
    return nearest(everything, environment())


def nearest(everything: dict[str, dict], key: str) -> dict:
    """The entry of that key, else the last one for the same CUDA version."""
    flavour = key.partition(", ")[2]
    others = [kernels for other, kernels in everything.items() if other.partition(", ")[2] == flavour]
    return everything.get(key, others[-1] if others else {})


def main(check: bool) -> int:
    configs = recorded()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        reports, made = zip(*pool.map(fingerprint, configs), strict=True)
    found = {cfg.name: fingerprint for cfg, fingerprint in zip(configs, made, strict=True)}
    problems = [f"{report.name}: {problem}" for report in reports for problem in report.problems()]
    print(*problems, sep="\n", end="\n" * bool(problems))
    if check:
        before = known()
        changed = {name: (before.get(name), made) for name, made in found.items() if before.get(name) != made}
        changed |= {name: (made, None) for name, made in before.items() if name not in found}
        for name, (old, new) in changed.items():
            print(f"{name}: {old} -> {new}")
        print(f"{len(found)} kernels, {len(changed)} changed")
        return int(bool(changed or problems))
    everything = json.loads(FILE.read_text()) if FILE.exists() else {}
    everything[environment()] = found
    lines = (
        f"{json.dumps(key)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(made)}" for name, made in kernels.items())
        + "\n}"
        for key, kernels in everything.items()
    )
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(found)} kernels written to {FILE.name}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
