"""Spec files: TOML plus `key=value` overrides, read into a frozen Spec.

    spec = load_spec("flows/specs/quickstart.toml", ["prune.sparsity=0.7", "run.dir=runs/seventy"])

Unknown keys are refused with the nearest known one. Nothing here imports torch.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from infra.errors import UserError, nearest
from infra.specs import DataSpec, ModelSpec, Spec


def load_spec(
    path: str | Path, overrides: list[str] | None = None, *, run_suffix: str = ""
) -> Spec:
    """Read a TOML spec and apply `section.key=value` overrides.

    Where it names no run directory, that is runs/<name of the file><run_suffix>.

    Raises UserError for a missing file, malformed TOML, an unknown key or a wrong type.
    """
    path = Path(path)
    raw = read_toml(path)
    if _is_study(raw):
        raise UserError(f"{path} is a study file: sparseramp study {path}")
    apply_overrides(raw, overrides or [])
    run = raw.setdefault("run", {})
    if isinstance(run, dict) and not run.get("dir"):
        run["dir"] = f"runs/{path.stem}{run_suffix}"
    return parse_spec(raw, str(path))


def is_study(path: str | Path) -> bool:
    """Whether a file is that of a study; raises UserError where it cannot be read."""
    return _is_study(read_toml(Path(path)))


def _is_study(raw: dict[str, Any]) -> bool:
    return "cells" in raw or "study" in raw


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a spec file; raises UserError where there are none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except IsADirectoryError:
        saved = f": give {path / 'spec.toml'}" if (path / "spec.toml").is_file() else ""
        raise UserError(f"{path} is a folder, not a spec{saved}") from None
    except OSError as error:
        raise UserError(f"cannot read spec {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> None:
    """Set `section.key=value` in the contents of a spec; raises UserError where it is malformed."""
    for override in overrides:
        _apply(raw, override)


def parse_spec(raw: dict[str, Any], where: str) -> Spec:
    """Validate the contents of a spec; `where` names it in messages."""
    try:
        return Spec.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{explain(error)} ({where})") from None


def with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run of any version; keys that its version did not have get their defaults,
    which do what it did."""
    plain = Spec(model=ModelSpec(source="."), data=DataSpec(source=".")).identity()
    defaults: dict[str, Any] = json.loads(json.dumps(plain))
    return {
        key: defaults.get(key, {}) | value if isinstance(value, dict) else value
        for key, value in identity.items()
    }


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys, with both values, in which two nested dictionaries differ."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            changes.append(f"{prefix}{key} (was {a!r}, is {b!r})")
    return changes


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"{override!r} is not an override: write section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word: prune.method=wanda
    section = raw
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise UserError(f"{override!r}: {part!r} is a value, not a section")
    section[parts[-1]] = value


def toml_value(value: Any) -> str:
    """As TOML writes it, which is as JSON but for tables."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    return json.dumps(value, ensure_ascii=False)


def explain(error: ValidationError, root: type[BaseModel] = Spec) -> str:
    """What is wrong first with the contents of a file that `root` describes, on one line."""
    first = error.errors()[0]
    location = list(first["loc"])
    key = ".".join(map(str, location))
    if first["type"] == "extra_forbidden":
        homes = [name for name in root.model_fields if key in _keys(root, [name])]
        if len(location) == 1 and homes:
            return f"unknown key {key!r}: did you mean {homes[0]}.{key}?"
        known = _keys(root, location[:-1])
        return f"unknown key {key!r}: {nearest(str(location[-1]), known)}"
    if first["type"] == "missing":
        return f"{key!r} is missing: set it in the spec or add {key}=... to the command"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict):
        return message
    if first["type"] in ("list_type", "tuple_type") and isinstance(first["input"], str):
        items = json.dumps([item.strip() for item in first["input"].split(",")])
        return f"{key}={first['input']} is no list: write {key}='{items}'"
    return f"{key}={first['input']!r}: {message[:1].lower()}{message[1:]}"


def _keys(root: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    model = root
    for part in path:
        if isinstance(part, int):  # of a list, whose entries are alike
            continue
        annotation: Any = model.model_fields[part].annotation
        annotation = next(iter(get_args(annotation)), annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
