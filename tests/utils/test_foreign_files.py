"""What others wrote stays where it is and stays private: paths, indices, aliases, names of columns."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from toys.bad_options import BOMB
from toys.cli import command, refused, write_rows

from lightning_ssiuu.datamodules.readers import column
from lightning_ssiuu.models.loading import TINY, check_loadable, check_same_shape, load_model, resolve_checkpoint
from lightning_ssiuu.utils.errors import UserError
from lightning_ssiuu.utils.reading import load_yaml


@pytest.mark.parametrize("inner", ["../outside", "/etc", "models/../../outside", "link", ""])
def test_a_package_is_not_left(inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copytree(TINY, package / "model")
    shutil.copytree(TINY, tmp_path / "outside")
    (package / "link").symlink_to(tmp_path / "outside")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_checkpoint("package:my_weights/model") == str(package / "model")
    with pytest.raises(UserError, match="of an installed Python package"):
        resolve_checkpoint(f"package:my_weights/{inner}")


class Marker:
    """Makes a directory where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("name", ["pytorch_model-1.bin", "../model.safetensors", "absent.safetensors"])
def test_an_index_names_safetensors_beside_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    (model / "model.safetensors").rename(tmp_path / "model.safetensors")
    (model / "pytorch_model-1.bin").write_bytes(pickle.dumps(Marker()))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"an index that names \.safetensors files beside it alone"):
        load_model(model)
    assert not (tmp_path / "unpickled").exists()


def test_aliases_are_measured() -> None:
    assert load_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    for text in (BOMB, "a: &a [*a]", "[" * 100_000):
        with pytest.raises(yaml.YAMLError):
            load_yaml(text)


def test_names_of_columns_are_shown_only_where_they_look_like_names() -> None:
    with pytest.raises(UserError, match=r"allowed: answer, qestion \(did you mean 'qestion'\?\)"):
        list(column([{"qestion": "a", "answer": "b"}], "question", "question_column"))
    for record in ({"Who is Ada?": "b"}, {"x" * 50: "b"}, {f"c{n}": "b" for n in range(50)}):
        with pytest.raises(UserError, match=f"of {len(record)}, whose names look like data") as caught:
            list(column([record], "question", "question_column"))
        assert not any(name in str(caught.value) for name in record)


def test_nonmembers_are_not_the_forget_set(tmp_path: Path) -> None:
    rows = {"forget": [{"question": f"Ada {n}?", "answer": "b"} for n in range(4)]}
    rows["retain"] = [{"question": f"Bob {n}?", "answer": "b"} for n in range(4)]
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", given) for name, given in rows.items()}
    data = {"data": {"class_path": "CustomData", "init_args": {name: str(path) for name, path in paths.items()}}}
    (tmp_path / "data.json").write_text(json.dumps(data), encoding="utf-8")
    start = ("privacy", "--model", "tiny", "--output", tmp_path / "run", "--config", tmp_path / "data.json")
    same = command(*start, "--nonmembers", paths["forget"])
    refused(same, "nonmembers", "4 questions that are also in forget")
    blank = write_rows(tmp_path / "blank.jsonl", [{"question": " ", "answer": "b"}])
    refused(command(*start, "--nonmembers", blank), "nonmembers", "blank question or answer")
    assert "Ada" not in same.err
    assert not (tmp_path / "run").exists()


def test_models_of_another_shape(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}), encoding="utf-8")
    with pytest.raises(UserError, match=r"^unlearned: .*its num_hidden_layers is 2, not 4"):
        check_same_shape({"original": "tiny", "unlearned": str(model)})
    with pytest.raises(UserError, match=r"a configuration for all of the weights \(\d+ have no place in it"):
        check_loadable(model)
    check_loadable("tiny")
