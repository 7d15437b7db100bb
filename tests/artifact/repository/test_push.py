"""A folder to the Hub and back: one commit, cut off at any point, private, on branches; what travels when loading."""

import os
import signal
import threading

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import ViTModel

from tests.processes import PATIENCE, family, run_python, started_python
from tscnc_hf import load_sparse
from tscnc_hf.artifact.models.saving import save_sparse
from tscnc_hf.artifact.repository.opening import open_repository, published_files
from tscnc_hf.artifact.repository.push import push_folder
from tscnc_hf.artifact.repository.recard import publish, rebuild_card


PACKED = "model.sparse.safetensors"
REPO = "tester/my-model"


@pytest.fixture
def folder(tmp_path, tiny_vit):
    """A pruned model, dense and packed, with a card; and beside it what must not be published."""
    model, processor = tiny_vit
    prune(model)
    folder = tmp_path / "my-model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_sparse(model, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# by hand\n")
    never = ("training_args.bin", "optimizer.pt", "_notes.txt", ".hidden", "checkpoint-3/model.safetensors")
    for name in (*never, "state/evaluation.json", "trained.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never")
    return folder


def prune(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(torch.rand(weight.shape, generator=generator) < 0.1)


def logits(model):
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(images).logits


def uploads(hub):
    return [line.removeprefix("PUT /lfs/") for line in hub.log if line.startswith("PUT /lfs/")]


# ---- what is published ----


def test_weights_come_first_and_the_card_last_in_one_commit(folder, hub):
    names = published_files(folder)
    assert names == ["model.safetensors", PACKED, "config.json", "preprocessor_config.json", "README.md"]
    publish(folder, REPO)
    assert hub.files(REPO) == {*names, ".gitattributes"} and len(hub.commits(REPO)) == 2
    assert hub.content(REPO, "README.md").startswith(b"---\nlicense: mit")  # somebody else's card is left alone
    log = [line for line in hub.log if not line.startswith("GET")]
    assert [line for line in log if "commit" in line] == [log[-1]]
    assert max(log.index(f"PUT /lfs/{blob}") for blob in uploads(hub)) < len(log) - 1


def test_a_repository_never_holds_two_models(folder, hub, tmp_path, tiny_vit):
    publish(folder, REPO)
    api = HfApi()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "notes.md"):
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=REPO)
    prune(tiny_vit[0], seed=1)
    save_sparse(tiny_vit[0], tmp_path / "only-packed")
    publish(tmp_path / "only-packed", REPO)
    left = {name for name in hub.files(REPO) if name.endswith((".safetensors", ".bin", "index.json"))}
    assert left == {PACKED} and "notes.md" in hub.files(REPO)


def test_what_was_said_of_an_earlier_model_goes_with_it(folder, hub):
    """And its weights, under whatever name a library would find them; what others put there stays."""
    publish(folder, REPO)
    weights = [
        "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json",
        "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack",
        "adapter_model.safetensors", "adapter_config.json", "open_clip_pytorch_model.bin",
    ]  # fmt: skip
    said = ["results.json", "tscnc_config.json", "latency.json", "robustness.md", "model.onnx"]
    said += ["figures/security_curve.png", "figures/adversarial_examples.png"]
    others = ["notes.md", "figures/mine.png", "onnx/model.onnx", "merges.json", "checkpoint-2/model.safetensors"]
    added = [CommitOperationAdd(name, b"{}") for name in (*weights, *said, *others)]
    HfApi().create_commit(REPO, added, commit_message="By others")
    publish(folder, REPO)
    assert hub.files(REPO) == {*published_files(folder), *others, ".gitattributes"}
    (folder / "results.json").write_text("{}")
    push_folder(folder, REPO)
    push_folder(folder, REPO)
    assert hub.content(REPO, "results.json") == b"{}"  # what the folder has stays


def test_pushes_at_once_leave_one_model(folder, hub, tmp_path, tiny_vit):
    """The second commit is made on the first, whose dense weights are not there when the push begins."""
    prune(tiny_vit[0], seed=1)
    save_sparse(tiny_vit[0], tmp_path / "only-packed")

    def another_push(blob):
        hub.before_upload = None
        push_folder(folder, REPO)

    hub.before_upload = another_push
    push_folder(tmp_path / "only-packed", REPO, message="Later")
    assert [message for _, message, _ in hub.commits(REPO)] == ["initial commit", "Upload model", "Later"]
    assert {name for name in hub.files(REPO) if name.endswith(".safetensors")} == {PACKED}
    assert torch.equal(logits(load_sparse(REPO)), logits(tiny_vit[0]))


def test_a_push_gives_up_where_others_are_always_faster(folder, hub, monkeypatch):
    listed = HfApi.list_repo_files

    def then_somebody_commits(api, *args, **options):
        found = listed(api, *args, **options)
        added = CommitOperationAdd("notes.md", f"{len(hub.commits(REPO))}".encode())
        HfApi().create_commit(REPO, [added], commit_message="Faster")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "list_repo_files", then_somebody_commits)
        with pytest.raises(OSError, match=f"{REPO} got other commits 5 times .*Push again"):
            push_folder(folder, REPO)
    assert {message for _, message, _ in hub.commits(REPO)} == {"initial commit", "Faster"}
    push_folder(folder, REPO)
    assert PACKED in hub.files(REPO)


def test_pickles_and_checkpoints_are_not_published_whatever_they_are_called(folder):
    published = published_files(folder)
    never = ["model_best.pth.tar", "x.PT", "x.pt2", "b.joblib", "a.npy", "a.NPZ", "c.Bin", "deep/er/x.pkl.gz"]
    never += ["sub/checkpoint-5/model.safetensors", "sub/state/x.json", "a/b/_c/d.txt"]
    for name in never:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"never")
    assert published_files(folder) == published


def test_a_link_to_what_lies_elsewhere_is_not_followed(folder, hub, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.txt").write_text("secret")
    (folder / "linked-folder").symlink_to(tmp_path / "elsewhere")
    (folder / "again.json").symlink_to("config.json")
    assert "again.json" in published_files(folder) and "linked-folder/secret.txt" not in published_files(folder)
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="notes.txt is a link to .*secret.txt, outside of the folder.*a copy"):
        publish(folder, REPO)
    assert not hub.repos


def test_a_snapshot_of_the_cache_is_pushed(folder, hub):
    (folder / "figures").mkdir()
    (folder / "figures" / "mine.png").write_bytes(b"drawn")
    publish(folder, REPO)
    snapshot = snapshot_download(REPO)
    assert os.path.islink(os.path.join(snapshot, "figures", "mine.png"))
    publish(snapshot, "tester/copy")
    assert hub.files("tester/copy") == hub.files(REPO)


def test_what_is_no_image_classifier_has_a_card_of_its_own_or_none(folder, hub, tiny_vit, tmp_path):
    """Which would call it one, with code that gives it a random head."""
    backbone = tmp_path / "backbone"
    ViTModel(tiny_vit[0].config).save_pretrained(backbone)
    with pytest.raises(ValueError, match="backbone is a ViTModel, and the cards .* image classifiers.*by hand"):
        publish(backbone, "tester/backbone")
    assert not (backbone / "README.md").exists() and not hub.repos
    (backbone / "README.md").write_text("# A backbone\n")
    publish(backbone, "tester/backbone")
    assert hub.content("tester/backbone", "README.md") == b"# A backbone\n"


def test_pushing_what_is_there_makes_no_commit(folder, hub):
    first = publish(folder, REPO)
    again = publish(folder, REPO)
    assert again.oid == first.oid and len(hub.commits(REPO)) == 2


def test_what_is_no_model_is_not_pushed(folder, hub, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / PACKED).unlink()
    for push in (publish, push_folder):
        with pytest.raises(FileNotFoundError, match="weights"):
            push(folder, REPO)
    assert not hub.repos


def test_a_card_that_the_hub_refuses_stops_before_anything_is_sent(folder, hub):
    (folder / "README.md").write_text("---\nlicense: [mit, apache]\n---\n")
    with pytest.raises(ValueError, match="license must be a string"):
        publish(folder, REPO)
    assert not uploads(hub) and len(hub.commits(REPO)) == 1


# ---- cut off ----


def test_a_push_killed_between_files_leaves_main_as_it_was_and_is_taken_up(folder, hub, tmp_path, tiny_vit):
    publish(folder, REPO)
    before, files = hub.commits(REPO)[-1], dict(hub.commits(REPO)[-1][2])
    prune(tiny_vit[0], seed=2)
    (folder / "README.md").unlink()  # then the push writes one, with a figure
    tiny_vit[0].save_pretrained(folder)
    save_sparse(tiny_vit[0], folder)
    sent_before, lock = len(uploads(hub)), threading.Lock()

    def kill_at_the_second(blob):
        with lock:
            if len(uploads(hub)) - sent_before >= 2 and family(process.pid):
                os.kill(process.pid, signal.SIGKILL)
                raise ConnectionResetError

    hub.before_upload = kill_at_the_second
    command = ["-m", "tscnc_hf.cli", "push", folder, REPO]
    with started_python(command, environment=hub.environment(tmp_path / "home")) as process:
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
    hub.before_upload = None
    assert hub.commits(REPO)[-1] == before and hub.commits(REPO)[-1][2] == files

    arrived = {blob for blob in uploads(hub)[sent_before:] if blob in hub.blobs}
    again = len(uploads(hub))
    publish(folder, REPO)
    assert not arrived & set(uploads(hub)[again:])  # what arrived is not sent twice
    publish(folder, "tester/whole")
    one, other = hub.commits(REPO)[-1][2], hub.commits("tester/whole")[-1][2]
    assert one.keys() == other.keys()
    assert {n: v for n, v in one.items() if n != "README.md"} == {n: v for n, v in other.items() if n != "README.md"}
    assert len(hub.commits(REPO)) == 3


def test_an_upload_that_fails_is_an_error_that_says_what_to_do(folder, hub):
    publish(folder, REPO)
    before = hub.commits(REPO)[-1]
    hub.blobs.clear()
    hub.before_upload = lambda blob: False
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b" ")
    with pytest.raises(OSError, match=f"{REPO} is as it was before. Push again: what arrived is not sent twice"):
        push_folder(folder, REPO)
    assert hub.commits(REPO)[-1] == before


# ---- private, branches ----


@pytest.mark.parametrize("before", [None, "ours"])
def test_a_push_that_fails_leaves_the_card_as_it_was(before, folder, hub):
    (folder / "README.md").unlink()
    if before:
        rebuild_card(open_repository(folder), model_name="tester/earlier")
        before = (folder / "README.md").read_bytes()
    hub.before_upload = lambda sha256: False
    with pytest.raises(OSError, match="is as it was before"):
        publish(folder, REPO)
    assert (folder / "README.md").is_file() == bool(before)
    assert before is None or (folder / "README.md").read_bytes() == before
    hub.before_upload = None
    publish(folder, REPO)
    assert REPO in (folder / "README.md").read_text() and REPO.encode() in hub.content(REPO, "README.md")


def test_private_repositories(folder, hub, monkeypatch, tmp_path):
    publish(folder, REPO, private=True)
    assert hub.repos[REPO].private
    assert torch.equal(logits(load_sparse(REPO)), logits(load_sparse(folder)))
    publish(folder, "tester/open")
    with pytest.raises(PermissionError, match="tester/open is public: nothing was sent"):
        publish(folder, "tester/open", private=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another-cache"))
    with pytest.raises(RepositoryNotFoundError):
        load_sparse(REPO)
    assert load_sparse("tester/open")


def test_a_branch_is_made_and_main_stays(folder, hub, tiny_vit):
    publish(folder, REPO)
    main = hub.commits(REPO)[-1]
    old = logits(load_sparse(REPO))
    prune(tiny_vit[0], seed=3)
    tiny_vit[0].save_pretrained(folder)
    save_sparse(tiny_vit[0], folder)
    commit = publish(folder, "my-model", revision="sparser")  # the owner is whose token it is
    publish(folder, REPO, revision="sparser")
    assert hub.commits(REPO)[-1] == main and hub.commits(REPO, "sparser")[-1][0] == commit.oid
    assert torch.equal(logits(load_sparse(REPO)), old)
    for revision in ("sparser", commit.oid):
        assert torch.equal(logits(load_sparse(REPO, revision=revision)), logits(tiny_vit[0]))


# ---- and back ----


def test_only_config_and_packed_file_travel_and_logits_are_identical(folder, hub, tmp_path, tiny_vit):
    publish(folder, REPO)
    code = (
        "import sys, torch\nfrom tscnc_hf import load_sparse\nmodel = load_sparse(sys.argv[1])\n"
        "x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))\n"
        "with torch.no_grad(): torch.save(model(x).logits, sys.argv[2])"
    )
    before = len(hub.log)
    run_python(["-c", code, REPO, tmp_path / "logits.pt"], environment=hub.environment(tmp_path / "fresh"))
    fetched = [line for line in hub.log[before:] if line.startswith("GET") and "/resolve/" in line]
    assert {line.rsplit("/", 1)[-1] for line in fetched} == {"config.json", PACKED}
    sent = [line for line in hub.log[before:] if not line.startswith(("GET", "HEAD"))]
    assert not sent
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(tiny_vit[0]))


def test_the_card_of_a_push_is_valid_for_the_hub(folder, hub):
    (folder / "README.md").unlink()
    publish(folder, REPO)
    card = ModelCard(hub.content(REPO, "README.md").decode())
    card.validate()
    assert hub.log[-1] == "POST /api/validate-yaml"
    assert card.data.eval_results and f'from_pretrained("{REPO}")' in card.text
    broken = ModelCard(str(card).replace("pipeline_tag: image-classification", "pipeline_tag: [1]"))
    with pytest.raises(ValueError, match="pipeline_tag must be a string"):
        broken.validate()
