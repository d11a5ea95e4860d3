"""`trunkline push`: a finished run's model, its card and its config on the Hugging Face hub, as one commit."""

import re
from collections.abc import Callable
from pathlib import Path

from trunkline.training.sharing.card import card

REPO = re.compile(r"[\w.-]+/[\w.-]+")
LOG_IN = "log in with a token that may write (hf auth login, or HF_TOKEN)"


def push(run: Path, repo: str, *, private: bool, licence: str = "", tell: Callable[[str], None] = print) -> str:
    """Uploads a run and returns the address of its page; HF_ENDPOINT names another hub.

    Args:
        repo: 'user/name'; made where it is not there.
        private: of a repository that is made.
        licence: as of `card`.

    Raises:
        ValueError: the run is not finished, or the hub refuses or is not reached; says what would help. A commit is
            there whole, or not at all.
    """
    if not REPO.fullmatch(repo):
        raise ValueError(f"push: expected a repository such as user/name, got '{repo}'")
    text = card(run, repo, licence)  # which checks that there is something to push
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError as error:
        raise ValueError(f"push: the hub needs trunkline[hub], which is not installed: {error}") from error
    files = {path.name: path for path in sorted((run / "model").iterdir()) if path.is_file()}
    files["config.yaml"] = run / "config.yaml"
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
    operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=text.encode()))
    size = sum(path.stat().st_size for path in files.values())
    tell(f"pushing {len(operations)} files, {size / 1e6:,.1f} MB, to {repo}")
    try:
        api = HfApi(library_name="trunkline")
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message=f"Trained with Trunkline: {run.name}")
    # not logged in, no right to write, a hub that is down, a connection that breaks: every one is another class there,
    # of another package from one release to the next
    except Exception as error:
        raise ValueError(f"push: {repo} is not written: {_in_words(error)}") from error
    return str(url)


def _in_words(error: Exception) -> str:
    """What went wrong, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    told = " ".join(str(error).split())[:300] or type(error).__name__
    if status in (401, 403) or "token" in type(error).__name__.lower():
        return f"{told}; {LOG_IN}"
    if status is not None and status < 500:
        return told
    return f"{told}; the run is as it was: give the same command once the hub is reached"
