"""The `report` stage: one self-contained page about a run."""
