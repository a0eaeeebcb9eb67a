"""What the command lines of these programs have in common."""

import argparse

from util.cli.argparser import Parser
from util.errors import UsageError


def new_parser(prog: str, docstring: str, force: bool = False, processes: bool = False) -> Parser:
    """A parser whose help is the program's docstring, with --force and --processes where they are wanted."""
    parser = Parser(
        prog=f"applications.prepare.{prog}", description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if force:
        parser.add_argument("--force", action="store_true", help="start over, and replace a set that is there already")
    if processes:
        parser.add_argument("--processes", type=int, metavar="N", help="that share the work (one a core)")
    return parser


def parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    flags = parser.parse_args(arguments)
    processes = getattr(flags, "processes", None)
    if processes is not None and not 0 <= processes <= 256:
        raise UsageError(f"--processes {processes}: must lie between 0 (this one alone) and 256")
    return flags
