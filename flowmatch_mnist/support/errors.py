"""Reporting mistakes that the user can fix: one line on stderr, exit status 2, no traceback."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OUT_OF_MEMORY = re.compile("^OutOfMemoryError|[Oo]ut of memory|can't allocate memory|not enough memory")
"""Matches PyTorch's errors for lack of memory on a GPU, on an Apple GPU and on a CPU."""


class UserError(Exception):
    """A mistake that the user can fix. The message says what is wrong, where, and what to do."""


def one_line(message: object) -> str:
    """Return a message on a single line."""
    return " ".join(str(message).split())


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn mistakes of the user, disk errors, lack of memory and a diverged model into one line on stderr and exit status 2.

    An interrupt from the keyboard exits with status 130, as shells expect.
    """
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # Lightning turns it into an exit with status 1
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
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(f"{type(error).__name__} {error}"):
            raise
        print("error: there is not enough memory; use a smaller batch, or fewer samples", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
