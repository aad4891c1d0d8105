"""The same weights as a GGUF file for llama.cpp: architecture `qwen`, float16, with a vocabulary of placeholders.

    python benchmarks/peer_gguf.py MODEL OUT.gguf      MODEL: a folder with Qwen-1 weights, as `qwenlet random` writes

Good for speed and memory only: llama.cpp can't turn text into ids with it. `llama-quantize OUT.gguf Q4_0.gguf Q4_0`
makes the quantized ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import torch

from qwenlet.checkpoint import Checkpoint

_LAYER = {
    "ln_1.weight": "attn_norm.weight",
    "attn.c_attn.weight": "attn_qkv.weight",
    "attn.c_attn.bias": "attn_qkv.bias",
    "attn.c_proj.weight": "attn_output.weight",
    "ln_2.weight": "ffn_norm.weight",
    "mlp.w1.weight": "ffn_up.weight",
    "mlp.w2.weight": "ffn_gate.weight",
    "mlp.c_proj.weight": "ffn_down.weight",
}
_OUTER = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write(model: Path, out: Path) -> None:
    checkpoint = Checkpoint.open(model)
    config, weights = checkpoint.config, checkpoint.weights()
    writer = gguf.GGUFWriter(out, "qwen")
    writer.add_context_length(config.context_length)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size * 2)  # as published: the two halves counted together
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_merges(["a b"])
    names = {name: _OUTER[name] for name in _OUTER}
    for layer in range(config.num_hidden_layers):
        names |= {f"transformer.h.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in _LAYER.items()}
    for ours, theirs in names.items():
        dtype = torch.float16 if theirs.endswith("weight") and "norm" not in theirs else torch.float32
        writer.add_tensor(theirs, weights.read(ours, dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write(args.model, args.out)


if __name__ == "__main__":
    main()
