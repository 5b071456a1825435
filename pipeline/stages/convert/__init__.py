"""The `convert` stage: classical activations become learnable ones."""
