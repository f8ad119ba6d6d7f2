import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from oracle import described

from fastattn import _core

# More threads than there are CPUs would be held back; tests want them on any machine.
_core.assume_cpus(16)

# One example may allocate arrays and call the float64 reference, so time says nothing about the kernel.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("default", max_examples=200, **common)
settings.register_profile("ci", max_examples=200, derandomize=True, **common)
settings.register_profile("each-isa", max_examples=60, derandomize=True, **common)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Say of whatever fails what it was about: shapes, dtypes, keywords, and the instruction set."""
    report = yield
    if call.excinfo is not None and report.failed:
        for entry in call.excinfo.traceback:
            if Path(entry.path).name.startswith(("test_", "oracle")):
                report.sections.append((f"in {entry.name}", described(entry.frame.f_locals)))
    return report
