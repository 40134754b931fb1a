"""What a study consists of: its variants, and the runs that they come to. Imports no torch."""

from __future__ import annotations

import difflib
import json
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from distrib.cli import load_config
from distrib.config import Config, Part, Text, UserError
from distrib.folder import RunFolder
from distrib.options import parse_args
from distrib.root import ROOT

STUDIES = ROOT / "configs" / "studies"
ABOUT = "_study.yaml"
OURS = ("wandb.mode=disabled",)  # of each run


class About(Part):
    """``_study.yaml``."""

    title: Text
    question: Text = ""
    figure: Literal["curves", "gradients", "points"] = "points"
    """curves: training error by epoch; gradients: each convolution's, by step; points: a run each."""
    panels: Mapping[Text, Sequence[Text]] = field(default_factory=dict)
    """curves: which variants stand in which panel; all in one where it is left out."""
    against: Mapping[Text, Text] = field(default_factory=dict)
    """What a variant is compared with; the first one where it is left out."""


@dataclass(frozen=True)
class Variant:
    """Settings that are trained once a seed."""

    name: str
    file: str  # for --config
    overrides: tuple[str, ...]

    def config(self, seed: int) -> Config:
        """What train.py makes of it.

        Raises:
            UserError: a key or the file is wrong.
        """
        return load_config(self.file, [*self.overrides, *OURS, f"run.seed={seed}"])


@dataclass(frozen=True)
class Study:
    """Variants, the first of which the others are compared with."""

    name: str
    about: About
    variants: tuple[Variant, ...]

    def against(self, variant: str) -> str | None:
        """What ``variant`` is compared with; None for the first one."""
        first = self.variants[0].name
        return self.about.against.get(variant, None if variant == first else first)


@dataclass(frozen=True)
class Job:
    """One run."""

    variant: str
    seed: int
    folder: Path
    words: tuple[str, ...]  # for train.py

    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""
        return (self.summary() or {}).get("status") == "finished"

    def summary(self) -> dict[str, Any] | None:
        """Its ``summary.json``, if there is one."""
        return RunFolder(str(self.folder)).summary()


def jobs_of(study: Study, seeds: int, runs: Path) -> list[Job]:
    """Each variant with each seed. A run of other settings has another folder, so that no old figure is taken for it.

    Raises:
        UserError: a variant's configuration is wrong.
    """
    jobs = []
    for seed in range(seeds):
        for variant in study.variants:
            config = variant.config(seed)
            # Defaults are left out: a key that a later version adds changes no name. W&B's come from the environment.
            settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"wandb"})
            settings["run"] = {"seed": seed}
            mark = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
            folder = runs / f"{variant.name.replace('/', '-')}-{seed}-{mark:08x}"
            words = (*variant.overrides, *OURS, f"run.seed={seed}", f"run.dir={folder}")
            jobs.append(Job(variant.name, seed, folder, ("--config", variant.file, *words)))
    return jobs


def read_study(name: str, overrides: Sequence[str]) -> Study:
    """The study in the folder ``name``, or the one called so that the code brings along.

    Raises:
        UserError: there is none, or its description is wrong.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = STUDIES / name
    if not folder.is_dir():
        known = sorted(path.parent.name for path in STUDIES.glob(f"*/{ABOUT}"))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}, or give a folder"
        raise UserError(f"there is no study {name}: {hint}")
    files = sorted(folder.glob("[!_.]*.yaml"))
    if not files:
        raise UserError(f"{folder} holds no configurations: a study has a file NAME.yaml for each of its variants")
    about = _read_about(folder / ABOUT, [file.stem for file in files])
    return Study(folder.name, about, tuple(Variant(file.stem, str(file), tuple(overrides)) for file in files))


def _read_about(file: Path, variants: Sequence[str]) -> About:
    try:
        about = About.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise UserError(f"cannot read {file}: {reason}; it says what the study asks (title:, question:)") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{file}: {key}: {first['msg']}; it has {', '.join(About.model_fields)}") from None
    named = [*about.against, *about.against.values(), *(name for panel in about.panels.values() for name in panel)]
    unknown = next((name for name in named if name not in variants), None)
    if unknown is not None:
        raise UserError(f"{file}: there is no variant {unknown}; there are {', '.join(variants)}")
    return about


def typed_study(variants: Sequence[str], words: Sequence[str]) -> Study:
    """The study of ``--variant "NAME: words"``: each one's words, behind those of all.

    Raises:
        UserError: the words are none that train.py takes.
    """
    made = []
    for text in variants:
        name, colon, own = text.partition(":")
        if not colon or not name.strip():
            raise UserError(f"--variant {text!r} is not 'NAME: key=value …'")
        args = parse_args([*words, *_split(own)], prog="train.py")
        if args.fresh or args.print_config or args.resume != "auto":
            raise UserError("a study's runs are begun and continued as needed: leave --fresh and --resume out")
        made.append(Variant(name.strip(), args.config, tuple(args.overrides)))
    names = [variant.name for variant in made]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two variants are called {twice}: give each a name of its own")
    return Study("variants", About(title="Variants"), tuple(made))


def _split(words: str) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError as error:
        raise UserError(f"--variant: {words.strip()}: {error}") from None
