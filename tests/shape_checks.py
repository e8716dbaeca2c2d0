"""The run-time type checker of the tests: beartype, for which a whole number is a good float, as for type checkers."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
