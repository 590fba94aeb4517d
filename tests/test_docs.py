"""The documents name every job, setting and endpoint that there is, and none that there is not.

Tables of settings are generated: after a change, ``make docs`` rewrites them in place.
"""

import ast
import importlib
import re
import sys
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_settings.sources.types import _CliPositionalArg

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"<!-- settings: (\S+) -->\n(.*?)<!-- end -->\n", flags=re.DOTALL)


REQUIRED = object()


class Setting(NamedTuple):
    name: str
    kind: Any
    value: Any
    meaning: str
    positional: bool = False


def entry_points() -> dict[str, str]:
    """Modules that are run with ``-m``, and the name of the config that each parses."""
    found = {}
    for folder in ("jobs", "tuning", "serve_apps"):
        for path in sorted((ROOT / folder).glob("*.py")):
            source = path.read_text(encoding="utf-8")
            if '__name__ == "__main__"' not in source:
                continue
            for node in ast.walk(ast.parse(source)):
                match node:
                    case ast.Call(func=ast.Name("parse"), args=[ast.Name(config), *_]):
                        found[f"{folder}.{path.stem}"] = config
    return found


def settings_table(config: type[BaseModel], flag: str = "--") -> str:
    """A row a setting: its flag or key, type, default and docstring."""
    rows = [f"| {'flag' if flag else 'field'} | type | default | meaning |", "|---|---|---|---|"]
    for setting in sorted(flatten(config), key=lambda each: each.value is not REQUIRED):
        shown = flag + (setting.name.replace("_", "-") if flag else setting.name)
        if setting.positional:
            shown = setting.name.upper()
        meaning = " ".join(setting.meaning.split()).replace("|", "\\|")
        kind = type_name(setting.kind).replace("|", "\\|")
        rows.append(f"| `{shown}` | {kind} | {default(setting.value)} | {meaning} |")
    return "\n".join(rows) + "\n"


def flatten(config: type[BaseModel] | BaseModel, prefix: str = "") -> Iterator[Setting]:
    """The settings of a config and of its groups; a group's defaults are those it is given."""
    fields = (config if isinstance(config, type) else type(config)).model_fields
    for name, field in fields.items():
        if isinstance(config, BaseModel):
            value = getattr(config, name)
        elif field.is_required():
            value = REQUIRED
        else:
            value = field.get_default(call_default_factory=True)
        kind = field.annotation
        if isinstance(value, BaseModel):
            yield from flatten(value, f"{prefix}{name}.")
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from flatten(kind, f"{prefix}{name}.")
        elif not (get_origin(kind) is Literal and len(get_args(kind)) == 1):  # a tag, no choice
            positional = _CliPositionalArg in field.metadata
            yield Setting(prefix + name, kind, value, field.description or "", positional)


def type_name(kind: Any) -> str:
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return type_name(arguments[0])
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(type_name(each) for each in arguments if each is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{each.value}`" for each in kind)
    if get_origin(kind) in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if get_origin(kind) is dict:
        return f"{type_name(arguments[0])} → {type_name(arguments[1])}"
    return {"Path": "path"}.get(kind.__name__, kind.__name__)


def default(value: Any) -> str:
    if value is REQUIRED:
        return "required"
    if value is None or value in ((), {}, []):
        return ""
    if isinstance(value, Path) and value.is_absolute():
        value = value.relative_to(ROOT)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"`{value}`".replace("|", "\\|")


def block(name: str) -> str:
    """The generated table of ``name``: an entry point, or ``module:Class``."""
    module, _, config = name.partition(":")
    flag = "" if config else "--"
    found = getattr(importlib.import_module(module), config or entry_points()[module])
    return settings_table(found, flag)


def fill(text: str) -> str:
    """``text`` with every generated block made anew."""

    def renew(match: re.Match[str]) -> str:
        return f"<!-- settings: {match[1]} -->\n{block(match[1])}<!-- end -->\n"

    return BLOCK.sub(renew, text)


def documents() -> list[Path]:
    return sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_generated_tables_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert fill(text) == text, "run `make docs`"


def test_every_job_is_documented_and_every_documented_job_exists():
    text = (DOCS / "jobs.md").read_text(encoding="utf-8")
    documented = re.findall(r"^## `python -m (\S+)`", text, flags=re.MULTILINE)
    assert sorted(documented) == sorted(entry_points())
    assert sorted(match[1] for match in BLOCK.finditer(text)) == sorted(entry_points())


@pytest.mark.parametrize("name", entry_points())
def test_every_setting_says_what_it_means(name):
    config = getattr(importlib.import_module(name), entry_points()[name])
    assert config.__doc__
    silent = [setting.name for setting in flatten(config) if not setting.meaning]
    assert silent == []


def test_every_endpoint_is_documented_and_every_documented_one_exists():
    from serve_apps.api import build_api
    from serve_apps.security import Door

    paths = build_api(None, Door()).openapi()["paths"]
    served = {f"{method.upper()} {path}" for path, each in paths.items() for method in each}
    text = (DOCS / "endpoint.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^## `([A-Z]+ /\S*)`", text, flags=re.MULTILINE))
    assert documented == served


def test_documented_requests_are_accepted():
    from fusionrec.serving.schemas import parse_request

    text = (DOCS / "endpoint.md").read_text() + (ROOT / "README.md").read_text()
    requests = re.findall(r"""^(?:  -d ')?(\{(?!"detail).*\})'?$""", text, flags=re.MULTILINE)
    assert len(requests) == 7
    for request in requests:
        parse_request(request.encode())


def test_every_environment_variable_is_documented():
    used = set()
    for folder in ("platform", "jobs", "serve_apps", "tuning"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(re.findall(r"\bFUSIONREC_[A-Z][A-Z_]+\b", path.read_text(encoding="utf-8")))
    text = "".join(path.read_text(encoding="utf-8") for path in documents())
    examples = {"FUSIONREC_NAME", "FUSIONREC_SEED"}
    assert {name for name in used - examples if name not in text} == set()


def test_links_between_documents_lead_somewhere():
    for path in [*documents(), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_tree_in_the_readme_is_the_tree():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [tree] = re.findall(r"^platform/fusionrec/ .*?(?=^```)", text, flags=re.DOTALL | re.MULTILINE)
    packages = {
        path.parent.name for path in (ROOT / "platform" / "fusionrec").glob("*/__init__.py")
    }
    assert set(re.findall(r"^  (\w+)/", tree, flags=re.MULTILINE)) == packages
    names = re.findall(r"^([\w.]+/?) ", tree, flags=re.MULTILINE)
    for name in set(names) - {"artifacts/"}:  # made by the first job
        assert (ROOT / name).exists(), name


if __name__ == "__main__":
    for document in documents():
        old = document.read_text(encoding="utf-8")
        if (new := fill(old)) != old:
            document.write_text(new, encoding="utf-8")
            sys.stdout.write(f"rewrote {document.relative_to(ROOT)}\n")
