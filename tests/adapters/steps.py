"""Steps of an engine: tokens of sequences over pages in random order, and what attention of each must be."""

from dataclasses import dataclass

import torch

from fa3_cute.contract.reference import attention_reference

HEADS, HEADS_K, PAGE = 4, 2, 16


@dataclass
class Step:
    """queries and keys of each sequence, new ones among the keys; K and V of all, [sequences][keys, heads_k, dim]."""

    queries: list[int]
    keys: list[int]
    dim: int = 64

    def __post_init__(self):
        generator = torch.Generator().manual_seed(3)

        def rand(*shape):
            return torch.randn(shape, generator=generator).to(torch.bfloat16)

        self.q = rand(sum(self.queries), HEADS, self.dim)
        self.k, self.v = ([rand(n, HEADS_K, self.dim) for n in self.keys] for _ in "kv")
        pages = [-(-n // PAGE) for n in self.keys]
        order = torch.randperm(sum(pages) + 2, generator=generator).tolist()
        self.num_pages, width = len(order), max(pages) + 1
        self.tables = torch.full((len(pages), width), -1, dtype=torch.int32)
        for row, count in enumerate(pages):
            self.tables[row, :count] = torch.tensor(order[sum(pages[:row]) :][:count], dtype=torch.int32)

    @property
    def lengths(self) -> torch.Tensor:
        return torch.tensor(self.keys, dtype=torch.int32)

    @property
    def starts(self) -> torch.Tensor:
        return torch.tensor([0, *torch.tensor(self.queries).cumsum(0).tolist()], dtype=torch.int32)

    def new(self, of: list) -> torch.Tensor:
        """The rows of k or v that come with the queries, packed."""
        return torch.cat([x[len(x) - n :] for x, n in zip(of, self.queries, strict=True)])

    def slots(self, whole: bool = False) -> torch.Tensor:
        """Rows of the pool: of the new tokens, or of all."""
        found = []
        for row, (n, m) in enumerate(zip(self.keys, self.queries, strict=True)):
            places = torch.arange(0 if whole else n - m, n)
            found.append(self.tables[row, places // PAGE].long() * PAGE + places % PAGE)
        return torch.cat(found)

    def expected(self, scales=(1.0, 1.0, 1.0), **options) -> torch.Tensor:
        """[tokens, heads, dim], in float32."""
        found, start = [], 0
        for n, k, v in zip(self.queries, self.k, self.v, strict=True):
            tensors = (self.q[start : start + n], k, v)
            q, k, v = (x.float().numpy()[None] * scale for x, scale in zip(tensors, scales, strict=True))
            if n:
                found.append(torch.from_numpy(attention_reference(q, k, v, **options)[0][0]).float())
            start += n
        return torch.cat(found)

    def quantised(self) -> "Step":
        """The same with numbers that FP8 has."""
        self.q = self.q.to(torch.float8_e4m3fn).to(torch.bfloat16)
        for of in (self.k, self.v):
            of[:] = [x.to(torch.float8_e4m3fn).to(torch.bfloat16) for x in of]
        return self


MIXED = [1, 5, 20, 1], [33, 5, 47, 1]  # decodes, a chunk, a prompt
CASES = {
    "causal": ({}, {"causal": True}),
    "window": ({"window": 8}, {"window_size": (7, 0)}),
    "softcap": ({"softcap": 1.5}, {"causal": True, "softcap": 1.5}),
    "sinks": ({"sinks": True}, {"causal": True, "s_aux": torch.arange(HEADS).float().numpy()}),
}


def sinks_of(case: dict) -> torch.Tensor | None:
    return torch.arange(HEADS).to(torch.bfloat16) if case.get("sinks") else None


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return ((found.float() - exact).abs().max() / exact.abs().max()).item()
