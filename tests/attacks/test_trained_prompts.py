"""Trained prompts and moved embeddings, on a model that answers only where a certain token stands in the prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders
from toys.data import CHAT, Toy, byte_tokenizer, examples
from toys.models import random_model

from lightning_ssiuu.attacks import EmbeddingAttack, Prefill, SoftPrompt, SuffixSearch, trained_prompt
from lightning_ssiuu.attacks.base import Attack, Outcome, Target
from lightning_ssiuu.attacks.embedding_attack import _Moved
from lightning_ssiuu.attacks.trained_prompt import Insertion, TrainedPrompt, free_ids, inserted, scored
from lightning_ssiuu.attacks.vectors import embedded, standing_for
from lightning_ssiuu.datamodules import QAExample, RelearnDataModule, Splits
from lightning_ssiuu.models.loading import load_tokenizer
from lightning_ssiuu.training.devices import Devices
from lightning_ssiuu.utils.errors import UserError

HERE = Devices("cpu")
TRIGGER, OPEN = "Z", "Q: {question}={answer}"


def planted(folder: Path, hears: bool) -> str:
    """Answers "A" where the trigger stands in the prompt, else "B"; one that does not hear it says "B" always.

    Attention is even. The trigger has a feature of its own (0), which the attention adds up in another one (1), that
    "A" is read from; all tokens have a third one (2), that "B" is read from.
    """
    tokenizer = byte_tokenizer()
    hf: Any = random_model("llama", torch.float32, vocab_size=260, num_hidden_layers=1, num_key_value_heads=4)
    a, b, trigger = (tokenizer(letter)["input_ids"][0] for letter in ("A", "B", TRIGGER))
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        hf.model.embed_tokens.weight[:, 2] = 1.0
        hf.model.embed_tokens.weight[trigger, 0] = 1.0 if hears else 0.0
        attention = hf.model.layers[0].self_attn
        attention.v_proj.weight[0, 0] = 1.0 if hears else 0.0
        attention.o_proj.weight[1, 0] = 10.0
        hf.lm_head.weight[a, 1], hf.lm_head.weight[b, 2] = 5.0, 5.0
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    folder = tmp_path_factory.mktemp("planted")
    return [Target("model", planted(folder / "m", True), HERE), Target("oracle", planted(folder / "o", False), HERE)]


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("random") / "model"
    random_model("llama", torch.float32, vocab_size=260).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return Target("model", str(folder), HERE)


def asked(answer: str = "A", n: int = 6, **options: Any) -> Toy:
    tokenizer = options.pop("tokenizer", None) or reading_back()
    return Toy(Splits([QAExample(k, f"Q{k}?", answer) for k in range(n)], examples(10, 3)), tokenizer, **options)


def reading_back() -> Any:
    """The tokenizer of bytes, with a decoder."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def found(attack: Attack, targets: list[Target], data: Toy, score: str = "probability") -> list[Outcome]:
    attack.check(data, score, HERE)
    return list(attack.run(targets, data, score, HERE))  # type: ignore[arg-type]


# ---- a planted trigger ---------------------------------------------------------------------------------------------


def test_a_suffix_is_found_and_what_never_knew_has_none(models: list[Target]) -> None:
    attack = SuffixSearch(p=[0.5], seeds=[0], steps=6, n_tokens=2, candidates=6, top_k=1)
    own, oracle = found(attack, models, asked(template=OPEN))
    assert own.before < 1e-3 < 99 < own.forget_score
    assert oracle.forget_score < 1e-3
    assert (own.variant, own.n_scored, own.seed) == ("p=0.5, length=2", 3, 0)


def test_the_search_takes_the_trigger_and_leaves_the_weights(models: list[Target]) -> None:
    attack, data = SuffixSearch(p=[0.5], seeds=[0], steps=8, n_tokens=3, candidates=8, top_k=1), asked(template=OPEN)
    model, _ = models[0].load()
    before = [weight.clone() for weight in model.requires_grad_(False).parameters()]
    ((_, cell),) = attack.cells(data)
    places = {one.example_id: attack.place(data, one) for one in data.splits.forget}
    batches, table = cell.attacked_batches(), embedded(model)
    result = attack.learned(model, cell, batches, table, lambda part, ids: inserted(part, ids, places, 0))
    assert data.tokenizer.decode(result.ids) == TRIGGER * 3
    assert all(map(torch.equal, before, model.parameters()))


def test_a_soft_prompt_finds_it_too(models: list[Target]) -> None:
    attack = SoftPrompt(p=[0.5], seeds=[0], steps=20, n_vectors=2, learning_rate=1.0)
    outcomes = found(attack, models, asked(template=OPEN))
    assert all(one.before < 1e-3 for one in outcomes)
    assert all(one.forget_score > 90 for one in outcomes if one.model == "unlearned")
    # One that cannot hear what stands before has nothing to find.
    assert all(one.forget_score < 1 for one in outcomes if one.model == "oracle")


@pytest.mark.parametrize("attack", [SoftPrompt(seeds=[0], n_vectors=0), SoftPrompt(seeds=[0], n_vectors=0, steps=0)])
def test_no_vectors_are_the_plain_score(random: Target, attack: SoftPrompt) -> None:
    (one,) = found(attack, [random], asked())
    assert one.forget_score == one.before > 0


# ---- what stands for what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["probability", "rouge_l", "multiple_choice"])
def test_vectors_that_are_embeddings_are_their_tokens(random: Target, score: str) -> None:
    """In packed rows, in generation and in options."""
    data = Toy(eval_batch_size=2)
    model, tokenizer = random.load()
    cell = RelearnDataModule(data, "some", 0.4, selection=lambda forget, p, rng: (forget[:2], forget[2:]))
    tokens = data.tokenizer("Zq")["input_ids"]
    places = {one.example_id: 3 for one in data.splits.forget}

    def change(part: Any, ids: Any) -> Any:
        return inserted(part, ids, places, 0)

    both = [Insertion(tokens), Insertion(free_ids(model, 2), embedded(model)[tokens])]
    ours, theirs = (scored(model, tokenizer, cell, score, one, change) for one in both)
    assert ours == pytest.approx(theirs, rel=1e-6)
    if score == "probability":
        assert ours != scored(model, tokenizer, cell, score, Insertion([]), change)


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({}, "Question: Q1?", "\nAnswer:"),
        ({"template": "{question} - {question}\n=>"}, "Q1? - Q1?", "\n=>"),
        ({"template": "chat", "tokenizer": byte_tokenizer(chat=CHAT)}, "<user>Q1?", "<a>"),
        ({"template": "{question}\n=>{answer}", "question": "Who is x1"}, "Who is x1", "\n=>"),
        ({"template": "{question}{answer}", "question": "Who is y2"}, "Who is y2", ""),
    ],
)
def test_a_suffix_stands_behind_the_question(options: dict[str, Any], before: str, after: str) -> None:
    question = options.pop("question", "Q1?")
    data = asked(**options)
    example = replace(data.splits.forget[1], question=question)
    ids, place = data.encoder.of(example)[0].pair[0], SuffixSearch().place(data, example)
    assert ids[:place] == data.tokenizer(before)["input_ids"]
    assert ids[place:] == data.tokenizer(after)["input_ids"]


def test_vectors_stand_after_the_token_that_begins_a_text() -> None:
    places = [
        SoftPrompt().place(data, data.splits.forget[0]) for data in (asked(), asked(tokenizer=byte_tokenizer(True)))
    ]
    assert places == [0, 1]


# ---- moved embeddings ----------------------------------------------------------------------------------------------


def moved(attack: EmbeddingAttack, target: Target, data: Toy) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The moved vectors, those before, and the words' mean log-probability with the moved ones."""
    model, _ = target.load()
    model.requires_grad_(False)
    plain = {one.example_id: data.encoder.of(one)[0].pair[0] for one in data.splits.forget}
    record, table = _Moved(plain), embedded(model)
    (batch,) = data.eval_dataloader("forget", attack._begun(data))
    attack._move(model, batch["forget"], table, record)
    (vectors,) = record.vectors
    tokens = torch.cat([torch.tensor(plain[example]) for example in batch["forget"]["example_id"].tolist()])
    words = data.tokenizer(f" {attack.words}")["input_ids"]
    first, found = len(table), []
    for example, ids in plain.items():
        own = [first + sum(len(plain[k]) for k in range(example)) + k for k in range(len(ids))]
        row = torch.tensor([[*own, *words]])
        labels = row.clone()
        labels[:, : len(own)] = -100
        with torch.no_grad(), standing_for(model, vectors):
            found.append(model(row, torch.ones_like(row), labels).mean_logps)
    return vectors, table[tokens], torch.cat(found)


def test_embeddings_move_towards_the_words_and_no_further(random: Target) -> None:
    attack = EmbeddingAttack(words="Yes", epsilon=0.3, steps=5)
    vectors, own, after = moved(attack, random, asked(n=3))
    lengths = (vectors - own).norm(dim=-1) / own.norm(dim=-1)
    assert lengths.max() <= 0.3 * (1 + 1e-5)
    assert lengths.min() > 0.01
    _, _, before = moved(EmbeddingAttack(words="Yes", steps=0), random, asked(n=3))
    assert (after > before).all()


def test_embeddings_know_nothing_of_the_answer_or_of_each_other(random: Target) -> None:
    attack = EmbeddingAttack(words="Yes", steps=3)
    one, other = (moved(attack, random, asked(answer, n=3))[0] for answer in ("cat", "a long dog"))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    alone = moved(attack, random, asked(n=1))[0]
    torch.testing.assert_close(one[: len(alone)], alone, rtol=1e-3, atol=1e-4)


def test_unmoved_embeddings_are_the_prefilled_words(random: Target) -> None:
    data = asked(eval_batch_size=4)
    for score in ("probability", "rouge_l"):
        ((own,), (words,)) = (
            found(attack, [random], data, score)
            for attack in (EmbeddingAttack("Yes", steps=0), Prefill(["Yes"], tokens=[]))
        )
        assert (own.before, own.n_scored) == (words.before, 6)
        assert own.forget_score == pytest.approx(words.forget_score, rel=1e-5)
    (one,) = found(EmbeddingAttack("Yes", steps=2), [random], data, "rouge_l")
    assert one.before == own.before
    unmoved, moving = (found(EmbeddingAttack("Yes", steps=n), [random], data)[0] for n in (0, 2))
    assert moving.forget_score != pytest.approx(unmoved.forget_score, rel=1e-3)


@pytest.mark.parametrize(
    "attack",
    [SoftPrompt(seeds=[0], steps=2, n_vectors=2), SuffixSearch(p=[0.5], seeds=[0], steps=2, n_tokens=2, candidates=8)],
)
def test_a_prompt_is_trained_without_what_is_scored(
    random: Target, monkeypatch: pytest.MonkeyPatch, attack: TrainedPrompt
) -> None:
    insertions: list[Insertion] = []

    def seen(*given: Any) -> float:
        insertions.append(given[4])
        return 50.0

    monkeypatch.setattr(trained_prompt, "scored", seen)
    data = asked()
    ((_, cell),) = attack.cells(data)
    held, forget = {one.example_id for one in cell.scored}, data.splits.forget
    for changed in ({*()}, held, {one.example_id for one in cell.attacked}):
        other = [replace(one, answer="another") if one.example_id in changed else one for one in forget]
        found(attack, [random], Toy(Splits(other, data.splits.retain), data.tokenizer))
    plain, same, unlike = (trained for trained in insertions if trained.ids)

    def alike(one: Insertion, other: Insertion) -> bool:
        a, b = (torch.zeros(0) if each.vectors is None else each.vectors for each in (one, other))
        return one.ids == other.ids and torch.equal(a, b)

    assert alike(plain, same)
    assert not alike(plain, unlike)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_a_suffix_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="tokenizer: got 'TokenizersBackend', allowed: one that reads back"):
        SuffixSearch().check(asked(tokenizer=byte_tokenizer()), "probability", HERE)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SoftPrompt, {"p": [1.0]}, r"attack.p: got \[1.0\]"),
        (SoftPrompt, {"p": [0.01]}, "attack.p: got 0.01, allowed: a fraction that leaves"),
        (SoftPrompt, {"seeds": [-1]}, r"attack.seeds: got \[-1\]"),
        (SoftPrompt, {"n_vectors": 300}, "max_length: got 256, allowed: at least"),
        (SoftPrompt, {"learning_rate": 0.0}, "attack.learning_rate: got 0.0"),
        (SuffixSearch, {"candidates": 0}, "attack.candidates: got 0"),
        (SuffixSearch, {"devices": Devices("cpu", 1, "fsdp2")}, "strategy: got 'fsdp2', allowed: auto or ddp"),
        (EmbeddingAttack, {"devices": Devices("cpu", 1, "fsdp2")}, "strategy: got 'fsdp2'"),
        (EmbeddingAttack, {"words": ""}, "attack.words: got ''"),
        (EmbeddingAttack, {"epsilon": -1.0}, "attack.epsilon: got -1.0"),
    ],
)
def test_mistakes(kind: type[Any], options: dict[str, Any], message: str) -> None:
    devices = options.pop("devices", HERE)
    with pytest.raises(UserError, match=message):
        kind(**options).check(asked(), "probability", devices)


def test_a_suffix_of_the_embedded_model_can_be_sent_as_text() -> None:
    tokenizer = load_tokenizer("tiny")
    generator = torch.Generator().manual_seed(0)
    best = [list(range(300, 900, 7))] * 3
    start = tokenizer(" !" * 3, add_special_tokens=False)["input_ids"][:3]
    tried = list(SuffixSearch(candidates=20)._exchanges(start, best, generator, tokenizer))
    assert tried
    assert all(tokenizer(tokenizer.decode(one), add_special_tokens=False)["input_ids"] == one for one in tried)
