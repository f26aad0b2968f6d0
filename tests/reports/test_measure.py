"""What an audit measures, and that it asks a model for no more than its figures need."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from toys.data import Toy, examples
from toys.models import random_model

from lightning_ssiuu.attribution.logit_lens import layer_logps, prefers_answer
from lightning_ssiuu.attribution.weight_change import MINIMUM_COST, OwnChange, OwnFlag, own_flags
from lightning_ssiuu.datamodules import Splits
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import neuron_sites
from lightning_ssiuu.reports.audit import measure

SPLITS = Splits(examples(0, 5, 3), examples(10, 4, 3), examples(20, 2, 3))


def toy_model() -> AnswerModel:
    return AnswerModel(random_model(dtype=torch.float64, vocab_size=260))


@pytest.mark.parametrize("share", [0.0, MINIMUM_COST - 1e-6, MINIMUM_COST + 1e-6, 0.5])
def test_the_retain_set_is_asked_where_a_unit_costs_the_minimum_alone(share: float) -> None:
    model, asked = toy_model(), list[Any]()
    sites = neuron_sites(model.hf)

    def changes(_model: Any, _original: Any, parts: Any, *_: Any) -> OwnChange:
        parts = list(parts)
        asked.append(parts[0]["example_id"].tolist())
        rows = {site.key: torch.zeros(site.width, dtype=torch.float64) for site in sites}
        if len(asked) == 1:
            rows[sites[2].key][1] = math.log1p(-share)
        return OwnChange(sites, rows, {}, 1, sum(len(part["labels"]) for part in parts))

    with patch.object(measure, "own_change", changes):
        flags = measure._own_flags(model, {}, Toy(SPLITS), 3, "length_normalised", 1e-3)
    forget, retain = [0, 1, 2], [10, 11, 12]
    enough = share > MINIMUM_COST
    assert asked == ([forget, retain] if enough else [forget])
    # What was found is what asking both would have found.
    asked.clear()
    both = [changes(None, None, [{"example_id": torch.tensor([0]), "labels": torch.zeros(1, 2)}]) for _ in range(2)]
    assert flags == own_flags(both[0], both[1])
    assert [type(flag) for flag in flags] == [OwnFlag] * enough


def test_the_lens_looks_at_the_answer_and_one_distractor_alone() -> None:
    model, data = toy_model(), Toy(SPLITS, eval_batch_size=2)
    rows: list[int] = []
    model.hf.get_input_embeddings().register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    found = measure.answer_lens(model, data)
    assert sorted(rows) == [2, 4, 4]
    logps, preferred = [], []
    for batch in data.eval_dataloader("forget"):
        options = batch["forget"]["options"]
        logps.append(layer_logps(model, {name: options[name] for name in ("input_ids", "attention_mask", "labels")}))
        preferred.append(prefers_answer(logps[-1], options["option_of"]).double())
    every = torch.cat(logps, 1).unflatten(1, (-1, 4))
    expected = {"answer": every[:, :, 0], "distractor": every[:, :, 1], "accuracy": 100 * torch.cat(preferred, 1)}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64), values.mean(1))
