"""Writes models of random weights for `espalier bench infer`: what our worker reads, and the same weights for llama.cpp.

Usage: python model.py SHAPE FOLDER TOKENIZER [FORM…], where SHAPE is one of SHAPES, TOKENIZER is Qwen3's tokenizer.json,
packed with zstd, and each FORM is one of FORMS. Writes FOLDER/espalier (safetensors in bf16) and FOLDER/FORM.gguf.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import zstandard
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

VOCABULARY = 151_936
END_OF_TURN, END_OF_TEXT = 151_645, 151_643
ROPE_THETA, EPS, POSITIONS = 1e6, 1e-6, 40_960
# hidden, intermediate, layers, heads, heads of keys, elements of a head
SHAPES = {
    "0.6b": (1024, 3072, 28, 16, 8, 128),
    # Of two small layers: what is not the model shows.
    "tiny": (64, 128, 2, 4, 2, 16),
}
FORMS = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# Deviation of weights before training.
DEVIATION = 0.02


def tensors(shape):
    """Name in the checkpoint, name in a GGUF, and shape of each tensor."""
    hidden, wide, layers, heads, kv_heads, dim = shape
    yield "model.embed_tokens.weight", "token_embd.weight", (VOCABULARY, hidden)
    yield "model.norm.weight", "output_norm.weight", (hidden,)
    for i in range(layers):
        for ours, theirs, of in [
            ("input_layernorm", "attn_norm", (hidden,)),
            ("self_attn.q_proj", "attn_q", (heads * dim, hidden)),
            ("self_attn.k_proj", "attn_k", (kv_heads * dim, hidden)),
            ("self_attn.v_proj", "attn_v", (kv_heads * dim, hidden)),
            ("self_attn.o_proj", "attn_output", (hidden, heads * dim)),
            ("self_attn.q_norm", "attn_q_norm", (dim,)),
            ("self_attn.k_norm", "attn_k_norm", (dim,)),
            ("post_attention_layernorm", "ffn_norm", (hidden,)),
            ("mlp.gate_proj", "ffn_gate", (wide, hidden)),
            ("mlp.up_proj", "ffn_up", (wide, hidden)),
            ("mlp.down_proj", "ffn_down", (hidden, wide)),
        ]:
            yield f"model.layers.{i}.{ours}.weight", f"blk.{i}.{theirs}.weight", of


def drawn(shape):
    """The tensors' values in bf16. Norms are one."""
    random = np.random.default_rng(7)
    for ours, theirs, of in tensors(shape):
        if len(of) == 1:
            values = np.ones(of, np.float32)
        else:
            values = random.standard_normal(of, np.float32) * np.float32(DEVIATION)
        yield ours, theirs, values.astype(bfloat16)


def write_checkpoint(folder, shape):
    hidden, wide, layers, heads, kv_heads, dim = shape
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCABULARY,
        "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim,
        "rms_norm_eps": EPS, "rope_theta": ROPE_THETA, "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True, "eos_token_id": END_OF_TURN, "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [END_OF_TURN, END_OF_TEXT]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    save_file({ours: values for ours, _, values in drawn(shape)}, folder / "model.safetensors")


def vocabulary(packed):
    """Tokens, their kinds and the merges of Qwen3's tokenizer."""
    text = zstandard.ZstdDecompressor().stream_reader(packed.open("rb")).read()
    tokenizer = json.loads(text)
    tokens = [f"[PAD{i}]" for i in range(VOCABULARY)]
    kinds = [gguf.TokenType.UNUSED] * VOCABULARY
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    return tokens, kinds, merges


def write_gguf(file, shape, form, words):
    hidden, wide, layers, heads, kv_heads, dim = shape
    quantization, file_type = FORMS[form]
    tokens, kinds, merges = words
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_block_count(layers)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(END_OF_TURN)
    writer.add_pad_token_id(END_OF_TEXT)
    writer.add_add_bos_token(False)
    for _, theirs, halves in drawn(shape):
        values = halves.astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(theirs, values)
        else:
            writer.add_tensor(theirs, gguf.quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    name, folder, tokenizer, *forms = sys.argv[1:]
    shape, folder = SHAPES[name], Path(folder)
    write_checkpoint(folder / "espalier", shape)
    words = vocabulary(Path(tokenizer))
    for form in forms:
        write_gguf(folder / f"{form}.gguf", shape, form, words)


main()
