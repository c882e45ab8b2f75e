"""Loggers whose level follows NATTEN_LOG_LEVEL."""

import logging
import os

_LEVELS = ("debug", "info", "warning", "error", "critical")


def get_logger(name: str) -> logging.Logger:
    logger = logging.getLogger(name)
    level = os.environ.get("NATTEN_LOG_LEVEL", "").lower()
    if level in _LEVELS:
        logger.setLevel(level.upper())
    return logger
