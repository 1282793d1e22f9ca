#!/usr/bin/env python3
"""Writes tests/golden/lora.safetensors and the folder tests/golden/lora: low-rank adapters by PyTorch and PEFT.

The generator, its weights and batches are those of golden_transformer.py; its linear layers in blocks become PEFT's. The file
holds, for both variants of the model, random adapters (`VARIANT.adapter.NAME`), the loss and its gradients with respect to them
(`VARIANT.gradient.NAME`), and the logits of both directions after PEFT merged the adapters into the weights
(`VARIANT.logits.TARGET`) with one of these weights (`VARIANT.merged`). The folder is what PEFT's `save_pretrained` writes for
the variant `plain`.

Needs torch, numpy, safetensors and peft. Run: python3 scripts/golden_lora.py
"""

import json
import pathlib
import platform
import shutil
import tempfile

import peft
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import golden_transformer as golden

RANK, ALPHA, TARGETS = 3, 5.0, {"plain": ["qkv", "proj", "fc1", "fc2"], "options": ["qkv", "fc2"]}
FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests/golden"


def linears(v, p):
    """The linear layers of the blocks as modules under their names, with these weights."""
    root = nn.Module()
    root.blocks = nn.ModuleList()
    for i in range(v["layers"]):
        block = nn.Module()
        block.attention, block.mlp = nn.Module(), nn.Module()
        for part, layer in [("attention", "qkv"), ("attention", "proj"), ("mlp", "fc1"), ("mlp", "fc2")]:
            name = f"blocks.{i}.{part}.{layer}"
            outputs, inputs = p[f"{name}.weight"].shape
            module = nn.Linear(inputs, outputs).double()
            module.weight.data, module.bias.data = p[f"{name}.weight"].clone(), p[f"{name}.bias"].clone()
            setattr(getattr(block, part), layer, module)
        root.blocks.append(block)
    return root


def through(modules):
    """golden.linear with the modules' layers."""
    plain = golden.linear

    def linear(p, name, x):
        return modules.get_submodule(name)(x) if name.startswith("blocks.") else plain(p, name, x)

    return linear


def main():
    torch.manual_seed(20210617)
    torch.set_num_threads(1)
    stored = load_file(FOLDER / "transformer.safetensors")
    batch = (stored["text"], stored["text_lengths"].tolist(), stored["codes"])
    out, plain = {}, golden.linear
    for variant, v in golden.VARIANTS.items():
        prefix = f"{variant}.weight."
        p = {name.removeprefix(prefix): t.double() for name, t in stored.items() if name.startswith(prefix)}
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[variant], lora_dropout=0.0, bias="none")
        model = peft.get_peft_model(linears(v, p), config).double()
        modules = model.base_model.model
        adapters = {}
        for name, t in modules.named_parameters():
            if t.requires_grad:
                # float32 values, so that both sides start from the same numbers; the arithmetic here is float64.
                values = t.data if "lora_A" in name else 0.1 * torch.randn(t.shape)
                t.data = values.float().double()
                adapters[name.replace(".default", "")] = t
        golden.linear = through(modules)
        value = golden.loss(v, p, batch)
        value.backward()
        out[f"{variant}.loss"] = value.detach()
        for name, t in adapters.items():
            out[f"{variant}.adapter.{name}"] = t.detach().float().clone()
            out[f"{variant}.gradient.{name}"] = t.grad.float()
        if variant == "plain":
            save(model)
        golden.linear = through(model.merge_and_unload())
        for target in ["image", "text"]:
            out[f"{variant}.logits.{target}"] = golden.logits(v, p, target == "image", *batch).detach().float()
        golden.linear = plain
        out[f"{variant}.merged"] = modules.get_submodule("blocks.1.attention.qkv").weight.detach().float().clone()
        print(variant, value.item(), len(adapters), "matrices")
    metadata = {
        "torch": torch.__version__, "peft": peft.__version__, "safetensors": safetensors.__version__,
        "python": platform.python_version(), "script": "scripts/golden_lora.py",
        "settings": json.dumps(dict(rank=RANK, alpha=ALPHA, targets=TARGETS)),
    }
    path = FOLDER / "lora.safetensors"
    save_file({name: t.contiguous() for name, t in out.items()}, path, metadata)
    print(path.name, path.stat().st_size, "bytes")


def save(model):
    """The adapter in float32, as PEFT stores it."""
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place, state_dict={name: t.float() for name, t in model.state_dict().items()})
        folder = FOLDER / "lora"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ["adapter_config.json", "adapter_model.safetensors"]:
            shutil.copy(pathlib.Path(place) / name, folder / name)


if __name__ == "__main__":
    main()
