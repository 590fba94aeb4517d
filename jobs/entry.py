"""What every entry point shares: errors become one sentence on standard error and exit status 2."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from fusionrec.errors import ConfigError, FusionRecError

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


def check_port(host: str, port: int) -> None:
    """Say now, not after minutes, that the endpoint could not listen there.

    Raises:
        ConfigError: the port cannot be bound.
    """
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"setting port = {port} cannot be used on {host} ({error}): stop what listens there, "
            "or choose another with --port"
        ) from error
