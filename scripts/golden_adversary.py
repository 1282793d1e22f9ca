#!/usr/bin/env python3
"""Makes tests/golden/taming_adversary.safetensors: losses of taming-transformers' VQLPIPSWithDiscriminator for a small
VQGAN's reconstruction, for the generator and for the discriminator, and autograd's gradients of both losses. The VGG-16
inside of LPIPS has weights by the formula of golden_weights.py. No step is taken between the two losses; the
discriminator's BatchNorm is in train mode, so that each batch is normalised by itself.

    python3 -m venv venv && venv/bin/pip install torch torchvision numpy safetensors einops requests tqdm
    venv/bin/pip install --no-deps taming-transformers-rom1504
    venv/bin/python scripts/golden_adversary.py tests/golden/taming_adversary.safetensors
"""
import sys
from importlib.metadata import version

import golden_taming
import torch
import torchvision
from golden_weights import fill_lpips
from safetensors.torch import save_file
from taming.modules.losses import lpips as taming_lpips
from taming.modules.losses.vqperceptual import VQLPIPSWithDiscriminator, vanilla_d_loss


def criterion():
    taming_lpips.LPIPS.load_from_pretrained = lambda self, name="vgg_lpips": None
    vgg16 = torchvision.models.vgg16
    taming_lpips.models.vgg16 = lambda pretrained=True: vgg16(weights=None)
    loss = VQLPIPSWithDiscriminator(disc_start=0, disc_weight=0.8, disc_num_layers=2, disc_ndf=8)
    fill_lpips(loss.perceptual_loss)
    with torch.no_grad():
        for p in loss.discriminator.parameters():
            p.copy_(p.half())
    loss.discriminator.train()  # LPIPS stays in eval mode: its heads have dropout
    return loss


def statistics(gradient):
    g = gradient.flatten()
    waves = torch.cos(torch.arange(len(g), dtype=torch.float64) % 1000)
    return torch.stack([g.double().norm(), (g.double() * waves).sum()])


def main():
    torch.manual_seed(11)
    torch.set_num_threads(1)
    m, loss = golden_taming.model(), criterion()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z = m["quant_conv"](m["encoder"](x))
        rows = z.permute(0, 2, 3, 1).reshape(-1, golden_taming.DIM)
        book = rows[torch.randperm(len(rows))[:golden_taming.CODES]] + 0.1 * rows.std() * torch.randn(golden_taming.CODES, golden_taming.DIM)
        m["quantize"].embedding.weight.copy_(book.half())
    z_q, codebook_loss, (_, _, codes) = m["quantize"](m["quant_conv"](m["encoder"](x)))
    y = m["decoder"](m["post_quant_conv"](z_q))
    last = m["decoder"].conv_out.weight
    total, log = loss(codebook_loss, x, y, 0, 1, last_layer=last, split="train")
    names = [name for name, _ in m.named_parameters()]
    gradients = torch.autograd.grad(total, [p for _, p in m.named_parameters()], retain_graph=True)
    own = [(name, p) for name, p in loss.discriminator.named_parameters()]
    d_loss, d_log = loss(codebook_loss, x, y, 1, 1, last_layer=last, split="train")
    d_gradients = torch.autograd.grad(d_loss, [p for _, p in own], retain_graph=True)
    real, fake = loss.discriminator(x), loss.discriminator(y.detach())

    out = {name: p.detach().half() for name, p in m.named_parameters()}
    out |= {"discriminator." + name: p.detach().half() for name, p in own}
    out |= {"golden." + name.split("/")[1]: value for name, value in (log | d_log).items()}
    out |= {"golden.x": x, "golden.codes": codes.float(), "golden.y": y, "golden.vanilla": vanilla_d_loss(real, fake),
            "golden.codebook_loss": codebook_loss}
    out |= {"golden.gradient." + name: statistics(g) for name, g in zip(names, gradients)}
    out |= {"golden.gradient.discriminator." + name: statistics(g) for (name, _), g in zip(own, d_gradients)}
    metadata = {"torch": torch.__version__, "taming-transformers-rom1504": version("taming-transformers-rom1504")}
    save_file({k: torch.as_tensor(v).detach().contiguous() for k, v in out.items()}, sys.argv[1], metadata)
    print({k: float(v) for k, v in (log | d_log).items()}, file=sys.stderr)


if __name__ == "__main__":
    main()
