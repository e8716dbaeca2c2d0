"""The run-time type checker of the tests: beartype, for which a whole number is a good float, as for type checkers.

Of each function the first calls in each test are checked: further ones are those of a loop, which look alike, and their
checks took a third of the suite's time.
"""

import functools
from collections import Counter
from collections.abc import Callable

from beartype import BeartypeConf, beartype

CALLS = 50
calls: Counter[Callable] = Counter()
"""Of each function so far; cleared before each test."""


def check(function: Callable) -> Callable:
    checked = beartype(conf=BeartypeConf(is_pep484_tower=True))(function)

    @functools.wraps(function)
    def first_calls(*args, **kwargs):
        if calls[function] < CALLS:
            calls[function] += 1
            return checked(*args, **kwargs)

    return first_calls
