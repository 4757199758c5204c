"""Logging of a run: stderr, and one rotating file that every worker writes to.

Library code only calls logging.getLogger(__name__). The command line configures once, and each worker again with the
same LogConfig. Only the logger "shardq" is touched: other libraries log URLs with signatures in them.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardq.errors import BadOption
from shardq.files.atomic import writing

LEVELS: Final = ("debug", "info", "warning", "error")
ROTATE_AT_BYTES: Final = 16 << 20
ROTATED_FILES: Final = 4

_LOGGER: Final = "shardq"
_STDERR_HANDLER: Final = "shardq-stderr"
_FILE_HANDLER: Final = "shardq-file"
_STDERR_FORMAT: Final = "%(levelname)s %(name)s: %(message)s"
_FILE_FORMAT: Final = "%(asctime)s %(levelname)s %(processName)s[%(process)d] %(name)s: %(message)s"
# User access tokens, authorization headers, and the signatures of signed URLs.
_SECRET: Final = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"
    r"|(?<=bearer )[^\s'\"]+"
    r"|(?<=signature=)[^&\s'\"]+"
    r"|(?<=x-amz-credential=)[^&\s'\"]+"
    r"|(?<=x-amz-security-token=)[^&\s'\"]+",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What a worker needs to log to where its caller does; picklable."""

    level: str
    log_file: Path | None  # absolute

    def apply(self) -> None:
        """Configure logging in this process; see `configure_logging`."""
        configure_logging(self.level, self.log_file)


class RedactingFormatter(logging.Formatter):
    """Replaces what looks like a token or signature, in tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted record without secrets."""
        return _SECRET.sub("<secret>", super().format(record))


def configure_logging(level: str, log_file: Path | None) -> None:
    """Send the log of shardq to stderr, and with `log_file` to that file.

    Without a file stderr gets everything from `level` on; with one the file does, and stderr only warnings and errors.
    Calling it again replaces what it did before. The file rotates at ROTATE_AT_BYTES, safely between processes
    (concurrent-log-handler). Raises BadOption for an unknown level, NotWritable for a file that cannot be opened.
    """
    if level not in LEVELS:
        raise BadOption(f"unknown log level {level!r}; choose one of {', '.join(LEVELS)}")
    number = logging.getLevelNamesMapping()[level.upper()]
    console = logging.StreamHandler()
    console.set_name(_STDERR_HANDLER)
    console.setLevel(number if log_file is None else max(number, logging.WARNING))
    console.setFormatter(RedactingFormatter(_STDERR_FORMAT))
    handlers: list[logging.Handler] = [console]
    if log_file is not None:
        handlers.append(_file_handler(log_file, number))
    logger = logging.getLogger(_LOGGER)
    for old in [h for h in logger.handlers if h.name in (_STDERR_HANDLER, _FILE_HANDLER)]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(number)


def _file_handler(path: Path, level: int) -> logging.Handler:
    from concurrent_log_handler import ConcurrentRotatingFileHandler

    with writing(path):
        handler = ConcurrentRotatingFileHandler(
            str(path.absolute()),
            maxBytes=ROTATE_AT_BYTES,
            backupCount=ROTATED_FILES,
            encoding="utf-8",
        )
        with path.open("a"):
            pass  # the handler opens late; fail here, not at the first line
    handler.set_name(_FILE_HANDLER)
    handler.setLevel(level)
    handler.setFormatter(RedactingFormatter(_FILE_FORMAT))
    return handler
