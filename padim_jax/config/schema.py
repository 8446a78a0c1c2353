"""Settings as fields of frozen dataclasses, each stated once: default, check and meaning.

A field is a `setting`, with a text below it, or a `group`: another dataclass of settings.
`defaults` makes a ConfigDict of them, `build` validates one, and the documentation lists them
(docs/conf.py). `config.settings` shows how.
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from padim_jax.config.checks import one_line, wrong
from padim_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Setting:
    """Statement of a setting; see `setting`."""

    default: Any
    check: Callable[..., Any]
    depends_on: str
    earlier: Callable[..., Any]


def setting(
    default: Any,
    check: Callable[..., Any],
    *,
    depends_on: str = "",
    later: Any = dataclasses.MISSING,
    earlier: Callable[..., Any] | None = None,
) -> Any:
    """Declare a field of a dataclass as a setting.

    Args:
      default: value in a new configuration; or a function that makes a reference from the
        ConfigDict of the group's fields above.
      check: returns the value in its final type, or raises UserError, from the setting's name
        and value; see `checks`.
      depends_on: a field above of the same group, whose value the check takes as well.
      later: for a setting that older stored models lack: the value that leaves their scores as
        they are, whatever `default` is. Such fields go last.
      earlier: check of stored models instead of `check`, if earlier versions allowed more.

    Returns:
      The field.
    """
    stated = Setting(default, check, depends_on, earlier or check)
    return dataclasses.field(default=later, metadata={"setting": stated})


def group() -> Any:
    """Declare a field of a dataclass as a group of settings, which its type has."""
    return dataclasses.field()


def statement(field: dataclasses.Field) -> Setting:
    """Return what a field of a dataclass states by `setting`."""
    return field.metadata["setting"]


def is_group(field: dataclasses.Field) -> bool:
    """Return whether a field is a group of settings."""
    return dataclasses.is_dataclass(field.type)


def defaults(schema: Any) -> ml_collections.ConfigDict:
    """Return a new configuration.

    Args:
      schema: dataclass of settings and groups.
    """
    config = ml_collections.ConfigDict()
    for field in dataclasses.fields(schema):
        if is_group(field):
            config[field.name] = defaults(field.type)
        else:
            default = statement(field).default
            config[field.name] = default(config) if callable(default) else default
    return config


def build(schema: Any, values: Any, name: str = "config", *, earlier: bool = False) -> Any:
    """Validate each setting of a group by itself, and the groups in it.

    Args:
      schema: dataclass of settings and groups.
      values: a mapping or ConfigDict of exactly these; not validated yet: any type.
      name: name of the group in messages.
      earlier: whether to allow what earlier versions allowed.

    Returns:
      An instance of `schema`.

    Raises:
      UserError: a setting is unknown, missing or wrong.
    """
    _require_fields(name, values, schema)
    checked: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        path, value = f"{name}.{field.name}", values[field.name]
        if is_group(field):
            checked[field.name] = build(field.type, value, path, earlier=earlier)
        else:
            stated = statement(field)
            check = stated.earlier if earlier else stated.check
            others = [checked[stated.depends_on]] if stated.depends_on else []
            checked[field.name] = check(path, value, *others)
    return schema(**checked)


def to_json(value: Any) -> Any:
    """Return a setting, or a dataclass of settings, as JSON values, which `build` reads."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return value


def require_group(name: str, value: Any) -> None:
    """Require a group of settings, or raise UserError."""
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise wrong(name, value, "a group of settings")


def _require_fields(name: str, values: Any, schema: Any) -> None:
    """Require exactly the fields of a dataclass."""
    require_group(name, values)
    expected = {field.name for field in dataclasses.fields(schema)}
    names = set(values.keys())
    # Names in a file's JSON may be any text.
    if unknown := sorted(one_line(str(key)) for key in names - expected):
        close = difflib.get_close_matches(unknown[0], expected, n=1)
        raise UserError(
            f"{name}.{unknown[0]}: no such setting"
            + (f"; did you mean {name}.{close[0]}?" if close else ".")
            + f" Allowed: {', '.join(sorted(expected))}"
        )
    if missing := sorted(expected - names):
        raise UserError(f"{name}.{missing[0]}: missing; expected {', '.join(sorted(expected))}")
