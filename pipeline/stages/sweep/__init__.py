"""The `sweep` stage: a search over ranges of parameters, its trials stages like all others."""
