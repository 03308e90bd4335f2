"""Seeds that follow from the run's own and from what they are for, so that no generator's state need be saved."""

from __future__ import annotations

IMAGE_ORDER, DROPOUT, INITIAL_WEIGHTS = range(3)  # purposes of a seed


def derived_seed(*numbers: int) -> int:
    """A seed for one purpose, well mixed from the numbers that name the purpose."""
    import numpy

    return int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)[0] >> 1)
