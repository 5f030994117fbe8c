#!/usr/bin/env python3
"""Makes the golden files of this folder: tiny random Qwen3 checkpoints, PEFT adapters, and what transformers and PEFT
compute with them in float32.

Usage: make.py FOLDER. Needs torch 2.11, transformers 5.17, peft and safetensors; no GPU is needed. The same versions give the same files but for rounding of the last bits.

Weights are multiples of bf16, so that a program which keeps them in bf16 and computes in float32 sees the same values.
Weights of single layers in the real shapes are not stored: `hashed` draws each value from its position and a seed.
"""
import json
import pathlib
import sys

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

OUT = pathlib.Path(sys.argv[1])
torch.set_num_threads(8)
torch.manual_seed(0)
DENSE = dict(
    vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rope_theta=1_000_000.0, rms_norm_eps=1e-6,
    tie_word_embeddings=True, attention_bias=False, bos_token_id=510, eos_token_id=511, dtype="bfloat16",
)
MOE = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rope_theta=10_000_000.0, rms_norm_eps=1e-6,
    tie_word_embeddings=False, attention_bias=False, bos_token_id=510, eos_token_id=511, dtype="bfloat16",
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True, decoder_sparse_step=1,
    mlp_only_layers=[1],
)


def spread(model):
    """Random weights of a size that makes attention and router sharp enough to show mistakes."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = 1 + 0.2 * torch.randn(p.shape, generator=g)
        else:
            p.data = torch.randn(p.shape, generator=g) * (1.5 / p.shape[-1] ** 0.5)
        p.data = p.data.to(torch.bfloat16).to(torch.float32)
    return model.eval()


def prompts():
    g = np.random.default_rng(2)
    return [[int(x) for x in g.integers(0, 500, n)] for n in (1, 5, 17, 40)]


@torch.no_grad()
def expected(model):
    """Greedy continuations of each prompt, and all logits of the third."""
    greedy = []
    for ids in prompts():
        now, margins = list(ids), []
        for _ in range(24):
            logits = model(torch.tensor([now])).logits[0, -1]
            top = torch.topk(logits, 2)
            margins.append(float(top.values[0] - top.values[1]))
            now.append(int(top.indices[0]))
        greedy.append({"prompt": ids, "ids": now[len(ids):], "margins": margins})
    logits = model(torch.tensor([prompts()[2]])).logits[0].float().contiguous()
    return greedy, logits


def checkpoint(name, config, build):
    folder = OUT / name
    model = spread(build())
    bf16 = build().to(torch.bfloat16)
    bf16.load_state_dict({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()})
    bf16.save_pretrained(folder, max_shard_size="120KB" if name == "tiny-moe" else "10GB")
    greedy, logits = expected(model)
    facts = {
        "greedy": greedy, "logits_of": 2,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }
    (folder / "expected.json").write_text(json.dumps(facts, indent=1))
    save_file({"logits": logits}, folder / "expected.safetensors")
    return model


def adapter(name, base_build, state, **settings):
    base = base_build()
    base.load_state_dict(state)
    base.eval()
    config = peft.LoraConfig(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_dropout=0.0, task_type="CAUSAL_LM", **settings,
    )
    model = peft.get_peft_model(base, config)
    g = torch.Generator().manual_seed(len(name))
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data = (torch.randn(p.shape, generator=g) * 0.3 / p.shape[-1] ** 0.5).to(torch.bfloat16).to(torch.float32)
    folder = OUT / name
    model.save_pretrained(folder)
    greedy, logits = expected(model.eval())
    (folder / "expected.json").write_text(json.dumps({"greedy": greedy, "logits_of": 2}, indent=1))
    save_file({"logits": logits}, folder / "expected.safetensors")


MASK = (1 << 64) - 1


def hashed(seed, shape, scale):
    """Value i is splitmix64(seed * 2^40 + i), its top 24 bits as a number in [-1, 1), times `scale`, rounded to bf16."""
    n = int(np.prod(shape))
    out = torch.empty(n, dtype=torch.float32)
    for start in range(0, n, 1 << 24):
        with np.errstate(over="ignore"):
            z = np.arange(start, min(n, start + (1 << 24)), dtype=np.uint64) + np.uint64(seed << 40)
            z = (z + np.uint64(0x9E3779B97F4A7C15))
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
        x = (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
        out[start:start + len(x)] = torch.from_numpy(x * np.float32(scale))
    return out.to(torch.bfloat16).to(torch.float32).reshape(shape)


REAL = {
    "0.6b": dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8),
    "4b": dict(hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8),
    "30b-a3b": dict(
        hidden_size=2048, intermediate_size=6144, num_attention_heads=32, num_key_value_heads=4, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    ),
}


@torch.no_grad()
def layer(name):
    """One layer of the real shape over 6 tokens; the seeds are the tensors' places in `seeds`."""
    moe = name == "30b-a3b"
    common = dict(
        vocab_size=16, num_hidden_layers=1, head_dim=128, rope_theta=1_000_000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=True, attention_bias=False, max_position_embeddings=1024,
    )
    config = (Qwen3MoeConfig if moe else Qwen3Config)(**common, **REAL[name])
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = (Qwen3MoeForCausalLM if moe else Qwen3ForCausalLM)(config)
    block = model.model.layers[0].to_empty(device="cpu").float().eval()
    seeds = {}
    for n, (key, p) in enumerate(block.named_parameters()):
        seeds[key] = {"seed": n + 1, "shape": list(p.shape)}
        if "norm" in key:
            p.data = 1 + hashed(n + 1, p.shape, 0.25)
        else:
            p.data = hashed(n + 1, p.shape, 2.0 / p.shape[-1] ** 0.5)
        seeds[key]["scale"] = 0.25 if "norm" in key else 2.0 / p.shape[-1] ** 0.5
    tokens = 6
    x = hashed(1000, (1, tokens, config.hidden_size), 1.0)
    rope = type(model.model.rotary_emb)(config)
    positions = torch.arange(tokens)[None]
    cos_sin = rope(x, positions)
    causal = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]
    y = block(x, attention_mask=causal, position_embeddings=cos_sin, position_ids=positions)
    y = (y[0] if isinstance(y, tuple) else y)[0]
    picks = [int(i) for i in np.linspace(0, config.hidden_size - 1, 32).astype(int)]
    return {
        "config": {**common, **REAL[name]}, "seeds": seeds, "input": {"seed": 1000, "scale": 1.0, "tokens": tokens},
        "columns": picks, "output": [[float(v) for v in row[picks]] for row in y],
        "row_sums": [float(v) for v in y.double().sum(-1)], "row_norms": [float(v) for v in y.double().norm(dim=-1)],
    }


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    dense = lambda: Qwen3ForCausalLM(Qwen3Config(**DENSE)).float()
    moe = lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE)).float()
    model = checkpoint("tiny-dense", DENSE, dense)
    state = model.state_dict()
    checkpoint("tiny-moe", MOE, moe)
    adapter("lora-plain", dense, state, r=4, lora_alpha=8)
    adapter("lora-rslora", dense, state, r=8, lora_alpha=16, use_rslora=True)
    adapter("lora-patterns", dense, state, r=4, lora_alpha=8, rank_pattern={"q_proj": 8, "layers.1.mlp.down_proj": 2},
            alpha_pattern={"q_proj": 4, "layers.2.self_attn.o_proj": 32})
    layers = {}
    for name in REAL:
        try:
            layers[name] = layer(name)
        except Exception as error:  # said in the file, so that the others are not lost
            layers[name] = {"error": repr(error)}
            print(name, repr(error))
    (OUT / "layers.json").write_text(json.dumps(layers))
    for path in sorted(OUT.rglob("*")):
        if path.is_file():
            print(path.relative_to(OUT), path.stat().st_size)


main()
