#!/usr/bin/env python3
"""Makes the golden files of this folder: what transformers and PEFT compute when they train the tiny checkpoints of
`crates/qwen3/tests/golden` in float32 on the CPU.

Usage: make.py CHECKPOINTS FOLDER [clear|bf16]. CHECKPOINTS is `crates/qwen3/tests/golden`. Needs torch 2.11, transformers 5.17,
peft and safetensors; no GPU and no network. The same versions give the same files but for rounding of the last bits.

With `clear` it makes `lora-moe-clear` alone. With `bf16` it trains the curve that is there again, over a base in bfloat16
under autocast, on a GPU where there is one, and writes `bf16.json`: how far torch's own bfloat16 is from its float32.

Every loss is the mean of -log p over the supervised tokens of all documents of a step; each document is a sequence of
its own.
"""
import json
import os
import pathlib
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3ForCausalLM, Qwen3MoeForCausalLM

CHECKPOINTS, OUT = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = ATTENTION + ["gate_proj", "up_proj", "down_proj"]
PICKS, STRIDE = 256, 9973
torch.set_num_threads(8)


DTYPE, DEVICE = torch.float32, "cpu"


def base(name, untied=False):
    """A checkpoint. Untied: the LM head is the embedding with its rows in reverse order."""
    folder = CHECKPOINTS / name
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    if name == "tiny-moe":
        try:
            config._experts_implementation = "eager"
        except Exception as error:  # an older or newer name: the default computes the same
            print("experts:", repr(error))
        return Qwen3MoeForCausalLM.from_pretrained(folder, config=config, dtype=DTYPE).to(DEVICE).eval()
    model = Qwen3ForCausalLM.from_pretrained(folder, config=config, dtype=DTYPE).to(DEVICE).eval()
    if not untied:
        return model
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].flip(0).contiguous()
    config.tie_word_embeddings = False
    other = Qwen3ForCausalLM(config).to(DEVICE, DTYPE)
    other.load_state_dict(state)
    return other.eval()


def documents(seed, lengths):
    """Ids with some order in them, so that there is something to learn, and two supervised stretches in each."""
    g = np.random.default_rng(seed)
    made = []
    for n in lengths:
        ids, now = [], int(g.integers(0, 500))
        for _ in range(n):
            ids.append(now)
            now = int((now * 7 + 3 + g.integers(0, 3)) % 500)
        first = n // 4
        supervised = [list(range(max(1, first), first + n // 5 + 1)), list(range(n - n // 3, n))]
        made.append({"ids": ids, "supervised": sorted(set(supervised[0] + supervised[1]))})
    return made


def total_loss(model, docs):
    """Sum of -log p over the supervised tokens."""
    total = torch.zeros((), device=DEVICE)
    for doc in docs:
        logits = model(input_ids=torch.tensor([doc["ids"]], device=DEVICE), use_cache=False).logits[0].float()
        logp = torch.log_softmax(logits, -1)
        for at in doc["supervised"]:
            total = total - logp[at - 1, doc["ids"][at]]
    return total


def count(docs):
    return sum(len(doc["supervised"]) for doc in docs)


def plain(name):
    return name.replace(".default.", ".")


def trained(model):
    return [(plain(name), p) for name, p in model.named_parameters() if p.requires_grad]


def adapt(model, seed, b, **settings):
    """PEFT's wrapper with drawn weights: A as PEFT draws it in size, B of size `b`."""
    config = peft.LoraConfig(lora_dropout=0.0, task_type="CAUSAL_LM", **settings)
    wrapped = peft.get_peft_model(model, config)
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(trained(wrapped)):
        drawn = torch.rand(p.shape, generator=g) * 2 - 1
        size = b if "lora_B" in name else 1.0
        p.data = (drawn * size / p.shape[-1] ** 0.5).to(p.device).contiguous()
    return wrapped.eval()


def weights(model):
    return {name: p.detach().clone().contiguous() for name, p in trained(model)}


def gradients(model, docs):
    loss = total_loss(model, docs) / count(docs)
    loss.backward()
    grads = {name: p.grad.detach().clone().contiguous() for name, p in trained(model)}
    norm = float(torch.sqrt(sum((g.double() ** 2).sum() for g in grads.values())))
    return float(loss), norm, grads


def lora_case(name, checkpoint, docs, seed, **settings):
    model = adapt(base(checkpoint), seed, 0.3, **settings)
    (OUT / name).mkdir(parents=True, exist_ok=True)
    save_file(weights(model), OUT / name / "adapter_model.safetensors")
    loss, norm, grads = gradients(model, docs)
    save_file(grads, OUT / name / "gradients.safetensors")
    return {"settings": settings, "loss": loss, "norm": norm}


def margins(model, docs):
    """Of each choice of experts: how far the last one chosen is ahead of the next, in deviations of its logits."""
    found = []

    def look(gate, inputs):
        x = torch.nn.functional.linear(inputs[0].reshape(-1, gate.weight.shape[1]).float(), gate.weight.float())
        top = x.topk(model.config.num_experts_per_tok + 1).values
        found.append(float(((top[:, -2] - top[:, -1]) / x.std(-1)).min()))

    hooks = [layer.mlp.gate.register_forward_pre_hook(look) for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    with torch.no_grad():
        for doc in docs:
            model(input_ids=torch.tensor([doc["ids"]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return min(found)


def clear_documents():
    """Of 3,000 draws the one whose choices of experts are clearest: rounding to bfloat16 must change none."""
    model = base("tiny-moe")
    drawn = (documents(seed, [9]) for seed in range(3000))
    return max(((margins(model, docs), docs) for docs in drawn), key=lambda pair: pair[0])


def clear_case():
    margin, docs = clear_documents()
    case = lora_case("lora-moe-clear", "tiny-moe", docs, 6, r=4, lora_alpha=8, target_modules=ATTENTION)
    return case | {"margin": margin, "documents": docs}


def full_case(name, docs, untied):
    """All gradients by norm and by picks: element i * 9973 mod count, for i below 256."""
    loss, norm, grads = gradients(base("tiny-dense", untied), docs)
    picks, norms = {}, {}
    for key, grad in grads.items():
        flat = grad.flatten()
        picks[key] = flat[(torch.arange(PICKS) * STRIDE) % len(flat)].contiguous()
        norms[key] = float(grad.double().norm())
    save_file(picks, OUT / f"{name}.safetensors")
    return {"loss": loss, "norm": norm, "norms": norms}


def curve(model, docs, steps, groups, lr, clip):
    """Step s trains on documents 2s and 2s + 1, around; one document is one micro-batch."""
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    losses, norms = [], []
    parameters = [p for _, p in trained(model)]
    for step in range(steps):
        pair = [docs[(2 * step + i) % len(docs)] for i in range(2)]
        optimizer.zero_grad()
        total = 0.0
        for doc in pair:
            loss = total_loss(model, [doc]) / count(pair)
            loss.backward()
            total += float(loss)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, clip)))
        optimizer.step()
        losses.append(total)
    return losses, norms


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().contiguous()


def lora_curve(docs, steps):
    settings = dict(r=8, lora_alpha=16, use_rslora=True, target_modules=ALL)
    model = adapt(base("tiny-dense"), 5, 0.0, **settings)
    folder = OUT / "curve"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(model), folder / "initial.safetensors")
    lr, decay, clip = 2e-3, 0.01, 1.0
    groups = [{"params": [p for _, p in trained(model)], "weight_decay": decay}]
    losses, norms = curve(model, docs, steps, groups, lr, clip)
    model.save_pretrained(folder)
    for extra in folder.glob("README.md"):
        extra.unlink()
    ids = docs[0]["ids"][:17]
    tensors = {"base": logits(base("tiny-dense"), ids), "adapted": logits(model, ids)}
    tensors["merged"] = logits(model.merge_and_unload().eval(), ids)
    save_file(tensors, folder / "logits.safetensors")
    return {"settings": settings, "lr": lr, "weight_decay": decay, "clip": clip, "losses": losses, "norms": norms, "ids": ids}


def full_curve(docs, steps):
    """All weights but those of norms decay."""
    model = base("tiny-dense")
    lr, decay, clip = 5e-4, 0.1, 1.0
    named = trained(model)
    groups = [
        {"params": [p for name, p in named if "norm" not in name], "weight_decay": decay},
        {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
    ]
    losses, norms = curve(model, docs, steps, groups, lr, clip)
    return {"lr": lr, "weight_decay": decay, "clip": clip, "losses": losses, "norms": norms}


def put(model, file):
    """The adapter's numbers of a file."""
    tensors = load_file(file)
    for name, p in trained(model):
        p.data = tensors[name].to(p.device, p.dtype)
    return model


def autocast():
    """Without the cache of weights, which a step of the optimizer would leave behind the times."""
    return torch.autocast(DEVICE, DTYPE, cache_enabled=False)


def bf16():
    """What bfloat16 costs torch: how far its losses are from those of the curve."""
    global DTYPE, DEVICE
    DTYPE, DEVICE = torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu"
    facts = json.loads((OUT / "facts.json").read_text())
    case = facts["curve"]
    model = put(adapt(base("tiny-dense"), 0, 0.0, **case["settings"]), OUT / "curve" / "initial.safetensors")
    groups = [{"params": [p for _, p in trained(model)], "weight_decay": case["weight_decay"]}]
    with autocast():
        losses, _ = curve(model, facts["curve_documents"], len(case["losses"]), groups, case["lr"], case["clip"])
    apart = sum(abs(a - b) for a, b in zip(losses, case["losses"]))
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    found = {"curve": {"share": apart / sum(case["losses"])}, "device": device}
    (OUT / "bf16.json").write_text(json.dumps(found, indent=1) + "\n")


def main():
    part = sys.argv[3:]
    if part == ["bf16"]:
        return bf16()
    if part == ["clear"]:
        facts = json.loads((OUT / "facts.json").read_text())
        facts["lora-moe-clear"] = clear_case()
        return (OUT / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    OUT.mkdir(parents=True, exist_ok=True)
    few, many = documents(11, [23, 40, 11]), documents(12, [24, 31, 18, 40, 27, 22, 35, 29])
    facts = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "gradient_documents": few, "curve_documents": many,
        "lora-dense": lora_case("lora-dense", "tiny-dense", few, 3, r=4, lora_alpha=8, target_modules=ALL),
        "lora-some": lora_case(
            "lora-some", "tiny-dense", few, 4, r=3, lora_alpha=8, use_rslora=True,
            target_modules=["v_proj", "o_proj", "up_proj"],
        ),
        "lora-moe": lora_case("lora-moe", "tiny-moe", few, 6, r=4, lora_alpha=8, target_modules=ATTENTION),
        "lora-moe-clear": clear_case(),
        "full-tied": full_case("full-tied", few, False),
        "full-untied": full_case("full-untied", few, True),
        "curve": lora_curve(many, 200),
        "full-curve": full_curve(many, 40),
    }
    (OUT / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    total = 0
    for path in sorted(OUT.rglob("*")):
        if path.is_file():
            total += path.stat().st_size
            print(path.relative_to(OUT), path.stat().st_size)
    print("total", total)


main()
