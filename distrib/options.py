"""What is typed behind ``train.py`` and ``launch``: options, settings in the forms that people write, ``--help``."""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel

from distrib import config
from distrib.config import Config, UserError
from distrib.keys import NO_SETTING, REMARKS, TRUE_OR_FALSE, describe, find_kind, nearest, refuse, show, takes

DEFAULT_CONFIG = "configs/resnet50.yaml"
SETTING = re.compile(r"\w+(\.\w+)*=.*", re.DOTALL)
# Settings with a second name, which people look for among the options.
SHORT = {"--data": ("data.root", "DIR"), "--init-from": ("model.weights", "FILE")}


class PlainParser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        message = message.replace(", key=value", "")  # which argparse counts among what is required
        raise UserError(f"{message} ({self.prog} --help shows the options)")


class Parser(PlainParser):
    """argparse, but a mistake is a UserError, and ``--optim.lr=0.5`` and ``--optim.lr 0.5`` mean ``optim.lr=0.5``.

    Sweeps write that form; the options of other trainers (``--lr 0.5``) are answered with ours.
    """

    def __init__(self, parts: Sequence[str | None] = (None,), **options: Any) -> None:
        """``parts``: those of the settings that ``--help`` shows, if any; None: all."""
        super().__init__(allow_abbrev=False, add_help=False, **options)
        self._parts = parts
        self.add_argument(
            "-h", "--help", nargs="?", const="", metavar="PART", help="show this, or one part of the settings: optim"
        )

    def parse_words(self, argv: Sequence[str]) -> argparse.Namespace:
        """Options and ``key=value`` words in any order; ``--help`` is answered here, and ends the program."""
        asked = next((k for k, word in enumerate(argv) if word.partition("=")[0] in ("-h", "--help")), None)
        if asked is not None:
            follows = argv[asked + 1] if asked + 1 < len(argv) and re.fullmatch(r"[\w.]+", argv[asked + 1]) else None
            part = argv[asked].partition("=")[2] or follows
            settings = "\n\n".join(map(settings_help, [part] if part else self._parts))
            title = "\nsettings:\n\n" if settings else ""
            print(settings if part else f"{self.format_help()}{title}{settings}")
            sys.exit(0)
        return self.parse_intermixed_args(self._without_dashes(list(argv)))

    def _without_dashes(self, argv: list[str]) -> list[str]:
        """Turns ``--key value`` and ``--key=value`` into ``key=value``; the parser's own options stay."""
        words = []
        while argv:
            word = argv.pop(0)
            flag, equals, value = word.partition("=")
            own = self._option_string_actions.get(flag) if flag not in SHORT else None
            if own is not None or not flag.startswith("-") or flag in ("-", "--"):
                words.append(word)
                if own is not None and own.nargs != 0 and not equals and argv:
                    words.append(argv.pop(0))
                continue
            follows = bool(argv) and not equals and re.match(r"-(?![\d.])", argv[0]) is None
            key = SHORT[flag][0] if flag in SHORT else flag.lstrip("-").replace("-", "_")
            kind = find_kind(key)
            given = value if equals else argv[0] if follows else None
            if kind is None:
                raise UserError(self._no_option(flag, key, given))
            if kind.part and not kind.optional:
                raise UserError(f"{flag}: {refuse(key, given)}")
            switch = kind.base is bool or kind.part is not None
            if switch and not equals and (given is None or given.lower() not in TRUE_OR_FALSE):
                words.append(f"{key}=true")
            elif given is None:
                raise UserError(f"{flag} stands without a value: {describe(key)}")
            else:
                words.append(f"{key}={value if equals else argv.pop(0)}")
        return words

    def _no_option(self, flag: str, key: str, value: str | None) -> str:
        if key in NO_SETTING:
            return f"{flag} is no option: {NO_SETTING[key]}"
        options = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.8)
        if options:
            return f"{flag} is no option; did you mean {options[0]}?"
        meant = nearest(key)
        kind = find_kind(meant) if meant else None
        if kind is not None and kind.part and kind.optional:
            return f"{flag} is no option; write {meant}=true"
        if meant is None or kind is None or kind.part:
            return f"{flag} is no option; settings are written key=value, `--help` shows them"
        remark = f" ({REMARKS[meant]})" if meant in REMARKS else ""
        return f"{flag} is no option; write {show(meant, kind.default if value is None else value)}{remark}"


def positive(text: str) -> int:
    """An option's type: a whole number of 1 or more."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def weights_parser(command: str, description: str, examples: str) -> Parser:
    """The parser of a tool that uses weights: with ``--model``, and the settings of data in its help."""
    parser = Parser(
        parts=["data"],
        prog=f"distrib {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="NAME", help="network; default: what the weights fit")
    return parser


def settings_among(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files and folders among ``words``, and the settings: ``key=value`` where there is no file of that name."""
    settings = [bool(SETTING.fullmatch(word)) and not os.path.lexists(word) for word in words]
    pairs = list(zip(words, settings, strict=True))
    return [word for word, is_one in pairs if not is_one], [word for word, is_one in pairs if is_one]


def add_configuration(parser: Parser) -> None:
    """The options and words that say what is trained."""
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="default: %(default)s")
    for flag, (key, metavar) in SHORT.items():
        parser.add_argument(flag, metavar=metavar, help=f"the same as {key}={metavar}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.epochs=100 optim.lr=0.5")


def add_settings(parser: Parser) -> None:
    """The options that every way to start a run has."""
    add_configuration(parser)
    parser.add_argument(
        "--fresh", action="store_true", help="start anew: what is in the run's folder moves to one with its time"
    )
    parser.add_argument(
        "--resume",
        type=_resume,
        default="auto",
        metavar="auto|must",
        help="auto (default): continue where there is a checkpoint; must: refuse to start without one",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")


def _resume(word: str) -> str:
    if word not in ("auto", "must"):  # other trainers take a file here
        raise argparse.ArgumentTypeError(f"takes auto or must, got {word!r}; {NO_SETTING['resume']}")
    return word


def parse_start(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The words of a way to start a run: ``parser``'s own options, and those of ``add_settings``.

    Raises:
        UserError: an option that does not exist, with the form that is wanted; options that contradict each other.
        SystemExit: ``--help`` was asked for, and given.
    """
    add_settings(parser)
    args = parser.parse_words(argv)
    if args.fresh and args.resume == "must":
        raise UserError("--fresh starts anew and --resume must continues: leave one of them out")
    return args


def start_words(args: argparse.Namespace) -> tuple[str, ...]:
    """The options of ``add_settings`` that a launcher hands on to train.py, as it takes them."""
    return (*(["--fresh"] if args.fresh else []), *(["--resume", "must"] if args.resume == "must" else []))


def parse_args(argv: Sequence[str], prog: str = "train.py") -> argparse.Namespace:
    """``train.py``'s arguments, as ``parse_start`` reads them; ``overrides`` are the ``key=value`` words."""
    return parse_start(Parser(prog=prog, description="Train a ResNet. The same command again continues the run."), argv)


def settings_help(part: str | None = None, width: int | None = None) -> str:
    """Every key with its default, what it takes and what it means; of one part, or of all.

    Raises:
        UserError: there is no such part.
    """
    names = [name for name in Config.model_fields if _part(name)]
    if part is not None and part not in names:
        near = difflib.get_close_matches(part.partition(".")[0], names, n=1)
        raise UserError(
            f"--help {part}: there is no such part; " + (f"did you mean {near[0]}?" if near else _list(names))
        )
    width = width or min(120, shutil.get_terminal_size().columns)
    said = _comments()
    lines: list[str] = []
    for name in [part] if part else [*names, ""]:
        if not name:
            lines += ["", "others:"]
        else:
            title = (find_kind(name).part.__doc__ or "").partition("\n")[0]  # type: ignore[union-attr]
            lines += ["", *textwrap.wrap(f"{name}: {title}", width)]
        for key in _keys(name):
            lines += _entry(key, said[key], width)
    return "\n".join(lines[1:])


def _entry(key: str, words: str, width: int) -> list[str]:
    kind = find_kind(key)
    assert kind is not None
    default = "null" if kind.default is None else kind.default
    head = f"  {show(key, default)}"
    text = f"{words} [{takes(key)}]"
    gap = 36
    first = f"{head:<{gap - 1}} " if len(head) < gap else f"{head}\n{' ' * gap}"
    wrapped = textwrap.wrap(text, max(30, width - gap))
    return (first + f"\n{' ' * gap}".join(wrapped)).split("\n")


def _keys(part: str) -> list[str]:
    """The keys below ``part`` that have no keys of their own; of no part, those that stand alone."""
    model = Config if not part else find_kind(part).part  # type: ignore[union-attr]
    keys: list[str] = []
    for name in model.model_fields:  # type: ignore[union-attr]
        key = f"{part}.{name}" if part else name
        inner = find_kind(key)
        assert inner is not None
        if inner.part is None:
            keys.append(key)
        elif part:
            keys += _keys(key)
    return keys


def _part(key: str) -> type[BaseModel] | None:
    kind = find_kind(key)
    return kind.part if kind else None


def _comments() -> dict[str, str]:
    """The line below each key in the configuration's source, by dotted key.

    Read here, when somebody asks, and not by pydantic at each start, which takes it 50 ms.
    """
    tree = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
    by_class = {node.name: dict(_lines(node)) for node in tree.body if isinstance(node, ast.ClassDef)}

    def walk(part: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
        for name in part.model_fields:
            inner = _part(f"{prefix}{name}")
            if inner:
                yield from walk(inner, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", by_class[part.__name__][name]

    return dict(walk(Config, ""))


def _lines(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, line in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            yield field.target.id, " ".join(str(line.value.value).split())


def _list(names: Sequence[str]) -> str:
    return f"there are {', '.join(names)}"
