"""The `shard` and `shard_images` stages: documents or labelled images become webdataset tar shards."""
