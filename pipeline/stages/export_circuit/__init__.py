"""The `export_circuit` stage: a model of sums and products alone as a file that encrypted inference and proofs read."""
