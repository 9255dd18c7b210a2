"""Optimizers whose mathematics need compression."""

from smallreduce.optim._block_adam import BlockAdam8bit
from smallreduce.optim._cser import CSER
from smallreduce.optim._cser_stats import CSERStats
from smallreduce.optim._dgc import DGC
from smallreduce.optim._dgc_warmup import dgc_geometric_warmup, dgc_warmup
from smallreduce.optim._muon import Muon
from smallreduce.optim._muon_stats import MuonStats
from smallreduce.optim._sdp4bit import SDP4Bit
from smallreduce.optim._sdp4bit_stats import SDP4BitMemory, SDP4BitStats

__all__ = [
    "BlockAdam8bit",
    "CSER",
    "CSERStats",
    "DGC",
    "Muon",
    "MuonStats",
    "SDP4Bit",
    "SDP4BitMemory",
    "SDP4BitStats",
    "dgc_geometric_warmup",
    "dgc_warmup",
]
