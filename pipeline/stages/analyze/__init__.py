"""The `analyze` stage: statements about trained models that are computed, not measured."""
