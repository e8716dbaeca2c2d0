"""openmmtools and pymbar without the banners that they log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("openmmtools", "pymbar")


@contextmanager
def quiet_import() -> Iterator[None]:
    """Import or make something of theirs inside: of their loggers, only errors come through meanwhile."""
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
