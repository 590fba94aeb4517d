"""What every entry point shares: errors become one sentence on standard error and exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from fusionrec.errors import FusionRecError

if not Path("/dev/nvidiactl").exists():
    # DeepSpeed, which transformers imports, warns when it has to find that out by itself.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


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
