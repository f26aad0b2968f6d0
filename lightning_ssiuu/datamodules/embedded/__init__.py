"""The embedded data, and the script that makes them and the tiny model."""

from importlib.resources import files
from pathlib import Path

_FOLDER = Path(str(files(__name__)))
#: The fictitious people of :class:`~lightning_ssiuu.Facts`, and the items of its benign attack; made of the word lists.
FACTS, WORD_LISTS = _FOLDER / "facts.json", _FOLDER / "word_lists.json"
#: The real facts of :class:`~lightning_ssiuu.WorldFacts`.
WORLD_FACTS = _FOLDER / "world_facts.json"
