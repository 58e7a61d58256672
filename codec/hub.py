"""Repositories of the Hugging Face hub, as places to publish."""

from __future__ import annotations

from typing import Any

from shards.errors import UserError


def make_repository(api: Any, repo: str, repo_type: str, private: bool) -> None:
    """Where there is none yet. Raises UserError where one stands that is public, and should be private."""
    api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
    if private and not api.repo_info(repo, repo_type=repo_type).private:
        raise UserError(f"{repo} exists and is public: agree to that with private=false, or take another repo=")
