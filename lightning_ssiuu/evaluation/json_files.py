"""The JSON files that commands write: who writes them, and what stands in them at the top.

The reference is made from this table (docs/hooks.py), and tests hold it against what runs write. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_VERSION = "the package's, in `provenance.versions`"
_PROVENANCE = (
    "`versions` (of this package, torch and others), `commit` (of this package; null where it is not known), `seed`, "
    "`config_sha256`, `data_sha256`, `device`, `wall_s` (seconds); but for `fit` also `weights_sha256` by model"
)
_SCORES = "{split: {score: percent}}"


@dataclass(frozen=True)
class JsonFile:
    """A JSON file of a run directory.

    Args:
        written_by: The command.
        fields: What always stands at the top, and what it is.
        sometimes: The same of what is there under a condition.
        schema: Which version its schema has, and where it stands.
    """

    written_by: str
    fields: Mapping[str, str]
    sometimes: Mapping[str, str] = field(default_factory=dict)
    schema: str = _VERSION


JSON_FILES = {
    "metrics.json": JsonFile(
        "`fit`, and the callback `RunReport`",
        {
            "objective": "name of the objective's class",
            "steps": "optimiser steps that were made",
            "stopped_by": "the rule that ended the run, in words",
            "walked_back": "with `stopping.walk_back`: `scale` of the update, `keep`, the share of weights it "
            "changes, and `averaged`, whether it is the average's; or null",
            "score": "the score that `stopping` looks at",
            "collapsed": "whether the retain score fell to chance; null where no chance is known",
            "retain_chance": "that level, percent, or null",
            "before": f"`forget_score`, `retain_score`, `test_score` (percent), `scores` {_SCORES}, `influence` (0)",
            "after": "the same after the run; `influence`: D⁺, D⁻ and flagged neurons; `elicited` {score: percent} "
            "where an adversary was asked",
            "loggers": "what each logger calls the run (TensorBoard, W&B, MLflow; null for others), to go on there",
            "provenance": _PROVENANCE,
        },
    ),
    "attack.json": JsonFile(
        "`attack`, which puts every attack on a model into one file",
        {
            "attacks": "a row for each attack and p or variant: `attack`, `kind`, `p`, `variant`, `score`, the scores "
            "of `unlearned` and, where given, `oracle` or `control`, and the `gap` (`mean`, `std`, `per_seed`)",
            "curves": "of attacks that train: scores by epoch, for each model, p, seed, learning rate and attacker",
            "outcomes": "of the others: the score before and under attack, for each model and variant",
            "settings": "by attack: its options and `provenance`",
        },
        schema="the package's, for each attack in `settings.ATTACK.provenance.versions`",
    ),
    "audit.json": JsonFile(
        "`audit`",
        {
            "verdict": "`label`, `sentence`, `grounds`, `uncertainty`, `collapsed`, `oracle_retains`",
            "scores": "{model: {split: {score: percent}}}",
            "influence": "by changed model: D⁺ and D⁻, all and the 100 largest, and the number of flagged neurons",
            "flagged": "the first flagged neurons: where they are and what they carry",
            "relearning": "the attacks that counted: `source` (`attack.json` or `probe`), rows, curves; or null",
            "ablation": "scores with flagged neurons undone, beside random ones; or null",
            "logit_lens": "by model: percent of true answers preferred after each layer; or null",
            "target": "of which probability attributions are the gradient",
            "method": "the attribution method",
            "alpha": "false-positive rate of the flags",
            "score": "the score of the verdict",
            "command": "the command that repeats it",
            "data_options": "how the data were asked where that is not the run's: template, prompt, how many examples",
            "provenance": _PROVENANCE,
        },
        {
            "correlation": "with `--after_attack`: ρ of attributions before and after, with its interval",
            "attribution_correlation": "the same ρ alone",
            "suite": "with `--suite`: what the published name says",
        },
    ),
    "certificate.json": JsonFile(
        "`certify` and `erase`",
        {
            "schema": "name and number of this schema",
            "made": "when, UTC",
            "versions": "of the packages that unlearned",
            "verdict": "as in `audit.json`, rounded",
            "not_counted": "what other attacks bring back, in sentences",
            "weights_sha256": "digests of the models",
            "configuration_hmac": "keyed hash of `config.yaml`",
            "forget": "`rows`, `ids_hmac`, `id_key_hmac`, `files_hmac`; `ids` with `--show_ids`",
            "retain": "`rows`",
            "run": "`objective`, `steps`, `stopped_by`, `seed`",
            "scores": "as in `audit.json`, rounded",
            "scored": "`data_options`, as in `audit.json`",
            "tried": "every attack that was made",
            "not_tried": "the attacks of the package that were not",
            "settings": "by attack: its options",
            "seal": "keyed hash of all the rest",
        },
        schema="in its field `schema`, now `lightning-ssiuu certificate 1`; `verify` refuses any other",
    ),
    "erase.json": JsonFile(
        "`erase`",
        {
            "asked": "what the command was asked for; data as digests",
            "search": "who proposed the settings: `own`, or Optuna's version, sampler and seed",
            "known": "items, template, what the model knows of them and by chance (percent)",
            "trials": "each setting that was tried, with its scores",
            "seconds": "by step: how long each took",
            "verdict": "the label of the verdict",
            "sentence": "the verdict in words",
        },
        {"chosen": "the trial that was taken"},
        schema="none; only `erase` reads it, to continue",
    ),
    "utility.json": JsonFile(
        "`utility`",
        {
            "utility_score": "mean of the tasks, percent",
            "tasks": "{task: percent}",
            "suite": "which tasks",
            "n_items": "{task: items}",
            "provenance": _PROVENANCE,
        },
    ),
    "privacy.json": JsonFile(
        "`privacy`",
        {
            "membership_auc": "{model: {attack: AUC in percent}}",
            "n_forget": "members",
            "n_nonmembers": "others",
            "nonmembers": "`test`, or `given`",
            "provenance": _PROVENANCE,
        },
        {
            "reference_auc": "with `--oracle`: AUC of the reference attack, percent",
            "privleak": "with `--oracle`: {attack: how far the AUC is from the oracle's, percent, with its sign}",
            "forget_quality": "with `--oracle`: p-value of truth ratios, or null without distractors",
        },
    ),
    "evaluate.json": JsonFile(
        "`evaluate`",
        {
            "suite": "the suite",
            "figures": "{figure: value}, in the units of the benchmark's own code",
            "reference": "`model`, `log` or null: what figures were compared with",
            "n_items": "{set: items}",
            "sets_sha256": "{set: digest of its examples}",
            "log": "the file beside it with values by example (`TOFU_EVAL.json` …; open-unlearning's format)",
            "provenance": _PROVENANCE,
        },
    ),
    "meta_evaluation.json": JsonFile(
        "`meta-evaluate`",
        {
            "scores": "by score: how well it tells the models apart",
            "models": "{model: {score: percent}}",
            "relearned": "by model: scores before and after relearning",
            "quantized": "by model: scores in few bits",
            "options": "of relearning and quantisation",
            "n": "{group: models}",
            "provenance": _PROVENANCE,
        },
    ),
}
