"""The capability `log`. With it, printed lines go to the host's log too."""

import sys

from wit_world.imports import log as _host


def trace(message: object) -> None:
    """Writes a line to the host's log at the level trace."""
    _host.write(_host.Level.TRACE, str(message))


def debug(message: object) -> None:
    """Writes a line to the host's log at the level debug."""
    _host.write(_host.Level.DEBUG, str(message))


def info(message: object) -> None:
    """Writes a line to the host's log at the level info."""
    _host.write(_host.Level.INFO, str(message))


def warn(message: object) -> None:
    """Writes a line to the host's log at the level warn: something may be wrong."""
    _host.write(_host.Level.WARN, str(message))


def error(message: object) -> None:
    """Writes a line to the host's log at the level error: something is wrong."""
    _host.write(_host.Level.ERROR, str(message))


class _Printed:
    """Output that collects printed text and logs it line by line."""

    def __init__(self) -> None:
        self.line = ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            info(line)
        return len(text)

    def flush(self) -> None:
        pass


sys.stdout = sys.stderr = _Printed()  # type: ignore[assignment]
