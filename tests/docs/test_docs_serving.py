"""docs/serving.md maps arguments of engines to fields that exist, and its strides are those of the caches it draws."""

import math

import pytest
from test_docs_guides import DEFAULTS, SERVING, names, rows

SIZES = {"N": 11, "P": 16, "H": 3, "D": 64, "L": 5, "2": 2}


def mapped(text: str) -> list[str]:
    """Fields to which the tables of engines' calls map an argument."""
    return [name for _, cell in rows(text, "argument", "FlashAttentionParams") for name in names(cell)]


def test_arguments_of_engines_are_mapped_to_fields():
    fields_of_pages = {"page_table", "page_table_batch_stride", "page_size", "num_pages", "max_num_splits"}
    assert fields_of_pages < set(mapped(SERVING.read_text())) < set(DEFAULTS)


def test_a_wrong_mapping_is_found():
    text = SERVING.read_text()
    assert not set(mapped(text.replace("| `page_table`, `page_table_b", "| `block_table`, `page_table_b"))) <= set(
        DEFAULTS
    )


def layouts(text: str) -> list[list[str]]:
    """The table of caches: what lies in memory, strides of pages, rows and heads, where V starts."""
    titles = "cache in memory", "`k_batch_stride`", "`k_row_stride`", "`k_head_stride`", "v starts at"
    return rows(text, *titles)


def product(factors: str) -> int:
    """Of letters, as "2 P H D"."""
    return math.prod(SIZES[factor] for factor in factors.split())


def strides_of(shape: str) -> tuple[dict[str, int], int]:
    """Strides of the dimensions by their names; how far V lies behind K: the dimension 2, or half of a row of both."""
    dims = shape.strip("[]").split(", ")
    strides = {dim: math.prod(map(product, dims[place + 1 :])) for place, dim in enumerate(dims)}
    return strides, strides.get("2", SIZES["D"])


def wrong_layouts(text: str) -> list[str]:
    """Caches whose strides are not those of their shape."""
    found = []
    for name, *stated, v_start in layouts(text):
        strides, v_offset = strides_of(name[name.index("[") :])
        tokens = strides.get("N P")
        expected = [16 * tokens, tokens, strides["H"]] if tokens else [strides[dim] for dim in "NPH"]
        numbers = [product(cell) for cell in stated]
        offset = v_start.partition("k + ")[2]
        if numbers != expected or offset and product(offset) != v_offset:
            found.append(name)
    return found


def test_strides_of_caches_are_those_of_their_shapes():
    assert len(layouts(SERVING.read_text())) == 7 and not wrong_layouts(SERVING.read_text())


@pytest.mark.parametrize(
    "old, new", [("| 2 P H D | D | P D |", "| 2 P H D | D | D |"), ("| k + N P H D |", "| k + P H D |")]
)
def test_a_wrong_stride_is_found(old, new):
    text = SERVING.read_text()
    assert len(wrong_layouts(text.replace(old, new, 1))) == 1
