"""Compressed weights and gradients for sharded models.

FSDP2 (``fully_shard``):

    state = smallreduce.fsdp.compress(model, gradients="int4-hadamard", weights="int8")

FSDP1 (``FullyShardedDataParallel``), gradients alone:

    fsdp1_model.register_comm_hook(smallreduce.fsdp.HookState("int4-hadamard"), smallreduce.fsdp.hook)

See docs/fsdp.md.
"""

from smallreduce.fsdp._compress import compress
from smallreduce.fsdp._hook import HookState, hook
from smallreduce.fsdp._memory import ResidualMemory
from smallreduce.fsdp._state import State
from smallreduce.fsdp._stats import LegStats, Stats

__all__ = ["HookState", "LegStats", "ResidualMemory", "State", "Stats", "compress", "hook"]
