"""Names of published models, as pure functions: nothing is looked for but directories beside a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ssiuu.cli.suites import suite_module
from lightning_ssiuu.evaluation.published import published
from lightning_ssiuu.utils.errors import UserError

LLAMA = "Llama-3.2-1B-Instruct"
HUB = "open-unlearning/"


@pytest.mark.parametrize(
    ("name", "split", "method", "settings"),
    [
        ("forget10_NPO_lr1e-05_beta0.1_alpha1_epoch10", "forget10", "NPO", "lr 1e-05 beta 0.1 alpha 1 epoch 10"),
        ("forget10_SimNPO_lr5e-05_b3.5_a1_d1_g0.25_ep5", "forget10", "SimNPO", "lr 5e-05 b 3.5 a 1 d 1 g 0.25 ep 5"),
        ("forget05_RMU_lr1e-05_layer10_scoeff100_epoch10", "forget05", "RMU", "lr 1e-05 layer 10 scoeff 100 epoch 10"),
        ("forget01_GradDiff_lr1e-05_alpha1-dflt", "forget01", "GradDiff", "lr 1e-05 alpha 1-dflt"),
        ("forget10_UNDIAL_own", "forget10", "UNDIAL", "own "),
        ("forget10_GradAscent", "forget10", "GradAscent", ""),
    ],
)
def test_what_a_name_says(name: str, split: str, method: str, settings: str) -> None:
    words = settings.split(" ")
    for first in (f"{HUB}unlearn_tofu_", "somebody/tofu_", "/nowhere/saves/unlearn_tofu_"):
        found = published(f"{first}{LLAMA}_{name}")
        assert (found.model, found.split, found.method) == (LLAMA, split, method)
        assert found.settings == dict(zip(words[::2], words[1::2], strict=False))
        retain = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}[split]
        assert (found.original, found.oracle) == (f"{HUB}tofu_{LLAMA}_full", f"{HUB}tofu_{LLAMA}_{retain}")


def test_a_revision_is_no_part_of_the_name() -> None:
    found = published(f"{HUB}unlearn_tofu_{LLAMA}_forget10_NPO_lr1e-05@abc123")
    assert (found.name, found.settings) == (f"unlearn_tofu_{LLAMA}_forget10_NPO_lr1e-05", {"lr": "1e-05"})
    assert found.checkpoint.endswith("@abc123")


def test_directories_beside_a_directory_come_first(tmp_path: Path) -> None:
    unlearned = tmp_path / f"unlearn_tofu_{LLAMA}_forget05_NPO"
    for folder in (unlearned, tmp_path / f"tofu_{LLAMA}_full"):
        folder.mkdir()
    found = published(unlearned)
    assert found.original == str(tmp_path / f"tofu_{LLAMA}_full")
    assert found.oracle == f"{HUB}tofu_{LLAMA}_retain95"  # none is there
    content = found.content("tofu")
    assert str(tmp_path) not in str(content)
    assert content["names"]["original"] == f"tofu_{LLAMA}_full"


@pytest.mark.parametrize(
    "name", [f"{HUB}tofu_{LLAMA}_full", f"{HUB}tofu_{LLAMA}_retain90", "unlearn_tofu_X_forget20_NPO", "tiny", ""]
)
def test_a_name_that_says_nothing_is_one_line_that_says_what_to_give(name: str) -> None:
    with pytest.raises(UserError, match=r"^unlearned: got .*; of others give --original, --oracle and --data$"):
        published(name)


def test_each_model_is_asked_as_it_was_trained() -> None:
    chat = suite_module(published(f"tofu_{LLAMA}_forget01_NPO"), None)
    assert (chat.forget, chat.retain, chat.template, chat.date) == ("forget01", "retain99", "chat", "2025-04-10")
    assert (chat.path, chat.tokenizer_or_name) == (None, f"tofu_{LLAMA}_forget01_NPO")
    own = suite_module(published("tofu_Llama-2-7b-chat-hf_forget10_NPO"), "data")
    assert (own.path, own.template, own.system_prompt) == ("data", "[INST] {question} [/INST]{answer}", None)
