"""What a forked child does first, where there is fork: not on Windows."""

import os
from collections.abc import Callable


def after_fork_in_child(function: Callable[[], object]) -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
