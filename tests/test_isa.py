"""Every instruction set that this CPU has runs the representative tests, on one thread and on two."""

import ast
from pathlib import Path

import pytest
from oracle import python, run_script

import fastattn

CONFIG = fastattn.show_config(mode="dicts")


def test_isas_are_listed_best_first():
    assert len(set(CONFIG["isas"])) == len(CONFIG["isas"])
    assert CONFIG["isas"][-1] == "baseline"
    assert CONFIG["isa"] in CONFIG["isas"]


def test_the_first_is_chosen():
    source = "import fastattn; print(fastattn.show_config(mode='dicts')['isa'])"
    assert run_script(source, FASTATTN_ISA="").strip() == CONFIG["isas"][0]


# The instruction set in use has all cases in the run that this is part of, the others up to forty of each test. On
# one thread a few do, of two sets: that results are the same for any number of threads is what some of these tests are
# about, and what threads share is compiled once for all sets.
RUNS = [(isa, 2) for isa in CONFIG["isas"] if isa != CONFIG["isa"]]
RUNS += [(isa, 1) for isa in dict.fromkeys([CONFIG["isa"], CONFIG["isas"][-1]])]

# The kernel of the tile unit runs, with the unit emulated, wherever there is AVX512-BF16.
EMULATED = ["amx-emulated"] if "avx512bf16" in CONFIG["isas"] else []
RUNS += [(isa, 2) for isa in EMULATED]
# Of one with a tile unit, once more with float32 and float16 split whatever their shape.
SPLITTING = [isa for isa in [*CONFIG["isas"], *EMULATED] if isa.startswith("amx")][:1]
RUNS = [(isa, threads, "1") for isa, threads in RUNS] + [(isa, 2, "always") for isa in SPLITTING]


HERE = Path(__file__).parent
# Files without one are not even looked into: some import several frameworks, which takes longer than many tests.
FILES = sorted(str(path) for path in HERE.glob("test_*.py") if "mark.isa" in path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(("isa", "threads", "split"), RUNS)
def test_representative_tests(isa, threads, split):
    done = python(
        *("-m", "pytest", "-q", "-x", "-m", "isa", "-p", "no:cacheprovider", "-c", str(HERE.parent / "pyproject.toml")),
        *("--hypothesis-profile", "each-isa", *(["--quick"] if threads == 1 else ["--cases=40"]), *FILES),
        FASTATTN_ISA=isa,
        FASTATTN_NUM_THREADS=str(threads),
        FASTATTN_SPLIT=split,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("isa", [*CONFIG["isas"], *EMULATED])
def test_the_environment_chooses(isa):
    source = "import fastattn; print(fastattn.show_config(mode='dicts')['isa'])"
    assert run_script(source, FASTATTN_ISA=isa).strip() == isa


def test_it_is_told_why_a_faster_isa_is_not_used():
    source = "import fastattn; print(*fastattn.show_config(mode='dicts')['unused'].items(), sep='\\n')"
    reasons = dict(map(ast.literal_eval, run_script(source, FASTATTN_ISA="baseline").splitlines()))
    for isa in CONFIG["isas"][:-1]:
        assert "FASTATTN_ISA" in reasons[isa]
    for isa in set(reasons) - set(CONFIG["isas"]) - {"any"}:
        assert "lacks" in reasons[isa]
    assert CONFIG["isas"][0] not in fastattn.show_config(mode="dicts")["unused"] or CONFIG["isa"] != CONFIG["isas"][0]


@pytest.mark.skipif(not EMULATED, reason="needs AVX512-BF16")
def test_one_that_is_for_tests_has_none_that_is_faster():
    source = "import fastattn; print(fastattn.show_config(mode='dicts')['unused'])"
    assert run_script(source, FASTATTN_ISA=EMULATED[0]).strip() == "{}"


@pytest.mark.parametrize(
    "isa",
    # Unknown ones, and that of another architecture.
    [
        "pentium",
        CONFIG["isas"][-1].upper(),
        ",".join([*CONFIG["isas"], ""]),
        "avx2" if "neon" in CONFIG["isas"] else "neon",
    ],
)
def test_an_unknown_or_unsupported_isa_is_refused(isa):
    done = python("-c", "import fastattn", FASTATTN_ISA=isa)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "RuntimeError" in last
    assert "FASTATTN_ISA" in last
    assert isa in last
    assert not [name for name in CONFIG["isas"] if name not in last]


DIGESTS = """
import hashlib
import ml_dtypes, numpy as np, fastattn
dtype = np.dtype({dtype!r})
rng = np.random.default_rng(0)
for seqlen_q, seqlen_k, dim, keywords in [
    (100, 333, 64, dict()), (70, 200, 128, dict(causal=True)), (40, 130, 96, dict(window=(60, 3))),
    (33, 70, 20, dict(softcap=2.0)), (40, 300, 256, dict(alibi_slopes=np.array([1.0, 0.1]))),
    (50, 64, 64, dict(scale=30.0)), (50, 700, 64, dict(scale=2.0**80)),
    (3, 333, 64, dict()), (8, 1300, 128, dict(causal=True)), (5, 70, 20, dict(window=(60, 3))),
    (4, 270, 80, dict(softcap=2.0)), (7, 600, 256, dict(alibi_slopes=np.array([1.0, 0.1]))),
]:
    query = rng.standard_normal((2, seqlen_q, dim)).astype(dtype)
    key, value = rng.standard_normal((2, 1, seqlen_k, dim)).astype(dtype)
    for x in fastattn.attention(query, key, value, return_lse=True, **keywords):
        print(hashlib.sha256(x.tobytes()).hexdigest())
"""


INT8_DIGESTS = """
import hashlib
import ml_dtypes, numpy as np, fastattn
rng = np.random.default_rng(0)
cache = fastattn.KVCache(2, 64, dtype=np.int8, num_pages=9)
ids = [cache.add(*rng.standard_normal((2, 2, length, 64))) for length in (1, 77, 1300)]
query = rng.standard_normal((3, 16, 2, 64)).astype("bfloat16")
for x in cache.attention(query, ids, return_lse=True):
    print(hashlib.sha256(x.tobytes()).hexdigest())
"""


@pytest.mark.skipif("amx" not in CONFIG["isas"], reason="needs the tile unit that is emulated")
def test_the_emulated_tile_unit_decodes_int8_to_the_bits_of_the_real_one():
    real, emulated = (run_script(INT8_DIGESTS, FASTATTN_ISA=isa) for isa in ("amx", "amx-emulated"))
    assert len(real.split()) == 2
    assert emulated == real


@pytest.mark.skipif("amx" not in CONFIG["isas"], reason="needs the tile unit that is emulated")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_the_emulated_tile_unit_gives_the_bits_of_the_real_one(dtype):
    source = DIGESTS.format(dtype=dtype)
    real, emulated = (run_script(source, FASTATTN_ISA=isa, FASTATTN_SPLIT="always") for isa in ("amx", "amx-emulated"))
    assert len(real.split()) == 24
    assert emulated == real
