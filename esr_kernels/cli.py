"""The command line `esr-kernels`.

Exit status: 0 done, 1 something failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = ("demo", "upscale", "verify", "bench", "info")
PROGRAM = "esr-kernels"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


def _parser(commands: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Fused kernels for efficient super-resolution networks.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name in commands:
        # A command is imported only when it is asked for, so that a broken part does not take the others with it.
        importlib.import_module(f".commands.{name}", __package__).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (wrong usage raises SystemExit, as argparse does)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if not a.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"error: unknown command {command!r}, expected one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        return 2
    parser = _parser(COMMANDS if command is None else [command])
    args = parser.parse_args(arguments)
    if args.version:
        from . import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    from .errors import BackendError, OptimizeError

    try:
        status: int = importlib.import_module(f".commands.{args.command}", __package__).run(args)
        return status
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as `head` does
        sys.stderr.close()
        return 1
    except (ValueError, FileNotFoundError, BackendError, OptimizeError) as error:
        # A wrong argument, picture or checkpoint; anything else is a bug and keeps its traceback.
        print(f"error: {error}", file=sys.stderr)
        return 1
