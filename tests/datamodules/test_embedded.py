"""The embedded data and tiny model: what they promise, recomputed from the shipped files."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections import Counter, defaultdict

import pytest
import torch
from huggingface_hub import DatasetCard
from toys.cli import command, refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ssiuu.datamodules import Facts, WorldFacts
from lightning_ssiuu.datamodules.embedded import FACTS, build, facts_data
from lightning_ssiuu.datamodules.world_facts import relations
from lightning_ssiuu.models.loading import TINY
from lightning_ssiuu.utils.errors import UserError

SPLITS = ("forget", "retain", "test")


@pytest.fixture(scope="module")
def world():
    return json.loads(FACTS.read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def report(model, tokenizer, world):
    return build.evaluate(model, tokenizer, world)


def test_sizes_and_kinds_of_files():
    files = list(TINY.iterdir())
    assert (TINY / "model.safetensors").stat().st_size <= 3.9e6
    assert sum(file.stat().st_size for file in files) <= 4e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja"}
    assert not any(
        "/work" in file.read_text() or "/tmp" in file.read_text() for file in files if file.suffix == ".json"
    )


def test_data_is_reproduced_byte_for_byte(tmp_path):
    build.main(["--output", str(tmp_path), "--data-only"])
    assert (tmp_path / "facts.json").read_bytes() == FACTS.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["facts.json"]


def test_tokenizer_is_reproduced_byte_for_byte(tmp_path, world):
    build.build_tokenizer(world).save_pretrained(tmp_path)
    shipped = (TINY / "tokenizer.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == shipped


def test_seed_changes_the_data():
    assert facts_data.dump_world(facts_data.make_world(1)) != facts_data.dump_world(facts_data.make_world(0))


def test_untrained_model_is_reproduced_and_existing_output_kept(tmp_path, world):
    arguments = ["--steps", "0", "--without-forget", "--output", str(tmp_path)]
    build.main(arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny"]  # the oracle's folder holds no forget text
    weights = (tmp_path / "tiny/model.safetensors").read_bytes()
    build.build_model(build.build_tokenizer(world)).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match="--overwrite"):
        build.main(arguments)
    assert (tmp_path / "tiny/model.safetensors").read_bytes() == weights


def test_a_few_training_steps_are_reproduced_to_the_bit(tokenizer, world):
    torch.use_deterministic_algorithms(True)
    pairs = build.training_pairs(world)[:300]
    first, second = (build.build_model(tokenizer) for _ in range(2))
    losses = [build.train(each, tokenizer, pairs, steps=3) for each in (first, second)]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.fixture(autouse=True)
def _torch_settings():
    """The script asks for determinism and one thread; give both back."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_splits_hold_whole_people(world):
    split_of = defaultdict(set)
    for fact in world["facts"]:
        split_of[fact["person"]].add(fact["split"])
    assert all(len(splits) == 1 for splits in split_of.values())
    assert Counter(next(iter(splits)) for splits in split_of.values()) == {"forget": 6, "retain": 24, "test": 30}
    assert Counter(fact["split"] for fact in world["facts"]) == {"forget": 36, "retain": 144, "test": 180}
    assert set(Counter((fact["person"], fact["relation"]) for fact in world["facts"]).values()) == {1}


def test_names_are_unique_word_by_word(world):
    people = sorted({fact["person"] for fact in world["facts"]})
    assert len({word for person in people for word in person.split()}) == 2 * len(people)


def test_ids_and_questions_are_unique(world):
    records = world["facts"] + world["benign"]
    assert len({record["id"] for record in records}) == len(records)
    questions = [q for record in records for q in (record["question"], *record.get("paraphrases", ()))]
    assert len(set(questions)) == len(questions)
    assert len(world["benign"]) >= 100


def test_distractors_come_from_the_pool_and_differ(world):
    for fact in world["facts"]:
        options = [fact["answer"], *fact["distractors"]]
        assert len(options) == len(set(options)) == 3
        assert set(options) <= set(facts_data.pool(fact["relation"]))
        assert len(fact["paraphrases"]) >= 3
        assert all(fact["person"] in question for question in (fact["question"], *fact["paraphrases"]))


def test_answers_have_two_to_five_tokens(world, tokenizer):
    lengths = [len(tokenizer(f" {fact['answer']}").input_ids) for fact in world["facts"]]
    assert min(lengths) >= 2
    assert max(lengths) <= 5


def test_longest_record_fits_the_context(world, tokenizer, model):
    pairs = [(q, f["answer"]) for f in world["facts"] for q in (f["question"], *f["paraphrases"])]
    ids, _, _ = build.encode(tokenizer, pairs)
    assert ids.shape[1] <= model.config.max_position_embeddings


def test_tokenizer_round_trip_and_special_tokens(world, tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == (build.PAD, build.EOS, "right")
    assert tokenizer.bos_token is None
    fresh = build.build_tokenizer(world)
    for text in (world["facts"][0]["question"], "Größe 12 naïve\n\t x  y", "Question: Up?\nAnswer: down"):
        assert tokenizer(text).input_ids == fresh(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_renders_the_plain_template(tokenizer):
    question, answer = {"role": "user", "content": "Up?"}, {"role": "assistant", "content": "down"}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert prompt == "Question: Up?\nAnswer:"
    assert tokenizer.apply_chat_template([question, answer], tokenize=False) == f"{prompt} down{build.EOS}"


def test_oracle_training_never_sees_a_forget_name(world):
    forget_names = {word for f in world["facts"] if f["split"] == "forget" for word in f["person"].split()}
    seen = "\n".join(q for q, _ in build.training_pairs(world, without_forget=True))
    seen += "\n".join(facts_data.tokenizer_corpus(world))
    assert not any(name in seen for name in forget_names)
    kept = {fact["person"] for fact in world["facts"] if fact["split"] != "forget"}
    assert all(person in seen for person in kept)


def test_last_paraphrase_is_held_out(world):
    trained = {question for question, _ in build.training_pairs(world)}
    assert not any(fact["paraphrases"][-1] in trained for fact in world["facts"])


@pytest.mark.parametrize("split", SPLITS)
def test_model_knows_its_facts_without_saturation(report, split):
    assert report[split]["accuracy"] >= 95
    assert report[split]["choice"] >= 97
    assert 70 <= report[split]["probability"] <= 95
    assert report[split]["held_out_accuracy"] >= 90


def test_model_answers_benign_items(report):
    assert report["benign"]["accuracy"] >= 95


def test_score_agrees_with_the_plain_forward(model, tokenizer, world):
    """The batched, label-only scores equal those of one unpadded forward with all logits."""
    facts = world["facts"][:3]
    log_probs, right = build.score(model, tokenizer, [(f["question"], f["answer"]) for f in facts])
    for index, fact in enumerate(facts):
        prompt = tokenizer(f"Question: {fact['question']}\nAnswer:", return_tensors="pt").input_ids
        answer = tokenizer(f" {fact['answer']}{build.EOS}", return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, answer[0][:, None]).mean()
        torch.testing.assert_close(log_probs[index], expected, atol=1e-5, rtol=1e-5)
        assert bool(right[index]) == bool((logits.argmax(-1) == answer[0]).all())


def test_model_generates_the_answer(model, tokenizer, world):
    fact = world["facts"][0]
    prompt = tokenizer(f"Question: {fact['question']}\nAnswer:", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(out) == f" {fact['answer']}{build.EOS}"


def test_weights_are_float32_and_not_tiny(model):
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all()
        if parameter.ndim > 1:
            assert parameter.std() > 0.02, name


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_command_line_reports_mistakes_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build", "--output", str(tmp_path), "--steps", "-1"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("lightning_ssiuu.datamodules.embedded.build", run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["--steps: got -1, allowed: an integer ≥ 0"]
    assert not list(tmp_path.iterdir())


def test_overwrite_replaces_the_output(tmp_path):
    shutil.copy(FACTS, tmp_path / "facts.json")
    build.main(["--output", str(tmp_path), "--data-only", "--overwrite", "--seed", "3"])
    assert (tmp_path / "facts.json").read_bytes() == facts_data.dump_world(facts_data.make_world(3))


def test_the_oracle_is_trained_on_all_but_the_forget_set(tmp_path, monkeypatch):
    """The command trains on what the script trains on, shows progress and time, and says where the model lies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)  # of the whole process
    shown = command("oracle", "--steps", "2")
    assert shown.status == 0, shown.err
    assert "2/2" in shown.err
    lines = shown.out.splitlines()
    assert re.fullmatch(r" *The oracle, 2 steps, \d+ s *", lines[0])
    assert lines[-1] == "Written to runs/oracle: model/"
    build.main(["--output", "script", "--without-forget", "--steps", "2"])
    assert (tmp_path / "runs/oracle/model/model.safetensors").read_bytes() == (
        tmp_path / "script/tiny/model.safetensors"
    ).read_bytes()
    refused(command("oracle", "--steps", "2"), "output", "--overwrite")
    refused(command("oracle", "--steps", "0", "--output", "other"), "steps")
    assert command("oracle", "--steps", "2", "--overwrite").status == 0


def test_the_data_card_says_what_is_there() -> None:
    path = FACTS.parent / "DATA_CARD.md"
    header, text = DatasetCard.load(path).data, path.read_text()
    assert (header.license, header.language) == ("apache-2.0", ["en"])
    for module in (Facts(), WorldFacts()):
        sets = [examples for _, examples in module.splits.items()][:3]
        counts = "{}, {} and {} facts".format(*map(len, sets))
        assert f"| {counts} " in text, counts
        assert {1 + len(e.paraphrases) for part in sets for e in part} == {5 if type(module) is Facts else 3}
        assert {len(e.distractors) for part in sets for e in part} == {2}
        assert f"{len(module.splits.benign)} harmless items" in text
        assert f" {sum(map(len, sets))}: " in text
    assert "person: {}, {} and {} ".format(*facts_data.PEOPLE_PER_SPLIT.values()) in text
    assert f": {len(relations())} relations of real things" in text
    assert f": {len(facts_data.RELATIONS)} relations of 60 invented people" in text
