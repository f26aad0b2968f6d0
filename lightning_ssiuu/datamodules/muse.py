"""MUSE: questions about news or books to be unlearned, its knowledge memorisation sets (arXiv 2407.06460)."""

from __future__ import annotations

from typing import Any

from lightning_ssiuu.datamodules.paired import PairedFiles


class MUSE(PairedFiles):
    """Knowledge questions of MUSE (Shi et al. 2024, arXiv 2407.06460) from a local directory or the hub.

    Its ``knowmem`` sets: ``question`` and ``answer``. MUSE's texts are not read: this package unlearns question–answer
    pairs. The test set is cut from the retain file. ``multiple_choice`` is off: MUSE scores generated text (ROUGE-L).

    Args:
        path: A directory with ``{forget}.json`` and ``{retain}.json`` (or ``.jsonl``, ``.csv``), also in a
            ``knowmem`` directory below it, or a hub id; None: ``muse-bench/MUSE-News``.
        forget: Name of the forget file, or split of the hub's ``knowmem`` configuration.
        retain: Name of the retain file or split, ``retain_qa`` or ``retain2_qa``.
        **kwargs: ``retain_size``, ``test_size`` (:class:`~.paired.PairedFiles`) and the options of
            :class:`UnlearningDataModule`.

    Example:
        >>> data = MUSE("muse-bench/MUSE-Books", retain="retain2_qa", test_size=50)
        >>> data.forget, data.multiple_choice
        ('forget_qa', False)
    """

    hub_id = "muse-bench/MUSE-News"
    config = "knowmem"

    def __init__(
        self, path: str | None = None, forget: str = "forget_qa", retain: str = "retain_qa", *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(path, forget, retain, *args, **kwargs)
