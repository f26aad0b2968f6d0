"""FaithUn: facts about celebrities with reworded, two-hop and same-answer questions (arXiv 2502.19207)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_ssiuu.datamodules.clusters import Cluster, ClusterDataModule, parse_clusters
from lightning_ssiuu.datamodules.readers import FOLDER_OR_HUB, file_errors, folder_or_hub, hub_errors
from lightning_ssiuu.utils.errors import Given, UserError


class FaithUn(ClusterDataModule):
    """FaithUn (Yang et al. 2025, arXiv 2502.19207) from a local directory or the hub.

    Trained on its base questions; :meth:`probes` gives the reworded, two-hop and same-answer questions, which the suite
    ``faithun`` scores. The format is :func:`~.clusters.parse_clusters`'s; the split files list cluster numbers from 0,
    one a line, over all entities in the file's order. The release lies on GitHub: give the directory of a copy, or a
    hub data set that holds its files.

    Verified in the description beside the published data: names of files and of the four kinds of questions, clusters
    numbered over all entities. Assumed, for no code of the authors' is public: the prompt that lists the options
    (``choice_template``), in our words after the paper's text, and the ranking by mean log-probability per token.

    Args:
        path: Directory with the files, searched with its subdirectories, or a hub id (``owner/name``).
        file: Name of the questions' file.
        forget: Name of the file with the cluster numbers of the forget set.
        retain: The same for the retain set.
        test: The same for the test set; None: no test set.
        n_distractors: Wrong options per question at most; the paper's 3 options are 2 wrong ones and the answer.
        choice_template: As in :class:`UnlearningDataModule`, but on: FaithUn is scored by multiple choice.
        **kwargs: See :class:`UnlearningDataModule`.

    Raises:
        UserError: Directory, data set or file missing, another format, a number that is no cluster's, or a cluster in
            two sets.

    Example:
        >>> data = FaithUn("path/to/FaithUn", test=None)
        >>> data.split_files
        {'forget': 'forget_set_split.txt', 'retain': 'retaining_set_split.txt', 'test': None}
    """

    def __init__(
        self,
        path: str,
        file: str = "FaithUn_Dataset.json",
        forget: str = "forget_set_split.txt",
        retain: str = "retaining_set_split.txt",
        test: str | None = "test_set_split.txt",
        n_distractors: int = 2,
        choice_template: str | None = "instruction",
        **kwargs: Any,
    ) -> None:
        super().__init__(n_distractors=n_distractors, choice_template=choice_template, **kwargs)
        self.path, self.file = path, file
        self.split_files = {"forget": forget, "retain": retain, "test": test}

    def load_clusters(self) -> tuple[list[Cluster], dict[str, list[int]]]:
        folder = folder_or_hub(self.path) or _download(self.path)
        with file_errors("file", self.file):
            entities = json.loads(_read(folder, self.file, "file"))
        clusters = parse_clusters(entities, "file")
        indices = {
            name: [] if file is None else _numbers(_read(folder, file, name), file, name, len(clusters))
            for name, file in self.split_files.items()
        }
        _check_disjoint(indices)
        return clusters, indices


def _download(hub_id: str) -> Path:
    import huggingface_hub  # slow to import and not needed for files

    with hub_errors("path", hub_id, FOLDER_OR_HUB):
        return Path(huggingface_hub.snapshot_download(hub_id, repo_type="dataset", allow_patterns=["*.json", "*.txt"]))


def _read(folder: Path, name: str, argument: str) -> str:
    files = sorted(file for file in folder.rglob(Path(name).name) if file.is_file())
    if not files:
        names = sorted(file.name for file in folder.rglob("*") if file.suffix in (".json", ".txt"))
        raise UserError(argument, name, ", ".join(names) or "a path with FaithUn's files")
    with file_errors(argument, name):
        return files[0].read_text(encoding="utf-8-sig")


def _numbers(text: str, file: str, argument: str, n_clusters: int) -> list[int]:
    lines = {number: line.strip() for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    for number, line in lines.items():
        if not line.isdecimal() or len(line) > 9 or int(line) >= n_clusters:
            allowed = f"one number from 0 to {n_clusters - 1} a line"
            raise UserError(argument, Given(f"line {number} of {file}"), allowed)
    return list(dict.fromkeys(map(int, lines.values())))


def _check_disjoint(indices: dict[str, list[int]]) -> None:
    set_of: dict[int, str] = {}
    for name, numbers in indices.items():
        if twice := [number for number in numbers if set_of.setdefault(number, name) != name]:
            other = set_of[twice[0]]
            raise UserError(name, Given(f"{len(twice)} clusters that are also in {other}"), f"disjoint from {other}")
