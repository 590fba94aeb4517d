"""Typed settings: a YAML file, then the environment, then flags override the defaults.

Every config is frozen, keyword-only, rejects unknown keys and round-trips through JSON. The string
under a field is its documentation and its ``--help``; it names the unit.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from fusionrec.errors import ConfigError

T = TypeVar("T", bound="JobConfig")


class Config(BaseModel):
    """Base of every piece of configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class JobConfig(BaseSettings):
    """Base of the configuration of an entry point: flags are its fields in kebab case.

    ``FUSIONREC_SEED=1`` sets ``seed`` of whichever job runs; ``--config FILE`` names a YAML file.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        env_prefix="FUSIONREC_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
        nested_model_default_partial_update=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic-settings'
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only explicit arguments here; :func:`parse` orders file, environment and flags."""
        return (init_settings,)


def parse(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """Resolve ``cls`` from ``--config FILE``, the environment and the flags of ``argv``.

    Raises:
        ConfigError: names the first setting that is wrong, its value and the remedy.
        SystemExit: after ``--help``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    file_values = _read_config_flag(arguments)
    prog = getattr(sys.modules["__main__"], "__spec__", None)
    name = "python -m " + (prog.name if prog is not None else cls.__module__)
    try:
        flags = CliSettingsSource[Any](
            cls,
            cli_prog_name=name,
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_avoid_json=True,
            cli_hide_none_type=True,
            cli_exit_on_error=False,
        )
        flags.root_parser.epilog = (
            "--config FILE reads settings from a YAML file; FUSIONREC_NAME in the environment "
            "overrides the file, and a flag overrides both."
        )
        values: dict[str, Any] = {}
        for source in (file_values, _read_environment(cls), flags(args=arguments)()):
            values = _merge(values, source)
        return cls(**values)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error
    except SettingsError as error:
        reason = str(error).removeprefix("error parsing CLI: ")
        raise ConfigError(f"{reason}; see {name} --help") from error


def _read_environment(cls: type[JobConfig]) -> dict[str, Any]:
    try:
        return EnvSettingsSource(cls)()
    except SettingsError as error:
        # Only settings with parts (lists, mappings, groups) are parsed before validation.
        [field] = [name for name in cls.model_fields if f'"{name}"' in str(error)]
        variable = f"{cls.model_config['env_prefix']}{field}".upper()
        raise ConfigError(
            f"environment variable {variable} = {os.environ.get(variable)!r} is not JSON: write it "
            "as a JSON list or object"
        ) from error


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merge(old, value)
        merged[key] = value
    return merged


def _read_config_flag(arguments: list[str]) -> dict[str, Any]:
    """Take ``--config FILE`` (or ``--config=FILE``) out of ``arguments`` and read the file."""
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            path = Path(arguments[index + 1])
            del arguments[index : index + 2]
            return read_yaml(path)
        if argument.startswith("--config="):
            del arguments[index]
            return read_yaml(Path(argument.removeprefix("--config=")))
        if argument == "--config":
            raise ConfigError("flag --config has no value: give --config FILE, a YAML file")
    return {}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ConfigError: the file is missing or is not a YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"config file {path}{place} is not YAML in UTF-8: mend it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must be a mapping of settings to values")
    return values


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "the settings"
    flag = "--" + field.replace("_", "-")
    if first["type"] == "missing":
        return f"setting {field} is missing: give {flag} VALUE"
    if first["type"] == "extra_forbidden":
        return f"setting {field} is unknown (value {first['input']!r}): remove it or see --help"
    return f"setting {field} = {first['input']!r} is wrong: {first['msg']}; set {flag}"
