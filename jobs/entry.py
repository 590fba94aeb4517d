"""What every entry point shares: errors become one sentence on standard error and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fusionrec.errors import FusionRecError


def run(main: Callable[[], None]) -> None:
    """Run ``main``; a user's mistake ends the process with its sentence, without a traceback."""
    try:
        main()
    except FusionRecError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
