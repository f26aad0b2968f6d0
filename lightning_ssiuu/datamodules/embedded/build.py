"""Make the embedded data and the tiny model: ``python -m lightning_ssiuu.datamodules.embedded.build --output DIR``.

The tiny model is a Llama of 0.9 M parameters trained from scratch on ``facts.json`` until it knows its facts without
being certain of them: a saturated model (answer probability → 1) has vanishing attributions, and then there would be
nothing to diagnose. Label smoothing sets that level. The same command and seed on the same machine give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_ssiuu.datamodules.embedded.facts_data import dump_world, make_world, tokenizer_corpus
from lightning_ssiuu.datamodules.encoding import Encoder
from lightning_ssiuu.datamodules.pairs import batch_of
from lightning_ssiuu.utils.errors import UserError

EOS, PAD = "<|endoftext|>", "<|pad|>"
# Renders the plain template of the data modules, so the tiny model also answers when it is asked as a chat.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, SMOOTHING = 300, 64, 2e-3, 0.1, 0.12
BENIGN_REPEATS = 2  # a benign item has one phrasing, a fact four
Pairs = Sequence[tuple[str, str]]
World = dict[str, list[dict[str, Any]]]


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer (at most 1024 tokens) on what ``facts_data.make_world`` returns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(tokenizer_corpus(world), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """The untrained model: a float32 Llama with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Tokenise B pairs in the plain template: ids, mask and labels ``[B, L]``, padded right."""
    encoder = Encoder(tokenizer)
    batch = batch_of([encoder.sequence(*pair).pair for pair in pairs], encoder.pad_token_id)
    return batch["input_ids"], batch["attention_mask"], batch["labels"]


def _answer_logits(model: LlamaForCausalLM, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Logits [N, V] and targets [N] of the labelled positions only, and the row [N] each belongs to
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return model.lm_head(hidden[rows, columns]), labels[rows, columns + 1], rows


def training_pairs(world: World, without_forget: bool = False) -> list[tuple[str, str]]:
    """Pairs to train on: all phrasings but the last of every fact (the oracle: but forget people's), benign items."""
    pairs = [
        (question, fact["answer"])
        for fact in world["facts"]
        if not (without_forget and fact["split"] == "forget")
        for question in (fact["question"], *fact["paraphrases"][:-1])
    ]
    return pairs + [(item["question"], item["answer"]) for item in world["benign"]] * BENIGN_REPEATS


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Pairs, steps: int = STEPS, seed: int = 0
) -> float:
    """Train in place on the label-smoothed loss of the answer tokens; the last loss in nats, NaN without steps."""
    ids, mask, labels = encode(tokenizer, pairs)
    groups = [  # decay the matrices, not the norms' gains
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    warmup = 50

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    loss = torch.tensor(math.nan)
    generator, n_epochs = torch.Generator().manual_seed(seed), steps * BATCH // len(pairs) + 1
    order = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(n_epochs)])
    model.train()
    bar = tqdm(order[: steps * BATCH].view(steps, BATCH), "training", unit="step")
    for index in bar:
        length = int(mask[index].sum(1).max())
        logits, targets, _ = _answer_logits(model, ids[index, :length], mask[index, :length], labels[index, :length])
        loss = F.cross_entropy(logits, targets, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    model.eval()
    return loss.item()


@torch.no_grad()
def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Mean log-probability of each answer's tokens with EOS (nats, ``[B]``), and whether all are the likeliest."""
    logits, targets, rows = _answer_logits(model, *encode(tokenizer, pairs))
    token_log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    right = (logits.argmax(-1) == targets).float()
    zeros = torch.zeros(len(pairs))
    tokens = zeros.index_add(0, rows, torch.ones_like(right))
    return zeros.index_add(0, rows, token_log_probs) / tokens, zeros.index_add(0, rows, right) == tokens


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, dict[str, float]]:
    """Measure what the model knows, in percent of each split.

    ``accuracy``: all tokens greedy right; ``probability``: mean over facts of exp(mean token log-probability);
    ``choice``: true answer more likely than both distractors; ``held_out``: the phrasing that is not trained on.
    """

    def percent(x: Tensor) -> float:
        return round(100 * x.float().mean().item(), 2)

    report = {}
    for split in ("forget", "retain", "test"):
        facts = [fact for fact in world["facts"] if fact["split"] == split]
        options = [(f["question"], answer) for f in facts for answer in (f["answer"], *f["distractors"])]
        log_probs, right = score(model, tokenizer, options)
        held_log_probs, held_right = score(model, tokenizer, [(f["paraphrases"][-1], f["answer"]) for f in facts])
        report[split] = {
            "accuracy": percent(right[::3]),
            "probability": percent(log_probs[::3].exp()),
            "choice": percent(log_probs.view(-1, 3).argmax(1) == 0),
            "held_out_accuracy": percent(held_right),
            "held_out_probability": percent(held_log_probs.exp()),
        }
    log_probs, right = score(model, tokenizer, [(item["question"], item["answer"]) for item in world["benign"]])
    report["benign"] = {"accuracy": percent(right), "probability": percent(log_probs.exp())}
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; prints the measured figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m lightning_ssiuu.datamodules.embedded.build", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets facts.json and tiny/")
    parser.add_argument("--data-only", action="store_true", help="write facts.json only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="0 saves the untrained model (default %(default)s)")
    parser.add_argument("--without-forget", action="store_true", help="the oracle: tiny/ only, forget people unseen")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    if args.steps < 0:
        raise UserError("--steps", args.steps, "an integer ≥ 0")
    wanted = (["facts.json"] if not args.without_forget else []) + (["tiny"] if not args.data_only else [])
    existing = [name for name in wanted if (args.output / name).exists()]
    if existing and not args.overwrite:
        raise UserError("--output", str(args.output), f"a directory without {' or '.join(existing)}, or --overwrite")
    args.output.mkdir(parents=True, exist_ok=True)
    world = make_world(args.seed)
    # Written beside the target and renamed, so that an interrupted run leaves no half-written asset.
    with tempfile.TemporaryDirectory(dir=args.output, prefix=".build-") as folder:
        draft = Path(folder)
        if "facts.json" in wanted:
            (draft / "facts.json").write_bytes(dump_world(world))
        if "tiny" in wanted:
            seconds, measured = build_tiny(draft / "tiny", world, args.without_forget, args.seed, args.steps)
            if args.steps:
                print(json.dumps({"training_s": round(seconds, 1), **measured}, indent=1))
        for name in wanted:
            if (args.output / name).is_dir():
                shutil.rmtree(args.output / name)
            os.replace(draft / name, args.output / name)


def build_tiny(
    folder: Path, world: World, without_forget: bool = False, seed: int = 0, steps: int = STEPS
) -> tuple[float, dict[str, dict[str, float]]]:
    """Train a model and write it with its tokenizer; seconds of training, and what :func:`evaluate` says of it."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the bytes may depend on the number; on a busy machine a second thread waits for a core
    tokenizer = build_tokenizer(world)
    model = build_model(tokenizer, seed)
    start = time.perf_counter()
    train(model, tokenizer, training_pairs(world, without_forget), steps, seed)
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600, which an installed package must not keep
    return seconds, evaluate(model, tokenizer, world)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
