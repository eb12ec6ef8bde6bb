"""Publish a directory on the Hub."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from lora_merge.errors import OutputError, SourceError

_LOG = logging.getLogger(__name__)


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload a directory as one commit to a Hub repository, which is made if need be.

    Args:
        folder: What to upload.
        repo: `user/name`.
        private: Make the repository private, if it is made.
        message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        OutputError: If the Hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(
            f"{repo}: the Hub did not take it: {reason}",
            "check the name, `hf auth login` (or HF_TOKEN) and the network",
        ) from error
    return str(commit.commit_url)


def download(ref: str, repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Get files of a Hub repository, from the cache if they are there.

    Args:
        ref: What the user typed.
        repo: The repository's id.
        revision: Branch, tag or commit; None for the main branch.
        patterns: Names of files, may be shell patterns.

    Returns:
        The folder of the revision, named after its commit.

    Raises:
        SourceError: If the repository cannot be had; says why.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    _LOG.info("looking on the Hub, or in its cache, for %s", ref)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise SourceError(
            f"{ref}: gated on the Hub", "accept its terms, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{ref}: no revision {revision!r} in {repo}", "check it") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{ref}: no such file, directory or Hub repository",
            "check the spelling; for a private repository set HF_TOKEN",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        # Before huggingface-hub 2.1, a commit that is cached is asked for all the same.
        with contextlib.suppress(LocalEntryNotFoundError, OSError, ValueError):
            return Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    allow_patterns=list(patterns),
                    local_files_only=True,
                )
            )
        raise SourceError(
            f"{ref}: not on disk, not in the Hub cache, and the Hub cannot be asked",
            "check the path, the network and HF_HUB_OFFLINE",
        ) from error


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
