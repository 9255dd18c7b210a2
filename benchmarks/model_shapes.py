"""Parameter shapes of public models, in the buckets that FSDP makes of them: each decoder layer one, the rest the root.

Shapes and their order are those of ``named_parameters()`` in transformers' implementation of each model; the constants
are fields of the ``config.json`` that the checkpoint is published with, named in the comments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["MODELS", "Bucket", "Model", "Parameter"]


class Parameter(NamedTuple):
    """``is_expert``: the weights of one routed expert, or of all in one tensor."""

    shape: tuple[int, ...]
    is_expert: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Parameters that are sharded together; ``count`` buckets of a model are like this one."""

    name: str
    count: int
    parameters: tuple[Parameter, ...]

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True)
class Model:
    name: str
    buckets: tuple[Bucket, ...]

    @property
    def numel(self) -> int:
        return sum(bucket.count * bucket.numel for bucket in self.buckets)


def _of(*shapes: tuple[int, ...]) -> tuple[Parameter, ...]:
    return tuple(map(Parameter, shapes))


def _gated_mlp(hidden: int, intermediate: int, is_expert: bool = False) -> tuple[Parameter, ...]:
    """gate_proj, up_proj, down_proj."""
    up = Parameter((intermediate, hidden), is_expert)
    return up, up, Parameter((hidden, intermediate), is_expert)


def _root(vocabulary: int, hidden: int) -> Bucket:
    """The embedding, the last norm and the head, whose weights none of the models ties."""
    return Bucket("root", 1, _of((vocabulary, hidden), (hidden,), (vocabulary, hidden)))


def llama_3_70b() -> Model:
    """https://huggingface.co/meta-llama/Meta-Llama-3-70B"""
    layers = 80  # num_hidden_layers
    hidden = 8192  # hidden_size
    intermediate = 28672  # intermediate_size
    heads, kv_heads = 64, 8  # num_attention_heads, num_key_value_heads
    vocabulary = 128256  # vocab_size
    kv = kv_heads * hidden // heads
    attention = _of((hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden))  # q_proj, k_proj, v_proj, o_proj
    norms = _of((hidden,), (hidden,))
    layer = Bucket("layer", layers, attention + _gated_mlp(hidden, intermediate) + norms)
    return Model("Llama-3-70B", (layer, _root(vocabulary, hidden)))


def deepseek_v3() -> Model:
    """https://huggingface.co/deepseek-ai/DeepSeek-V3, without the module that predicts a second token."""
    layers, dense = 61, 3  # num_hidden_layers, first_k_dense_replace
    hidden = 7168  # hidden_size
    intermediate, expert = 18432, 2048  # intermediate_size, moe_intermediate_size
    experts, shared = 256, 1  # n_routed_experts, n_shared_experts
    heads = 128  # num_attention_heads
    q_rank, kv_rank = 1536, 512  # q_lora_rank, kv_lora_rank
    nope, rope, value = 128, 64, 128  # qk_nope_head_dim, qk_rope_head_dim, v_head_dim
    vocabulary = 129280  # vocab_size
    attention = _of(
        (q_rank, hidden),  # q_a_proj
        (q_rank,),  # q_a_layernorm
        (heads * (nope + rope), q_rank),  # q_b_proj
        (kv_rank + rope, hidden),  # kv_a_proj_with_mqa
        (kv_rank,),  # kv_a_layernorm
        (heads * (nope + value), kv_rank),  # kv_b_proj
        (hidden, heads * value),  # o_proj
    )
    mixture = experts * _gated_mlp(hidden, expert, is_expert=True)
    router = _of((experts, hidden), (experts,))  # weight, e_score_correction_bias
    norms = _of((hidden,), (hidden,))
    return Model(
        "DeepSeek-V3-671B",
        (
            Bucket("dense layer", dense, attention + _gated_mlp(hidden, intermediate) + norms),
            Bucket(
                "layer of experts",
                layers - dense,
                attention + mixture + router + _gated_mlp(hidden, shared * expert) + norms,
            ),
            _root(vocabulary, hidden),
        ),
    )


def gpt_oss_120b() -> Model:
    """https://huggingface.co/openai/gpt-oss-120b. All experts of a layer are one tensor, whose rows are ``2 *
    intermediate_size`` elements of gate and up, or ``hidden_size`` of down."""
    layers = 36  # num_hidden_layers
    hidden, intermediate = 2880, 2880  # hidden_size, intermediate_size
    experts = 128  # num_local_experts
    heads, kv_heads, head = 64, 8, 64  # num_attention_heads, num_key_value_heads, head_dim
    vocabulary = 201088  # vocab_size
    q, kv = heads * head, kv_heads * head
    # The sinks come first, then q_proj, k_proj, v_proj and o_proj, each with a bias.
    attention = _of((heads,), (q, hidden), (q,), (kv, hidden), (kv,), (kv, hidden), (kv,), (hidden, q), (hidden,))
    router = _of((experts, hidden), (experts,))
    mixture = (
        Parameter((experts, hidden, 2 * intermediate), is_expert=True),  # gate_up_proj
        Parameter((experts, 2 * intermediate)),  # gate_up_proj_bias
        Parameter((experts, intermediate, hidden), is_expert=True),  # down_proj
        Parameter((experts, hidden)),  # down_proj_bias
    )
    norms = _of((hidden,), (hidden,))
    layer = Bucket("layer", layers, attention + router + mixture + norms)
    return Model("GPT-OSS-120B", (layer, _root(vocabulary, hidden)))


MODELS = (llama_3_70b(), deepseek_v3(), gpt_oss_120b())
