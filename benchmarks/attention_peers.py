"""The peers of kernels.attention, as functions of bench_attention's Inputs that return one of () -> out_THU.

NotAvailable where a peer cannot do a mode, or is not installed.
"""

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from benchmarks.harness import NotAvailable
from kernels import reference

if TYPE_CHECKING:
    from benchmarks.bench_attention import Inputs

Peer = Callable[["Inputs"], Callable[[], Tensor]]

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
FLASH_ATTN = {"flash-attn": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}
BYTES_OF_SCORES = 16  # a pair and head at the highest moment of torch's plain equations: four times float32


def of(device: str) -> dict[str, Peer]:
    """By name, those that are worth timing there."""
    on_cpu = device == "cpu"
    found: dict[str, Peer] = {f"torch sdpa {name}": partial(sdpa, name=name)
                              for name in (("flash", "math") if on_cpu else SDPA)}
    found["torch flex"] = flex
    if on_cpu:
        return found | {"transformers sdpa": transformers_sdpa, "transformers eager": transformers_eager}
    return found | {name: partial(flash_attn, module=module) for name, module in FLASH_ATTN.items()}


def batched(i: "Inputs", *tensors: Tensor) -> list[Tensor]:
    """[B, heads, L, C]; packed documents are one row of a batch."""
    B, L = (1, i.B * i.L) if i.mode == "packed" else (i.B, i.L)
    return [x.view(B, L, *x.shape[1:]).transpose(1, 2) for x in tensors]


def flat(out_BHLU: Tensor) -> Tensor:
    return out_BHLU.transpose(1, 2).flatten(0, 1)


def dense_mask(i: "Inputs") -> Tensor | None:
    """What a row of the batch sees, where a flag does not say it."""
    if i.mode == "packed":
        return reference.visible(i.documents, causal=True, window=None)
    if i.mode == "window":
        place_L = torch.arange(i.L, device=i.device)
        back_LL = place_L[:, None] - place_L
        return (back_LL >= 0) & (back_LL < i.options["window"])
    return None


def refuse(i: "Inputs", name: str, *modes: str) -> None:
    if i.mode in modes:
        raise NotAvailable(f"{name} has no {i.mode}")


def sdpa(i: "Inputs", name: str) -> Callable[[], Tensor]:
    refuse(i, "scaled_dot_product_attention", "softcap", "sink")
    if i.device == "cuda" and name == "flash" and i.mode in ("packed", "window"):
        raise NotAvailable("the flash kernel of scaled_dot_product_attention takes no mask")
    if i.device == "cuda" and name == "math":
        rows, length = (1, i.B * i.L) if i.mode == "packed" else (i.B, i.L)
        want, free = BYTES_OF_SCORES * rows * i.H * length**2, torch.cuda.mem_get_info()[0]
        if want > free:
            raise NotAvailable(f"all scores take {want / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    mask = dense_mask(i)
    repeated = i.H // i.G if name == "efficient" else 1  # that kernel wants as many heads everywhere

    def forward() -> Tensor:
        q, k, v = batched(i, i.q_THC, *(x.repeat_interleave(repeated, dim=1) if repeated > 1 else x
                                        for x in (i.k_TGC, i.v_TGU)))
        with sdpa_kernel(SDPA[name]):
            return flat(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and i.options["causal"],
                                                       enable_gqa=q.shape[1] != k.shape[1]))

    return forward


def flex(i: "Inputs") -> Callable[[], Tensor]:
    if i.device == "cpu":
        raise NotAvailable("FlexAttention has no backward on a CPU")
    if torch._dynamo.config.disable:
        raise NotAvailable("torch.compile is disabled, and FlexAttention is not meant to run without")
    torch.compiler.reset()  # of many shapes in one process the later ones would not be compiled any more
    return flex_by(torch.compile(flex_attention.flex_attention, dynamic=False), i)


def flex_by(attend: Callable, i: "Inputs") -> Callable[[], Tensor]:
    length = i.B * i.L if i.mode == "packed" else i.L
    document_T = torch.repeat_interleave(torch.arange(len(i.lengths), device=i.device),
                                         torch.tensor(i.lengths, device=i.device))

    def sees(b, h, query, key):
        seen = query >= key
        if i.mode == "window":
            seen &= query - key < i.options["window"]
        return seen & (document_T[query] == document_T[key]) if i.mode == "packed" else seen

    def capped(score, b, h, query, key):
        return i.options["softcap"] * torch.tanh(score / i.options["softcap"])

    block_mask = None if not i.options["causal"] else flex_attention.create_block_mask(
        sees, None, None, length, length, device=i.device)
    more = {"score_mod": capped if i.mode == "softcap" else None, "block_mask": block_mask, "enable_gqa": i.H != i.G}

    def forward() -> Tensor:
        q, k, v = batched(i, i.q_THC, i.k_TGC, i.v_TGU)
        if i.mode != "sink":
            return flat(attend(q, k, v, **more))
        out, beside = attend(q, k, v, **more, return_aux=flex_attention.AuxRequest(lse=True))
        return flat((out * (beside.lse - i.sink_H[:, None]).sigmoid()[..., None]).to(out.dtype))

    return forward


def flash_attn(i: "Inputs", module: str) -> Callable[[], Tensor]:
    try:
        attend = importlib.import_module(module).flash_attn_varlen_func
    except (ImportError, AttributeError) as error:
        raise NotAvailable(f"{module} with flash_attn_varlen_func is not installed") from error
    if module != "flash_attn.cute":
        refuse(i, module, "sink")
    cu_seqlens, longest = i.documents.cu_seqlens, max(i.lengths)
    more = {"causal": i.options["causal"]}
    if i.mode == "window":
        more["window_size"] = (i.options["window"] - 1, 0)
    if i.mode == "softcap":
        more["softcap"] = i.options["softcap"]

    def forward() -> Tensor:
        sink = {"learnable_sink": i.sink_H.to(i.dtype)} if i.mode == "sink" else {}
        out = attend(i.q_THC, i.k_TGC, i.v_TGU, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest,
                     max_seqlen_k=longest, **more, **sink)
        return out[0] if isinstance(out, tuple) else out  # some releases return the logsumexp too

    return forward


def transformers_sdpa(i: "Inputs") -> Callable[[], Tensor]:
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError as error:
        raise NotAvailable("transformers with sdpa_attention_forward is not installed") from error
    refuse(i, "sdpa_attention_forward", "softcap", "sink")
    mask, module = dense_mask(i), attention_module(i)

    def forward() -> Tensor:
        out_BLHU, _ = sdpa_attention_forward(
            module, *batched(i, i.q_THC, i.k_TGC, i.v_TGU), None if mask is None else mask[None, None],
            scaling=i.C**-0.5, is_causal=i.options["causal"])
        return out_BLHU.flatten(0, 1)

    return forward


def transformers_eager(i: "Inputs") -> Callable[[], Tensor]:
    """Of Gemma 2, which has a soft cap, of gpt-oss, which has sinks, and of Qwen3."""
    model = {"softcap": "gemma2", "sink": "gpt_oss"}.get(i.mode, "qwen3")
    try:
        attend = importlib.import_module(f"transformers.models.{model}.modeling_{model}").eager_attention_forward
    except (ImportError, AttributeError) as error:
        raise NotAvailable(f"transformers with {model} is not installed") from error
    mask, module = dense_mask(i), attention_module(i)
    if mask is None and i.options["causal"]:
        mask = torch.ones(i.L, i.L, dtype=torch.bool, device=i.device).tril()
    added = None if mask is None else torch.zeros_like(mask, dtype=i.dtype).masked_fill(
        ~mask, torch.finfo(i.dtype).min)[None, None]
    more = {"softcap": i.options["softcap"]} if i.mode == "softcap" else {}

    def forward() -> Tensor:
        out_BLHU, _ = attend(module, *batched(i, i.q_THC, i.k_TGC, i.v_TGU), added, scaling=i.C**-0.5, **more)
        return out_BLHU.flatten(0, 1)

    return forward


def attention_module(i: "Inputs") -> SimpleNamespace:
    """What transformers' functions read of the module that calls them."""
    return SimpleNamespace(num_key_value_groups=i.H // i.G, is_causal=i.options["causal"], training=False, head_dim=i.C,
                           sinks=i.sink_H)
