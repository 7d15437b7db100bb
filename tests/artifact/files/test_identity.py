"""One object that tells whether two things were made of the same options, data, code and weights."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch
from torch import nn

from tscnc_hf.artifact.files import identity as module
from tscnc_hf.artifact.files.identity import RunIdentity, code_identity, weights_digest


ONE = RunIdentity(
    options={"seed": 1, "cnc_weight": 0.01},
    data={"train": {"images": 10, "digest": "aa"}, "asked": {"dataset": "a", "limit": 10}},
    code={"torch": "2.9"},
    weights={"model": "ff"},
    usual={"cnc_weight": 0.0, "tsc_weight": 0.0},
)


def changed(**parts) -> RunIdentity:
    return replace(ONE, **parts)


def test_what_is_the_same_has_no_differences_and_survives_a_file():
    again = RunIdentity.from_dict(json.loads(json.dumps(ONE.to_dict())))
    assert ONE.differences(again) == again.differences(ONE) == ONE.differences(ONE) == []


@pytest.mark.parametrize(
    ("other", "texts"),
    [
        (changed(options={"seed": 2, "cnc_weight": 0.01}), ["seed=1 (now 2)"]),
        (changed(options={"seed": 1}), ["cnc_weight=0.01 (now 0.0)"]),  # what is not there has its default
        (changed(options={"seed": 1, "cnc_weight": 0.01, "tsc_weight": 0.0}), []),
        (changed(code={"torch": "2.14"}), ["torch='2.9' (now '2.14')"]),
        (changed(weights={}), ["model='ff' (now None)"]),
        (
            changed(data={"train": {"images": 5, "digest": "bb"}, "asked": {"dataset": "a", "limit": 5}}),
            ["limit=10 (now 5)", "train.images=10 (now 5)", "train.digest='aa' (now 'bb')"],
        ),
        (changed(data={**ONE.data, "asked": {"dataset": "b", "limit": 99}}), []),  # the same data by another name
    ],
)
def test_differences_are_named_with_both_values(other, texts):
    assert [str(difference) for difference in ONE.differences(other)] == texts


def test_parts_are_compared_alone_where_they_are_asked_for():
    other = changed(options={"seed": 2}, code={"torch": "3"})
    assert {difference.part for difference in ONE.differences(other)} == {"options", "code"}
    assert {difference.part for difference in ONE.differences(other, ["code"])} == {"code"}


def test_the_digest_is_of_all_that_decides_but_the_code():
    others = [
        changed(options={"seed": 2, "cnc_weight": 0.01}),
        changed(data={"train": {"images": 10, "digest": "ab"}}),
        changed(weights={"model": "fe"}),
    ]
    assert len({ONE.digest(), *(other.digest() for other in others)}) == 4
    assert changed(code={}).digest() == ONE.digest()
    assert ONE.digest(["options"]) != ONE.digest()


def test_an_option_that_is_added_later_changes_no_digest_at_its_default():
    added = replace(ONE, options={**ONE.options, "new": False}, usual={**ONE.usual, "new": False})
    assert added.digest() == ONE.digest() != replace(added, options={**ONE.options, "new": True}).digest()


def test_what_is_no_identity_is_refused():
    for values in ([], {}, {"options": {}}, {"options": [], "data": {}, "code": {}, "weights": {}}):
        with pytest.raises(ValueError, match="an identity has the parts options, data, code, weights"):
            RunIdentity.from_dict(values)


def test_weights_are_told_by_names_shapes_dtypes_and_bits():
    model = nn.Linear(3, 2)
    digest = weights_digest(model)
    assert digest == weights_digest(model)
    with torch.no_grad():
        model.weight[0, 0] = -model.weight[0, 0]
    assert weights_digest(model) != digest
    assert len({weights_digest(nn.Sequential(model)), weights_digest(model), weights_digest(model.double())}) == 3


def test_a_commit_is_that_of_this_code_and_of_no_repository_around_it(tmp_path, monkeypatch):
    assert "torch" in code_identity()
    other = tmp_path / "site-packages" / "identity.py"
    other.parent.mkdir()
    other.write_text("")
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(module, "__file__", str(other))
    assert module.commit() is None
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    assert module.commit().endswith("-dirty")
