"""What a person is told when something they gave cannot be used: one line, exit status 2, no traceback."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake that the person at the keyboard can mend. The message says what, where, and what to do."""


def one_line(message: object) -> str:
    """Fold a message onto a single line."""
    return " ".join(str(message).split())


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, and whose help shows the docstring as it is written."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with status 2."""
        self.exit(2, f"error: {one_line(message)}; see `{self.prog} --help`\n")


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn errors that are the user's to mend, the disk's, or a diverged model's, into one line on stderr and exit status 2.

    An interrupt from the keyboard ends with status 130, as shells expect.
    """
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # what Lightning makes of one ends with status 1
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        raise
    except (UserError, FloatingPointError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
        print(f"error: {one_line(what)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
