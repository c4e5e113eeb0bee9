"""The entry point ``ade``, which finds a verb and runs it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import metadata
from types import ModuleType
from typing import Any, TextIO

from ade_base.errors import UserError
from ade_base.extensions import Verb, added, extensions, load
from ade_cli.install import PROJECT, say_what_to_install

VERBS: dict[str, Verb] = {
    "fit": Verb(
        "turn a folder of images into a bundle that can be served, in one command",
        "ade_cli.fit",
        "fit",
    ),
    "recipes": Verb("list the systems that can be trained", "ade_cli.recipes", "train"),
    "train": Verb("train a model on a data set or a folder of images", "ade_cli.train", "train"),
    "evaluate": Verb(
        "measure a run or a bundle: likelihood, reconstructions, samples",
        "ade_cli.evaluate",
        "evaluate",
    ),
    "encoder": Verb(
        "make an encoder, a network whose features the gate also uses", "ade_cli.encoder", "fit"
    ),
    "export": Verb(
        "turn a run's checkpoint into a bundle that can be served", "ade_cli.export", "fit"
    ),
    "calibrate": Verb(
        "calibrate a bundle's gate on your images, without training",
        "ade_cli.calibrate",
        "calibrate",
    ),
    "sample": Verb("draw samples into a picture or an array", "ade_cli.sample"),
    "encode": Verb("write the latents of image files", "ade_cli.encode"),
    "reconstruct": Verb("encode and decode image files", "ade_cli.reconstruct"),
    "score": Verb("score image files, or a folder of any size into a table", "ade_cli.score"),
    "serve": Verb("serve a bundle over HTTP, with a web page", "ade_cli.serve", "process"),
    "publish": Verb(
        "replace the bundle of a running service, without an interruption",
        "ade_cli.publish",
        "process",
    ),
    "status": Verb("report the state of the service on this machine", "ade_cli.status", "process"),
    "doctor": Verb(
        "report what is installed, what is missing for what, and how to add it", "ade_cli.doctor"
    ),
    **added("verbs"),
}
INTERRUPTED = 130  # exit status after Ctrl-C


def parse(given: list[str]) -> argparse.Namespace:
    """Parse a command line; ``verb`` is the verb's name."""
    parser = argparse.ArgumentParser(
        prog="ade",
        description="Train, export, calibrate and serve AV-ADE image models and their gate, which "
        "accepts or rejects images.",
    )
    parser.add_argument("--version", action="version", version=f"ade {metadata.version(PROJECT)}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (line, *_) in VERBS.items():
        verb = verbs.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name in given[:1]:  # only this verb is imported: serving needs no training packages
            _module(name, given).add_arguments(verb)
            for add in (each.options.get(name) for each in extensions()):
                if add is not None:
                    load(add)(verb)
            verb.set_defaults(usage=verb.format_usage())
    return parser.parse_args(given)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    _escape_what_cannot_be_printed()
    with _messages_may_be_lost():
        try:
            args = parse(given)
        except KeyboardInterrupt:  # imports of a verb can take seconds
            print(" ".join(["ade", *given[:1]]) + ": interrupted", file=sys.stderr)
            return INTERRUPTED
        with _signals_raise(args.verb):
            return _run(args)


def _escape_what_cannot_be_printed() -> None:
    """Escape what the encoding of standard output lacks, instead of failing after the work.

    Results have names of files, which need not be UTF-8, and letters such as σ.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


class _Messages:
    """Standard error, except that what cannot be written is lost without an error."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()


@contextlib.contextmanager
def _messages_may_be_lost() -> Iterator[None]:
    """Let no progress bar or warning end long work: a log's disk may be full, its reader gone.

    If standard error is closed, it is the null device for the block and for child processes:
    ``print`` would write to standard output, and the next file that is opened would get its number.
    """
    file = sys.stderr
    if file is None:
        file = open(os.devnull, "w")
        os.set_inheritable(file.fileno(), True)
    try:
        with contextlib.redirect_stderr(_Messages(file)):
            yield
    finally:
        try:
            file.flush()
        except OSError:  # Python tries again at its end, and its exit status would be 120
            _discard(file)


@contextlib.contextmanager
def _signals_raise(verb: str) -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into :class:`SystemExit`, so that unfinished outputs are removed.

    ``ade serve`` has handlers of its own, and ``torchrun`` stops its processes at once.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if verb == "serve" or "LOCAL_RANK" in os.environ or not is_main:
        yield
        return
    signs = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        signs.append(signal.SIGHUP)

    def end(number: int, frame: object) -> None:
        for sign in signs:  # a closed terminal sends SIGHUP twice: the second must not end this
            signal.signal(sign, signal.SIG_IGN)
        sys.exit(128 + number)

    before = [signal.signal(sign, end) for sign in signs]
    try:
        yield
    finally:
        for sign, handler in zip(signs, before, strict=True):
            signal.signal(sign, handler)


def _run(args: argparse.Namespace) -> int:
    module = _module(args.verb)
    try:
        status = int(module.run(args) or 0)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where errors are handled
        return status
    except UserError as error:
        _say(args.verb, _as_typed(str(error), args.usage))
        return 2
    except KeyboardInterrupt:
        how = module.resumed(args) if hasattr(module, "resumed") else ""
        print(f"ade {args.verb}: interrupted{how}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has closed it
        _discard(sys.stdout)
        return 141
    except ModuleNotFoundError as error:  # of a package that only some of the verb's options need
        extra = module.extra(args) if hasattr(module, "extra") else VERBS[args.verb].extra
        say_what_to_install(args.verb, error, extra)
        return 2
    except MemoryError as error:
        reason = f": {error}" if str(error) else ""
        print(f"ade {args.verb}: there is not enough memory{reason}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # which few verbs import
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"ade {args.verb}: {_of_gpu_memory(args)}", file=sys.stderr)
        return 2
    except OSError as error:
        from ade_base.files import NO_ROOM  # here, because few verbs end with an error

        if error.filename is None and error.errno not in (*NO_ROOM, errno.EIO):
            raise
        if error.filename is None:  # perhaps of standard output
            _discard(sys.stdout)
        where = "" if error.filename is None else f"{error.filename}: "
        _say(args.verb, f"{where}{error.strerror}")
        return 2


def _say(verb: str, error: str) -> None:
    """Print an error; names of files in it must not control the terminal."""
    from ade_base.messages import visible  # here, because few verbs end with an error

    print(f"ade {verb}: " + "\n".join(map(visible, error.split("\n"))), file=sys.stderr)


def _discard(file: TextIO) -> None:
    """Throw away what is still to be printed, which would fail again at the end of the program."""
    with contextlib.suppress(OSError, AttributeError):  # it may be no file, or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def _of_gpu_memory(args: argparse.Namespace) -> str:
    """What to do about a GPU with too little memory."""
    options = _options(args.usage)
    remedies = {
        "--set": "a smaller batch (--set batch_size=N) and another --out",
        # A fit keeps the device that it was begun with.
        "--device": "--device cpu" + (" and another --out" if args.verb == "fit" else ""),
    }
    given = [remedy for option, remedy in remedies.items() if option in options]
    return "the GPU has too little memory" + (f": give {', or '.join(given)}" if given else "")


def _options(usage: str) -> set[str]:
    return {word.strip("[]") for word in usage.split()}


def _as_typed(message: str, usage: str) -> str:
    """Spell the option that a message begins with as the user types it.

    Libraries name their arguments: ``batch_size must be at least 1``.
    """
    name, must, rest = message.partition(" must ")
    option = "--" + name.replace("_", "-")
    return option + must + rest if must and option in _options(usage) else message


def _module(verb: str, given: Sequence[str] = ()) -> ModuleType:
    try:
        return importlib.import_module(VERBS[verb].module)
    except ModuleNotFoundError as error:
        say_what_to_install(verb, error, _extra(verb, given))
        raise SystemExit(2) from None


def _extra(verb: str, given: Sequence[str]) -> str | None:
    """The extra that a verb needs, if any; that of ``serve`` depends on the given engine."""
    if verb != "serve":
        return VERBS[verb].extra
    from handlers.launch.engines import ENGINES, default_engine

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--engine", default=default_engine())
    return ENGINES.get(parser.parse_known_args(given)[0].engine, ENGINES[default_engine()]).extra


if __name__ == "__main__":
    sys.exit(main())
