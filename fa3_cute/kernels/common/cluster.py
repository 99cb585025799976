"""Thread block clusters: stores into the shared memory of the cluster's other CTAs (PTX ISA, "st.async", "mapa")."""
import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def send(values: tuple, place: cute.Tensor, arrived: cute.Pointer, peer: Int32):
    """Store 1, 2 or 4 f32 at `place`, a tensor of that size in shared memory, in CTA `peer` of the cluster.

    Asynchronous: the bytes count down the transactions of the peer's mbarrier at `arrived`. Both are this CTA's
    addresses; every CTA of a cluster has the same layout.
    """
    words = tuple(value.bitcast(Int32) for value in values)
    cute.arch.store_async_dsmem(place.iterator, words[0] if len(words) == 1 else words, arrived, peer)


def sync_cluster():
    """Wait for all threads of the cluster. Orders no memory accesses beyond what each thread has waited for."""
    cute.arch.cluster_arrive_relaxed()
    cute.arch.cluster_wait()
