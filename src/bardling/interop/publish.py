"""Publishing an exported model on the Hugging Face hub, through `huggingface_hub`.

A repository that does not exist is created, private unless asked otherwise; that of an existing one stays as it is. The access
token is the client's own (HF_TOKEN, or `hf auth login`) and is never an option, because options end up in logs and histories.
"""

import re
from pathlib import Path

from bardling.data.text.hub import hub_endpoint, hub_library
from bardling.errors import UserError

_REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")


def check_publishing(repository: str) -> None:
    """Raise a `UserError` before any work if the name is not USER/REPO, or there is no package or no token to publish with."""
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"--push {repository}: must be USER/REPO, a name on the hub")
    if not hub_library("get_token")():
        raise UserError(f"--push {repository}: there is no access token: set HF_TOKEN, or log in with `hf auth login`")


def publish(path: Path, repository: str, *, private: bool) -> str:
    """Upload a folder, or a file, as one commit and return the address of the repository."""
    from huggingface_hub.errors import HfHubHTTPError

    api, what = hub_library("HfApi")(endpoint=hub_endpoint()), f"--push {repository}"
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        options = {"repo_id": repository, "commit_message": "Upload a model exported by Bardling"}
        if path.is_dir():
            api.upload_folder(folder_path=path, **options)
        else:
            api.upload_file(path_or_fileobj=path, path_in_repo=path.name, **options)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        remedy = "use a token that may write there" if status in (401, 403) else "try again later"
        raise UserError(f"{what}: the hub refused it with status {status}: {remedy}; the export is in {path}") from error
    except Exception as error:  # the classes of its HTTP client differ between versions
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        remedy = f"check the connection; the export is in {path}"
        raise UserError(f"{what}: cannot be uploaded to {hub_endpoint()} ({reason}): {remedy}") from error
    return f"{hub_endpoint()}/{repository}"
