"""What the compiler made of a config: a Report, for which it is compiled in this process, past every cache."""

import re
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from ..planning.config import SMEM_BYTES_PER_CTA
from ..planning.operations import Config
from .build import CompileError, compile_config
from .cubin import CubinKernel, cubin_in, read_cubin

# ptxas remarks that cost performance without failing the compile, and what they mean.
UNACCEPTABLE_REMARKS = {
    "C7508": "setmaxnreg is ignored: the register split between producer and consumers is lost",
    "C7510": "WGMMA is serialised",
    "C7511": "WGMMA is serialised: too few registers",
    "C7512": "WGMMA is serialised",
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of one config.

    registers          per thread at launch, before setmaxnreg
    stack_bytes        local memory per thread; spill_*_bytes are ptxas's count of it, spill_stores and spill_loads the
                       instructions that move it
    smem_bytes         dynamic shared memory of one CTA
    wgmmas             WGMMA instructions; setmaxnregs, instructions likewise
    warnings           sentences: ptxas remarks of UNACCEPTABLE_REMARKS
    notes              {code: times} of ptxas's other remarks, such as C7517, a wait that it added
    seconds            of the compile, which runs ptxas twice (see compile_report)
    """

    name: str
    config: Config
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    spill_stores: int
    spill_loads: int
    smem_bytes: int
    wgmmas: int
    setmaxnregs: int
    instructions: int
    warnings: tuple[str, ...]
    notes: dict[str, int]
    seconds: float

    def problems(self) -> list[str]:
        """Why this config must not ship, one sentence each; empty if it may."""
        spilled = (self.stack_bytes, self.spill_store_bytes, self.spill_load_bytes, self.spill_stores, self.spill_loads)
        budget = min(self.config.smem_bytes, SMEM_BYTES_PER_CTA)
        stores, loads = f"{self.spill_stores} stores", f"{self.spill_loads} loads"
        rules = (
            (
                not any(spilled),
                f"spills: {self.stack_bytes} bytes of stack, {stores}, {loads}{advice(self.config)}",
            ),
            (
                min(1, budget) <= self.smem_bytes <= budget,
                f"{self.smem_bytes} bytes of shared memory: the config allows {budget}",
            ),
            # WGMMA reads from shared memory: without there is none
            (self.wgmmas > 0 or not getattr(self.config, "has_gemms", budget), "no WGMMA instruction"),
            (
                self.setmaxnregs >= 2 or not self.config.uses_setmaxnreg,
                f"{self.setmaxnregs} setmaxnreg: producer and consumers need one each",
            ),
        )
        return [sentence for holds, sentence in rules if not holds] + list(self.warnings)

    def as_dict(self) -> dict:
        """The fields as plain values: a JSON row."""
        return asdict(self)


def advice(cfg: Config) -> str:
    """What to do about a spill where a user's function is part of the kernel."""
    names = getattr(cfg, "mod_names", "")
    return f"; {names} must keep fewer values at a time" if names else ""


def spills_of(cfg: Config, code: bytes) -> str:
    """What spills in the object file of a config's kernel, in words; "" if nothing does."""
    spilled = [kernel for kernel in read_cubin(cubin_in(code)).values() if kernel.stack_bytes]
    return f"{cfg.name} spills {spilled[0].stack_bytes} bytes per thread{advice(cfg)}" if spilled else ""


def compile_report(cfg: Config) -> Report:
    """Compile a config, past every cache, and measure the result. Raises CompileError; needs no GPU.

    The counts come from the cubin, which the compiler hands over for free. Whether ptxas serialised WGMMA or ignored
    setmaxnreg, the spilled bytes and the shared memory stand only in the DSL's remark file, for which it runs ptxas a
    second time: 2.9 s instead of 2.2 s for head_dim 128 on a 2-core machine, still the cheapest source of these facts.
    """
    return compile_and_read(cfg)[0]


def compile_and_read(cfg: Config) -> tuple[Report, CubinKernel]:
    """`compile_report`, and with it what the report was read from: the kernel's cubin, every opcode counted."""
    with tempfile.TemporaryDirectory(prefix="fa3_cute_") as folder:
        remarks = Path(folder, "remarks.yaml")
        start = time.perf_counter()
        compiled = compile_config(cfg, f"--keep-cubin --dump-dir {folder} --remark-output {remarks} --remark-filter .*")
        seconds = time.perf_counter() - start
        text = remarks.read_text() if remarks.exists() else ""
    (kernel,) = read_cubin(compiled.__cubin__).values()
    return _report(cfg, kernel, text, seconds), kernel


def _report(cfg: Config, kernel: CubinKernel, remarks: str, seconds: float) -> Report:
    return Report(
        name=cfg.name,
        config=cfg,
        registers=kernel.registers,
        spill_stores=kernel.count("STL"),
        spill_loads=kernel.count("LDL"),
        wgmmas=kernel.count("HGMMA") + kernel.count("QGMMA"),
        setmaxnregs=kernel.count("USETMAXREG"),
        instructions=kernel.opcodes.total(),
        seconds=seconds,
        **_parse_remarks(cfg.name, remarks, cfg.smem_bytes > 0),
    )


def _parse_remarks(name: str, remarks: str, has_smem: bool = True) -> dict:
    """The fields of a Report that only the DSL's remark file knows. Raises CompileError if it does not say them."""
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", remarks)
    smem = re.search(r"Shared memory allocated: (\d+) bytes", remarks)
    if not spills or has_smem and not smem:  # of no shared memory they say nothing
        raise CompileError(f"{name}: the compiler's remarks say nothing of spills or of shared memory")
    stack, stores, loads = map(int, spills.groups())
    codes = Counter(re.findall(r"\((C\d{4})\)", remarks))
    return {
        "stack_bytes": stack,
        "spill_store_bytes": stores,
        "spill_load_bytes": loads,
        "smem_bytes": int(smem[1]) if smem else 0,
        "warnings": tuple(f"{code}: {meaning}" for code, meaning in UNACCEPTABLE_REMARKS.items() if code in codes),
        "notes": {code: times for code, times in sorted(codes.items()) if code not in UNACCEPTABLE_REMARKS},
    }
