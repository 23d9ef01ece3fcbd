"""Publishing an exported folder on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from saccade.errors import SaccadeError
from saccade.files import reading


def check_hub(repository: str, private: bool = False) -> None:
    """Check a repository's name and that the user is logged in, before the work whose result goes there.

    Raises:
        SaccadeError: if the name is not one, the hub does not know the user or does not answer, or the repository is
            public and `private` is true.
    """
    name = f"push_to_hub={repository!r}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise SaccadeError(f"{name} is not the name of a repository: write USER/NAME") from error
    if "/" not in repository:
        raise SaccadeError(f"{name} has no user or organisation: write USER/NAME")
    if constants.is_offline_mode():
        raise SaccadeError(f"{name}: HF_HUB_OFFLINE is set, and nothing is sent: unset it, or leave this out")
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # of the HTTP client, whose library differs between versions of huggingface_hub
        raise SaccadeError(
            f"{name}: {api.endpoint} did not say who you are ({_short(error)}): run `hf auth login` or set HF_TOKEN, "
            "or try again when it can be reached"
        ) from error
    if private:
        with reading(f"{name}: {api.endpoint} did not say whether it is private"):
            public = api.repo_exists(repository) and not api.repo_info(repository).private
        if public:
            raise SaccadeError(
                f"{name} is public, and private=true does not change that: make it private on the hub first"
            )


def push_folder(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder as one commit, and return the address of the repository, which is created if it does not exist.

    Args:
        private: of a new repository; one that exists stays as it is.

    Raises:
        SaccadeError: if the hub refuses it or cannot be reached; the folder stays.
    """
    api = HfApi()
    try:
        created = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by Saccade")
    except Exception as error:
        raise SaccadeError(
            f"push_to_hub={repository!r} failed ({_short(error)}); the model is in {folder}: upload it with "
            f"`hf upload {repository} {folder}`"
        ) from error
    return str(created)


def _short(error: Exception) -> str:
    """The first sentence of what the hub says, over one line."""
    return " ".join(str(error).strip().splitlines()[:1]).rstrip(".") or type(error).__name__
