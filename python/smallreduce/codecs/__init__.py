"""Codecs: what a wire format is, how many bytes it takes, and how it is spelled.

A codec is an immutable value; equal codecs make equal packets. For the layers above, beside these: :func:`as_int`,
:func:`check_elements` and :func:`fraction_of` check arguments everywhere alike.
"""

from smallreduce.codecs._cast import Cast
from smallreduce.codecs._codec import Codec, PacketCodec, as_int, check_elements, fraction_of
from smallreduce.codecs._int_quant import IntQuant
from smallreduce.codecs._packet import decode, encode
from smallreduce.codecs._random_blocks import RandomBlocks
from smallreduce.codecs._sign import Sign
from smallreduce.codecs._spelling import codec
from smallreduce.codecs._topk import TopK

__all__ = [
    "Cast",
    "Codec",
    "IntQuant",
    "PacketCodec",
    "RandomBlocks",
    "Sign",
    "TopK",
    "as_int",
    "check_elements",
    "codec",
    "decode",
    "encode",
    "fraction_of",
]
