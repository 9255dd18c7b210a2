"""Compressed gradients for DistributedDataParallel.

    state = smallreduce.ddp.register(ddp_model, "int4")

or, where a framework wants torch's own pair (docs/frameworks.md):

    ddp_model.register_comm_hook(smallreduce.ddp.HookState("int4", module=ddp_model), smallreduce.ddp.hook)

Right under gradient accumulation, ``static_graph``, ``find_unused_parameters``, ``gradient_as_bucket_view``,
``join()``, AMP and mixed dtypes. As every communication hook it divides by the group's size, also under
``join(divide_by_initial_world_size=False)``. Error feedback under a ``GradScaler`` bears no ``join()`` (``scaler`` of
:class:`HookState`), and the hook cannot be captured in a CUDA graph: both raise.

Parameters that are left exact travel apart from the compressed ones of their bucket. Where a whole bucket is exact, its
bits are those of DDP without a hook; with one exception, a unit in the last place: on a number of ranks that is no
power of two, under ``gradient_as_bucket_view``, DDP divides gradients that were not set to None between two steps, and
multiplies all others by 1/W, as the hook, which sees no difference, does with all.
"""

from smallreduce.ddp._hook import hook, register
from smallreduce.ddp._notice import NeverCalled
from smallreduce.ddp._policy import CodecFor
from smallreduce.ddp._state import HookState
from smallreduce.ddp._stats import BucketStats, Bypassed, Stats

__all__ = ["BucketStats", "Bypassed", "CodecFor", "HookState", "NeverCalled", "Stats", "hook", "register"]
