"""Sharding that cuts no block: a layout of whole buckets, and fully sharded data parallelism on it."""

from smallreduce.ragged._fully_shard import fully_shard
from smallreduce.ragged._granularity import Granularity
from smallreduce.ragged._module import RaggedModule
from smallreduce.ragged._placement import RaggedShard
from smallreduce.ragged._plan import Plan, plan
from smallreduce.ragged._state import state
from smallreduce.ragged._tensor import RaggedTensor

__all__ = ["Granularity", "Plan", "RaggedModule", "RaggedShard", "RaggedTensor", "fully_shard", "plan", "state"]
