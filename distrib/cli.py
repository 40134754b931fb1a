"""YAML and overrides to a Config: defaults, then ``extends:``, then the file, then dotted ``key=value``.

Every mistake becomes one ``UserError`` line that names the key, the file and line, and the form that is wanted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from distrib.config import Config, UserError
from distrib.follow import follow_names
from distrib.keys import NO_SETTING, TRUE_OR_FALSE, Kind, find_kind, is_null, nearest, read_typed, refuse
from distrib.root import ROOT

REFERENCE = re.compile(r"\$\{([^${}]+)\}")
# The one place where an unset variable may stand: what reads it says what to set, and a synthetic run never does.
MAY_STAY_UNSET = "data.root"
# W&B's own variables, which win over our defaults. WANDB_MODE wins over what is written too (log.py).
WANDB_NAMES = {
    "wandb.project": "WANDB_PROJECT",
    "wandb.entity": "WANDB_ENTITY",
    "wandb.name": "WANDB_NAME",
    "wandb.group": "WANDB_RUN_GROUP",
    "wandb.tags": "WANDB_TAGS",
    "wandb.notes": "WANDB_NOTES",
    "wandb.dir": "WANDB_DIR",
}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but ``1e-3`` is a number: YAML 1.1 wants a dot and a signed exponent, nobody writes those.

    And ``2026-03-01`` is text, as in ``run.name=2026-03-01``: nothing here takes a date.
    """


class _Dumper(yaml.SafeDumper):
    """Quotes the text that ``_Loader`` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


@dataclass
class _Source:
    """Raw values and, for each dotted key, where it was written."""

    values: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)

    def update(self, other: _Source) -> None:
        _merge(self.values, other.values)
        self.where.update(other.where)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, merges, checks and resolves a configuration. A relative ``path`` may also stand beside the code.

    Raises:
        UserError: one line naming the key or file that is wrong and the way out.
    """
    source = _read_file(_find(Path(path)), ())
    for word in overrides:
        source.update(_read_override(word))
    values = _resolve(follow_names(_validate(source.values, source.where)))
    for key, name in WANDB_NAMES.items():
        if key not in source.where and os.environ.get(name):
            values["wandb"][key.partition(".")[2]] = read_typed(key, os.environ[name])
            source.where[key] = f"the environment's {name}"
    return _validate(values, source.where)


def change_config(config: Config, overrides: Sequence[str]) -> Config:
    """``config`` with the ``key=value`` words, as behind a configuration file.

    Raises:
        UserError: one line naming the key that is wrong and the way out.
    """
    source = _Source(config.model_dump(mode="json"))
    for word in overrides:
        source.update(_read_override(word))
    return _validate(_resolve(_validate(source.values, source.where)), source.where)


def dump_config(config: Config) -> str:
    """The configuration as YAML that ``load_config`` reads back to an equal Config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _find(path: Path) -> Path:
    """``path`` as it stands in the working directory, else beside the code."""
    if os.path.lexists(path) or path.is_absolute() or "\0" in str(path):
        return path
    beside = _beside_code(path)
    if beside is None:
        where = f"{ROOT} has it not" if Path.cwd() == ROOT else f"neither {Path.cwd()} nor {ROOT} has it"
        raise UserError(f"cannot read configuration {path}: {where}")
    return beside


def _beside_code(path: Path) -> Path | None:
    """The configuration that the code brings along: own_images means configs/own_images.yaml."""
    names = (path, Path("configs", path), Path("configs", f"{path}.yaml"))
    return next((ROOT / name for name in names if (ROOT / name).is_file()), None)


def _read_file(path: Path, seen: tuple[Path, ...]) -> _Source:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        named_by = f" (extended by {seen[-1]})" if seen else ""
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read configuration {path}{named_by}: {reason}") from None
    values, where = _parse(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a mapping of parts (run:, model:, data:, …)")
    base = values.pop("extends", None)
    values = {key: _switched(find_kind(str(key)), value) for key, value in values.items()}
    if base is None:
        return _Source(values, where)
    if not isinstance(base, str):
        raise UserError(f"extends: takes one file name, got {base!r}{_place('extends', where)}")
    if path.resolve() in [p.resolve() for p in seen]:
        raise UserError(f"{path}: extends itself, by way of {seen[-1]}")
    extended = path.parent / base
    if not os.path.lexists(extended):
        extended = _beside_code(Path(base)) or extended
    source = _read_file(extended, (*seen, path))
    source.update(_Source(values, where))
    return source


def _parse(text: str, name: str) -> tuple[Any, dict[str, str]]:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        where: dict[str, str] = {}
        _locate(node, "", name, where)
        return loader.construct_document(node), where
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{name}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # 0x_ looks like a number to YAML and is none
        raise UserError(f"{name}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply, or an alias inside its own anchor") from None
    finally:
        if loader is not None:
            loader.dispose()


def _locate(node: yaml.Node, prefix: str, name: str, where: dict[str, str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        place = f"{name}:{key_node.start_mark.line + 1}"
        if key in where:
            raise UserError(f"{key} stands twice: {where[key]} and {place}")
        where[key] = place
        _locate(value_node, f"{key}.", name, where)


def _read_override(word: str) -> _Source:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"{word!r} is not key=value (a configuration file goes behind --config)")
    if re.search(r"[\0\r\n]", text):
        raise UserError(f"{key}: a value is one line, got {text!r} (command line)")
    kind = find_kind(key)
    where = {key: "command line"}
    value: Any
    if kind and kind.part and kind.optional and text.strip().lower() in TRUE_OR_FALSE:
        value = _switched(kind, TRUE_OR_FALSE[text.strip().lower()])
    elif kind and kind.part and text.strip() and not is_null(kind, text):
        value, inner = _parse(text, "command line")
        if _ends_in_comment(text):
            raise UserError(f"{key}: YAML reads the end of {text!r} as a comment; quote what has a # (command line)")
        where |= {f"{key}.{k}": "command line" for k in inner}
    else:
        value = read_typed(key, text)
    for name in reversed(key.split(".")):
        value = {name: value}
    return _Source(value, where)


def _switched(kind: Kind | None, value: Any) -> Any:
    """true and false for a part that may be null mean its defaults and null."""
    if kind and kind.part and kind.optional and isinstance(value, bool):
        return {} if value else None
    return value


def _ends_in_comment(text: str) -> bool:
    """Whether YAML passes over the end of ``text``, which is one line and valid."""
    node = yaml.compose(text, Loader=_Loader)
    return node is not None and node.end_mark.index < len(text.rstrip())


def _validate(values: dict[str, Any], where: dict[str, str]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, values, where)) from None


def _explain(error: ValidationError, values: dict[str, Any], where: dict[str, str]) -> str:
    errors = error.errors(include_url=False)
    first, key = errors[0], _key_of(errors[0])
    others = len({_key_of(error) for error in errors}) - 1
    place = _place(key, where)
    if first["type"] == "value_error":  # from a cross-check: its text names the keys
        text = str(first["ctx"]["error"])
        message = text + next((_place(k, where) for k in re.findall(r"\w+\.\w+", text) if _place(k, where)), place)
    elif first["type"] in ("extra_forbidden", "invalid_key"):
        meant, leaf = nearest(key), key.rpartition(".")[2]
        if leaf in NO_SETTING:
            hint = f": {NO_SETTING[leaf]}"
        else:
            hint = f"; did you mean {meant}?" if meant else "; `--help` shows the valid ones"
        message = f"unknown key {key}{place}{hint}"
    else:
        message = f"{refuse(key, _look_up(values, key))}{place}"
    return message + (f" (and {others} more)" if others else "")


def _key_of(error: ErrorDetails) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] not in ("extra_forbidden", "invalid_key"):
        while key and find_kind(key) is None:  # data.scale.1 is an item of data.scale
            key = key.rpartition(".")[0]
    return key


def _place(key: str, where: dict[str, str]) -> str:
    below = next((place for k, place in where.items() if k.startswith(f"{key}.")), None)
    while key:
        if key in where:
            return f" ({where[key]})"
        key = key.rpartition(".")[0]
    return f" ({below})" if below else ""


def _look_up(values: dict[str, Any], key: str) -> Any:
    value: Any = values
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _resolve(config: Config) -> dict[str, Any]:
    """Replaces ``${run.name}`` by that key's value and ``${HOME}`` by the environment's."""
    values = config.model_dump()

    def replace(text: str, key: str, seen: tuple[str, ...]) -> str:
        def one(match: re.Match[str]) -> str:
            name = match[1]
            value = _look_up(values, name) if "." in name else os.environ.get(name)
            if name in seen:
                raise UserError(f"{seen[0]}: refers to itself, by way of {match[0]}")
            if isinstance(value, str) and "." in name:  # another key's text may hold references too
                value = replace(value, key, (*seen, name))
            if isinstance(value, str | int | float) and value != "":
                return str(value)
            if key == MAY_STAY_UNSET and "." not in name:
                return match[0]
            what = "no such key with a value" if "." in name else f"set the environment variable {name}"
            raise UserError(f"{key}: cannot resolve {match[0]} in {text!r}: {what}")

        return REFERENCE.sub(one, text)

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: walk(inner, f"{key}.{name}" if key else name) for name, inner in value.items()}
        return replace(value, key, (key,)) if isinstance(value, str) else value

    return walk(values, "")
