"""A kernel with a mod is compiled in one process and found on disk by the next."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODS = """
import math
SCALE = 0.5
def weight(distance):
    return distance * (SCALE * math.pi)
def f(score, batch, head, query, key, info, aux):
    return score + weight(query - key) * aux.scalars[0]
"""
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import their_mods
from fa3_cute import ScoreMod
from fa3_cute.planning.tables import forward_config
from fa3_cute.runtime import compiler
mod = ScoreMod(their_mods.f, scalars=1)
cfg = forward_config("bf16", 64, "full", False, False, features=frozenset({("score_mod", mod.id)}))
try:
    compiler.get_kernel(cfg)
    print("there")
except compiler.CompileError as error:
    print("FA3_CUTE_DISABLE_JIT is set" in str(error) and "to be compiled")
"""


def said(folder: Path, **environment: str) -> str:
    own = {"FA3_CUTE_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], env=os.environ | own, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_next_process_finds_it(tmp_path):
    (tmp_path / "their_mods.py").write_text(MODS)
    assert said(tmp_path, FA3_CUTE_DISABLE_JIT="1") == "to be compiled"
    assert said(tmp_path) == "there"
    assert said(tmp_path, FA3_CUTE_DISABLE_JIT="1", PYTHONHASHSEED="7") == "there"
    (tmp_path / "their_mods.py").write_text(MODS.replace("0.5", "0.25"))
    assert said(tmp_path, FA3_CUTE_DISABLE_JIT="1", PYTHONDONTWRITEBYTECODE="1") == "to be compiled"
