"""What a run writes about itself, and who may write it."""
