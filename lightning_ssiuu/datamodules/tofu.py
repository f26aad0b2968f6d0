"""TOFU: question–answer pairs about fictitious authors (Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

from typing import Any

from lightning_ssiuu.datamodules.paired import PairedFiles


class TOFU(PairedFiles):
    """TOFU (arXiv 2401.06121) from a local directory or the hub.

    The test set is cut from the retain file: the first ``retain_size`` items are the retain set and the ``test_size``
    that follow the test set. Perturbed answers, where the file has them, become distractors. ``multiple_choice`` is
    off: TOFU scores generated text (ROUGE-L recall).

    Args:
        path: A directory with ``{forget}.jsonl`` and ``{retain}.jsonl`` (or ``.json``, ``.csv``), or a hub id; None:
            ``locuslab/TOFU``.
        forget: Name of the forget file or hub configuration, e.g. ``forget01``, ``forget05``, ``forget10_perturbed``.
        retain: Name of the retain file or hub configuration, e.g. ``retain99``.
        **kwargs: ``retain_size``, ``test_size`` (:class:`~.paired.PairedFiles`) and the options of
            :class:`UnlearningDataModule`.

    Example:
        A tenth of the authors forgotten, with multiple choice, and 400 of the others' questions as test set:

        >>> data = TOFU(forget="forget10_perturbed", retain="retain90", test_size=400, multiple_choice=True)
        >>> data.hub_id
        'locuslab/TOFU'
    """

    hub_id = "locuslab/TOFU"

    def __init__(
        self, path: str | None = None, forget: str = "forget01", retain: str = "retain99", *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(path, forget, retain, *args, **kwargs)
