"""How times are taken: a part of every key, since times taken in another way must not be compared."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MeasurementPolicy:
    """Warm clocks, cold L2, rounds over all candidates in turn, medians; every launch inside a CUDA graph.

    Counts are fixed, never derived from times: ranks that tune together do the same number of everything.
    """

    warm_ms: int = 200
    calls: int = 10
    rounds: int = 15
    cold_l2: bool = True
    cuda_graph: bool = True


POLICY = MeasurementPolicy()

MARGIN = 0.03
"""How much faster than the analytic default a configuration must be to replace it: less is noise."""
