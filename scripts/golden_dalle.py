#!/usr/bin/env python3
"""Makes tests/golden/dalle_dvae.safetensors: a small random dVAE of OpenAI's DALL-E package, and its outputs for two
images, and autograd's gradients of the logit-Laplace likelihood (arXiv 2102.12092, appendix A.3), which the package
has not: it is written here.

    python3 -m venv venv && venv/bin/pip install torch numpy safetensors attrs requests
    venv/bin/pip install --no-deps DALL-E
    venv/bin/python scripts/golden_dalle.py tests/golden/dalle_dvae.safetensors
"""
import math
import sys
from importlib.metadata import version

import attr
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

attr.set_run_validators(False)  # the package refuses small ones
from dall_e import Decoder, Encoder, map_pixels, unmap_pixels  # noqa: E402

CODES, HIDDEN, INIT = 32, 8, 12


def main():
    torch.manual_seed(13)
    torch.set_num_threads(1)
    settings = dict(n_hid=HIDDEN, n_blk_per_group=1, vocab_size=CODES, requires_grad=False, use_mixed_precision=False)
    encoder, decoder = Encoder(**settings), Decoder(n_init=INIT, **settings)
    with torch.no_grad():
        for p in [*encoder.parameters(), *decoder.parameters()]:
            p.copy_((p + 0.1 * torch.randn_like(p)).half())  # biases that are not 0; stored in two bytes
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():  # else one code is chosen everywhere, and the images hardly vary
        last, first = encoder.blocks.output.conv, decoder.blocks.input
        last.b.copy_((last.b - encoder(map_pixels(x)).mean((0, 2, 3))).half())
        first.w.copy_((8 * first.w).half())
    logits = encoder(map_pixels(x))
    codes = logits.argmax(1)
    output = decoder(F.one_hot(codes, CODES).permute(0, 3, 1, 2).float())
    mean, log_spread = output[:, :3], output[:, 3:]
    v = map_pixels(x)
    likelihood = (math.log(2) + log_spread + (v * (1 - v)).log() + (torch.logit(v) - mean).abs() / log_spread.exp()).mean()
    likelihood.backward()

    out = {"golden.x": x, "golden.logits": logits, "golden.codes": codes.float(), "golden.output": output,
           "golden.pixels": unmap_pixels(torch.sigmoid(mean)), "golden.nll": likelihood}
    for part, module in (("encoder.", encoder), ("decoder.", decoder)):
        out |= {part + name: p.detach().half() for name, p in module.named_parameters()}
    for name, p in decoder.named_parameters():
        g = p.grad.flatten()
        waves = torch.cos(torch.arange(len(g), dtype=torch.float64) % 1000)
        out["golden.gradient.decoder." + name] = torch.stack([g.double().norm(), (g.double() * waves).sum()])
    save_file({k: v.detach().contiguous() for k, v in out.items()}, sys.argv[1],
              {"torch": torch.__version__, "DALL-E": version("DALL-E")})
    print(codes.unique().numel(), likelihood, output.std((0, 2, 3)), file=sys.stderr)


if __name__ == "__main__":
    main()
