"""The command line `esr-kernels`.

Exit status: 0 done, 1 something failed, 2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

COMMANDS = ("demo", "upscale", "train", "verify", "bench", "challenge", "optimize", "info")
PROGRAM = "esr-kernels"


class _Terminated(BaseException):
    """The process was asked to end; unwinds as an interruption does, so that no unfinished file stays."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


def _command(name: str) -> ModuleType:
    return importlib.import_module(f".commands.{name}", __package__)


def _parser(commands: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Fused kernels for efficient super-resolution networks.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name in commands:
        # A command is imported only when it is asked for, so that a broken part does not take the others with it.
        try:
            _command(name).add_parser(subparsers)
        except ImportError as error:
            if len(commands) == 1:
                raise
            subparsers.add_parser(name, help=f"cannot run here: {error}")
    return parser


# Requests to stop. Python discards what a signal handler raises while a destructor or a weak reference's callback
# happens to run, as they do around long calls of compiled code; then `check_interruption` raises it again.
_requests: list[type[BaseException]] = []


def check_interruption() -> None:
    """Between two steps of long work: stop if that has been asked for.

    Raises:
        KeyboardInterrupt: and its like for SIGTERM.
    """
    if _requests:
        raise _requests[0]


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise an exception and are remembered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: _Terminated}
    usual = (signal.SIG_DFL, signal.default_int_handler)

    def stop(number: int, frame: object) -> NoReturn:
        kind = kinds[signal.Signals(number)]
        _requests.append(kind)
        raise kind

    def discarded(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type not in _requests:
            unraisable(lost)

    unraisable = sys.unraisablehook
    # Who ignores a signal, as nohup does, or handles it, keeps that.
    before = {n: h for n in kinds if (h := signal.getsignal(n)) in usual}
    try:
        sys.unraisablehook = discarded
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)
        _requests.clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (wrong usage raises SystemExit, as argparse does)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _stoppable():
            return _run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print("\nterminated", file=sys.stderr)
        return 143
    except BrokenPipeError:
        # The reader of a pipe has gone, as `head` does; what Python still holds for it must go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str]) -> int:
    command = next((a for a in arguments if not a.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"error: unknown command {command!r}, expected one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        return 2
    from .errors import BackendError, OptimizeError, TrainingError

    try:
        parser = _parser(COMMANDS if command is None else [command])
        args = parser.parse_args(arguments)
        if args.version:
            from . import __version__

            print(f"{PROGRAM} {__version__}")
            return 0
        if args.command is None:
            parser.print_help(sys.stderr)
            return 2
        status: int = _command(args.command).run(args)
        return status
    except BrokenPipeError:
        raise
    except ImportError as error:
        print(f"error: {command} cannot run here: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, BackendError, OptimizeError, TrainingError) as error:
        # A wrong argument, picture, checkpoint or folder; anything else is a bug and keeps its traceback.
        print(f"error: {error}", file=sys.stderr)
        return 1
