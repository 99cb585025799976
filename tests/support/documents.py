"""The documents, and what tests read in them."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

import fa3_cute
from fa3_cute import AttentionMode, DataType, FlashAttentionParams
from fa3_cute.contract.status import shown


ROOT = Path(__file__).resolve().parents[2]
README, PACKAGE = ROOT / "README.md", ROOT / "fa3_cute"
CONTRACT = PACKAGE / "kernels" / "README.md"
API, API_ZH, KERNEL, PERFORMANCE = (
    ROOT / "docs" / name for name in ("api.md", "api.zh-CN.md", "kernel.md", "performance.md")
)
DOCUMENTS = sorted([README, CONTRACT, *(ROOT / "docs").glob("*.md")])
FIELDS = [(field.name, shown(field.default)) for field in fields(FlashAttentionParams)]

both_languages = pytest.mark.parametrize("page", [API, API_ZH], ids=lambda path: path.name)
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


POINTERS = {f"{name}_ptr": 1 << 20 for name in ("q", "k", "v", "out", "cu", "lse", "lengths", "scratch", "table")}
NAMES = POINTERS | {name: getattr(fa3_cute, name) for name in fa3_cute.__all__}
DENSE = FlashAttentionParams(
    q=1 << 20,
    k=1 << 20,
    v=1 << 20,
    out=1 << 20,
    dtype=DataType.FP16,
    batch_size=2,
    seqlen_q=1,
    seqlen_k=4096,
    num_heads=16,
    num_heads_k=2,
    head_dim=128,
)
PACKED = replace(
    DENSE, mode=AttentionMode.VARLEN_PREFILL, cu_seqlens_q=1 << 20, cu_seqlens_k=1 << 20, total_q=2, total_k=8192
)


def changed(params: FlashAttentionParams, text: str) -> FlashAttentionParams:
    """With "field=value, ..." as a document writes it."""
    return replace(params, **eval(f"dict({text})", dict(NAMES)))
