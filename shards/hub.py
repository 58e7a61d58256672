"""The Hugging Face hub as a filesystem, and its repositories as they stood when this process first looked."""

from __future__ import annotations

from functools import cache
from typing import Any

import fsspec


@cache
def filesystem() -> Any:
    """One for all threads: each thread's own would hold a copy of all that was listed, 90 MB for 100,000 files.

    Its client would wait for a listing without end; here it waits no longer than for a file.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limit(request: Any) -> None:
        limits = request.extensions["timeout"]
        if request.method == "GET" and limits["read"] is None:
            request.extensions["timeout"] = dict.fromkeys(limits, constants.HF_HUB_DOWNLOAD_TIMEOUT)

    def client() -> Any:
        client = default_client_factory()
        client.event_hooks["request"].append(limit)
        return client

    set_client_factory(client)
    return fsspec.filesystem("hf", skip_instance_cache=True)


def at_commit(files: Any, path: str) -> str:
    """In a repository of the hub: as it stood when this process first looked, whatever is pushed since."""
    try:
        found = files.resolve_path(path)
    except FileNotFoundError as error:
        if type(error.__cause__).__name__ == "RevisionNotFoundError":
            raise PermissionError("no such branch, tag or commit there (in its name, write / as %2F)") from error
        raise PermissionError("no such repository, or not for you to read: `hf auth login` signs you in") from error
    commit = _commit(found.repo_type, found.repo_id, found.revision)
    return str(type(found)(found.repo_type, found.repo_id, commit, found.path_in_repo).unresolve())


@cache
def _commit(repo_type: str, repo: str, revision: str) -> str:
    from huggingface_hub import HfApi

    sha = HfApi().repo_info(repo, repo_type=repo_type, revision=revision).sha
    assert sha is not None
    return sha
