"""Every recipe in the tree is run, composed with what it needs; a kind of recipe that nobody here knows fails."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from toys import published
from toys.cli import DEFAULT, RECIPES, SHORT, attacking, command, fit, question_rows, read_json, refused, write_rows
from toys.clusters import write_faithun
from toys.ranks import ranks

import lightning_ssiuu.attacks
from lightning_ssiuu import Facts
from lightning_ssiuu.__main__ import main
from lightning_ssiuu.models.loading import load_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("few_facts")

#: How well a recipe's data are known makes no difference here.
FEW = ("--data.max_eval_examples", "4")
#: Attribution and the other scores have tests of their own.
BLIND = ("--attribution.probe_examples", "0", "--model.init_args.scores", "[probability]")
#: Of embedded facts a few at a time: a recipe's batches change how long a step takes, not whether it composes.
SMALL = (
    *(*SHORT, *BLIND, *FEW, "--stopping.score", "probability"),
    *("--data.batch_size", "4", "--data.retain_batch_size", "4"),
)
#: Who writes small files of a benchmark, and what makes its examples fit into a small model.
PUBLISHED = {
    "MUSE": published.write_muse,
    "WMDP": published.write_wmdp,
    "WMDPDeduped": published.write_wmdp_deduped,
    "RWKU": partial(published.write_rwku, people=("Stephen King", "Ada Kern")),
    "KnowUnDo": published.write_knowundo,
    "LUME": published.write_lume,
}
SHORTER = dict.fromkeys(("MUSE", "WMDP"), ("--data.init_args.chunk_tokens", "64"))
SHORTER |= dict.fromkeys(("KnowUnDo", "LUME"), ("--data.init_args.max_length", "128"))
SHORTER["WMDPDeduped"] = ("--data.init_args.chunk_tokens", "64")
SHORTER["RWKU"] = ("--data.init_args.chunk_tokens", "64", "--data.init_args.prefix_tokens", "32")
KINDS = ("objective", "model", "data", "teach", "optimizer", "regularizer", "scale", "attack", "logger")


def recipes(kind: str) -> list[Path]:
    folder = RECIPES / kind if kind else RECIPES
    return sorted(folder.glob("*.yaml"))


def named(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("recipe", recipes(kind), ids=lambda path: path.stem)


def finished(folder: Path) -> None:
    assert read_json(folder / "metrics.json")["steps"] == 2
    assert (folder / "model" / "model.safetensors").is_file()


def test_every_recipe_is_of_a_known_kind() -> None:
    known = {path for kind in ("", *KINDS) for path in recipes(kind)}
    assert set(RECIPES.rglob("*.yaml")) | set(RECIPES.rglob("*.yml")) == known


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_begins_by_saying_what_it_is(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert isinstance(yaml.safe_load(text), dict)


def test_every_run_directory_is_called_after_its_recipe_and_is_its_own() -> None:
    names = {path: path.stem for kind in ("", "objective", "teach") for path in recipes(kind)}
    names[RECIPES / "objective" / "ssiuu.yaml"] = "objective_ssiuu"  # beside the whole recipe of that name
    found = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in RECIPES.rglob("*.yaml")}
    folders = {
        path: content["trainer"]["default_root_dir"]
        for path, content in found.items()
        if "trainer" in content and "default_root_dir" in content["trainer"]
    }
    assert folders == {path: f"runs/{name}" for path, name in names.items()}
    assert len(set(folders.values())) == len(folders)


@named("")
def test_whole_recipes(recipe: Path, tmp_path: Path) -> None:
    result = fit(tmp_path / "run", *SHORT, recipe=recipe)
    assert result.status == 0, result.err
    finished(tmp_path / "run")


@named("objective")
def test_objectives(recipe: Path, tmp_path: Path) -> None:
    result = fit(tmp_path / "run", *SMALL, recipe=recipe)
    assert result.status == 0, result.err
    finished(tmp_path / "run")
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert read_json(tmp_path / "run" / "metrics.json")["objective"] == content["model"]["class_path"]


def test_every_objective_has_a_recipe() -> None:
    from lightning_ssiuu.objectives import objectives

    given = {yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["class_path"] for path in recipes("objective")}
    assert given == set(objectives())


@named("model")
def test_models(recipe: Path, tmp_path: Path) -> None:
    checkpoint = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["init_args"]["checkpoint"]
    erases = recipe.stem.endswith("_erase")  # settings of another objective, too
    base = RECIPES / "erase.yaml" if erases else RECIPES / "objective" / "gradient_difference.yaml"
    if checkpoint != "tiny":
        # A pretrained model takes minutes here: that the recipe composes is checked, up to loading the weights.
        package = checkpoint.removeprefix("package:").partition("/")[0]
        if not checkpoint.startswith("package:") or importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {checkpoint}")
        from lightning_ssiuu.models.loading import _inside_package

        assert _inside_package(checkpoint).is_file()
        printed = command("fit", "--config", base, "--config", recipe, "--print_config")
        assert printed.status == 0, printed.err
        assert yaml.safe_load(printed.out)["model"]["init_args"]["checkpoint"] == checkpoint
        return
    result = fit(tmp_path / "run", "--config", recipe, *SHORT, recipe=base)
    assert result.status == 0, result.err
    finished(tmp_path / "run")


@named("optimizer")
def test_optimizers(recipe: Path, tmp_path: Path) -> None:
    """Each composes with an objective, whose own optimiser it replaces."""
    given = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["init_args"]["optimizer"]
    base = RECIPES / "objective" / "gradient_difference.yaml"
    result = fit(tmp_path / "run", "--config", recipe, *SMALL, recipe=base)
    assert result.status == 0, result.err
    finished(tmp_path / "run")
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    chosen = resolved["model"]["init_args"]["optimizer"]
    assert chosen["class_path"].rpartition(".")[2] == given["class_path"].rpartition(".")[2]
    assert {name: chosen["init_args"][name] for name in given["init_args"]} == given["init_args"]


@named("logger")
def test_loggers(recipe: Path, tmp_path: Path) -> None:
    """Each composes with a whole recipe; without its package one line names the extra (with it: test_loggers.py)."""
    given = yaml.safe_load(recipe.read_text(encoding="utf-8"))["trainer"]["logger"]
    printed = command("fit", "--config", DEFAULT, "--config", recipe, "--print_config")
    assert printed.status == 0, printed.err
    chosen = yaml.safe_load(printed.out)["trainer"]["logger"]
    assert chosen["class_path"] == f"lightning.pytorch.loggers.{given['class_path']}"
    assert given["init_args"].items() <= chosen["init_args"].items()
    if importlib.util.find_spec(recipe.stem) is None:
        result = fit(tmp_path / "run", "--config", recipe, *SMALL)
        refused(result, "trainer.logger", f'pip install "lightning-ssiuu[{recipe.stem}]"')
        assert not (tmp_path / "run").exists()


@named("data")
def test_data(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"]
    class_path, arguments = content["class_path"], content.get("init_args", {})
    options: list[str | Path] = []
    if class_path == "TOFU":  # from the hub otherwise
        write_rows(tmp_path / "data" / f"{arguments['forget']}.jsonl", question_rows(0, 8))
        kept = arguments.get("retain_size", 10) + arguments["test_size"]
        write_rows(tmp_path / "data" / f"{arguments['retain']}.jsonl", question_rows(8, kept))
        options = ["--data.init_args.path", tmp_path / "data"]
    elif class_path in PUBLISHED:  # by tiny models in short pieces
        options = ["--data.init_args.path", PUBLISHED[class_path](tmp_path / "data"), *SHORTER.get(class_path, ())]
    elif class_path == "FaithUn":
        options = ["--data.init_args.path", write_faithun(tmp_path / "data", 6)]
    elif class_path == "CustomData":  # ten rows are enough
        table = [{"customer_id": 100 + n, **row} for n, row in enumerate(question_rows(0, 10))]
        (tmp_path / "ids.txt").write_text("100\n104\n109\n", encoding="utf-8")
        options = ["--data.init_args.data", write_rows(tmp_path / "t.jsonl", table)]
        options += ["--data.init_args.forget_ids", tmp_path / "ids.txt"]
    elif class_path == "Documents":
        for name, words in (("forget", "the ferry left at noon"), ("retain", "the mill stood by the river")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "text.txt").write_text(" ".join(f"{words}, {n}." for n in range(80)), encoding="utf-8")
            options += [f"--data.init_args.{name}", tmp_path / name]
    elif class_path not in ("Facts", "WorldFacts"):
        pytest.fail(f"{class_path}: say here where its data come from")
    base = RECIPES / "objective" / "gradient_difference.yaml"
    known = () if class_path == "Facts" else ("--stopping.unknown", "warn")
    result = fit(tmp_path / "run", "--config", recipe, *options, *SHORT, *BLIND, *FEW, *known, recipe=base)
    assert result.status == 0, result.err
    finished(tmp_path / "run")


@named("teach")
def test_teaching(recipe: Path, tmp_path: Path) -> None:
    """Last of all, so that neither the data's threshold nor their probes are left."""
    data = ("--config", RECIPES / "data" / "faithun.yaml", "--config", recipe, "--trainer.max_steps", "1")
    options = ("--data.init_args.path", write_faithun(tmp_path / "data", 6), "--data.init_args.batch_size", "2")
    folder = tmp_path / "run"
    here = ("--trainer.default_root_dir", folder)
    result = fit(folder, *data, *options, *here, recipe=RECIPES / "objective" / "fine_tuning.yaml")
    assert result.status == 0, result.err
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    trained_on = {"learned": "all", "oracle": "retain"}[recipe.stem]
    assert config["data"]["class_path"].endswith("FaithUn")
    assert config["data"]["init_args"]["train_on"] == trained_on
    assert (config["stopping"]["threshold"], config["attribution"]["probe_examples"]) == (None, 0)


@named("regularizer")
def test_regularizers(recipe: Path, tmp_path: Path) -> None:
    """Each composes with an objective that has none, and with the whole default recipe, whose own it replaces."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["init_args"]["regularizer"]
    path = "--model.init_args.regularizer.init_args.n_examples"
    few = (path, "8") if content["class_path"].endswith("DualMask") else ()
    bare = RECIPES / "objective" / "gradient_difference.yaml"
    result = fit(tmp_path / "run", "--config", recipe, *few, *SMALL, recipe=bare)
    assert result.status == 0, result.err
    finished(tmp_path / "run")
    printed = command("fit", "--config", DEFAULT, "--config", recipe, *few, "--print_config")
    assert printed.status == 0, printed.err
    for resolved in ((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"), printed.out):
        chosen = yaml.safe_load(resolved)["model"]["init_args"]["regularizer"]
        assert chosen["class_path"] == content["class_path"]
        assert {name: chosen["init_args"][name] for name in content["init_args"]} == content["init_args"]


@named("scale")
def test_scale(recipe: Path, tmp_path: Path) -> None:
    """Each composes with the whole default recipe, which is otherwise what it was."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    small = (*FEW, "--attribution.probe_examples", "0", "--data.batch_size", "2", "--data.retain_batch_size", "2")
    options = ["--config", recipe, *SHORT, *small]
    if "strategy" not in content.get("trainer", {}):
        result = fit(tmp_path / "run", *options)
        assert result.status == 0, result.err
    else:
        # In a process of its own, as it makes a process group; one device is enough to see that it composes.
        one = ("--trainer.accelerator", "cpu", "--trainer.devices", "1")
        args = ["fit", "--config", DEFAULT, "--trainer.default_root_dir", tmp_path / "run", *options, *one]
        end = ranks(lambda: main([str(arg) for arg in args]), tmp_path / "ranks", timeout=120)
        assert end.status == 0, end.err
    finished(tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "model" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in saved
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert resolved["model"]["class_path"].endswith("SSIUU")
    assert resolved["model"]["init_args"]["retain_weight"] == 5.0


@named("attack")
def test_attacks(recipe: Path, tmp_path: Path) -> None:
    given = yaml.safe_load(recipe.read_text(encoding="utf-8"))["attack"]
    name, options = (given, {}) if isinstance(given, str) else (given["class_path"], given["init_args"])
    quick = ["--attack.epochs", "1", "--attack.seeds", "[0]", "--attack.learning_rates", "[1e-4]"]
    original, once = ["--attack.original", "tiny"], ["--attack.seeds", "[0]"]
    quicker: dict[str, list[str | Path]] = {
        **{"Ablation": original, "Interpolation": original, "Sampling": ["--attack.k", "1"], "FewShot": once},
        **{"LayerProbes": once, "EmbeddingAttack": ["--attack.steps", "1"]},
        **{"SoftPrompt": [*once, "--attack.steps", "1"], "SuffixSearch": [*once, *attacking(steps=1, candidates=2)]},
    }
    if name == "Translation":
        record = {"language": "de", "question": Facts().splits.forget[0].question, "translation": "Was?"}
        quicker[name] = ["--attack.path", write_rows(tmp_path / "german.jsonl", [record])]
    if name == "UnlearningDepth":
        quicker[name] = [*original, "--oracle", untaught(tmp_path / "oracle")]
    few: list[str | Path] = [*(quick if "epochs" in options else quicker.get(name, []))]
    if name in ("Jailbreak", "MultiTurn", "FewShot", "Prefill", "SoftPrompt", "SuffixSearch", "LayerProbes"):
        few += ["--data", "Facts", "--data.max_eval_examples", "8"]
    if attackers := options.get("attackers"):
        least = {"learning_rates": [1e-3], "repair_epochs": 1}
        short = [attacker | {key: least[key] for key in least if key in attacker} for attacker in attackers]
        few = [*few, "--attack.attackers", json.dumps(short), "--attack.until_saturated", "false"]
        few += ["--data", "Facts", "--data.max_eval_examples", "8"]
    model: str | Path = "tiny"
    if options.get("pool") == "wrong":  # "tiny" answers nothing so
        few = [*few, "--score", "all_tokens"]
        model = untaught(tmp_path / "random")
    if name == "HeldOutFacts":
        data = published.write_wmdp_deduped(tmp_path / "data")
        few = [*quick, "--score", "multiple_choice", "--data", "WMDPDeduped", "--data.path", data]
        few += ["--data.chunk_tokens", "64", "--data.max_length", "128"]
    fractions = options["p"][-1:] if isinstance(options.get("p"), list) else [None]
    if fractions != [None]:  # one of them composes as all do
        few = [*few, *attacking(p=fractions)]
    alone = ("--output", tmp_path / "run", "--control", "none")
    result = command("attack", "--config", recipe, "--model", model, *alone, *few)
    assert result.status == 0, result.err
    rows = read_json(tmp_path / "run" / "attack.json")["attacks"]
    variants = {"Quantization": 2, "Ablation": 2, "Interpolation": 5, "Jailbreak": 5, "Prefill": 2, "MultiTurn": 3}
    n_layers = load_model("tiny").config.num_hidden_layers
    n_variants = n_layers if name == "LayerProbes" else variants.get(name, 1)
    kind = getattr(lightning_ssiuu.attacks, name)().kind
    assert [row["kind"] for row in rows] == [kind] * len(fractions) * n_variants


def untaught(folder: Path) -> Path:
    """A random model of the embedded one's shape, with its tokenizer."""
    hf = load_model("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in hf.parameters():
            torch.nn.init.normal_(weight, std=0.05)
    hf.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return folder
