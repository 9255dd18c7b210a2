"""Sharding that cuts no block: a layout of whole buckets, and fully sharded data parallelism on it."""
