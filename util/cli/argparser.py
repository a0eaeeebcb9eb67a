"""The command line of a small program: argparse, with the errors of the rest of the project."""

import argparse
from typing import NoReturn

from util.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviated flags, knows --debug, and raises UsageError in one line."""

    def __init__(self, **settings: object):
        formatter = settings.pop("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")
