#!/usr/bin/env python3
"""Measures how far torch's own bf16 is from float32 on the same weights: what tests on a GPU compare ours with.

Usage: bf16.py FOLDER, the one of the golden files; writes FOLDER/bf16.json. Needs a GPU, torch 2.11, transformers 5.17
and safetensors.

Torch does in bf16 what the tests let ours do: a greedy answer of `TOKENS` ids to each prompt. Then float32 is given the
same ids, and of each position the log-probabilities of the `TOP` likeliest ids are compared. Prompts are many, since
what is rare is large: a router whose choice flips.
"""
import json
import pathlib
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

FOLDER = pathlib.Path(sys.argv[1])
PROMPTS, TOKENS, TOP = 48, 40, 20
torch.backends.cuda.matmul.allow_tf32 = False
COMMON = dict(head_dim=128, rms_norm_eps=1e-6, attention_bias=False, max_position_embeddings=40960)
SHAPES = {
    "0.6b": (Qwen3Config, Qwen3ForCausalLM, dict(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, rope_theta=1e6, tie_word_embeddings=True)),
    "4b": (Qwen3Config, Qwen3ForCausalLM, dict(
        vocab_size=8000, hidden_size=2560, intermediate_size=9728, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, rope_theta=5e6, tie_word_embeddings=True)),
    "30b-a3b": (Qwen3MoeConfig, Qwen3MoeForCausalLM, dict(
        vocab_size=8000, hidden_size=2048, intermediate_size=6144, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], rope_theta=1e7, tie_word_embeddings=False)),
}


def drawn(name, shape, device):
    """Values as `Seeded::any` of crates/qwen3 draws them: uniform, a multiple of bf16, of a size by the tensor's kind. Not
    the same numbers, which do not matter: both precisions have these."""
    norm = "norm" in name
    seed = sum(map(ord, name))
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.rand(shape, generator=generator, device=device) * 2 - 1
    x = 1 + 0.25 * x if norm else x * (2.0 / shape[-1] ** 0.5)
    return x.to(torch.bfloat16).float()


def of_shape(name):
    config, model, settings = SHAPES[name]
    with torch.device("cuda"):
        model = model(config(**COMMON, **settings)).float()
    for key, p in model.named_parameters():
        p.data = drawn(key, tuple(p.shape), "cuda")
    return model.eval(), settings["vocab_size"]


def of_folder(name):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32)
    return model.cuda().eval(), 500


@torch.no_grad()
def answer(model, prompt):
    """Greedy ids, and the logits of each position, recomputed whole each time: no cache in the way."""
    ids = list(prompt)
    for _ in range(TOKENS):
        ids.append(int(model(torch.tensor([ids], device="cuda")).logits[0, -1].argmax()))
    return ids


@torch.no_grad()
def logprobs(model, ids, start):
    logits = model(torch.tensor([ids[:-1]], device="cuda")).logits[0, start - 1:]
    return logits.float().log_softmax(-1)


def in_bf16(model):
    """The same weights as `from_pretrained` would have them: tables of angles stay in float32."""
    low = type(model)._from_config(model.config, dtype=torch.bfloat16).cuda().eval()
    low.load_state_dict({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}, strict=False)
    low.tie_weights()
    return low


@torch.no_grad()
def relative(name, model):
    """Error of all logits of the golden prompt, over their size."""
    facts = json.loads((FOLDER / name / "expected.json").read_text())
    ids = torch.tensor([facts["greedy"][facts["logits_of"]]["prompt"]], device="cuda")
    exact, low = model(ids).logits.float(), in_bf16(model)(ids).logits.float()
    return float((low - exact).norm() / exact.norm())


def measure(model, vocab):
    low = in_bf16(model)
    squares = count = 0
    largest = furthest = 0.0
    for n in range(PROMPTS):
        length = (1, 17, 64, 150)[n % 4]
        prompt = [(i * 7919 + n * 31 + length) % vocab for i in range(length)]
        ids = answer(low, prompt)
        exact, ours = logprobs(model, ids, length), logprobs(low, ids, length)
        top = ours.topk(TOP)
        errors = (top.values - exact.gather(1, top.indices)).double()
        squares, count = squares + float((errors ** 2).sum()), count + errors.numel()
        largest = max(largest, float(errors.abs().max()))
        chosen = exact.gather(1, torch.tensor(ids[length:], device="cuda")[:, None])[:, 0]
        furthest = max(furthest, float((exact.max(-1).values - chosen).max()))
    return {"rms": (squares / count) ** 0.5, "largest": largest, "behind": furthest, "compared": count}


def main():
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("tiny-dense", "tiny-moe"):
        model, vocab = of_folder(name)
        found[name] = {"relative": relative(name, model), **measure(model, vocab)}
        print(name, found[name], flush=True)
    for name in SHAPES:
        found[name] = measure(*of_shape(name))
        print(name, found[name], flush=True)
    (FOLDER / "bf16.json").write_text(json.dumps(found, indent=1) + "\n")


main()
