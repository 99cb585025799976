"""The house rules (style_rules.py) hold, catch what they are for, and the package stays light to import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import style_rules as rules
from style_rules import PACKAGE, Source

ROOT = PACKAGE.parent
PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
OTHER_FILES = sorted(path for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*.py"))


def breaches(files: list[Path], rule) -> str:
    return "\n".join(
        f"{path.relative_to(ROOT)}:{line}: {sentence}"
        for path in files
        for line, sentence in rule(Source(path, path.read_text()))
    )


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_package(rule):
    assert not breaches(PACKAGE_FILES, rule), f"{rule.__doc__}\n{breaches(PACKAGE_FILES, rule)}"


@pytest.mark.parametrize("rule", [rules.docstrings, rules.sizes], ids=lambda rule: rule.__name__)
def test_tests_and_examples(rule):
    assert not breaches(OTHER_FILES, rule), f"{rule.__doc__}\n{breaches(OTHER_FILES, rule)}"


def nested(block: str) -> str:
    """A function with the block four deep."""
    return "def f():\n" + "".join("    " * depth + f"{block}\n" for depth in range(1, 5)) + "    " * 5 + "pass"


BUNDLE = "class A:\n    k: pipeline.PipelineConsumer"
STATE_METHOD = "@dataclass\nclass Ring:\n    def fill(self):\n        "
CAUGHT = [
    (rules.layering, "contract/rules.py", "from ..planning.problem import ProblemShape"),
    (rules.layering, "planning/config.py", "from ..kernels.common.layout import element_type"),
    (rules.layering, "planning/config.py", "from ..runtime import compiler"),
    (rules.layering, "kernels/common/attend.py", "from ..forward.store import store"),
    (rules.layering, "kernels/common/attend.py", "from ..decode import merge"),
    (rules.layering, "kernels/common/attend.py", "def f():\n    from ...runtime import launch"),
    (rules.layering, "kernels/common/attend.py", "import fa3_cute.runtime.launch"),
    (rules.layering, "kernels/forward/load.py", "from ..decode.split import Split"),
    (rules.layering, "kernels/decode/load.py", "from fa3_cute.kernels.forward.load import load"),
    (rules.layering, "kernels/backward/load.py", "from ..forward.load import load"),
    (rules.layering, "runtime/compiler.py", "from .. import forward"),
    (rules.layering, "runtime/launch.py", "from ..arrays.memory import allocate"),
    (rules.layering, "arrays/call.py", "from ..api import forward"),
    (rules.layering, "api.py", "from .cli import main"),
    (rules.layering, "unheard_of.py", "pass"),
    (rules.layering, "api.py", "from .unheard_of import f"),
    (rules.foreign_imports, "contract/rules.py", "def f():\n    import cuda.bindings"),
    (rules.foreign_imports, "planning/config.py", "from cutlass import cute"),
    (rules.foreign_imports, "api.py", "def f():\n    import torch"),
    (rules.foreign_imports, "cli/bench.py", "from torch.nn import functional"),
    (rules.foreign_imports, "kernels/common/visibility.py", "from numpy import pi"),
    (rules.frozen_pipeline_state, "kernels/forward/load.py", "@dataclass(frozen=True)\n" + BUNDLE),
    (rules.loop_in_state_method, "kernels/forward.py", STATE_METHOD + "for i in cutlass.range(n): self.advance()"),
    (rules.loop_in_state_method, "kernels/forward.py", STATE_METHOD + "while True: self.advance()"),
    (rules.phase, "kernels/forward/load.py", "phase = 0"),
    (rules.docstrings, "api.py", "pass"),
    (rules.docstrings, "kernels/common/tma.py", '"""m"""\n@cute.jit\ndef f(x):\n    return x'),
    (rules.sizes, "api.py", "\n" * 401),
    (rules.sizes, "api.py", "def f():\n" + "    pass\n" * 60),
    (rules.sizes, "api.py", "def f(a, b, c, d, e, f, g, h, *, i): pass"),
    (rules.sizes, "api.py", nested("if x:")),
]
ALLOWED = [
    (rules.layering, "api.py", "from .planning import tables\nfrom .contract.status import Status\nimport numpy"),
    (rules.layering, "__init__.py", "from .api import forward"),
    (rules.layering, "contract/rules.py", "from .status import Status"),
    (rules.layering, "kernels/common/attend.py", "from .softmax import Softmax\nfrom ...planning import config"),
    (rules.layering, "kernels/forward/load.py", "from .bundles import FwdParams\nfrom ..common.tma import tma_load"),
    (rules.layering, "kernels/backward/load.py", "from .bundles import BwdParams\nfrom ..common.tma import tma_load"),
    (rules.layering, "cli/bench.py", "from .table import Table\nfrom .. import forward\nfrom ..api import forward"),
    (rules.foreign_imports, "contract/reference.py", "import numpy"),
    (rules.foreign_imports, "cli/peers.py", "import torch"),
    (rules.foreign_imports, "kernels/common/visibility.py", "import cutlass\nfrom . import torch"),
    (rules.frozen_pipeline_state, "kernels/forward/load.py", "@dataclass\n" + BUNDLE),
    (rules.loop_in_state_method, "kernels/forward.py", STATE_METHOD + "for i in range_constexpr(4): self.x[i] = 0"),
    (rules.phase, "api.py", "phase = 0"),
    (rules.docstrings, "kernels/__init__.py", ""),
    (rules.sizes, "api.py", "def f():\n" + "    pass\n" * 59),
    (rules.sizes, "../tests/test_f.py", "def f():\n" + "    pass\n" * 79),
    (rules.sizes, "api.py", nested("if const_expr(x):")),
    (rules.sizes, "api.py", "def f(x):\n    if x:\n        pass\n" + "    elif x:\n        pass\n" * 5),
]


def source(name: str, text: str) -> Source:
    return Source((PACKAGE / name).resolve(), text)


@pytest.mark.parametrize("rule, name, text", CAUGHT)
def test_rule_catches(rule, name, text):
    assert list(rule(source(name, text)))


@pytest.mark.parametrize("rule, name, text", ALLOWED)
def test_rule_allows(rule, name, text):
    assert not list(rule(source(name, text)))


def test_no_machine_paths():
    """Nothing names a folder of some developer's machine or a package index: pip's own configuration decides that."""
    private = re.compile(
        r"(?<![\w.$}~/-])/(?:work|root|opt|mnt|scratch|(?:home|Users)(?!/someone))/"
        r"|/simple\b|--(?:extra-)?index-url"
    )
    texts = [
        *PACKAGE_FILES,
        *OTHER_FILES,
        *PACKAGE.rglob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("Makefile", "pyproject.toml", "README.md")),
        *(ROOT / ".ci").glob("*"),  # not in a source distribution
    ]
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in texts
        if path != Path(__file__)
        for match in private.finditer(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_import_is_light():
    """`import fa3_cute` loads neither the DSL nor CUDA nor NumPy and takes under 0.1 s (the best of five processes)."""
    script = (
        "import sys, time; start = time.perf_counter(); import fa3_cute; print(time.perf_counter() - start,"
        "*sorted({'cutlass', 'cuda', 'numpy', 'torch'} & {name.split('.')[0] for name in sys.modules}))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(5)
    ]
    assert not runs[0][1:], f"import fa3_cute also imports {', '.join(runs[0][1:])}"
    assert min(float(seconds) for seconds, *_ in runs) < 0.1
