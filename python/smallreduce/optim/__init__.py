"""Optimizers whose mathematics need compression."""

from smallreduce.optim._cser import CSER
from smallreduce.optim._cser_stats import CSERStats
from smallreduce.optim._dgc import DGC
from smallreduce.optim._dgc_warmup import dgc_geometric_warmup, dgc_warmup

__all__ = ["CSER", "CSERStats", "DGC", "dgc_geometric_warmup", "dgc_warmup"]
