"""Files of models on the Hugging Face hub, without their weights."""

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from expertmesh.errors import ManifestError, UpstreamUnavailable

TIMEOUT_S = 3.0
"""A plan must not wait longer for a hub that is not there."""


def hub_file(source: str, revision: str, name: str) -> Path | None:
    """One small file of a model; without a connection, from the hub library's cache.

    None when the model has no such file. Raises ManifestError for a model or revision that the
    hub does not have, and UpstreamUnavailable when it cannot be asked or asks for a token.
    """
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise UpstreamUnavailable("huggingface_hub is not installed") from None
    # The library repeats a failed connection for half a minute.
    if constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT):
        cached = try_to_load_from_cache(source, name, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        if isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
            return None
        raise UpstreamUnavailable("no connection, and nothing in its cache")
    try:
        return Path(hf_hub_download(source, name, revision=revision, etag_timeout=TIMEOUT_S))
    except GatedRepoError:
        raise UpstreamUnavailable("the model asks for a token; set HF_TOKEN") from None
    except LocalEntryNotFoundError as error:
        raise UpstreamUnavailable(f"the connection broke: {error}") from None
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise ManifestError(
            f"{source}: the hub has no such model, or not at revision {revision}; check both"
        ) from None
    except OSError as error:
        raise UpstreamUnavailable(str(error)) from None


def _answers(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    if address.scheme in getproxies():
        return True  # Only the proxy can tell.
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=TIMEOUT_S).close()
    except OSError:
        return False
    return True
