"""Lets threadpoolctl, where it is installed, see and limit this library's threads."""

import contextlib

from fastattn import _core

with contextlib.suppress(ImportError):
    import threadpoolctl

    class FastattnController(threadpoolctl.LibController):  # type: ignore[misc]
        """The pool of `fastattn._core`."""

        user_api = "fastattn"
        internal_api = "fastattn"
        filename_prefixes = ("_core.",)
        check_symbols = ("fa_get_num_threads", "fa_set_num_threads")

        def get_num_threads(self) -> int:
            return _core.get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            _core.set_num_threads(num_threads)

        def get_version(self) -> None:
            return None

    threadpoolctl.register(FastattnController)
