"""Values that no option can have, by command."""

from __future__ import annotations

from lightning_ssiuu.models.loading import TINY

_SURROGATE = "x\udcff"  # what an argument that is no UTF-8 becomes
_LONG = "x" * 5000
_NO_TEXT = ["", _SURROGATE, _LONG, "[red]nope", "a\x1b[31mb", "no\nsuch"]
_NO_NUMBER = ["many", "nan", "[]", "{}", "{a: 1}", "0x", _SURROGATE, _LONG, "true", "a\x1b[2J"]
_NO_POSITIVE = [*_NO_NUMBER, "-1", "0", "-9223372036854775809", "1.5", "inf"]
_NO_CLASS = [
    *("Nope", "os.system", "json.dumps", "torch.nn.Linear", "no_module.Class", "torch.Nope", "torch", "1", "..."),
    *("builtins.exec", "os.path", "math.pi", "{class_path: 3}", "{class_path: Nope, init_args: 3}", *_NO_TEXT[1:]),
]
_NO_CHOICE = ["nope", "1", "[]", "{}", *_NO_TEXT]
_NO_NAME = ["nope", "os.system", "math.pi", "torch.nn.Linear", ".", "a..b", "no_module.x", *_NO_TEXT[1:]]
_NO_FLAG = ["perhaps", "2", "[]", *_NO_TEXT]
_NO_PATH = ["/no/such", "./no", "~no-such-user/x", "/dev/null", "package:torch/../../x", "package:", *_NO_TEXT]
_NO_MODEL = [
    *_NO_PATH,
    "package:torch//etc",
    "no/such/model",
    str(TINY.parent),
    str(TINY / "config.json"),
    "a:b",
    "\x00",
]
_NO_DATA_FILE = [*_NO_PATH, "no.json", "x.gguf", str(TINY), f"{_LONG}.json", f"{_SURROGATE}.csv", "a/b:c:d:e"]
_ABSTRACT = {
    "attack": "lightning_ssiuu.attacks.Attack",
    "data": "lightning_ssiuu.datamodules.UnlearningDataModule",
    "regularizer": "lightning_ssiuu.regularizers.Regularizer",
}
_INIT, _REGULARIZER = "model.init_args", "model.init_args.regularizer.init_args"

#: By command the options and what none of them can be.
OPTIONS: dict[str, dict[str, list[str]]] = {
    "fit": {
        "seed_everything": ["-1", str(2**32), str(2**70), "1.5", *_NO_NUMBER[:8]],
        "trainer.max_steps": ["-2", "1.5", *_NO_NUMBER],
        "trainer.max_epochs": ["-2", "0", "1.5", *_NO_NUMBER],
        "trainer.max_time": ["garbage", "1:2", "-1", "00:00:xx:00", "[]", "{hours: x}", "{eons: 1}", _LONG, _SURROGATE],
        "trainer.accumulate_grad_batches": _NO_POSITIVE,
        "trainer.limit_train_batches": ["-1", "2.5", *_NO_NUMBER],
        "trainer.limit_val_batches": ["-1", "2.5", *_NO_NUMBER],
        "trainer.overfit_batches": ["-1", "7.5", *_NO_NUMBER],
        "trainer.val_check_interval": ["-1", "2.5", "many", "nan", _SURROGATE],
        "trainer.check_val_every_n_epoch": ["x", "1.5", "[]"],
        "trainer.fast_dev_run": ["-1", "perhaps", "[]", _SURROGATE],
        "trainer.log_every_n_steps": ["x", "1.5", "[]"],
        "trainer.num_nodes": _NO_POSITIVE,
        "trainer.devices": ["0", "-2", "nine", "[]", "1.5", "{}", _SURROGATE],
        "trainer.precision": ["7", "nope", "fp16", "[]", _LONG, _SURROGATE],
        "trainer.accelerator": _NO_CHOICE[:1] + _NO_CLASS[:6] + _NO_TEXT,
        "trainer.strategy": ["nope", *_NO_CLASS[:6], *_NO_TEXT[1:]],
        "trainer.profiler": ["nope", "os.system", "torch.nn.Linear", "[]", _SURROGATE],
        "trainer.logger": ["nope", "os.system", "torch.nn.Linear", "7", "{class_path: Nope}", _SURROGATE],
        "trainer.callbacks": ["nope", "os.system", "torch.nn.Linear", "[7]", "[{class_path: Nope}]", _SURROGATE],
        "trainer.plugins": ["nope", "os.system", "torch.nn.Linear", "7", _SURROGATE],
        "trainer.gradient_clip_val": ["x", "[]", "many"],
        "trainer.gradient_clip_algorithm": ["nope", "1", _SURROGATE],
        "trainer.deterministic": ["perhaps", "[]", _SURROGATE],
        "trainer.default_root_dir": ["/dev/null/x", "x" * 300, f"{_LONG}/x", "x\x00y"],
        "trainer": ["nope", "7", "[]", str(TINY), _SURROGATE],
        "model": [*_NO_CLASS, "lightning_ssiuu.objectives.displaced.DisplacedObjective"],
        "data": [*_NO_CLASS, _ABSTRACT["data"]],
        "stopping": ["7", "[]", "nope", _SURROGATE],
        f"{_INIT}.checkpoint": _NO_MODEL,
        f"{_INIT}.optimizer": _NO_CLASS,
        f"{_INIT}.optimizer.init_args.lr": ["fast", "-1", "[]", "{}", _SURROGATE],
        f"{_INIT}.lr_scheduler": [*_NO_CLASS, "transformers.get_cosine_schedule_with_warmup"],
        f"{_INIT}.regularizer": [*_NO_CLASS, _ABSTRACT["regularizer"]],
        f"{_INIT}.lora": ["nope", "7", "[]", "{r: 0}", "{r: x}", "{nope: 1}", _SURROGATE],
        f"{_INIT}.quantization": _NO_CHOICE[1:],
        f"{_INIT}.retain_weight": ["-1", "inf", *_NO_NUMBER],
        f"{_INIT}.retain": _NO_CHOICE,
        f"{_INIT}.reference": _NO_CHOICE,
        f"{_INIT}.scores": ["[nope]", "[os.system]", "nope", "7", "{}", f"[{_LONG}]", _SURROGATE],
        f"{_INIT}.architecture": _NO_NAME,
        f"{_INIT}.retain_wieght": ["1"],
        f"{_REGULARIZER}.weight": ["-1", "inf", *_NO_NUMBER],
        f"{_REGULARIZER}.weight_mode": _NO_CHOICE,
        f"{_REGULARIZER}.modules": ["[nope]", "[layer99]", "7", "['']", _SURROGATE],
        "data.init_args.batch_size": [*_NO_POSITIVE, "1000", str(2**70)],
        "data.init_args.eval_batch_size": _NO_POSITIVE,
        "data.init_args.max_eval_examples": _NO_POSITIVE,
        "data.init_args.num_workers": ["-1", "x", "1.5"],
        "data.init_args.seed": ["-1", str(2**64), "x", "1.5"],
        "data.init_args.max_length": ["-1", "0", "8", "500", "x", str(2**70)],
        "data.init_args.template": ["", "no placeholder", "{answer}", "{question", _LONG],
        "data.init_args.tokenizer": ["/no/such"],
        "data.init_args.train_on": _NO_CHOICE,
        "data.init_args.batch_sise": ["1"],
        "attribution.alpha": ["-1", "0", "1", "2", *_NO_NUMBER],
        "attribution.probe_examples": ["-1", "1.5", *_NO_NUMBER],
        "attribution.method": _NO_NAME,
        "attribution.target": _NO_CHOICE,
        "attribution.memory_budget": ["-1", "2XB", "[]", _SURROGATE],
        "stopping.score": _NO_NAME,
        "stopping.threshold": ["-1", "100", "low", "inf", "[]", _SURROGATE],
        "stopping.every_n_steps": ["-1", "x", "1.5"],
        "checkpoints.every_n_steps": ["-1", "0", "x", "1.5"],
        "config": _NO_PATH,
        "ckpt_path": ["/no/such.ckpt", str(TINY), str(TINY / "config.json"), "/dev/null", _SURROGATE, _LONG],
        "nope": ["1"],
        "trainer.max_stepz": ["1"],
    },
    "validate": {
        f"{_INIT}.checkpoint": _NO_MODEL,
        "ckpt_path": ["/no/such.ckpt", str(TINY), "/dev/null", _SURROGATE, _LONG],
        "data": _NO_CLASS,
        "config": _NO_PATH,
        "trainer.accelerator": ["nope", _SURROGATE],
    },
    "attack": {
        "model": _NO_MODEL,
        "oracle": _NO_MODEL,
        "attack": [*_NO_CLASS, _ABSTRACT["attack"], "Harmfull", "lightning_ssiuu.Relearning"],
        "attack.p": ["[0.0]", "[1.5]", "[x]", "[]", "[nan]", "x", "{}", _SURROGATE],
        "attack.seeds": ["[-1]", f"[{2**70}]", "[]", "[x]", "x", "[1.5]"],
        "attack.learning_rates": ["[0]", "[-1]", "[nan]", "[inf]", "[x]", "[]", _SURROGATE],
        "attack.epochs": _NO_POSITIVE,
        "attack.batch_size": _NO_POSITIVE,
        "attack.lora": ["{r: 0}", "7", "nope", "{nope: 1}"],
        "attack.attackers": [
            "[]",
            "7",
            "nope",
            "[{optimizer: nope}]",
            "[{nope: 1}]",
            "[{rank: 0}]",
            "[{learning_rates: []}]",
        ],
        "attack.utility": _NO_FLAG,
        "attack.nope": ["1"],
        "data": [*_NO_CLASS, _ABSTRACT["data"]],
        "score": _NO_NAME,
        "control": ["/no/such.jsonl", str(TINY), _SURROGATE, _LONG],
        "output": ["/dev/null/x", f"{_LONG}/x", "x\x00y"],
        "devices": ["0", "-1", "nine", "[]", "33", "1.5", _SURROGATE],
        "accelerator": ["nope", *_NO_TEXT],
        "strategy": _NO_CHOICE,
        "precision": _NO_CHOICE,
        "architecture": _NO_NAME,
        "save_attacked": _NO_FLAG,
        "config": _NO_PATH,
    },
    "audit": {
        "original": _NO_MODEL,
        "unlearned": _NO_MODEL,
        "oracle": _NO_MODEL,
        "after_attack": _NO_MODEL,
        "data": _NO_CLASS,
        "score": _NO_NAME,
        "scores": ["[nope]", "7", "[7]", "{}", _SURROGATE],
        "alpha": ["-1", "0", "1", "2", *_NO_NUMBER],
        "probe_examples": _NO_POSITIVE,
        "probe": ["7", "nope", "{nope: 1}", "{epochs: 0}", "{learning_rates: [x]}"],
        "method": _NO_NAME,
        "target": _NO_CHOICE,
        "memory_budget": ["-1", "2XB", "[]", _SURROGATE],
        "own_change": _NO_FLAG,
        "output": ["/dev/null/x", f"{_LONG}/x"],
        "config": _NO_PATH,
        "originall": ["tiny"],
    },
    "utility": {
        "model": _NO_MODEL,
        "suite": _NO_CHOICE,
        "tasks": ["[]", "7", "{}", _SURROGATE],
        "limit": _NO_POSITIVE,
        "batch_size": _NO_POSITIVE,
        "data": _NO_CLASS,
        "accelerator": ["nope", *_NO_TEXT],
        "precision": _NO_CHOICE,
        "config": _NO_PATH,
    },
    "privacy": {
        "model": _NO_MODEL,
        "oracle": _NO_MODEL,
        "nonmembers": _NO_DATA_FILE,
        "k": ["0", "-1", "1.5", "inf", *_NO_NUMBER[:9]],
        "data": _NO_CLASS,
        "gradient_norm": _NO_FLAG,
        "precision": _NO_CHOICE,
        "config": _NO_PATH,
    },
    "compare": {"score": _NO_NAME, "output": ["/dev/null/x"], "nope": ["1"]},
}

#: Nine lines that stand for 9⁹ values.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
