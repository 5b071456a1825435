"""What each `polytrope` command does, one file per group; the arguments stand in `polytrope.pipeline.cli`."""
