"""The command line: ``python -m fastattn info``, ``bench`` and ``explain``."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import io
import json
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import fastattn
from fastattn import AttentionView, bench, explain
from fastattn._files import atomic_write


def print_info(arguments: argparse.Namespace) -> None:
    """Print the configuration, and what this machine can do at most."""
    fastattn.show_config()
    threads = arguments.threads or fastattn.get_num_threads()
    print(f"\nat {threads} thread{'s' if threads > 1 else ''}:")
    for name in bench.FLOATS:
        peak = fastattn.measure_peak(name, num_threads=threads)
        print(f"  {name + ' peak':<16} {peak / 1e9:7.1f} GFLOP/s")
    bandwidth = fastattn.measure_bandwidth(1 << 28, num_threads=threads)
    print(f"  {'read bandwidth':<16} {bandwidth / 1e9:7.1f} GB/s")


def print_bench(arguments: argparse.Namespace) -> None:
    """Run the benchmark and print its tables or its JSON."""
    if arguments.plot is not None and not importlib.util.find_spec("matplotlib"):
        refuse("--plot needs the package matplotlib: pip install matplotlib")
    run = bench.run(
        bench.find_cases(arguments.shapes),
        arguments.dtypes,
        arguments.peers,
        arguments.threads or fastattn.get_num_threads(),
        arguments.seconds,
    )
    as_json = json.dumps(run.as_dict(), indent=1)
    print(as_json if arguments.json == "-" else bench.report(run))
    if arguments.json not in (None, "-"):
        write(arguments.json, f"{as_json}\n".encode())
    if arguments.plot is not None:
        write(arguments.plot, bench.draw_image(run, Path(arguments.plot).suffix[1:]))


def write(path: str, content: bytes) -> None:
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as complaint:
        refuse(str(complaint))


def print_explanation(arguments: argparse.Namespace) -> None:
    """Print what a word of a sentence attends to, and write the page."""
    sentence = read_sentence(arguments)
    if arguments.compare is not None and not arguments.compare.strip():
        refuse("--compare is empty")
    if arguments.compare and arguments.json:
        refuse("--compare and --json cannot be given together")
    views = [look_at(text) for text in (sentence, arguments.compare) if text]
    asked = {"word": arguments.word, "layer": arguments.layer, "head": arguments.head}
    chosen = {name: value for name, value in asked.items() if value is not None}
    shown = {"all_heads": arguments.all_heads, "rollout": arguments.rollout}
    try:
        if arguments.json:
            text = json.dumps(explain.as_dict(views[0], **shown, **chosen), indent=1)
        else:
            text = explain.report(views[0], other=views[1] if arguments.compare else None, **shown, **chosen)
        if arguments.html is not None:
            views[0].save(arguments.html, title=textwrap.shorten(sentence, 100, placeholder=" …"), **chosen)
    except (ValueError, OSError) as complaint:
        refuse(str(complaint))
    print(text)
    if arguments.html is not None:
        print(f"\nwrote {arguments.html}", file=sys.stderr if arguments.json else sys.stdout)


def look_at(sentence: str) -> AttentionView:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            view = explain.view_sentence(sentence, progress=layer_progress())
        except ImportError as missing:
            refuse(f"explain needs the package {missing.name}; install all that it needs by\n    {explain.INSTALL}")
    for warning in told:
        print(warning.message, file=sys.stderr)
    return view


def read_sentence(arguments: argparse.Namespace) -> str:
    """Return the sentence, from the command line, a file or standard input, on one line."""
    if arguments.sentence is not None and arguments.file is not None:
        refuse("SENTENCE and --file cannot be given together")
    if arguments.sentence is None and arguments.file is None:
        refuse("SENTENCE is missing; it can also be read from a file, by --file")
    text = arguments.sentence
    if arguments.file is not None:
        try:
            raw = sys.stdin.buffer.read() if arguments.file == "-" else Path(arguments.file).read_bytes()
        except OSError as complaint:
            refuse(str(complaint))
        text = raw.decode("utf-8", "replace")
    sentence = " ".join(text.split())
    if not sentence:
        refuse("SENTENCE is empty" if arguments.file is None else f"--file {arguments.file} is empty")
    return sentence


def layer_progress() -> explain.Progress | None:
    """Return what tells of each layer, if somebody looks."""
    if not sys.stderr.isatty():
        return None

    def tell(done: int, layers: int) -> None:
        print(f"\rlayer {done} of {layers}", end="\r\033[K" if done == layers else "", file=sys.stderr, flush=True)

    return tell


def refuse(message: str) -> NoReturn:
    """Leave with the status of wrong usage."""
    print(message, file=sys.stderr)
    sys.exit(2)


def shape_word(word: str) -> str:
    try:
        bench.find_cases([word])
    except ValueError as complaint:
        raise argparse.ArgumentTypeError(str(complaint)) from None
    return word


def names_from(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated names, "all" and "none"."""
    known = list(known)

    def names(words: str) -> list[str]:
        chosen = {"all": known, "none": []}.get(words, words.split(","))
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"got {word!r}; known are {', '.join(known)}, all and none")
        return chosen

    return names


def head_word(word: str) -> int | str:
    if word == "mean":
        return word
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"got {word!r}; it takes a whole number from 0 up, or mean")
    return int(word)


def positive_int(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"got {word!r}; it takes a whole number from 1 up")
    return int(word)


def positive_float(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {word!r}; it takes a number greater than 0")
    return number


def plot_file(word: str) -> str:
    if Path(word).suffix[1:] not in bench.FORMATS:
        raise argparse.ArgumentTypeError(f"got {word!r}; its name ends in .{', .'.join(bench.FORMATS)}")
    return word


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program_name(), description="Exact attention for NumPy on the CPU.")
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    parser.set_defaults(call=lambda arguments: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND")

    info = commands.add_parser("info", help="print the configuration, the peak and the read bandwidth")
    info.set_defaults(call=print_info)

    timing = commands.add_parser(
        "bench",
        help="time attention against the limit of this machine and against other libraries",
        description="Time attention against the limit of this machine (its products, softmax and reading, measured "
        "alone; docs/speed.md) and, in alternation, against other libraries. "
        "A ratio is the other's time over fastattn's: 2.00 means fastattn is twice as fast.",
    )
    timing.set_defaults(call=print_bench)
    timing.add_argument(
        "--shapes",
        nargs="+",
        type=shape_word,
        default=["forward", "decode"],
        metavar="SHAPE",
        help=f"groups ({', '.join(bench.GROUPS)}), names ({', '.join(bench.CASES)}) "
        "or B,H,Hkv,Sq,Sk,D[,causal][,backward|,both]; default: forward decode",
    )
    timing.add_argument(
        "--dtypes",
        type=names_from(bench.DTYPES),
        default=list(bench.DTYPES),
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(bench.DTYPES)}; default: all",
    )
    timing.add_argument(
        "--peers",
        type=names_from(bench.PEERS),
        default=list(bench.PEERS),
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(bench.PEERS)}; or none; default: all that are installed",
    )
    timing.add_argument(
        "--seconds",
        type=positive_float,
        default=1.0,
        metavar="N",
        help="for each baseline on each case; default: 1",
    )
    timing.add_argument("--json", metavar="FILE", help="write the figures there too; - prints them instead of tables")
    timing.add_argument(
        "--plot",
        type=plot_file,
        metavar="FILE",
        help=f"draw a roofline, and fastattn beside the others, as {', '.join(bench.FORMATS)}; needs matplotlib",
    )

    looking = commands.add_parser(
        "explain",
        help="show what a real trained model attends to in a sentence",
        description="Show what a word of a sentence attends to in all-MiniLM-L6-v2, a BERT of 6 layers of 12 heads. "
        "Without --head it is the head that is most certain of another word. "
        f"The model: {explain.INSTALL}",
    )
    looking.set_defaults(call=print_explanation)
    looking.add_argument("sentence", nargs="?", metavar="SENTENCE", help="in English, for the model knows no other")
    looking.add_argument("--file", metavar="FILE", help="read the sentence from a file; - is standard input")
    looking.add_argument(
        "--word", metavar="WORD", help="the first of its name; default: the word of which a head is most certain"
    )
    looking.add_argument("--layer", type=int, metavar="N", help="from 0; default: any")
    looking.add_argument(
        "--head", type=head_word, metavar="N", help="from 0, with --layer; or mean; default: the most certain"
    )
    looking.add_argument(
        "--all-heads", action="store_true", help="list the words that any head gives the word, with the heads that do"
    )
    looking.add_argument("--rollout", action="store_true", help="follow attention through all layers, too")
    looking.add_argument("--compare", metavar="SENTENCE", help="tell what the same head does in another sentence, too")
    looking.add_argument("--json", action="store_true", help="print JSON instead of text")
    looking.add_argument("--html", metavar="FILE", help="write all heads to a page that a browser opens")

    for command in (info, timing):
        command.add_argument("--threads", type=positive_int, metavar="N", help="default: fastattn's own default")
    return parser


def program_name() -> str:
    """Return what the user typed: the console script's name, or Python with the module's."""
    started = Path(sys.argv[0]).name
    return "python -m fastattn" if started == "__main__.py" else started


def is_broken_pipe(failure: OSError) -> bool:
    """Return whether the reader has gone away, which Windows calls an invalid argument, as it does a bad name."""
    invalid = failure.errno == errno.EINVAL and failure.filename is None
    return isinstance(failure, BrokenPipeError) or (os.name == "nt" and invalid)


def main() -> None:
    """Run the command that the command line names."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a pipe on Windows has few characters
    try:
        try:
            arguments = make_parser().parse_args()
            arguments.call(arguments)
        finally:
            print(end="", flush=True)  # here, where a reader that has gone away can be met
    except OSError as failure:
        if not is_broken_pipe(failure):
            raise
        # As a program that SIGPIPE ends. What is still in the buffer goes nowhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)


if __name__ == "__main__":
    main()
