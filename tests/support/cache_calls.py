"""Good calls whose keys lie in a cache: in pages, in rows of a dense one, with packed queries or without."""

from dataclasses import replace

from rule_calls import DENSE, PACKED, A

# A pool of 100 pages of 16 rows, 40 pages for a sequence at most.
PAGES = {"page_table": A, "page_size": 16, "num_pages": 100, "seqlen_k": 640, "seqused_k": A + 4}
PAGED = replace(DENSE, **PAGES)
PACKED_CACHE = replace(PACKED, cu_seqlens_k=None, total_k=0, seqlen_k=640, seqused_k=A + 4)
PACKED_PAGED = replace(PACKED_CACHE, **PAGES)
CACHES = PAGED, PACKED_CACHE, PACKED_PAGED
