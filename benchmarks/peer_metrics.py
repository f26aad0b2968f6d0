"""open-unlearning's metrics, by its own code on a random model, beside ours."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from peer_code import COLLATOR
from peer_tables import TOLERANCE, Table, drawn, relative, toy
from torch import Tensor

from lightning_ssiuu.datamodules.pairs import batch_of
from lightning_ssiuu.evaluation.metrics import ExtractionStrength, ModelUtility, TruthRatio, membership
from lightning_ssiuu.evaluation.metrics.answers import answer_probability
from lightning_ssiuu.evaluation.metrics.base import sequence_means
from lightning_ssiuu.evaluation.metrics.rouge import rouge_l_f1_stemmed, rouge_l_recall, rouge_l_recall_stemmed
from lightning_ssiuu.evaluation.metrics.truth_ratio import forget_quality, truth_ratio
from lightning_ssiuu.evaluation.predictions import Predictions
from lightning_ssiuu.models.answers import AnswerModel, Answers
from lightning_ssiuu.models.loading import load_tokenizer

Pairs = list[tuple[list[int], list[int]]]
#: What is compared, our values, the peer's (an aggregate first, where there is one), and what differs.
Row = tuple[str, Any, Any, str]

EOS, PAD = 0, 1
LENGTHS = [(9, 2), (4, 7), (6, 3), (3, 5), (7, 1), (5, 6), (8, 4), (2, 3)]
N_WRONG = 3
K = 0.4
LAST = "the last token, EOS, does not count there"
GRANTED = "an answer whose last token is wrong has 1/length there, 0 here"
NORMS = "the mean of the weights' norms there, the norm of all weights together here"
STEMMED = "words are stemmed there, not here, and are runs of a to z and digits"
#: Of the peer's names.
ATTACKS = {
    "loss": "loss.LOSSAttack",
    "reference": "reference.ReferenceAttack",
    "zlib": "zlib.ZLIBAttack",
    "min_k": "min_k.MinKProbAttack",
    "min_k_plus_plus": "min_k_plus_plus.MinKPlusPlusAttack",
    "gradient_norm": "gradnorm.GradNormAttack",
}


class Peer:
    """The peer's metrics of one model, as its evaluators call them.

    Args:
        class_named: What :func:`peer_code.imported` gives.
        model: Whose metrics they are.
    """

    def __init__(self, class_named: Callable[[str], Any], model: AnswerModel) -> None:
        self.class_named, self.model, self.tokenizer = class_named, model, load_tokenizer("tiny")
        self.collator = class_named(COLLATOR)(self.tokenizer, index="index")

    def metric(self, path: str, **options: Any) -> Any:
        """What a metric under ``evals.metrics`` returns."""
        own = {"collators": self.collator, "batch_size": 3, "tokenizer": self.tokenizer} | options
        metric = self.class_named(f"evals.metrics.{path}")
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return metric.evaluate_metric(self.model.hf, path, **own)

    def attack(self, name: str, forget: Pairs, holdout: Pairs, reference: AnswerModel) -> Any:
        """What its ``mia_auc`` returns for one of :data:`ATTACKS`."""
        attack = self.class_named(f"evals.metrics.mia.{ATTACKS[name]}")
        options = {"tokenizer": self.tokenizer, "reference_model": reference.hf, "k": K, "p": 2}
        data = {"forget": items(forget), "holdout": items(holdout)}
        with redirect_stderr(io.StringIO()):
            auc = self.class_named("evals.metrics.mia.utils.mia_auc")
            # Its gradient norms go through the graph of a batch once, and so take batches of one.
            return auc(attack, self.model.hf, data, self.collator, 1 if name == "gradient_norm" else 3, **options)


def items(pairs: Pairs) -> list[dict[str, Any]]:
    """Questions as the peer's data sets give them."""
    made = []
    for index, (prompt, answer) in enumerate(pairs):
        ids, labels = torch.tensor([*prompt, *answer]), torch.tensor([-100] * len(prompt) + answer)
        made.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "index": index})
    return made


def by_index(found: Mapping[str, Any], key: str) -> list[float]:
    """The aggregate of a result of the peer's, and the values by example."""
    return [found["agg_value"], *(one[key] for one in found["value_by_index"].values())]


def with_mean(values: Tensor) -> Tensor:
    """The same shape of ours."""
    return torch.cat([values.double().mean().view(1), values.double()])


def without_end(answers: Answers) -> Answers:
    """Answers less their last token."""
    index = answers.sequence_index
    kept = torch.cat([index[1:] == index[:-1], torch.tensor([False])])
    return Answers(answers.logits[kept], answers.targets[kept], index[kept], answers.n_sequences)


def read(model: AnswerModel, pairs: Pairs) -> Answers:
    """What a model says about answers."""
    part = batch_of(pairs, PAD)
    answers: Answers = model(part["input_ids"], part["attention_mask"], part["labels"])
    return answers


def exact(answers: Answers) -> Tensor:
    """Share of each answer's tokens that are right."""
    return with_mean(sequence_means(answers.token_correct, answers.sequence_index, answers.n_sequences))


def strengths(answers: Answers) -> Tensor:
    """Extraction strength of each answer."""
    values = []
    for row in range(answers.n_sequences):
        correct, metric = answers.token_correct[answers.sequence_index == row], ExtractionStrength()
        metric.update(correct, torch.zeros(len(correct), dtype=torch.long), 1)
        values.append(metric.compute() / 100)
    return torch.stack(values)


def memorization(peer: Peer, answers: Answers, forget: Pairs) -> Iterator[Row]:
    """Probability, exact memorisation and extraction strength."""
    rows = answers.sequence_index, answers.n_sequences
    short = without_end(answers)
    found = by_index(peer.metric("memorization.probability", data=items(forget)), "prob")
    yield "probability", with_mean(answer_probability(answers.token_logps, *rows)), found, ""
    found = by_index(peer.metric("memorization.exact_memorization", data=items(forget)), "score")
    yield "exact memorisation", exact(answers), found, LAST
    yield "exact memorisation without EOS", exact(short), found, ""
    found = by_index(peer.metric("memorization.extraction_strength", data=items(forget)), "score")
    yield "extraction strength", with_mean(strengths(answers)), found, f"{LAST}; {GRANTED}"
    yield "extraction strength without EOS", with_mean(strengths(short)), found, GRANTED
    granted = torch.maximum(strengths(short), 1 / short.lengths)
    yield "extraction strength without EOS, at least 1/length", with_mean(granted), found, ""


def truth(peers: list[Peer], forget: Pairs, wrong: list[Pairs]) -> Iterator[Row]:
    """Truth ratio, its aggregates, and the p-value between two models."""
    of_model, ratios, found = "memorization.truth_ratio", [], []
    for peer in peers:
        listed = [dict(enumerate(alternatives)) for alternatives in zip(*(items(some) for some in wrong), strict=True)]
        correct = peer.metric("memorization.probability", data=items(forget))
        others = peer.metric("memorization.probability", data=listed)
        pre = {"pre_compute": {"correct": correct, "wrong": others}}
        kinds = ("closer_to_1_better", "true_better", "prob_mean")
        found.append({kind: peer.metric(of_model, aggregator=kind, **pre) for kind in kinds})
        options = [pair for row, own in enumerate(forget) for pair in (own, *(some[row] for some in wrong))]
        of = torch.arange(len(forget)).repeat_interleave(1 + N_WRONG)
        scores = read(peer.model, options).mean_logps, of, len(forget)
        ratios.append(truth_ratio(*scores))
        if len(ratios) == 1:
            theirs = found[0]["true_better"]
            yield "truth ratio", ratios[0], by_index(theirs, "score")[1:], ""
            for kind, aggregator in (("forget", "closer_to_1_better"), ("retain", "true_better")):
                metric = TruthRatio(kind)  # type: ignore[arg-type]
                metric.update(*scores)
                yield f"truth ratio, {kind}", metric.compute() / 100, found[0][aggregator]["agg_value"], ""
            share = by_index(found[0]["prob_mean"], "score")
            yield "1 / (1 + truth ratio), its prob_mean", with_mean(1 / (1 + ratios[0])), share, ""
    tested = peers[0].metric(
        "privacy.ks_test",
        pre_compute={"forget": found[0]["true_better"]},
        reference_logs={"retain_model_logs": {"retain": found[1]["true_better"]}},
    )
    yield "forget quality, KS p", forget_quality(*ratios), tested["agg_value"], ""


def our_scores(model: AnswerModel, reference: AnswerModel, pairs: Pairs) -> dict[str, Tensor]:
    """Of every attack, and of those that leave out EOS there, without it."""
    answers, texts = read(model, pairs), Predictions(model, load_tokenizer("tiny"), batch_of(pairs, PAD)).references
    rows, short = (answers.sequence_index, answers.n_sequences), without_end(answers)
    own = short.sequence_index, short.n_sequences
    parameters = list(model.parameters())
    each = [membership.gradient_norm_score(-short.mean_logps, [weight]) for weight in parameters]
    return {
        "loss": membership.loss_score(answers.token_logps, *rows),
        "reference": membership.reference_score(answers.token_logps, read(reference, pairs).token_logps, *rows),
        "zlib": membership.zlib_score(answers.token_logps, *rows, texts),
        "min_k": membership.min_k(answers.token_logps, *rows, K),
        "min_k without EOS": membership.min_k(short.token_logps, *own, K),
        "min_k_plus_plus": membership.min_k_plus_plus(answers.logits, answers.targets, *rows, K),
        "min_k_plus_plus without EOS": membership.min_k_plus_plus(short.logits, short.targets, *own, K),
        "gradient_norm": membership.gradient_norm_score(-answers.mean_logps, parameters),
        "gradient_norm without EOS, mean over weights": torch.stack(each).mean(0),
    }


def inference(peer: Peer, reference: AnswerModel, forget: Pairs, holdout: Pairs) -> Iterator[Row]:
    """Scores (the peer's are higher for what looks less like a member) and AUCs of every attack."""
    members, others = (our_scores(peer.model, reference, some) for some in (forget, holdout))
    found = {name: peer.attack(name, forget, holdout, reference) for name in ATTACKS}
    notes = {"min_k": LAST, "min_k_plus_plus": LAST, "gradient_norm": f"{LAST}; {NORMS}"}
    for name, scores in members.items():
        theirs = found[name.split(" ")[0]]
        note, values = notes.get(name, ""), by_index(theirs["forget"], "score")
        yield f"MIA {name}", with_mean(-scores.detach()), values, note
        yield f"MIA {name}, AUC", membership.membership_auc(scores, others[name]), theirs["auc"], note
    first, second = (found[name]["auc"] for name in ("loss", "min_k"))
    logs = {"retain_model_logs": {"retain": {"agg_value": second}}}
    leak = peer.metric("privacy.privleak", pre_compute={"forget": {"agg_value": first}}, reference_logs=logs)
    yield "PrivLeak", membership.privleak(first, second), leak["agg_value"], ""


def rouge(peer: Peer) -> Iterator[Row]:
    """ROUGE-L of texts that either side generates, and of the peer's texts."""
    from omegaconf import OmegaConf  # the peer's options are of its kind

    pairs = [(prompt, [*answer, EOS]) for prompt, answer in drawn([(n, 7) for n, _ in LENGTHS], 5, peer.model)]
    asked = [one | {"input_ids": torch.tensor(prompt), "labels": torch.tensor([*prompt, *answer])}
             for one, (prompt, answer) in zip(items(pairs), pairs, strict=True)]  # fmt: skip
    collator = peer.class_named(COLLATOR)(peer.tokenizer, "left", "index")
    limit = OmegaConf.create({"do_sample": False, "max_new_tokens": 2 * 8})  # twice the answer's, as here
    options = {"data": asked, "collators": collator, "generation_args": limit}
    kinds = {"rougeL_recall": rouge_l_recall_stemmed, "rougeL_f1": rouge_l_f1_stemmed}
    found = {kind: peer.metric("memorization.rouge", rouge_type=kind, **options) for kind in kinds}
    texts = list(found["rougeL_recall"]["value_by_index"].values())
    part = Predictions(peer.model, peer.tokenizer, batch_of(pairs, PAD))
    for kind, function in kinds.items():
        theirs = by_index(found[kind], kind)
        own = [function(one["generation"], one["ground_truth"]) for one in texts]
        yield f"{kind}, stemmed, of its texts", with_mean(torch.tensor(own)), theirs, ""
        own = [function(*pair) for pair in zip(part.generations, part.references, strict=True)]
        yield f"{kind}, stemmed, of each side's texts", with_mean(torch.tensor(own)), theirs, ""
    own = [rouge_l_recall(one["generation"], one["ground_truth"]) for one in texts]
    theirs = by_index(found["rougeL_recall"], "rougeL_recall")
    yield "rougeL_recall, not stemmed, of its texts", with_mean(torch.tensor(own)), theirs, STEMMED


def utility(peer: Peer) -> Iterator[Row]:
    """The harmonic mean of scores' means."""
    means = {"probability": 0.8, "rouge": 0.3, "truth ratio": 0.55}
    metric = ModelUtility(list(means))
    for name, value in means.items():
        metric.update(name, torch.tensor([value - 0.1, value + 0.1], dtype=torch.float64))
    pre = {name: {"agg_value": value} for name, value in means.items()}
    found = peer.metric("utility.hm_aggregate", pre_compute=pre)
    yield "model utility, harmonic mean", metric.compute() / 100, float(found["agg_value"]), ""


def rows(class_named: Callable[[str], Any]) -> Iterator[Row]:
    """All of them."""
    model, oracle = toy(0), toy(1)
    ended = [[(p, [*a, EOS]) for p, a in drawn(LENGTHS, seed, model)] for seed in range(1, 4 + N_WRONG)]
    forget, holdout, *_ = ended
    wrong = [[(own[0], other[1]) for own, other in zip(forget, some, strict=True)] for some in ended[-N_WRONG:]]
    peers = [Peer(class_named, one) for one in (model, oracle)]
    with torch.no_grad():
        answers = read(model, forget)
        yield from memorization(peers[0], answers, forget)
        yield from truth(peers, forget, wrong)
        yield from rouge(peers[0])
        yield from utility(peers[0])
    yield from inference(peers[0], oracle, forget, holdout)


def compare(class_named: Callable[[str], Any]) -> bool:
    """Print the table; whether all that should agree does."""
    table = Table("metric", "ours", "theirs", "rel. difference, of all examples")
    for name, mine, other, note in rows(class_named):
        ours, theirs = (torch.as_tensor(values, dtype=torch.float64).flatten() for values in (mine, other))
        table.row([name], [ours[0].item(), theirs[0].item()], [relative(ours, theirs)], note, TOLERANCE)
    return table.agrees
