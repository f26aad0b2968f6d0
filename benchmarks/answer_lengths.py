"""The embedded facts with shorter and longer answers, and a model that knows them: does length decide what SSIUU does?

    python benchmarks/answer_lengths.py --output runs/lengths

In ``short/`` an answer is its first word (1.2 tokens on average), in ``whole/`` as it is (2.7), in ``sentence/`` a
sentence. Each directory gets ``forget.jsonl``, ``retain.jsonl`` and ``test.jsonl`` of the same facts, the
embedded model after learning all of them in that form (``model/``), and the command of ``penalty_conditions.py`` is
printed. Its level is what a model that does not know gives: the probability of the answers of the same kind to other
questions, as ``stopping.threshold: chance`` has it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lightning as L
import torch

from lightning_ssiuu import CustomData, Facts, FineTuning
from lightning_ssiuu.evaluation.chance import level_of
from lightning_ssiuu.evaluation.scorer import evaluate
from lightning_ssiuu.models.export import save_pretrained
from lightning_ssiuu.training.devices import quiet_lightning

FORMS = ["short", "whole", "sentence"]
SENTENCES = {
    "Where was": "{name} was born in {answer}",
    "What is the profession": "The profession of {name} is {answer}",
    "What is the favourite": "The favourite dish of {name} is {answer}",
    "Which pet": "{name} keeps a {answer}",
    "Which instrument": "{name} plays the {answer}",
    "Who is": "The employer of {name} is {answer}",
}


def name_in(question: str) -> str:
    """The person a question is about: its two words with capitals after the first."""
    return " ".join(word.rstrip("?") for word in question.split()[1:] if word[0].isupper())


def reworded(question: str, answer: str, form: str) -> str:
    """An answer as a form has it."""
    if form == "whole":
        return answer
    if form == "short":
        return answer.split()[0]
    pattern = next(pattern for begin, pattern in SENTENCES.items() if question.startswith(begin))
    return pattern.format(name=name_in(question), answer=answer)


def main() -> None:
    """Write the files, teach the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = Facts()
    facts.setup("fit")
    for form in options.forms:
        folder = options.output / form
        folder.mkdir(parents=True, exist_ok=True)
        rows = {
            split: [
                {"question": each.question, "answer": reworded(each.question, each.answer, form)}
                for each in getattr(facts.splits, split)
            ]
            for split in ("forget", "retain", "test")
        }
        rows["others"] = [*rows["retain"], *rows["test"]]  # a model that is taught the retain set alone loses these
        for name, several in rows.items():
            text = "".join(json.dumps(row) + "\n" for row in several)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        teach(folder, options.epochs, options.rate)


def teach(folder: Path, epochs: int, rate: float) -> None:
    """Fine-tune the embedded model on all facts in their form; save it, and say how it is unlearned."""
    L.seed_everything(0, verbose=False)
    module = FineTuning(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0))
    files = {split: str(folder / f"{split}.jsonl") for split in ("forget", "others", "retain", "test")}
    data = CustomData(files["forget"], files["others"], tokenizer="tiny", train_on="all", batch_size=36)
    with quiet_lightning():
        trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, barebones=True, limit_val_batches=0)
        trainer.fit(module, datamodule=data)
    save_pretrained(module.model.hf, module.tokenizer, folder / "model")
    loaders = [data.eval_dataloader(split) for split in ("forget", "retain")]
    known = evaluate(module.model, module.tokenizer, loaders, ["probability"])
    level = level_of("chance", "probability", module.model, module.tokenizer, loaders[0], others=loaders[1])
    print({split: round(scores["probability"], 1) for split, scores in known.items()})
    print(
        f"python benchmarks/penalty_conditions.py --checkpoint {folder / 'model'} --forget {files['forget']} "
        f"--retain {files['retain']} --test {files['test']} --level {level:.3g} --output {folder / 'runs'} --only d",
        flush=True,
    )


if __name__ == "__main__":
    main()
