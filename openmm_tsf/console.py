"""What the command line shows: progress, tables, and errors in one line."""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

LINE_EVERY_SECONDS = 20.0
"""How often a stage says something where there is no terminal to draw a bar on."""
INTERRUPTED = 130
"""Exit code of Ctrl-C, as shells have it: 128 + SIGINT."""


def say(text: str) -> None:
    """One line on stderr, where everything goes that is not the result itself."""
    typer.echo(text, err=True)


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks; the file first where the operating system refused one."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    known = ValueError | OSError | ImportError | RuntimeError | MemoryError
    expected = isinstance(error, known) or type(error).__name__ == "OpenMMException"
    return text if expected else f"{type(error).__name__}: {text} (a defect of openmm-tsf; --debug shows where)"


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line on stderr and exit code 1, or 130 for Ctrl-C; --debug lets tracebacks out."""

    @functools.wraps(command)
    def wrapped(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            with _plain_warnings(debug):
                command(*args, debug=debug, **kwargs)
        except KeyboardInterrupt:
            say("interrupted; what is on disk stays, and the same command goes on from there")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of stdout is gone (as in `| head`); flushing at exit must not complain about it again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            if debug or type(error).__module__.split(".")[0] in ("typer", "click"):
                raise
            say(f"error: {one_line(error)}")
            raise typer.Exit(1) from None

    return wrapped


@contextmanager
def _plain_warnings(debug: bool) -> Iterator[None]:
    """Warnings meant for users as one line each; all the others, for programmers, only with --debug."""
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {' '.join(str(message).split())}")
        yield


class Bar:
    """The progress of one stage: a bar on a terminal, a line now and then elsewhere; bar(done, total, message).

    Args:
        label: what is going on.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._bar: Any = None
        self._last = self._begin = time.monotonic()

    def __enter__(self) -> Bar:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description:<8}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=14),
                TextColumn("{task.percentage:>3.0f} %", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
                # On a narrow terminal the message gives way, not the time.
                TextColumn("{task.fields[message]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            )
            self._bar = Progress(*columns, console=console, expand=True)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=None, message="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, message: str = "") -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, message=message)
        elif now - self._last > LINE_EVERY_SECONDS:
            self._last = now
            share = 100 * done / max(total, 1)
            say(f"{self.label}: {done} of {total} ({share:.0f} %), {now - self._begin:.0f} s  {message}")


def table(title: str, rows: Mapping[str, str]) -> None:
    """A title, then names and values in two columns, on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    typer.echo(title)  # a line of its own: a long path in a title of the table would be broken
    made = Table(show_header=False)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(Text(name), Text(value))
    Console().print(made)
