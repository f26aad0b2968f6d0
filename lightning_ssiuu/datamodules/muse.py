"""MUSE: questions about news or books to be unlearned, its knowledge memorisation sets (arXiv 2407.06460)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_ssiuu.datamodules.paired import PairedFiles
from lightning_ssiuu.datamodules.readers import Record, read_hub

_CONFIG = "knowmem"


class MUSE(PairedFiles):
    r"""Knowledge questions of MUSE (Shi et al. 2024, arXiv 2407.06460) from a local directory or the hub.

    Its ``knowmem`` sets: ``question`` and ``answer``. MUSE's texts are not read: this package unlearns question–answer
    pairs. The test set is cut from the retain file.

    Args:
        path: A directory with ``{forget}.json`` and ``{retain}.json`` (or ``.jsonl``, ``.csv``), also in a
            ``knowmem`` directory below it, or a hub id; None: ``muse-bench/MUSE-News``.
        forget: Name of the forget file, or split of the hub's ``knowmem`` configuration.
        retain: Name of the retain file or split, ``retain_qa`` or ``retain2_qa``.
        retain_size: Number of retain items; None: all that ``test_size`` leaves.
        test_size: Number of test items; None: all that follow ``retain_size`` items (none if that is None too).
        multiple_choice: As in :class:`UnlearningDataModule`, but off: MUSE scores generated text (ROUGE-L).
        **kwargs: See :class:`UnlearningDataModule`.

    Raises:
        UserError: Directory, file or data set missing, columns missing, or more items asked for than there are.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "knowmem"
        >>> folder.mkdir()
        >>> for name, first in (("forget_qa", 0), ("retain_qa", 5)):
        ...     rows = [{"question": f"Who won match {n}?", "answer": f"Team {n}"} for n in range(first, first + 5)]
        ...     _ = (folder / f"{name}.json").write_text(json.dumps(rows))
        >>> MUSE(path=str(folder.parent), test_size=2).splits
        Splits(forget=5, retain=3, test=2, benign=0)
    """

    hub_id = "muse-bench/MUSE-News"

    def __init__(
        self,
        path: str | None = None,
        forget: str = "forget_qa",
        retain: str = "retain_qa",
        retain_size: int | None = None,
        test_size: int | None = None,
        multiple_choice: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, forget, retain, retain_size, test_size, multiple_choice=multiple_choice, **kwargs)

    def folders(self, path: Path) -> list[Path]:
        """The directory, and the one that MUSE's own script makes for these sets."""
        return [path, path / _CONFIG]

    def read_hub(self, hub_id: str, name: str, argument: str) -> list[Record]:
        return read_hub(hub_id, _CONFIG, name, argument)
