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
settings.register_profile("quick", max_examples=20, derandomize=True, **common)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# How many cases of a test --quick leaves.
QUICK_CASES = 6


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="some cases of each test, and none that takes seconds")


def pytest_collection_modifyitems(config, items):
    """With --quick, leave of each test as many cases as catch most, spread evenly over those that there are."""
    if not config.getoption("quick"):
        return
    cases = {}
    for item in items:
        cases.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    kept = [
        item
        for each in cases.values()
        for item in each[:: -(-len(each) // QUICK_CASES)]
        if item.get_closest_marker("slow") is None
    ]
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Say of whatever fails what it was about: shapes, dtypes, keywords, and the instruction set."""
    report = yield
    if call.excinfo is not None and report.failed:
        for entry in call.excinfo.traceback:
            if Path(entry.path).name.startswith(("test_", "oracle")):
                report.sections.append((f"in {entry.name}", described(entry.frame.f_locals)))
    return report
