#!/bin/bash
# The library on aarch64, emulated: the parts in C, then the package under Debian's arm64 Python and NumPy's own wheel, on a
# CPU with BF16 and on one without. Needs qemu-aarch64 (Debian: qemu-user), apt-get and dpkg-deb, and no rights; what it
# fetches and builds stays in build/aarch64, so that the next run takes less. Emulation takes 20 to 50 times as long, so of
# the tests there is a part: some cases of each, of the files named below. TESTS and NO_BF16_TESTS name others.
set -euo pipefail
cd "$(dirname "$0")/.."
source=$PWD work=$PWD/build/aarch64
mkdir -p "$work"
cd "$work"

TESTS=${TESTS:-test_attention.py test_tails.py test_masks.py test_decoding.py test_backward.py test_isa.py}
NO_BF16_TESTS=${NO_BF16_TESTS:-test_attention.py}
PYTHON_PACKAGES="python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libpython3.11-dev libc6 libgcc-s1 libstdc++6
    libexpat1 zlib1g libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1"
WHEELS="numpy ml_dtypes pytest hypothesis threadpoolctl"

step() { printf '\n== %s (at %d s)\n' "$*" "$SECONDS"; }

# Lists and packages of another architecture, in a folder of their own: the system's are left alone.
apt() {
    apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o "Dir::State::Lists=$work/lists" \
        -o Dir::State::status=/dev/null -o "Dir::Cache=$work/cache" -o APT::Sandbox::User= -o "Debug::NoLocking=1" "$@"
}

step 'compiler'
if [[ ! -x venv/bin/python ]]; then
    python3 -m venv venv
    venv/bin/pip install -q --disable-pip-version-check ziglang 'setuptools>=77' 'cython>=3.1' 'numpy>=2'
fi
zig="$work/venv/bin/python -m ziglang cc"
export _PYTHON_HOST_PLATFORM=linux-aarch64

step 'parts in C'
# Without those of the pool, which fork while other threads run: qemu's emulated child does not survive that.
make -s -C "$source" check-c CC="$zig -target aarch64-linux-musl" RUN='qemu-aarch64 -cpu max' OUT="$work/c" FASTATTN_WERROR=1 \
    PROGRAMS="schedule_test plan_test $(python3 "$source/csrc/flags.py" make |
        sed -n 's/^KERNELS = //p' | sed 's/[^ ]*/kernel_&/g')"

step 'Python, NumPy'
if [[ ! -d root ]]; then
    mkdir -p lists/partial cache/archives/partial debs root.new dev
    apt update > /dev/null
    # shellcheck disable=SC2086
    (cd debs && apt download $PYTHON_PACKAGES > /dev/null)
    for deb in debs/*.deb; do
        [[ $deb == debs/libpython3.11-dev* ]] && to=dev || to=root.new
        dpkg-deb -x "$deb" $to
    done
    # shellcheck disable=SC2086
    venv/bin/pip install -q --disable-pip-version-check --target root.new/site --only-binary=:all: --python-version 3.11 \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 $WHEELS
    mv root.new root
fi

step 'the package'
# The headers of libpython3.11-dev, for Debian's Python.h includes those of the machine.
(cd "$source" && CC="$zig -target aarch64-linux-gnu.2.17" LDSHARED="$zig -target aarch64-linux-gnu.2.17 -shared" \
    CFLAGS="-I$work/dev/usr/include" LDFLAGS= "$work/venv/bin/python" setup.py -q build --build-base "$work/package")
package=$(echo "$work"/package/lib.*)

# Programs start Python by sys.executable, and the system cannot run it: it is a script that emulates.
cat > python.sh <<END
#!/bin/sh
export LD_LIBRARY_PATH= PYTHONPATH="\${PYTHONPATH:+\$PYTHONPATH:}$package:$work/root/site:$work/start"
exec qemu-aarch64 -cpu "\${EMULATED_CPU:-max}" -L "$work/root" "$work/root/usr/bin/python3.11" "\$@"
END
chmod +x python.sh
mkdir -p start
echo "import sys; sys.executable = '$work/python.sh'" > start/sitecustomize.py

rm -rf run && mkdir run && cp -r "$source"/{tests,pyproject.toml} run && cd run/tests
for cpu in max:neonbf16 cortex-a72:neon; do
    export EMULATED_CPU=${cpu%:*}
    step "tests, on ${cpu#*:}"
    "$work/python.sh" -c "import fastattn
fastattn.show_config()
assert fastattn.show_config(mode='dicts')['isa'] == '${cpu#*:}'"
    # shellcheck disable=SC2046
    "$work/python.sh" -m pytest -q -c ../pyproject.toml -p no:cacheprovider -o addopts=--import-mode=importlib --quick \
        --hypothesis-profile quick $([[ $EMULATED_CPU == max ]] && echo $TESTS || echo $NO_BF16_TESTS)
done
step 'done'
