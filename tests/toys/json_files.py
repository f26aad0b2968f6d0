"""Whether JSON files are as the reference says."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_ssiuu.evaluation.json_files import JSON_FILES


def undocumented(folder: Path) -> list[str]:
    """What JSON files below a directory have that the table has not, or lack that it promises."""
    wrong, seen = [], 0
    for name, known in JSON_FILES.items():
        for path in folder.rglob(name):
            seen += 1
            found = set(json.loads(path.read_text(encoding="utf-8")))
            wrong += [f"{name}: {one} is not in the table" for one in found - {*known.fields, *known.sometimes}]
            wrong += [f"{name}: {one} is missing" for one in set(known.fields) - found]
    return wrong if seen else [f"no JSON file in {folder}"]
