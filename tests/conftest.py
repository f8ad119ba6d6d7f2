import os
import random
import shutil
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

# How many cases of a test --quick leaves: as many as catch most.
QUICK_CASES = 6


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, help="at most so many cases of each test, also with --quick")
    parser.addoption("--quick", action="store_true", help="some cases of each test, and none that takes seconds")


def pytest_collection_modifyitems(config, items):
    """With --cases or --quick, leave a sample of each test's cases, another one for each instruction set."""
    quick = config.getoption("quick")
    most = config.getoption("cases") or (QUICK_CASES if quick else None)
    if most is None:
        return
    cases = {}
    for item in items:
        if not (quick and item.get_closest_marker("slow")):
            cases.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    chosen = set()
    for (path, name), each in cases.items():
        draw = random.Random(f"{path.name} {name} {os.environ.get('FASTATTN_ISA')}")
        chosen.update(draw.sample(each, min(most, len(each))))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Say of whatever fails what it was about: shapes, dtypes, keywords, and the instruction set."""
    report = yield
    if call.excinfo is not None and report.failed:
        for entry in call.excinfo.traceback:
            if Path(entry.path).name.startswith(("test_", "oracle")):
                report.sections.append((f"in {entry.name}", described(entry.frame.f_locals)))
    return report


@pytest.fixture(scope="module")
def browser():
    """A Chromium that playwright drives."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        system = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            launched = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except sync_api.Error as failure:
            pytest.skip(f"no browser: {failure}")
        yield launched
        launched.close()
