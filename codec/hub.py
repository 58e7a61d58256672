"""Repositories of the Hugging Face hub, as places to publish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shards.errors import UserError


def make_repository(api: Any, repo: str, repo_type: str, private: bool) -> None:
    """Where there is none yet. Raises UserError where one stands that is public, and should be private."""
    api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
    if private and not api.repo_info(repo, repo_type=repo_type).private:
        raise UserError(f"{repo} exists and is public: agree to that with private=false, or take another repo=")


def check_kept(repo: str, lost: Sequence[str]) -> None:
    """Raises UserError for files that were sent and are not there: the client leaves out, without a word, what a
    repository's own .gitignore names.
    """
    if lost:
        raise UserError(f"{repo} did not keep {lost[0]} ({len(lost)} such): see its .gitignore")


def refused(repo: str, error: Exception) -> str:
    """What the hub's client raised, and from what: of an upload that failed it says why only there."""
    reasons = [f"{type(reason).__name__}: {reason}" for reason in (error, error.__cause__) if reason]
    ways = "see that the hub can be reached and that you are signed in (`hf auth login`)"
    return f"repo={repo}: {' from '.join(reasons)}; {ways}"
