"""The program `bhpeft`, also `python -m bhpeft_pyro`; this module imports nothing that is slow."""

import io
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the program; Ctrl-C ends it at any moment with one line and exit code 130."""
    interrupted = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack letters of the texts
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from .cli.app import app

        app(prog_name="bhpeft")
    except BaseException:
        # An import that is interrupted may end in any other error.
        if not interrupted:
            raise
        sys.stderr.write("interrupted; every saved posterior is whole\n")
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to do but to exit


if __name__ == "__main__":
    main()
