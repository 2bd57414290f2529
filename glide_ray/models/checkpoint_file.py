"""Reading of .pt files: tensors only, never code; wrappers and prefixes of trainers are removed."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .foreign import mistaken_for_weights

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # entries that hold the state dict
# Of keys: torch's DataParallel and compile, and Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")
MAX_LISTED = 5  # names in a message


class ReleasedError(UserError):
    """A state dict that is not the released form of the model.

    The message names the first key that differs.
    """


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pt file, by their names in the model.

    Unwraps a state dict in an entry of WRAPPERS, removes PREFIXES and drops entries that are not
    tensors, each with a line in the log. Other pickled objects are refused, never run.
    Raises ReleasedError.
    """
    state, notes = _loaded(path), []
    while isinstance(state, Mapping):
        wrapper = next((name for name in WRAPPERS if isinstance(state.get(name), Mapping)), None)
        if wrapper is None:
            break
        state = state[wrapper]
        notes.append(f"its entry {wrapper!r} is taken")
    tensors = _tensors(state)
    if not tensors:
        raise ReleasedError(
            f"{path} is not a state dict of tensors; give one of the six published checkpoints."
        )
    if others := sorted(map(str, set(state) - set(tensors))):
        notes.append(f"left out, because they are no tensors: {listed(others)}")
    renamed, removed = _without_prefixes(tensors, path)
    if removed:
        notes.append(f"without the prefix {removed}")
    if notes:
        log.info(f"{path}: {'; '.join(notes)}")
    return renamed


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _loaded(path: str | Path) -> Any:
    """What is pickled in a file, of tensors and Python's own types. Raises ReleasedError."""
    if not Path(path).is_file():
        raise ReleasedError(f"There is no file {path}.")
    if mistake := mistaken_for_weights(path):
        raise ReleasedError(mistake)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, irrelevant to the user
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            pickled = file.read(2).startswith((b"PK", b"\x80"))
        if pickled and ("Unsupported" in str(error) or "GLOBAL" in str(error)):
            raise ReleasedError(
                f"{path} holds code or objects beside its tensors; it has not been run, and will "
                f"not be: save the state dict alone, as the published checkpoints are."
            ) from None
        raise ReleasedError(f"{path} is not a whole checkpoint; download it again.") from None
    except Exception:  # torch raises RuntimeError, EOFError, struct.error and more
        raise ReleasedError(f"{path} is not a whole checkpoint; download it again.") from None


def _tensors(state: Any) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        return {}
    return {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _without_prefixes(
    tensors: Mapping[str, Tensor], path: str | Path
) -> tuple[dict[str, Tensor], str]:
    """The tensors by their names without PREFIXES, and the longest sequence that was removed.

    Raises ReleasedError if two tensors then have the same name.
    """
    result: dict[str, Tensor] = {}
    removed = ""
    for name, tensor in tensors.items():
        bare = name
        while prefix := next((one for one in PREFIXES if bare.startswith(one)), None):
            bare = bare.removeprefix(prefix)
        if bare in result:
            raise ReleasedError(
                f"{path} has {bare!r} twice, with and without a prefix; save the state dict of one "
                f"model."
            )
        result[bare] = tensor
        removed = max(removed, name.removesuffix(bare), key=len)
    return result, removed
