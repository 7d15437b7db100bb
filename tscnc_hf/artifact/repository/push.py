"""A folder -> the Hub, in one commit: whoever loads the repository meanwhile has the old model or the new one."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from tscnc_hf.artifact.models.weights import has_weights
from tscnc_hf.artifact.packed.file import SPARSE_FILE
from tscnc_hf.artifact.repository.opening import is_dense_file, published_files, talking_to_the_hub


OLD_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@talking_to_the_hub()
def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    message: str = "Upload model",
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_path: str = "last-checkpoint",
) -> CommitInfo:
    """
    Upload what is published of a folder (`published_files`) as one commit.

    Large files go first and are named by their digest; the commit that makes them visible, with the small files and
    the card, is the last request. A push that is cut off before leaves the branch as it was, and when it is repeated,
    what the Hub has already is not sent again. (`HfApi.upload_folder` is not used: with hf_xet it makes several
    commits, so that a reader may find the new config beside the old weights.) Weights in the repository that are not
    in the folder are removed in the same commit: a repository never holds two models.

    Args:
        repo_id (`str`): "owner/name", or a name of the token's owner. Made if it is not there.
        revision (`str`, *optional*): a branch, made from main if it is not there; by default main itself.
        private (`bool`, *optional*): of a repository that is made. True also refuses one that is public already.
        checkpoint (`str`, *optional*): a training checkpoint, which goes into the same commit under
            `checkpoint_path`, whole but for `training_args.bin`, and replaces what was there.

    Returns:
        `CommitInfo`: of the commit, or of the newest one where nothing has changed.

    Raises:
        FileNotFoundError: the folder is no model.
        PermissionError: `private`, and the repository is public.
        OSError: the Hub can not be reached, or refuses. ValueError: it refuses the card's metadata.
    """
    folder = Path(folder)
    if not (has_weights(folder) or (folder / SPARSE_FILE).is_file()):
        raise FileNotFoundError(f"{folder} is no model: a push needs weights as safetensors, dense or packed")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise PermissionError(f"{repo_id} is public: nothing was sent. Make it private on the Hub, or push elsewhere")
    if revision not in (None, "main") and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = {name: folder / name for name in published_files(folder)}
    if checkpoint is not None:
        inside = (path for path in sorted(Path(checkpoint).rglob("*")) if path.is_file())
        kept = [path for path in inside if path.name != "training_args.bin"]
        files = {f"{checkpoint_path}/{path.relative_to(checkpoint).as_posix()}": path for path in kept} | files
    operations = []
    for name in api.list_repo_files(repo_id, revision=revision):
        weights = is_dense_file(name) or name == SPARSE_FILE or name in OLD_WEIGHTS
        replaced = weights or (checkpoint is not None and name.startswith(f"{checkpoint_path}/"))
        if replaced and name not in files:
            operations.append(CommitOperationDelete(name))
    operations += [CommitOperationAdd(name, path) for name, path in files.items()]
    try:
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except RuntimeError as error:  # how the client reports an upload that failed
        raise OSError(
            f"{error} ({error.__cause__}) {repo_id} is as it was before. Push again: what arrived is not sent twice"
        ) from error
