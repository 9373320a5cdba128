"""From the name of a model to its folder."""

from __future__ import annotations

import re
from pathlib import Path

from pallas_kernels.errors import CheckpointError, InputError

EMBEDDED = Path(__file__).parents[1] / "embedded"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_NOT_NEEDED = ["*/*", "consolidated*"]


def embedded() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.parent.name for p in EMBEDDED.glob("*/config.json"))


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: an embedded one, a folder, or one fetched from the Hugging Face Hub.

    Args:
      name: "stdlib" and other embedded names, a path, or "owner/name" on the Hub.
      revision: branch, tag or commit on the Hub.

    Raises:
      InputError: an unknown name; the message says which exist.
      CheckpointError: the Hub does not have it or cannot be reached.
    """
    text = str(name)
    if text in embedded():
        return EMBEDDED / text
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if text and path.exists():
        raise InputError(f"{text} is a file; give the folder that holds config.json and the weights")
    if isinstance(name, Path) or not is_hub_id(text):
        known = ", ".join(embedded()) or "none"
        raise InputError(
            f"there is no model {text!r}: embedded models are {known}; else give a folder, or owner/name on the Hub"
        )
    return _from_hub(text, revision)


def is_hub_id(text: str) -> bool:
    """Whether this is of the form owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) is not None


def fetch_config(name: str, revision: str | None = None) -> Path:
    """The folder with the config.json of a model on the Hub, of which nothing else is fetched.

    Raises:
      CheckpointError: the Hub does not have it or cannot be reached.
    """
    return _from_hub(name, revision, ["config.json"])


def _from_hub(name: str, revision: str | None, patterns: list[str] = _HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_NEEDED)
    except GatedRepoError:
        raise CheckpointError(
            f"{name} is gated: accept its terms on the Hub and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder {name!r} and no such model on the Hub that you may read"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name} on the Hub has no revision {revision!r}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        raise CheckpointError(
            f"there is no folder {name!r}, and the Hub cannot be reached to fetch it; go online or give a folder"
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"the Hub refuses {name}: {error}") from None
    return Path(folder)
