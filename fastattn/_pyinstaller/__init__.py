"""What PyInstaller needs to know of fastattn; it finds this package by the wheel's entry point."""

from __future__ import annotations

import os

__all__ = ["hook_dirs"]


def hook_dirs() -> list[str]:
    """Return the folder of hook-fastattn.py."""
    return [os.path.dirname(__file__)]
