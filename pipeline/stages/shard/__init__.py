"""The stages `shard`, `shard_images`, `shard_numbers`: documents, labelled images, rows of numbers to tar shards."""
