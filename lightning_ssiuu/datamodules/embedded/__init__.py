"""The embedded data, and the script that makes them and the tiny model."""

from importlib.resources import files
from pathlib import Path

#: The fictitious people of :class:`~lightning_ssiuu.Facts`, and the items of its benign attack.
FACTS = Path(str(files(__name__) / "facts.json"))
#: The real facts of :class:`~lightning_ssiuu.WorldFacts`.
WORLD_FACTS = Path(str(files(__name__) / "world_facts.json"))
