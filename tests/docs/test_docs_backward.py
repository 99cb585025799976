"""What the documents say of the backward pass: its fields, what is served, its rings, its shared memory."""

import re
from dataclasses import fields, replace

import pytest
from documents import API, API_ZH, CONTRACT, blocks, both_languages

import fa3_cute
from fa3_cute import BackwardParams, FlashAttentionParams
from fa3_cute.contract.backward_params import ARGUMENTS, NEW, OWN
from fa3_cute.contract.backward_rules import REFUSED, SERVED_DTYPES
from fa3_cute.contract.formats import DIM_STEP, HEAD_DIMS, VALUE_DIMS
from fa3_cute.planning.backward_kernels import pass_config
from fa3_cute.planning.backward_tables import SHORT, TABLE
from fa3_cute.planning.one_side import SIDES, OneSidePass
from fa3_cute.planning.one_side import TABLE as ONE_SIDE
from fa3_cute.planning.rings import by_name

ADDRESSES = {
    f"{name}_ptr": place << 32
    for place, name in enumerate(("q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv"), start=1)
}
HEADINGS = {API: "\n## backward()\n", API_ZH: "\n## 反向传播：backward\n"}


def section(page) -> str:
    return page.read_text().partition(HEADINGS[page])[2].partition("\n## ")[0]


# ---- fields ----------------------------------------------------------------------------------------------------------


def told(text: str) -> dict[str, str]:
    """{field: shape, type, default} of the table of fields; a row with a stride stands for those of four tensors."""
    found = {}
    for cell, kind in re.findall(r"^\| ((?:`\w+`(?:, )?)+)[^|]*\| ([^|]*) \| [^|]+ \|$", text, re.MULTILINE):
        for name in re.findall(r"\w+", cell):
            found |= dict.fromkeys(strides(), kind) if name == "dout_batch_stride" else {name: kind}
    return found


def strides() -> list[str]:
    return [name for name in NEW if name.endswith("_stride")]


def wrong_fields(text: str) -> list[str]:
    """Fields of BackwardParams' own that the table leaves out, or of which it says another element or alignment."""
    found = told(text)
    wrong = sorted(found.keys() ^ OWN)
    for name in found.keys() & OWN:
        kind, argument = found[name], ARGUMENTS[name]
        alignments = [int(number) for number in re.findall(r"(\d+)(?:-byte aligned| 字节对齐)", kind)]
        is_right = alignments == [number for number in (argument.alignment,) if argument.kind == "pointer"]
        if argument.kind == "pointer":
            is_right &= ("FP32" in kind) == (argument.element == "float32")
        wrong += [name] * (not is_right)
    return wrong


@both_languages
def test_the_table_has_every_field(page):
    assert wrong_fields(section(page)) == []
    given = {field.name for field in fields(FlashAttentionParams)}
    assert given - OWN | OWN == {field.name for field in fields(BackwardParams)}


@pytest.mark.parametrize(
    "old, new",
    [
        ("`dlse`", "`d_lse`"),
        ("FP32", "FP16"),
        ("| `dq` |", "| `dq`, `dp` |"),
        ("16", "8"),
        ("`deterministic` |", "x |"),
    ],
)
@both_languages
def test_a_wrong_table_of_fields_is_found(page, old, new):
    text = section(page)
    assert old in text and wrong_fields(text.replace(old, new))


# ---- what is served --------------------------------------------------------------------------------------------------


def served(text: str) -> tuple[set[str], set[int], set[str]]:
    """(element types, the least and the largest head_dim, fields that are refused)."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    types, dims = (
        next(said for what, said in rows if what in names)
        for names in (("element types", "类型"), ("head_dim, head_dim_v", "head_dim、head_dim_v"))
    )
    of_refusal = re.findall(r"^\| (.+) \| -16 \|$", text, re.MULTILINE)
    of_fields = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|.*-16", text, re.MULTILINE)
    refused = {name for cell in of_refusal + of_fields for name in re.findall(r"`(\w+)`", cell)}
    return set(re.findall(r"\w+\d+", types)), set(map(int, re.findall(r"\d+", dims))), refused


def expected() -> tuple[set[str], set[int], set[str]]:
    return (
        {dtype.name for dtype in SERVED_DTYPES},
        {DIM_STEP, HEAD_DIMS[-1]},
        {*REFUSED, "out_dtype", "grad_dtype"},
    )


@both_languages
def test_what_is_served(page):
    assert served(section(page)) == expected()


@pytest.mark.parametrize(
    "old, new", [("of 8 up to 256", "of 16 up to 256"), ("不超过 256 的 8", "不超过 192 的 8"), ("`tile_counter`", "")]
)
def test_a_wrong_table_of_what_is_served_is_found(old, new):
    pages = [page for page in (API, API_ZH) if old in section(page)]
    assert pages and all(served(section(page).replace(old, new)) != expected() for page in pages)


@both_languages
def test_the_example_is_a_good_call(page, monkeypatch):
    calls = []
    monkeypatch.setattr(fa3_cute, "forward", lambda params, stream: calls.append(params) or fa3_cute.Status.OK)
    monkeypatch.setattr(fa3_cute, "backward", lambda params, stream: calls.append(params) or fa3_cute.Status.OK)
    (example,) = blocks(section(page), "python")
    exec(example, ADDRESSES | {"stream": 0, "allocate": lambda nbytes: 1 << 40})
    assert [type(params) for params in calls] == [FlashAttentionParams, BackwardParams]
    assert [fa3_cute.explain(params) for params in calls] == [[], []]


# ---- the contract of the kernels -------------------------------------------------------------------------------------


def contract() -> str:
    """But for what test_docs_backward_roles.py reads."""
    return CONTRACT.read_text().partition("\n## The backward kernels\n")[2].partition("\n## ")[0].partition(ROLES)[0]


ROLES = "\n### Warpgroups with roles\n"
CONFIGS = [pass_config("bf16", *row, False, False) for row in TABLE if not TABLE[row].is_split]
SHORT_CONFIGS = [pass_config("bf16", *row, False, False, is_short=True) for row in SHORT]


def memory_in(text: str) -> set[tuple[str, ...]]:
    rows = re.findall(
        r"^\| (\d+(?:, short)?) \| ([a-z, ]+) \| (\d+x\d+)" + r" \| ([\dx ]+)" * 6 + r" \|$", text, re.MULTILINE
    )
    return {(head_dim, mask, *rest) for head_dim, masks, *rest in rows for mask in masks.split(", ")}


def memory() -> set[tuple[str, ...]]:
    """(head_dim, mask, tile, K or V, Q or dO, dS, dQ, shift or delta, all) of every config."""
    found = set()
    for cfg in CONFIGS + SHORT_CONFIGS:
        ring = by_name(cfg.rings)
        assert [ring[a][1:3] == ring[b][1:3] for a, b in (("k", "v"), ("q", "do"), ("shift", "delta"))] == [True] * 3
        slots = [f"{ring[name].slots} x {ring[name].slot_bytes}" for name in ("q", "ds", "dq", "shift")]
        tile = f"{cfg.tile_m}x{cfg.tile_n}"
        head_dim = f"{cfg.head_dim}{', short' * (cfg in SHORT_CONFIGS)}"
        found.add((head_dim, cfg.mask, tile, str(ring["k"].slot_bytes), *slots, str(cfg.smem_bytes)))
    return found


def test_the_table_of_shared_memory_is_the_configs():
    assert memory_in(contract()) == memory()


def rings_in(text: str, cfg) -> list[tuple[str, int, int, int]]:
    """(ring, slots, full, empty) of the table, in numbers of a config."""
    n = cfg.num_consumer_wgs
    numbers = {
        "n": n,
        "4n": 4 * n,
        "4r": 4 * cfg.num_dq_wgs,
        "4n+3": 4 * n + 3,
        "num_q_stages": cfg.num_q_stages,
        "num_do_stages": cfg.num_do_stages,
    }
    numbers |= {"num_ds_stages": cfg.num_ds_stages}
    value = lambda word: int(word) if word.isdigit() else numbers[word]
    rows = re.findall(
        r"^\| (\w+) \| (\w+) \| [^|]*\((\w+)\)[^|]*\| [^|]*\(([\w+]+)\)[^|]*\| [^|]+ \|$", text, re.MULTILINE
    )
    return [(name, *map(value, counts)) for name, *counts in rows if name != "ring"]


def rings(cfg) -> list[tuple[str, int, int, int]]:
    return [(ring.name, ring.slots, ring.full, ring.empty) for ring in cfg.rings]


@pytest.mark.parametrize("cfg", CONFIGS + SHORT_CONFIGS, ids=lambda cfg: cfg.name)
def test_the_table_of_rings_is_the_config(cfg):
    assert rings_in(contract(), cfg) == rings(cfg)


def test_the_table_of_roles_is_the_configs():
    of_roles = re.findall(r"`(load|schedule|watch|consume)`[^|]*\| (\d+) \|", contract())
    assert {name: int(registers) for name, registers in of_roles} == {
        role.name: role.registers for role in CONFIGS[0].roles if role.name != "reduce"
    }
    warps = {role.name: role.warps for role in CONFIGS[0].roles}
    alone = {name: range(i, i + 1) for i, name in enumerate(("load", "reduce", "schedule", "watch"))}
    assert warps == {**alone, "consume": range(4, 12)}
    producer, consumer = CONFIGS[0].registers
    assert f"{producer} + 2 * {consumer} = 3 * {(producer + 2 * consumer) // 3}," in contract()


@pytest.mark.parametrize(
    "old, new",
    [
        ("| 231680 |", "| 231681 |"),
        ("| full, causal, local | 128x128", "| full, causal | 128x128"),
        ("2 x 20480 | 2 x 320", "2 x 20480 | 2 x 640"),
        ("128, short", "128"),
    ],
)
def test_a_wrong_table_of_shared_memory_is_found(old, new):
    assert old in contract() and memory_in(contract().replace(old, new)) != memory()


@pytest.mark.parametrize(
    "old, new",
    [
        ("| dq | n |", "| dq | 1 |"),
        ("(4), after", "(1), after"),
        ("| ds |", "| dS |"),
        ("(4n+3)", "(4n)"),
        ("(32)", "(1)"),
    ],
)
def test_a_wrong_table_of_rings_is_found(old, new):
    assert old in contract() and rings_in(contract().replace(old, new), CONFIGS[0]) != rings(CONFIGS[0])


# ---- of the kernels of one gradient ----------------------------------------------------------------------------------


def contract_of_sides() -> str:
    return CONTRACT.read_text().partition("\n## The backward kernels of one gradient\n")[2].partition("\n## ")[0]


SOFTCAP = frozenset({("has_softcap", True)})  # with which dK and dV have kernels of their own
SIDE_PASSES = [OneSidePass("bf16", head_dim, "full", False, SOFTCAP) for head_dim in ONE_SIDE]
SIDE_PASSES.append(OneSidePass("bf16", 192, "full", False, SOFTCAP, head_dim_v=VALUE_DIMS[2, 192]))
SIDE_CONFIGS = [side for chosen in SIDE_PASSES for side in chosen.sides]


def memory_of_sides_in(text: str) -> list[tuple[str, ...]]:
    return re.findall(r"^\| ([\d, ]+) \| (d[qkv]) \| (\d+x\d+)" + r" \| ([\dx, ]+)" * 4 + r" \|$", text, re.MULTILINE)


def memory_of_sides() -> list[tuple[str, ...]]:
    """(head_dim, gradient, tile, x or x2, y, y2, all) of every config; both dims, and x and x2, where V has its own."""
    found = []
    for cfg in SIDE_CONFIGS:
        ring = by_name(cfg.rings)
        dims, sizes = [str(cfg.head_dim)], [str(ring["x"].slot_bytes)]
        if cfg.head_dim_v:
            dims.append(str(cfg.head_dim_v))
            sizes.append(str(ring["x2"].slot_bytes))
        else:
            assert ring["x2"].slot_bytes in (ring["x"].slot_bytes, 0)
        slots = [f"{ring[name].slots} x {ring[name].slot_bytes}" for name in ("y", "y2")]
        tile = f"{cfg.tile_rows}x{cfg.tile_columns}"
        found.append((", ".join(dims), cfg.side, tile, ", ".join(sizes), *slots, str(cfg.smem_bytes)))
    return found


def rings_of_sides_in(text: str, cfg) -> list[tuple[str, int, int, int]]:
    numbers = {"num_y_stages": cfg.num_y_stages, "num_y2_stages": cfg.num_y2_stages}
    value = lambda word: int(word) if word.isdigit() else numbers[word]
    rows = re.findall(r"^\| (\w+) \| (\w+) \| [^|]*\((\d+)\) \| [^|]*\((\d+)\) \| [^|]+ \|$", text, re.MULTILINE)
    return [(name, *map(value, counts)) for name, *counts in rows]


def test_the_tables_of_one_gradient_are_the_configs():
    assert memory_of_sides_in(contract_of_sides()) == memory_of_sides()
    for cfg in SIDE_CONFIGS:
        assert rings_of_sides_in(contract_of_sides(), cfg) == rings(cfg)
        roles = {role.name: (role.warps, role.registers) for role in cfg.roles}
        assert roles == {"load": (range(1), 24), "consume": (range(4, 12), 240)}
    assert {cfg.side for cfg in SIDE_CONFIGS} == set(SIDES)


@pytest.mark.parametrize(
    "old, new", [("| 231168 |", "| 231169 |"), ("1 x 32768", "2 x 32768"), ("| 256 | dv |", "| x |")]
)
def test_a_wrong_table_of_one_gradient_is_found(old, new):
    text = contract_of_sides()
    assert old in text and memory_of_sides_in(text.replace(old, new)) != memory_of_sides()


@pytest.mark.parametrize("old, new", [("| y2 | num_y2", "| y2 | num_y"), ("covers it (1)", "covers it (0)")])
def test_a_wrong_table_of_rings_of_one_gradient_is_found(old, new):
    text = contract_of_sides()
    assert old in text
    assert any(rings_of_sides_in(text.replace(old, new), cfg) != rings(cfg) for cfg in SIDE_CONFIGS)


# ---- of the kernel of dK and dV --------------------------------------------------------------------------------------


def contract_of_pair() -> str:
    return CONTRACT.read_text().partition("\n## The backward kernel of dK and dV\n")[2].partition("\n## ")[0]


PAIR_CONFIGS = [replace(chosen, features=frozenset()).pair for chosen in SIDE_PASSES]


def memory_of_pair_in(text: str) -> list[tuple[str, ...]]:
    return re.findall(r"^\| (\d+), (\d+) \| (\d+x\d+)" + r" \| ([\dx, ]+)" * 5 + r" \|$", text, re.MULTILINE)


def memory_of_pair() -> list[tuple[str, ...]]:
    """(head_dim, head_dim_v, tile, K and V, Q, dO, P, all) of every config."""
    found = []
    for cfg in PAIR_CONFIGS:
        ring = by_name(cfg.rings)
        slots = [f"{ring[name].slots} x {ring[name].slot_bytes}" for name in ("q", "do", "p")]
        keys = f"{ring['k'].slot_bytes}, {ring['v'].slot_bytes}"
        found.append((str(cfg.dim_qk), str(cfg.dim_v), f"{cfg.tile_m}x{cfg.tile_n}", keys, *slots, str(cfg.smem_bytes)))
    return found


def rings_of_pair_in(text: str, cfg) -> list[tuple[str, int, int, int]]:
    value = lambda word: int(word) if word.isdigit() else getattr(cfg, word)
    rows = re.findall(r"^\| (\w+) \| (\w+) \| [^|]*\((\d+)\) \| [^|]*\((\d+)\) \| [^|]+ \|$", text, re.MULTILINE)
    return [(name, *map(value, counts)) for name, *counts in rows]


def test_the_tables_of_dk_and_dv_are_the_configs():
    assert memory_of_pair_in(contract_of_pair()) == memory_of_pair()
    for cfg in PAIR_CONFIGS:
        assert rings_of_pair_in(contract_of_pair(), cfg) == rings(cfg)
        roles = {role.name: (role.warps, role.registers) for role in cfg.roles}
        assert roles == {"load": (range(1), 24), "values": (range(4, 8), 240), "keys": (range(8, 12), 240)}


@pytest.mark.parametrize("old, new", [("| 231424 |", "| 231425 |"), ("64x64", "64x128"), ("1 x 32768", "2 x 32768")])
def test_a_wrong_table_of_dk_and_dv_is_found(old, new):
    text = contract_of_pair()
    assert old in text and memory_of_pair_in(text.replace(old, new)) != memory_of_pair()


@pytest.mark.parametrize("old, new", [("| do | num_do", "| do | num_q"), ("of the other (4)", "of the other (8)")])
def test_a_wrong_table_of_rings_of_dk_and_dv_is_found(old, new):
    text = contract_of_pair()
    assert old in text
    assert any(rings_of_pair_in(text.replace(old, new), cfg) != rings(cfg) for cfg in PAIR_CONFIGS)
