"""Publish a directory on the Hub."""

from pathlib import Path

from lora_merge.errors import OutputError


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
