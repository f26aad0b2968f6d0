"""The commands, how their options are read, and the rules by which a run is taken up again."""
