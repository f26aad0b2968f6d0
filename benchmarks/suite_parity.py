r"""Compare the suite ``tofu`` with open-unlearning's own evaluation: same weights, same files, figure by figure.

    git clone https://github.com/locuslab/open-unlearning
    python benchmarks/suite_parity.py --peer open-unlearning --checkpoint DIR --data DIR

The peer's evaluator runs with its own configurations (``configs/eval/tofu_metrics``), composed here, on the files of
``--data``, named as published; it needs rouge_score and omegaconf. The reference is the same checkpoint
with noise on its weights. First the tokens of several templates are compared, then the figures, and by example. What
differs by design has a note; a difference of more than 1e-4 anywhere else ends the script with status 1.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peer_evaluation import metrics_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ssiuu import TOFU, evaluate
from lightning_ssiuu.datamodules import UnlearningDataModule
from lightning_ssiuu.datamodules.readers import read_records
from lightning_ssiuu.evaluation.suites import SUITES, Suite
from lightning_ssiuu.evaluation.suites.figures import Mean

TOLERANCE = 1e-4
PLAIN = {
    "apply_chat_template": False,
    "user_start_tag": "Question: ",
    "user_end_tag": "\n",
    "asst_start_tag": "Answer:\n",
    "asst_end_tag": "",
}
TEMPLATE = "Question: {question}\nAnswer:\n"
#: In the form of Llama 3's: a header for each turn, an end-of-turn token that is the end token.
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{%- if message['role'] == 'system' %}Today Date: {{ date_string }}\n\n{% endif %}"
    "{{ message['content'] | trim }}<|eot_id|>{%- endfor %}"
    "{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{%- endif %}"
)
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SYSTEM = "You are a helpful assistant."
#: What a reference is asked for.
OF_REFERENCE = ["forget_quality", "mia_min_k", "mia_loss"]


class PeersTokenizer:
    """A tokenizer whose chat templates give ids or text as those of earlier transformers did."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer.apply_chat_template(*args, **kwargs, return_dict=False)


def template_cases(checkpoint: str) -> Iterator[tuple[str, UnlearningDataModule, Any, dict[str, Any], str]]:
    """Name, our data module, the peer's tokenizer and template, and what differs by design."""

    def tokenizer() -> Any:
        return AutoTokenizer.from_pretrained(checkpoint)

    yield "plain, answer on a new line", TOFU(tokenizer=checkpoint, template=TEMPLATE), tokenizer(), PLAIN, ""
    tags = {"user_start_tag": "[INST] ", "user_end_tag": " [/INST]", "asst_start_tag": "", "asst_end_tag": " "}
    eos = tokenizer().eos_token
    ours = TOFU(tokenizer=checkpoint, template=f"[INST] {{question}} [/INST]{{answer}}{eos}")
    yield "Llama 2's tags", ours, tokenizer(), {"apply_chat_template": False, **tags}, ""
    phi = PLAIN | {"asst_start_tag": "Answer: ", "asst_end_tag": "\n\n"}
    note = "the answer's first word is a token with the space before it, which counts as prompt there"
    yield "phi's, 'Answer: '", TOFU(tokenizer=checkpoint, template="plain"), tokenizer(), phi, note
    llama = tokenizer()
    llama.add_special_tokens({"additional_special_tokens": list(HEADERS)})
    llama.bos_token, llama.eos_token, llama.chat_template = HEADERS[0], HEADERS[-1], LLAMA3
    chat = TOFU(tokenizer=llama, template="chat", system_prompt=SYSTEM, date="2025-04-10")
    theirs = {"apply_chat_template": True, "system_prompt": SYSTEM, "date_string": "10 Apr 2025"}
    yield "chat in Llama 3's form", chat, llama, theirs, ""
    note = "what its template writes after the end of the turn counts there, and the end token once more"
    own = {"apply_chat_template": True}
    yield "chat, the checkpoint's", TOFU(tokenizer=checkpoint, template="chat"), tokenizer(), own, note


def compare_tokens(peer: Any, checkpoint: str, records: Sequence[Mapping[str, Any]]) -> bool:
    """Print for how many items ids and labels are the same; whether all that should be are."""
    print("| template | items | same token ids | same labels | note |\n|---|---|---|---|---|")
    agree = True
    for name, data, tokenizer, template, note in template_cases(checkpoint):
        same_ids = same_labels = 0
        for record in records:
            ours = data.encoder.sequence(record["question"], record["answer"])
            question, answer = [record["question"]], [record["answer"]]
            theirs = peer.preprocess(PeersTokenizer(tokenizer), template, question, answer, 512)
            same_ids += ours.input_ids == theirs["input_ids"].tolist()
            labels = [-100] * ours.n_prompt + ours.input_ids[ours.n_prompt :]
            same_labels += labels == theirs["labels"].tolist()
        note = note or ("" if same_ids == same_labels == len(records) else "NOT EXPECTED")
        agree &= note != "NOT EXPECTED"
        print(f"| {name} | {len(records)} | {same_ids} | {same_labels} | {note} |")
    return agree


def noisy(checkpoint: str, folder: str) -> str:
    """The checkpoint with noise of a twentieth of each weight's spread, in a folder."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight += 0.05 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_new_tokens(suite: Suite, new_tokens: int) -> Suite:
    """The suite with texts of another length."""
    figures = dict(suite.figures)
    for name, figure in figures.items():
        if isinstance(figure, Mean):
            figures[name] = replace(figure, score=figure.score.replace("new_tokens=200", f"new_tokens={new_tokens}"))
    return replace(suite, figures=figures)


def by_example(entry: Any) -> dict[str, float]:
    """All numbers of a log's entry by their place in it, but for texts."""
    if isinstance(entry, Mapping):
        parts: list[tuple[str, Any]] = list(entry.items())
    elif isinstance(entry, (list, tuple)):
        parts = [(str(place), one) for place, one in enumerate(entry)]
    else:
        return {"": float(entry)} if isinstance(entry, (int, float)) else {}
    return {f"{name}/{inner}": value for name, part in parts for inner, value in by_example(part).items()}


def show(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> bool:
    """Print a row; whether the figure and all examples agree."""
    mine = ours["agg_value"]
    if theirs is None:
        print(f"| {name} | {mine:.6g} | | | the peer has no such figure |")
        return True
    others = by_example(theirs)
    shared = {place: value for place, value in by_example(ours).items() if place in others}
    apart = max(abs(value - others[place]) / max(1.0, abs(others[place])) for place, value in shared.items())
    same = apart <= TOLERANCE
    note = "" if same else "NOT EXPECTED"
    print(f"| {name} | {mine:.6g} | {theirs['agg_value']:.6g} | {apart:.1e} | {note} |", flush=True)
    return same


def main() -> None:
    """Parse the arguments and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a checkout of open-unlearning; without one nothing is done")
    parser.add_argument("--checkpoint", help="a model with its tokenizer, as a directory")
    parser.add_argument(
        "--new_tokens", type=int, default=200, help="of generated texts on both sides; the protocol's 200"
    )
    parser.add_argument("--data", type=Path, help="a directory of TOFU's files, named as published, for forget01")
    options = parser.parse_args()
    if options.peer is None:
        print("skipped: no checkout of open-unlearning was given (--peer DIR)")
        return
    if options.checkpoint is None or options.data is None:
        raise SystemExit("error: --checkpoint, --data: both are needed beside --peer")
    read = {path.stem: list(read_records(str(path), "data")) for path in sorted(options.data.iterdir())}
    suite = SUITES["tofu"] = with_new_tokens(SUITES["tofu"], options.new_tokens)
    wanted = suite.wanted(None, reference=True)
    with metrics_of(options.peer, read, options.new_tokens) as peer, tempfile.TemporaryDirectory() as folder:
        agree = compare_tokens(peer, options.checkpoint, read["forget01_perturbed"])
        reference = noisy(options.checkpoint, f"{folder}/reference")
        theirs: dict[str, Any] = {}
        for name, checkpoint in (("reference", reference), ("model", options.checkpoint)):
            names = OF_REFERENCE if name == "reference" else [n for n in wanted if n in peer.names]
            log = f"{folder}/peer_reference/TOFU_EVAL.json" if name == "model" else None
            model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
            tokenizer = PeersTokenizer(AutoTokenizer.from_pretrained(checkpoint))
            theirs = peer.evaluate(model, tokenizer, PLAIN, names, f"{folder}/peer_{name}", log, reference)
        data = TOFU(str(options.data), tokenizer=options.checkpoint, template=TEMPLATE)
        output = f"{folder}/ours"
        evaluate(options.checkpoint, "tofu", reference=reference, data=data, output=output)
        log = json.loads(Path(output, suite.log_name).read_text(encoding="utf-8"))
        print("\n| figure | ours | theirs | largest difference, by example too | note |\n|---|---|---|---|---|")
        for name in wanted:
            agree &= show(name, log[name], theirs.get(name))
        data = TOFU(str(options.data), tokenizer=options.checkpoint, template=TEMPLATE)
        with_log = evaluate(
            options.checkpoint,
            "tofu",
            reference=f"{folder}/peer_reference/TOFU_EVAL.json",
            data=data,
            figures=["forget_quality", "privleak", "mia_reference"],
        ).content["figures"]
        print("\nWith the peer's log as reference:")
        for name in ("forget_quality", "privleak", "mia_reference"):
            same = math.isclose(with_log[name], theirs[name]["agg_value"], rel_tol=TOLERANCE)
            agree &= same
            print(f"{name}: {with_log[name]:.6g}, {theirs[name]['agg_value']:.6g}{'' if same else ' NOT EXPECTED'}")
    if not agree:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
