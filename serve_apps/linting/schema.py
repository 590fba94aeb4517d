"""Keys that Serve would ignore in silence, values that it would refuse, import paths of nothing.

What may stand where is read from Ray's own pydantic schemas, and the arguments of an application
from the type that its builder asks for: nothing is listed here, and a new Ray brings its own keys.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from serve_apps.linting.document import Finding, Place, step

_IMPORTED = {"import_path", "policy_function", "request_router_class", "exporter_import_path"}
"""Keys whose values are ``module:attribute``."""

_NEAR = 0.55
"""Likeness of two names, from 0 to 1, from which one may be a mistake for the other."""


def check_schema(values: dict[str, Any]) -> tuple[list[Finding], ServeDeploySchema | None]:
    """What is wrong with keys, values and import paths; the schema where Serve would accept it."""
    walk = _Walk()
    walk.visit(values, ServeDeploySchema, ())
    accepted = copy.deepcopy(values)
    for place in walk.unimportable:  # validation would import them too, and fail
        _remove(accepted, place)
    for place, model, _ in walk.loose:
        walk.findings += validate(model, _at(accepted, place), place)[0]
    found, schema = validate(ServeDeploySchema, accepted, ())
    known = {finding.place for finding in walk.findings}
    said = {finding.message for finding in walk.findings if finding.warning}
    walk.findings += [
        finding for finding in found if finding.place not in known and finding.message not in said
    ]
    return walk.findings, schema


def arguments(application: dict[str, Any]) -> BaseModel | None:
    """The arguments of an application as its builder gets them; None where they are none."""
    model = _builder_model(str(application.get("import_path")))
    return None if model is None else validate(model, application.get("args", {}), ())[1]


class _Walk:
    """Goes through the values along the schemas."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.unimportable: list[Place] = []
        self.loose: list[tuple[Place, type[BaseModel], dict[str, Any]]] = []
        """Values that Serve's schema takes as any mapping, and what they become later."""

    def visit(
        self, values: Any, model: type[BaseModel], place: Place, *, code: bool = True
    ) -> None:
        """Look at ``values``, a ``model``; ``code`` says whether the code of it is here."""
        if not isinstance(values, dict):
            return  # validation says so
        code = code and not _brings_code(values.get("runtime_env"))
        self.findings += unknown(values, model.model_fields, place)
        for key, value in values.items():
            inner = (*place, key)
            info = model.model_fields.get(key)
            if info is None or value is None:
                continue
            if key == "runtime_env":
                self.findings += unknown(value, RuntimeEnv.known_fields, inner)
            elif key in _IMPORTED and isinstance(value, str):
                self._import(value, inner, code)
            elif key == "args" and code:
                self._arguments(value, values.get("import_path"), inner)
            kinds = list(_flatten(info.annotation))
            for nested in kinds:
                if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
                    continue
                listed = isinstance(value, list)
                for position, each in enumerate(value if listed else [value]):
                    here = (*inner, position) if listed else inner
                    self.visit(each, nested, here, code=code)
                    if dict in kinds and isinstance(each, dict):
                        self.loose.append((here, nested, each))

    def _import(self, path: str, place: Place, code: bool) -> None:
        try:
            load(path)
        except Exception as error:  # whatever the module does on import
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            message = f"= {path!r} cannot be imported here ({reason})"
            hint = "" if code else "; the runtime_env may bring it"
            self.findings.append(Finding(place, message + hint, warning=not code))
            self.unimportable.append(place)

    def _arguments(self, values: Any, builder: Any, place: Place) -> None:
        model = _builder_model(str(builder))
        if model is None:
            return
        before = len(self.findings)
        self.visit(values, model, place)
        known = {finding.place for finding in self.findings[before:]}
        found, _ = validate(model, values, place)
        self.findings += [finding for finding in found if finding.place not in known]


def unknown(values: Any, known: Iterable[str], place: Place) -> Iterator[Finding]:
    """A finding for each key of the mapping ``values`` that is not one of ``known``."""
    names = list(known)
    for key in values if isinstance(values, dict) else ():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, _NEAR)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(names))}"
            yield Finding((*place, key), f"is unknown: {hint}")


def load(path: str) -> Any:
    """What ``module:attribute`` or ``module.attribute`` names; raises whatever the import does."""
    module, _, attribute = path.replace(":", ".").rpartition(".")
    if not module:
        raise ImportError(f"{path} is not of the form module:attribute")
    return getattr(importlib.import_module(module), attribute)


def _builder_model(path: str) -> type[BaseModel] | None:
    """The pydantic model that the builder at ``path`` takes, found as Serve finds it."""
    try:
        builder = load(path)
        (parameter,) = inspect.signature(builder).parameters
        kind = get_type_hints(builder).get(parameter)
    except Exception:  # not importable here, or not a builder: said elsewhere
        return None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def validate(model: type[BaseModel], values: Any, place: Place) -> tuple[list[Finding], Any]:
    """What pydantic refuses and Ray warns of, and the model where ``values`` are accepted."""
    found: list[Finding] = []
    accepted = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            accepted = model.model_validate(values)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                if detail["type"] == "extra_forbidden":
                    continue  # an unknown key: said already, and better
                where = (*place, *_existing(values, detail["loc"]))
                message = detail["msg"].removeprefix("Value error, ").splitlines()[0]
                if detail["type"] == "missing":
                    message = f"lacks {detail['loc'][-1]}"
                elif not isinstance(detail["input"], dict | list):
                    message = f"= {detail['input']!r} is wrong: {message}"
                else:
                    message = f"is wrong: {message}"
                if where not in {each.place for each in found}:
                    found.append(Finding(where, message))
    for warning in caught:
        text = str(warning.message).splitlines()[0]
        found.append(Finding(place, f"makes Serve warn: {text}", warning=True))
    return found, accepted


def _existing(values: Any, location: tuple[str | int, ...]) -> Place:
    """``location`` without what pydantic adds to it: the branches of unions."""
    place: list[str | int] = []
    for part in location:
        if step(values, part) is not None:
            place.append(part)
            values = step(values, part)
    return tuple(place)


def _flatten(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of, such as those of ``Optional[Union[Dict, M]]``."""
    inner = get_args(annotation)
    origin = getattr(annotation, "__origin__", annotation)
    if origin is dict:
        yield dict
    elif inner:
        for each in inner:
            yield from _flatten(each)
    else:
        yield origin


def _brings_code(runtime_env: Any) -> bool:
    """Whether replicas get modules that this process may not have."""
    brought = ("working_dir", "py_modules", "pip", "uv", "conda", "container", "image_uri")
    return isinstance(runtime_env, dict) and any(key in runtime_env for key in brought)


def _at(values: Any, place: Place) -> Any:
    for part in place:
        values = values[part]
    return values


def _remove(values: Any, place: Place) -> None:
    """Take the value at ``place`` out; a policy without its function is no policy."""
    parent = _at(values, place[:-1])
    if place[-1] == "policy_function":
        place, parent = place[:-1], _at(values, place[:-2])
    if place[-1] != "import_path":  # needed, and only its form is validated
        del parent[place[-1]]
