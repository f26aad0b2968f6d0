"""What ``--config`` takes: files, recipes by name from anywhere, files that build on others; ``recipes``; examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from toys.cli import RECIPES, command, refused

from lightning_ssiuu.cli.config_files import config_files
from lightning_ssiuu.cli.recipes import recipe_names
from lightning_ssiuu.utils.errors import UserError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no recipes lie."""
    monkeypatch.chdir(tmp_path)


def parsed(*configs: str, of: str = "fit") -> dict:
    """What a command makes of its ``--config`` options."""
    result = command(of, *(word for config in configs for word in ("--config", config)), "--print_config")
    assert result.status == 0, result.err
    return yaml.safe_load(result.out)


def options(*configs: str) -> dict:
    return parsed(*configs)["model"]["init_args"]


def test_every_recipe_has_a_name() -> None:
    names = recipe_names()
    assert len(names) == len(set(names)) == len(list(RECIPES.rglob("*.yaml")))
    for name in names:
        for spelling in (name, f"lightning_ssiuu:{name}", f"{name}.yaml", f"recipes/{name}.yaml"):
            assert config_files(spelling) == [str(RECIPES / f"{name}.yaml")]


@pytest.mark.parametrize("name", ["ssiuu", "lightning_ssiuu:ssiuu", "recipes/ssiuu.yaml"])
def test_a_recipe_is_found_from_anywhere(name: str) -> None:
    assert parsed(name) == parsed(str(RECIPES / "ssiuu.yaml"))


def test_names_compose_as_files_do() -> None:
    names = ("objective/npo", "data/tofu", "teach/oracle")
    assert parsed(*names) == parsed(*(str(RECIPES / f"{name}.yaml") for name in names))


def test_every_command_takes_names() -> None:
    assert parsed("attack/harmful", of="attack")["attack"]["init_args"]["p"] == [0.1, 0.3]
    for name in ("attack", "audit", "utility", "privacy", "oracle", "fit"):
        refused(command(name, "--config", "attack/harmfull"), "config", "did you mean attack/harmful ")


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("data/")])
def test_recipes_of_data_are_those_of_every_command(name: str) -> None:
    given = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["data"]
    for other in ("attack", "audit"):
        found = parsed(name, of=other)["data"]
        assert found["class_path"].rpartition(".")[2] == given["class_path"]
        assert found["init_args"].items() >= given.get("init_args", {}).items()


def test_a_run_s_own_file_says_which_data(tmp_path: Path) -> None:
    run = parsed("ssiuu") | {"overwrite": True, "ckpt_path": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    for other in ("attack", "audit"):
        found = parsed("config.yaml", of=other)
        assert found["data"]["class_path"].endswith("Facts")
        assert found["overwrite"] is False


def test_what_no_command_has_is_refused_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {class_path: Facts}\nattributions: {probe_examples: 20}\n")
    refused(command("attack", "--config", "mine.yaml", "--model", "tiny"), "attributions.probe_examples")


def test_an_existing_file_of_that_name_wins(tmp_path: Path) -> None:
    assert options("ssiuu")["retain_weight"] == 5.0
    (tmp_path / "ssiuu").write_text("model: {class_path: NPO, init_args: {retain_weight: 2.5}}\ndata: Facts\n")
    assert options("ssiuu")["retain_weight"] == 2.5
    assert options("lightning_ssiuu:ssiuu")["retain_weight"] == 5.0


def test_a_directory_of_that_name_does_not(tmp_path: Path) -> None:
    (tmp_path / "ssiuu").mkdir()
    assert options("ssiuu")["retain_weight"] == 5.0


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ssiu", "(did you mean ssiuu or objective/ssiuu?)"),
        ("npo", "(did you mean objective/npo or objective/simnpo or objective/dpo?)"),
        ("model/smollm", "(did you mean model/smollm2 or model/smollm2_erase?)"),
        ("recipes/data/tofo.yaml", "(did you mean data/tofu or data/knowundo or data/table?)"),
        ("lightning_ssiuu:erse", "(did you mean erase?)"),
        ("../ssiuu.yaml", "lists"),
        ("/no/such.yaml", "an existing file, or a name that `lightning-ssiuu recipes` lists"),
    ],
)
def test_a_misspelt_name_is_told_with_those_near(name: str, meant: str) -> None:
    refused(command("fit", "--config", name), "config", repr(name), meant)


def test_a_whole_configuration_as_text_still_is_one() -> None:
    assert options("ssiuu", "{model: {init_args: {retain_weight: 4.0}}}")["retain_weight"] == 4.0
    assert config_files("seed_everything: 3") == ["seed_everything: 3"]


def test_files_build_on_others(tmp_path: Path) -> None:
    """Bases are merged key by key, wherever the ``config`` stands, and those beside a file come before recipes."""
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    (tmp_path / "mine" / "sub" / "base.yaml").write_text(
        "config: ssiuu\nmodel: {init_args: {forget_weight: 3.0, retain_weight: 2.0}}\n"
    )
    (tmp_path / "mine" / "top.yaml").write_text(
        "model: {init_args: {retain_weight: 7.0}}\nconfig: [sub/base.yaml, model/tiny]\n"
    )
    whole = parsed("mine/top.yaml")
    expected = parsed("ssiuu")
    expected["model"]["init_args"] |= {"forget_weight": 3.0, "retain_weight": 7.0}
    assert whole == expected
    (tmp_path / "mine" / "sub" / "ssiuu").write_text("model: {class_path: NPO}\ndata: Facts\n")
    assert parsed("mine/top.yaml")["model"]["class_path"].endswith("NPO")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config: top.yaml", "files that do not name each other in a circle"),
        ("config: ssiu", "did you mean ssiuu"),
        ("config: 3", "a int in top.yaml"),
        ("config: [[ssiuu]]", "a list in top.yaml"),
    ],
)
def test_bases_that_cannot_be_read(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text(text + "\n")
    refused(command("fit", "--config", "top.yaml"), "config", said)


def test_a_circle_over_two_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("config: b.yaml\n")
    (tmp_path / "b.yaml").write_text("config: a.yaml\n")
    with pytest.raises(UserError, match="circle"):
        config_files("a.yaml")


# ---- recipes -----------------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_what_they_say() -> None:
    lines = command("recipes").out.splitlines()
    assert lines == command("recipes", "list").out.splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines[: len(recipe_names())])
    assert list(shown) == recipe_names()
    assert shown["model/tiny"] == "The embedded model."
    # Whole sentences, also where a line of the file ends within one.
    assert shown["objective/fdcu"].endswith("by attribution (arXiv 2609.39279, which has alpha 50, beta 20).")
    assert [name for name, said in shown.items() if said[-1] not in '.:"'] == []


def test_a_recipe_is_shown() -> None:
    assert command("recipes", "show", "model/smollm2").out == (RECIPES / "model" / "smollm2.yaml").read_text()


def test_a_recipe_is_copied_and_used(tmp_path: Path) -> None:
    result = command("recipes", "copy", "objective/npo")
    assert (result.status, result.out) == (0, "Written to .: npo.yaml\n")
    assert (tmp_path / "npo.yaml").read_text() == (RECIPES / "objective" / "npo.yaml").read_text()
    refused(command("recipes", "copy", "objective/npo"), "DEST", "--overwrite")
    assert command("recipes", "copy", "ssiuu", "npo.yaml", "--overwrite").status == 0
    assert options("npo.yaml") == options("ssiuu")
    (tmp_path / "mine").mkdir()
    assert command("recipes", "copy", "ssiuu", "mine").out == "Written to mine: ssiuu.yaml\n"
    assert command("recipes", "copy", "ssiuu", "new/own.yaml").out == "Written to new: own.yaml\n"


@pytest.mark.parametrize(
    ("args", "argument"),
    [
        (("show",), "NAME"),
        (("copy",), "NAME"),
        (("list", "ssiuu"), "NAME"),
        (("show", "ssiu"), "NAME"),
        (("copy", "../setup.cfg"), "NAME"),
        (("nothing",), "action"),
        (("copy", "ssiuu", "/dev/null/x"), "DEST"),
    ],
)
def test_mistakes_of_recipes(args: tuple[str, ...], argument: str, tmp_path: Path) -> None:
    refused(command("recipes", *args), argument)
    assert not list(tmp_path.iterdir())


# ---- examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fit", "validate", "test", "attack", "audit", "utility", "privacy", "compare"])
def test_a_bare_command_shows_one_that_works(name: str) -> None:
    result = command(name)
    assert result.status == 2
    (line,) = result.err.splitlines()
    assert f"; for example: lightning-ssiuu {name} " in line
    words = line.rpartition("lightning-ssiuu ")[2].split()
    if "--config" in words:
        assert config_files(words[words.index("--config") + 1])
    assert "for example" not in command(name, "--nothing").err
