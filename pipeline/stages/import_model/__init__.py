"""The `import_model` stage: a checkpoint on disk becomes an artifact that the other stages take."""
