#!/usr/bin/env python3
"""Merges each adapter of this folder with its base as PEFT does, for `tests/merge.rs` to compare with.

Usage: merged.py FOLDER, the one of the golden files; writes FOLDER/lora-*/merged.safetensors. Needs torch 2.11, transformers
5.17, peft 0.21 and safetensors; no GPU is needed.

The base is loaded in float32, `merge_and_unload` adds in float32, and each sum is rounded once to bfloat16. Of each matrix
that the adapter changes every eighth row is kept, from the first on.
"""
import pathlib
import sys

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

EVERY = 8


def merged(folder, adapter):
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny-dense", dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    after = model.state_dict()
    assert after.keys() == before.keys(), after.keys() ^ before.keys()
    changed = {name: value for name, value in after.items() if not torch.equal(value, before[name])}
    return {name: value.to(torch.bfloat16)[::EVERY].contiguous() for name, value in changed.items()}


def main():
    folder = pathlib.Path(sys.argv[1])
    for adapter in sorted(folder.glob("lora-*")):
        rows = merged(folder, adapter)
        save_file(rows, adapter / "merged.safetensors")
        print(f"{adapter.name}: {len(rows)} matrices")


main()
