"""Reads settings: defaults, then a YAML file, then `stage.key=value` overrides."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cartridges.errors import UserError


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=Settings)


def load(kind: type[S], file: str | None = None, overrides: list[str] | None = None) -> S:
    """Defaults, then the YAML file, then dotted `key=value` overrides (values are YAML).

    Raises a one-line `UserError` for an unreadable file, an unknown key or a bad value.
    """
    merged: dict[str, Any] = _read_yaml(file) if file else {}
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override!r} is not key=value (for example train.num_tokens=256)")
        try:
            _assign(merged, key.split("."), yaml.safe_load(value))
        except yaml.YAMLError:
            raise UserError(f"--set {key}: {value!r} is not a YAML value; quote it") from None
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"there is no setting {where}{_nearest(kind, first['loc'])}") from None
        raise UserError(f"setting {where}: {first['msg'].removeprefix('Value error, ')}") from None


def _nearest(kind: type[Settings], path: tuple[int | str, ...]) -> str:
    """A hint for the unknown last name of `path`: a similar name, or all names."""
    for part in path[:-1]:
        field = kind.model_fields.get(str(part))
        inner = [one for one in (get_args(field.annotation) or [field.annotation])
                 if isinstance(one, type) and issubclass(one, Settings)] if field else []
        if not inner:
            return ""
        kind = inner[0]
    near = get_close_matches(str(path[-1]), kind.model_fields, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(kind.model_fields)}"


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read settings file {file}: {str(error).splitlines()[0]}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"settings file {file} must be a mapping of stages, such as 'train:'")
    return loaded


def _assign(target: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {'.'.join(path)}: {part} is a value, not a group of settings")
    target[path[-1]] = value
