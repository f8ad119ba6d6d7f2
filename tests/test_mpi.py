"""Attention over MPI ranks: jobs of one, two and four, in which all ranks run on_ranks.py; and jobs that end."""

import doctest
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import run_script

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "mpi.md"
MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

pytest.importorskip("mpi4py")
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun")

# Of a job, in seconds: a hang is a failure, and so is nothing else.
LIMIT = 540
# More ranks than cores, as root, and no network: what Open MPI asks to be told.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_btl": "self,sm",
    "FASTATTN_NUM_THREADS": "1",
}


def run_job(ranks, *arguments):
    """Run Python on so many ranks; return its exit status and what it printed."""
    job = subprocess.Popen(
        [MPIRUN, "-n", str(ranks), sys.executable, *arguments],
        env=os.environ | ENVIRONMENT,
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = job.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGTERM)  # which mpirun hands on to the ranks
        printed, _ = job.communicate()
        pytest.fail(f"the job of {ranks} ranks has not ended after {LIMIT} s\n{printed}")
    return job.returncode, printed


# Of each test so many cases: several ranks on a core take their time. All of them by
# mpirun -n 4 python -m mpi4py -m pytest tests/on_ranks.py
CASES = 20


@needs_mpirun
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_ranks_pass(ranks, pytestconfig):
    cases = ["--quick"] if pytestconfig.getoption("quick") else ["--cases", str(CASES)]
    pytest_ = ["-m", "mpi4py", "-m", "pytest", "-q", "-x", "--color=no", "-p", "no:cacheprovider"]
    status, printed = run_job(ranks, *pytest_, *cases, str(TESTS / "on_ranks.py"))
    assert status == 0, printed
    assert printed.count(" passed") == ranks, printed


FAILS_BEFORE = """
import numpy as np, fastattn.mpi
from mpi4py import MPI
x = np.ones((4, 10, 8)) if MPI.COMM_WORLD.rank else 1 / 0
fastattn.mpi.ring_attention(MPI.COMM_WORLD, x, x, x, layout="contiguous")
"""
FAILS_IN_MESSAGES = """
import numpy as np, fastattn.mpi
from mpi4py import MPI
class Broken(MPI.Intracomm):
    def Isend(self, *arguments):
        if self.rank == 1:
            raise OSError("the cable is cut")
        return super().Isend(*arguments)
x = np.ones((4, 10, 8))
fastattn.mpi.ring_attention(Broken(MPI.COMM_WORLD.Dup()), x, x, x, layout="contiguous")
"""


@needs_mpirun
@pytest.mark.parametrize(
    ("source", "message"),
    [(FAILS_BEFORE, "ZeroDivisionError"), (FAILS_IN_MESSAGES, "OSError: the cable is cut")],
    ids=["before the call", "in the messages"],
)
def test_a_job_ends_with_a_message(source, message):
    status, printed = run_job(2, "-m", "mpi4py", "-c", source)
    assert status != 0
    assert message in printed


def test_importing_fastattn_does_not_import_mpi4py():
    assert run_script("import sys, fastattn; print('mpi4py' in sys.modules)").strip() == "False"


@needs_mpirun
@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")
@pytest.mark.parametrize("ranks", [1, 2])
def test_python_in_its_page(ranks):
    source = f"import sys; sys.path.insert(0, {str(TESTS)!r})\nfrom pathlib import Path\n"
    source += f"from test_docs import run_python_of\nrun_python_of(Path({str(PAGE)!r}))"
    status, printed = run_job(ranks, "-m", "mpi4py", "-c", source)
    assert status == 0, printed


NAMES = [
    "",
    "ring_attention",
    "ring_attention_backward",
    "ulysses_attention",
    "ulysses_attention_backward",
    "positions",
    "shard",
    "unshard",
]


@needs_mpirun
@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings(name):
    import fastattn.mpi

    of = getattr(fastattn.mpi, name) if name else fastattn.mpi
    (test,) = doctest.DocTestFinder(recurse=False).find(of, "fastattn.mpi", globs={})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
