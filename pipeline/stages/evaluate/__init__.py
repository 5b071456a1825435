"""The `evaluate` and `measure_speed` stages: what trained models are worth, and how fast they are."""
