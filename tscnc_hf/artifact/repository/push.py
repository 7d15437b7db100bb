"""A folder -> the Hub, in one commit: whoever loads the repository meanwhile has the old model or the new one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, errors

from tscnc_hf.artifact.models.weights import has_weights
from tscnc_hf.artifact.packed.file import SPARSE_FILE
from tscnc_hf.artifact.repository.opening import (
    FIGURES_PAGE,
    LATENCY_FILE,
    METHOD_FILE,
    RESULTS_FILE,
    published_files,
    talking_to_the_hub,
)


# weights at the top of a repository under the names that transformers, timm and PEFT look for, whole, in shards or of
# a variant, and the indices of shards
WEIGHTS = re.compile(
    r"(open_clip_)?(pytorch_model|model|tf_model|flax_model|adapter_model)([.-][\w.-]+)?\.(safetensors|bin|h5|msgpack)"
    r"(\.index(\.\w+)?\.json)?|adapter_config\.json"
)
FIGURES = ("layers", "training", "security_curve", "adversarial_examples")
# what this library says of a model: said of an earlier one, it would be taken for what is pushed
SAID = {RESULTS_FILE, METHOD_FILE, LATENCY_FILE, FIGURES_PAGE, "model.onnx", *(f"figures/{x}.png" for x in FIGURES)}
TRIES = 5


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
    in the folder are removed in the same commit, and so is what this library says of a model (results, options,
    latency, figures, an export): a repository never holds two models. Other files, an image processor among them,
    stay. The commit is made only on the one whose files were looked at; where somebody else was faster, they are
    looked at again.

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
        OSError: the Hub can not be reached, or refuses, or others push to the branch all the time.
        ValueError: it refuses the card's metadata; or a file is a link that leads out of the folder.
    """
    folder = Path(folder)
    if not (has_weights(folder) or (folder / SPARSE_FILE).is_file()):
        raise FileNotFoundError(f"{folder} is no model: a push needs weights as safetensors, dense or packed")
    files = {name: folder / name for name in published_files(folder)}
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise PermissionError(f"{repo_id} is public: nothing was sent. Make it private on the Hub, or push elsewhere")
    if revision not in (None, "main") and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if checkpoint is not None:
        inside = (path for path in sorted(Path(checkpoint).rglob("*")) if path.is_file())
        kept = [path for path in inside if path.name != "training_args.bin"]
        files = {f"{checkpoint_path}/{path.relative_to(checkpoint).as_posix()}": path for path in kept} | files
    replaced = () if checkpoint is None else (f"{checkpoint_path}/",)
    for _ in range(TRIES):
        parent = api.model_info(repo_id, revision=revision).sha
        there = api.list_repo_files(repo_id, revision=parent)
        old = [name for name in there if name in SAID or WEIGHTS.fullmatch(name) or name.startswith(replaced)]
        operations = [CommitOperationDelete(name) for name in old if name not in files]
        operations += [CommitOperationAdd(name, path) for name, path in files.items()]
        try:
            return api.create_commit(
                repo_id, operations, commit_message=message, revision=revision, parent_commit=parent
            )
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 412:  # no longer the newest commit
                raise
        except RuntimeError as error:  # how the client reports an upload that failed
            raise OSError(
                f"{error} ({error.__cause__}) {repo_id} is as it was before. Push again: what arrived is not sent "
                "twice"
            ) from error
    raise OSError(
        f"{repo_id} got other commits {TRIES} times while this one was on its way, and nothing of it is to be seen "
        "there. Push again when nobody else does"
    )
