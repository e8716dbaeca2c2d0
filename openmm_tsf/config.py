"""Reading and writing configuration files.

Everything that a file says is checked before anything runs: an unknown key, a wrong type or a value out of range is a
`ConfigError` that names the key, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .architecture import cannot_explore
from .files import write_text
from .settings import Config


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line."""


def load_config(path: str | os.PathLike) -> Config:
    """Read a configuration; relative file names in it are taken from its own folder.

    Raises:
        ConfigError: not TOML, an unknown key, a wrong type, a value out of range.
        OSError: the file cannot be read.

    Warns:
        UserWarning: the usual share of exploring draws is not possible with this kind of flow.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    try:
        config = _absolute(parse_config(table), path.resolve().parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if config.model == "flow" and "explore" not in table.get("sample", {}) and not config.flow.explores:
        warnings.warn(f"{path}: sample.explore is 0 and not a tenth: {cannot_explore(config.flow)}", stacklevel=2)
    return config


def parse_config(table: dict[str, Any]) -> Config:
    """A Config from the nested dict of a TOML file.

    Raises:
        ConfigError: see `load_config`.
    """
    return read_table(Config, table, "")


def dump_config(config: Config) -> str:
    """TOML text with every key that has a value, defaults included; `parse_config` gives the same Config back."""
    import tomli_w

    head = "# Resolved configuration, defaults included. A key that is not here is left to the program.\n\n"
    return head + tomli_w.dumps(_plain(relevant(config)))


def relevant(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts, without the tables of a model that it has not."""
    tables = dataclasses.asdict(config)
    others = ("flow", "train") if config.model == "edg" else ("edg",)
    return {name: table for name, table in tables.items() if name not in others}


def save_config(config: Config, path: str | os.PathLike) -> None:
    """Write `dump_config` to a file, whole or not at all."""
    write_text(path, dump_config(config))


def flat(config: Config) -> dict[str, Any]:
    """Every key with its dotted name, as in {"seed": 1, "simulate.temperature": 600.0}."""
    return dict(_flat(dataclasses.asdict(config), ""))


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configurations differ, with (old, new) values."""
    before, after = flat(old), flat(new)
    pairs = {key: (before.get(key), after.get(key)) for key in {**before, **after}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _plain(value: Any) -> Any:
    """Without None, which TOML cannot say, and with lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def _absolute(config: Config, folder: Path) -> Config:
    def at(name: str | None) -> str | None:
        return None if name is None else str(folder / Path(name).expanduser())

    molecule = config.molecule
    xmls = tuple(at(name) if (folder / Path(name).expanduser()).exists() else name for name in molecule.force_field)
    return replace(
        config,
        molecule=replace(
            molecule, structure=at(molecule.structure), parameters=at(molecule.parameters), force_field=xmls
        ),
        simulate=replace(config.simulate, trajectory=at(config.simulate.trajectory)),
    )


def read_table(cls: type, table: Any, where: str) -> Any:
    """A dataclass from a TOML table, every key checked; `where` is the dotted name of the table."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where} = {table!r} must be a table: [{where}]")
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    prefix = f"{where}." if where else ""
    for key in table:
        if key not in known:
            raise ConfigError(_unknown(prefix, key, list(known)))
    hints = get_type_hints(cls)
    values = {key: _value(hints[key], value, prefix + key) for key, value in table.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        message = re.sub(r"^\w+ setting ", "", str(error))  # the table says whose setting it is
        raise ConfigError(f"[{where}] {message}" if where else message) from error


def _unknown(prefix: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"unknown key {prefix}{key}; {hint}"


def _value(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint` wants it, or a ConfigError that names the key."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    wanted = [option for option in options if option is not type(None)]
    for option in wanted:
        if dataclasses.is_dataclass(option):
            return read_table(option, value, key)
        fitted = _fit(option, value, key)
        if fitted is not None:
            return fitted
    raise ConfigError(f"{key} = {value!r} must be {' or '.join(_describe(option) for option in wanted)}")


def _fit(hint: Any, value: Any, key: str) -> Any:
    """The value in the type wanted, None where it does not fit."""
    if get_origin(hint) is Literal:
        return value if value in get_args(hint) else None
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return (
            tuple(_value(inner, entry, f"{key}[{i}]") for i, entry in enumerate(value))
            if isinstance(value, list)
            else None
        )
    if get_origin(hint) is dict:
        inner = get_args(hint)[1]
        return {k: _value(inner, v, f"{key}.{k}") for k, v in value.items()} if isinstance(value, dict) else None
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if number else None
    return value if type(value) is hint else None


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(f'"{name}"' for name in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list, each {_describe(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"a table, each {_describe(get_args(hint)[1])}"
    return {float: "a finite number", int: "a whole number", bool: "true or false", str: "a text"}[hint]
