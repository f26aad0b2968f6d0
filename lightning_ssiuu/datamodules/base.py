"""The data module every benchmark extends: forget, retain and test set, their loaders and their checks."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, Self, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import ConcatDataset, DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from lightning_ssiuu.datamodules.encoding import Collator, Encoded, EncodedDataset, Encoder, Examples, Key
from lightning_ssiuu.datamodules.sampling import EvalSampler, PairSampler, ResumableLoader, scored_alone
from lightning_ssiuu.datamodules.splits import QAExample, Splits
from lightning_ssiuu.datamodules.spooled import kept
from lightning_ssiuu.datamodules.templates import DATE
from lightning_ssiuu.utils.distributed import rank, world_size
from lightning_ssiuu.utils.errors import Given, UserError, check_at_least, check_choice

__all__ = ["QAExample", "Splits", "UnlearningDataModule"]

T = TypeVar("T")
TrainOn = Literal["pairs", "all", "retain"]
_EVAL_SPLITS = ("forget", "retain", "test")


class UnlearningDataModule(LightningDataModule, ABC):
    r"""Forget, retain and test set of a benchmark. A benchmark is a subclass that implements :meth:`load_splits`.

    A training batch is ``{"forget": part, "retain": part}``, an evaluation batch ``{split: part}``. A part is
    ``{"input_ids", "attention_mask", "labels": LongTensor [B, L], "example_id": LongTensor [B]}``, padded right;
    ``labels`` is −100 on prompt and padding and the answer's tokens with the final EOS otherwise. Evaluation parts of
    splits in which every example has distractors also hold ``"options"``, and ``"choices"`` under a
    ``choice_template`` (:class:`~.encoding.Collator`).

    The order of the training batches is a function of seed and epoch alone and the same on any number of ranks, each
    of which takes its share of the global batch. The module shards by itself, so the Trainer needs
    ``use_distributed_sampler=False`` (the command line sets it).

    Args:
        tokenizer: Checkpoint whose tokenizer is loaded (hub id, local directory, GGUF file or ``"tiny"``), or a
            tokenizer.
        template: ``"plain"`` (``"Question: {question}\nAnswer:"``), ``"chat"`` (the tokenizer's own chat template) or
            any text that contains ``{question}``, and ``{answer}`` where an answer is not to end with an end token but
            with what stands after it (:class:`~.encoding.Encoder`).
        batch_size: Forget sequences per micro-batch over all ranks; as many as there are where the set has fewer.
        retain_batch_size: Retain sequences per micro-batch over all ranks; None: as many as ``batch_size``.
        eval_batch_size: Sequences per rank and evaluation batch.
        max_eval_examples: Examples of a set to score (before, after and while training, in attacks and audits): of a
            larger set that many random ones, the same in every run. None: all.
        max_length: Longest prompt + answer in tokens; longer ones are an error, nothing is cut off. None: 256, or
            the tokenizer's limit where that is shorter.
        num_workers: Worker processes per loader.
        seed: Seeds the order of the training batches; None: what ``fit`` has as ``seed_everything``, else 0.
        train_on: ``"pairs"``; ``"all"``: batches ``{"retain": part}`` over forget and retain set, for fine-tuning
            before unlearning; ``"retain"``: the same over the retain set alone, for the oracle.
        multiple_choice: Attach options to evaluation batches where the data have distractors.
        choice_template: For the scores ``choice_likelihood`` and ``choice_generation``: also attach prompts that list
            a question's options, ``"instruction"`` or a text that contains ``{question}`` and ``{options}``
            (:class:`~.encoding.Encoder`). None: no such prompts.
        system_prompt: System turn before the question, for template ``"chat"``; None: what the chat template has.
        template_options: Variables of the chat template by name, e.g. ``{"enable_thinking": False}``.
        date: The day (``YYYY-MM-DD``) that chat templates which print today's date take for it, so that a run's
            prompts stay the same.

    Raises:
        UserError: On a bad argument; in :meth:`setup` on data that cannot be used (see there).

    Example:
        A benchmark of one's own:

        >>> class Sums(UnlearningDataModule):
        ...     def load_splits(self):
        ...         ask = [QAExample(n, f"What is {n} + {n}?", str(2 * n)) for n in range(12)]
        ...         return Splits(forget=ask[:4], retain=ask[4:10], test=ask[10:])
        >>> data = Sums(batch_size=2)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> {part: tuple(tensors["example_id"].shape) for part, tensors in batch.items()}
        {'forget': (2,), 'retain': (2,)}
        >>> data.eval_splits
        ['forget', 'retain', 'test']
    """

    #: Whether a short last batch of an epoch is filled up (pairs need equally large batches, an attack does not). Ranks
    #: may else have shares of different sizes, which the objective has to weigh as FineTuning does.
    fill_batches = True

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase = "tiny",
        template: str = "plain",
        batch_size: int = 8,
        retain_batch_size: int | None = None,
        eval_batch_size: int = 16,
        max_length: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        train_on: TrainOn = "pairs",
        multiple_choice: bool = True,
        choice_template: str | None = None,
        system_prompt: str | None = None,
        template_options: dict[str, Any] | None = None,
        date: str = DATE,
        max_eval_examples: int | None = None,
    ) -> None:
        super().__init__()
        retain_batch_size = batch_size if retain_batch_size is None else retain_batch_size
        sizes = {"batch_size": batch_size, "retain_batch_size": retain_batch_size, "eval_batch_size": eval_batch_size}
        for name, value in (sizes | {"num_workers": num_workers, "seed": seed or 0}).items():
            least = 1 if name in sizes else 0
            if value < least:
                raise UserError(name, value, f"at least {least}")
        if max_eval_examples is not None:
            check_at_least("max_eval_examples", max_eval_examples, 1)
        check_choice("train_on", train_on, TrainOn)
        self.tokenizer_or_name, self.max_length = tokenizer, max_length
        self.template, self.choice_template, self.date = template, choice_template, date
        self.system_prompt, self.template_options = system_prompt, template_options
        self.batch_size, self.retain_batch_size = batch_size, retain_batch_size
        self.eval_batch_size, self.num_workers = eval_batch_size, num_workers
        self.max_eval_examples = max_eval_examples
        self.seed, self.train_on, self.multiple_choice = seed or 0, train_on, multiple_choice
        self._encoded: dict[str, Sequence[Encoded]] = {}

    @abstractmethod
    def load_splits(self) -> Splits:
        """Read the sets. Called once per process, from :meth:`setup`."""

    @cached_property
    def splits(self) -> Splits:
        """The sets, read and validated (:meth:`Splits.validate`) on first use."""
        splits = self.load_splits()
        splits.validate()
        return splits

    @cached_property
    def encoder(self) -> Encoder:
        """Template and tokenizer at work, made on first use."""
        tokenizer = self.tokenizer_or_name
        if isinstance(tokenizer, str):
            from lightning_ssiuu.models.loading import load_tokenizer  # slow to import

            tokenizer = load_tokenizer(tokenizer)
        return Encoder(tokenizer, choice_template=self.choice_template, **self.encoding)

    @property
    def encoding(self) -> dict[str, Any]:
        """The options that make another data module encode questions and answers as this one does, but for its
        tokenizer and ``choice_template``.
        """
        names = ("template", "max_length", "system_prompt", "template_options", "date")
        return {name: getattr(self, name) for name in names}

    def with_template(self, template: str) -> Self:
        """The same sets asked under another template, as far as evaluation goes; this module stays as it is."""
        other = copy.copy(self)
        other.tokenizer_or_name, other.max_length = self.tokenizer, self.encoder.max_length
        other.template, other._encoded = template, {}
        other.__dict__.pop("encoder", None)
        return other

    def with_forget(self, examples: Sequence[QAExample], argument: str = "forget") -> Self:
        """The same with other examples, numbered anew, in place of the forget set; this module stays as it is.

        Raises:
            UserError: What :meth:`Splits.validate` raises of them, about ``argument``.
        """
        first = 1 + max(example.example_id for _, others in self.splits.items() for example in others)
        numbered = kept(replace(example, example_id=first + n) for n, example in enumerate(examples))
        other = copy.copy(self)
        other.__dict__["splits"] = replace(self.splits, forget=numbered)
        other._encoded = {}
        try:
            other.splits.validate()
        except UserError as error:
            raise UserError(argument, error.value, error.allowed) from error
        return other

    def invented(self) -> tuple[str, Sequence[QAExample]] | None:
        """As many facts of the form of the forget set, of things that there are not, and what they are, in words.

        None where the benchmark cannot make any; :func:`~.invented.invented` then makes some of the forget set.
        """
        return None

    def named_set(self, name: str) -> Sequence[QAExample]:
        """A set by the name that suites have for it: ``forget``, ``retain`` or ``test``; a benchmark may have more.

        Raises:
            UserError: If there is none, or it is empty.
        """
        sets = dict(self.splits.items())
        if not sets.get(name):
            raise UserError("data", Given(f"{type(self).__name__} without a set {name}"), "data with that set")
        return sets[name]

    def more(self, source: str, argument: str) -> Sequence[QAExample] | None:
        """Examples of the form of the sets from another file; None where that holds questions and answers.

        It is asked about the files of attacks and of ``privacy``; ``argument`` is what ``source`` was given for.
        """
        return None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        return self.encoder.tokenizer

    def content_sha256(self) -> str:
        """Digest of the sets as a model sees them: ids, prompts and answers of all examples as token ids.

        It tells data rendered otherwise (template, system prompt, date, tokenizer) from these, without their text.
        """
        return self.encoder.sha256(self.splits, self._encoded)

    def setup(self, stage: str | None = None) -> None:
        """Read, check and tokenise the data, once whatever the stage.

        Raises:
            UserError: What :meth:`Splits.validate` and :meth:`~.encoding.Encoder.encode` raise; a batch not divisible
                among the ranks; fewer examples than ranks; a Trainer that would shard a second time.
        """
        if not self._encoded:
            sets = dict(self.splits.items())
            self._encoded = {name: self.encoder.encode(sets[name], self.multiple_choice) for name in _EVAL_SPLITS}
        if stage not in ("validate", "test"):
            self._check_batches()

    def train_dataloader(self) -> DataLoader[Any]:
        """One loader over forget–retain pairs, or over what ``train_on`` says; see :class:`~.sampling.PairSampler`."""
        self.setup("fit")
        world_size, rank = self._ranks()
        parts, batch_sizes = self._train_parts()
        sizes = {part: len(parts[part]) for part in parts}
        sampler = PairSampler(sizes, batch_sizes, self.seed, rank, world_size, self.fill_batches)
        return self._loader(EncodedDataset(parts, options=False), sampler, ResumableLoader)

    @property
    def eval_splits(self) -> list[str]:
        """Names of the sets that :meth:`val_dataloader` and :meth:`test_dataloader` serve, in their order."""
        return [name for name, examples in self.splits.items() if name in _EVAL_SPLITS and examples]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader per entry of :attr:`eval_splits`: forget, retain and, unless empty, test."""
        return [self.eval_dataloader(split) for split in self.eval_splits]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self.val_dataloader()

    def eval_dataloader(self, split: str, examples: Sequence[QAExample] | None = None) -> DataLoader[Any]:
        """One pass over a set (``"forget"``, ``"retain"`` or ``"test"``), in order, with batches ``{split: part}``.

        Given ``examples`` are served under the name of ``split`` instead of the set's, all of them. Fewer examples than
        ranks are an error; see :class:`~.sampling.EvalSampler`.
        """
        if split not in _EVAL_SPLITS:
            raise UserError("split", split, ", ".join(_EVAL_SPLITS))
        if examples is None:
            self.setup("validate")
            encoded = self.to_score(self._encoded[split])
        else:
            encoded = self.encoder.encode(examples, self.multiple_choice)
        world_size, rank = self._ranks()
        if len(encoded) < world_size:
            raise UserError(split, Given(f"{len(encoded)} examples"), f"at least {world_size}, one for each rank")
        sampler = EvalSampler(split, len(encoded), self.eval_batch_size, rank, world_size)
        return self._loader(EncodedDataset({split: encoded}), sampler)

    def to_score(self, items: Sequence[T]) -> Sequence[T]:
        """Those of a set's items that are scored: all, or ``max_eval_examples`` of them in their order."""
        if self.max_eval_examples is None or len(items) <= self.max_eval_examples:
            return items
        return kept(items[number] for number in scored_alone(len(items), self.max_eval_examples))

    def n_scored(self, split: str) -> int:
        """Number of examples of a set that are scored."""
        size = len(dict(self.splits.items())[split])
        return size if self.max_eval_examples is None else min(size, self.max_eval_examples)

    def name_of(self, example_id: int) -> str:
        """What an example of the sets is called (:attr:`QAExample.name`); the number where none has that id."""
        every = (example for _, examples in self.splits.items() for example in examples)
        return next((example.name for example in every if example.example_id == example_id), str(example_id))

    def check_share(self, n_ranks: int) -> None:
        """Refuse more processes than there are examples in a set to score."""
        for split in self.eval_splits:
            if (size := self.n_scored(split)) < n_ranks:
                allowed = f"at most {size}, the number of examples to score in the {split} set"
                raise UserError("devices", n_ranks, allowed)

    def _ranks(self) -> tuple[int, int]:
        """Number of ranks that share a batch, and this one's; tensor-parallel ranks see the same data."""
        if self.trainer is None:
            return world_size(), rank()
        shard = getattr(self.trainer, "distributed_sampler_kwargs", None)
        if shard is None:
            return self.trainer.world_size, self.trainer.global_rank
        return shard["num_replicas"], shard["rank"]

    def _train_parts(self) -> tuple[dict[str, Examples], dict[str, int]]:
        forget, retain = self._encoded["forget"], self._encoded["retain"]
        if self.train_on == "pairs":
            return {"forget": forget, "retain": retain}, {"forget": self.batch_size, "retain": self.retain_batch_size}
        kept_on: Examples = ConcatDataset([forget, retain]) if self.train_on == "all" else retain  # type: ignore[list-item]
        return {"retain": kept_on}, {"retain": self.batch_size}

    def _check_batches(self) -> None:
        world_size, _ = self._ranks()
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            # Lightning would rebuild our sampler under a DistributedSampler, and fail with a puzzle
            raise UserError("trainer.use_distributed_sampler", True, "false: the data module shards by itself")
        parts, batch_sizes = self._train_parts()
        for part, batch_size in batch_sizes.items() if self.fill_batches else ():
            name = "retain_batch_size" if self.train_on == "pairs" and part == "retain" else "batch_size"
            if batch_size % world_size:
                raise UserError(name, batch_size, f"a multiple of {world_size}, the number of ranks")
            if batch_size > len(parts[part]):  # a recipe's, for a set of any size
                if (most := len(parts[part]) // world_size * world_size) == 0:
                    allowed = f"at least {world_size} examples, one for each rank"
                    raise UserError(part, Given(f"{len(parts[part])} examples"), allowed)
                setattr(self, name, most)
                rank_zero_info(f"data.{name}: {most} instead of {batch_size}, for there are no more {part} examples.")

    def _loader(
        self, dataset: EncodedDataset, sampler: Sampler[list[Key]], kind: type[DataLoader[Any]] = DataLoader
    ) -> DataLoader[Any]:
        return kind(
            dataset,
            batch_sampler=sampler,
            collate_fn=Collator(self.encoder.pad_token_id),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Without a generator of its own a loader draws from the global one, and evaluating would change training
            generator=torch.Generator().manual_seed(self.seed),
        )
