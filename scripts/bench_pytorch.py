"""PyTorch's side of scripts/bench_vs_pytorch.sh: the work of `vilg bench`, as a PyTorch user would write it for speed.

    bench_pytorch.py train|tokenizer|matcher|embed|decode|dalle-train|dalle-decode [options]

Prints one JSON object: seconds of every repetition, processor seconds in it (fewer than threads x seconds where
something else ran), what they went through, peak memory of this process (--device cuda: of its tensors). It shares no code with vilg.

Settings that make PyTorch faster are on by default: fused AdamW, gradients set to None,
scaled_dot_product_attention (causal, so that it skips half the blocks), denormals flushed, glibc told to keep its
memory (`--malloc` says how).
"""

import argparse
import contextlib
import json
import os
import sys
import time
import types

# glibc reads these as a process starts, so the script starts itself again. "keep" never gives memory back to the
# system between steps; "huge" asks for huge pages as well.
MALLOC = {
    "default": {},
    "keep": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"},
    "huge": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
        ":glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
    },
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["train", "tokenizer", "matcher", "embed", "decode", "dalle-train", "dalle-decode"])
    parser.add_argument("--precision", choices=["f32", "bf16", "int8"], default="f32")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--malloc", choices=MALLOC, default="keep")
    parser.add_argument("--compile", action="store_true", help="torch.compile (inductor; needs a C++ compiler)")
    shape = parser.add_argument_group("transformer")
    shape.add_argument("--layers", type=int, default=8)
    shape.add_argument("--hidden", type=int, default=512)
    shape.add_argument("--heads", type=int, default=8)
    shape.add_argument("--text", type=int, default=32, help="text positions")
    shape.add_argument("--side", type=int, default=16, help="side length of the grid of codes")
    shape.add_argument("--vocabulary", type=int, default=128, help="text tokens")
    shape.add_argument("--codebook", type=int, default=12288, help="codes")
    shape.add_argument("--attention", choices=["full", "axial"], default="full", help="of dalle-pytorch")
    shape.add_argument("--shift", action="store_true", help="dalle-pytorch's shifted tokens, its default but slower")
    images = parser.add_argument_group("tokenizer")
    images.add_argument("--channels", type=int, default=64)
    images.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 2])
    images.add_argument("--residual-blocks", type=int, default=1)
    images.add_argument("--latent", type=int, default=64)
    images.add_argument("--image-codes", type=int, default=1024)
    images.add_argument("--code-dim", type=int, default=64)
    images.add_argument("--size", type=int, default=64, help="side length of the images in pixels")
    images.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    matcher = parser.add_argument_group("matcher")
    matcher.add_argument("--encoder-layers", type=int, default=12, help="of the ViT and of the text encoder")
    matcher.add_argument("--encoder-hidden", type=int, default=384)
    matcher.add_argument("--encoder-heads", type=int, default=6)
    matcher.add_argument("--patch", type=int, default=16)
    matcher.add_argument("--matcher-size", type=int, default=224, help="side length of the images in pixels")
    matcher.add_argument("--matcher-vocabulary", type=int, default=21128)
    args = parser.parse_args()
    if args.device == "cuda" and args.precision == "int8":
        parser.error("PyTorch's int8 products are for CPUs")
    return args


ARGS = parse()
if os.environ.get("BENCH_MALLOC") != ARGS.malloc:
    os.environ.update(MALLOC[ARGS.malloc], BENCH_MALLOC=ARGS.malloc, OMP_NUM_THREADS=str(ARGS.threads))
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402


class Attention(nn.Module):
    def __init__(self, hidden, heads, causal=True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def split(self, x):
        b, l, hidden = x.shape
        return self.qkv(x).view(b, l, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.split(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(x.shape))

    def step(self, x, cache, first, mask):
        """Positions `first..` of sequences whose keys and values are in `cache` (2, b, heads, positions, d)."""
        q, k, v = self.split(x)
        end = first + x.shape[1]
        cache[0][:, :, first:end] = k
        cache[1][:, :, first:end] = v
        y = F.scaled_dot_product_attention(q, cache[0][:, :, :end], cache[1][:, :, :end], attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, hidden, heads, causal=True):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def step(self, x, cache, first, mask):
        x = x + self.attention.step(self.norm1(x), cache, first, mask)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Text, start of image, codes: each code is predicted at the position before it."""

    def __init__(self, a):
        super().__init__()
        self.codes = a.side * a.side
        self.text = a.text
        self.text_embedding = nn.Embedding(a.vocabulary, a.hidden)
        self.image_embedding = nn.Embedding(a.codebook, a.hidden)
        self.position = nn.Embedding(a.text + self.codes, a.hidden)
        self.start = nn.Parameter(torch.zeros(1, 1, a.hidden))
        self.blocks = nn.ModuleList(Block(a.hidden, a.heads) for _ in range(a.layers))
        self.norm = nn.LayerNorm(a.hidden)
        self.head = nn.Linear(a.hidden, a.codebook)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, text, codes):
        parts = [self.text_embedding(text), self.start.expand(text.shape[0], -1, -1), self.image_embedding(codes[:, :-1])]
        x = torch.cat(parts, 1) + self.position.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x[:, self.text :]))
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    def source(self, text, caches):
        """The text and the start of the image → logits of the first code."""
        x = torch.cat([self.text_embedding(text), self.start.expand(text.shape[0], -1, -1)], 1)
        x = x + self.position.weight[: x.shape[1]]
        l = x.shape[1]
        mask = torch.ones(l, l, dtype=torch.bool).tril()
        for block, cache in zip(self.blocks, caches):
            x = block.step(x, cache, 0, mask)
        return self.head(self.norm(x[:, -1]))

    def step(self, code, caches, position):
        x = (self.image_embedding(code) + self.position.weight[position])[:, None]
        for block, cache in zip(self.blocks, caches):
            x = block.step(x, cache, position, None)
        return self.head(self.norm(x[:, 0]))


class PostNormBlock(Block):
    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class Matcher(nn.Module):
    """CLIP's ViT and a BERT-style text encoder, with CLIP's loss."""

    def __init__(self, a):
        super().__init__()
        hidden, positions = a.encoder_hidden, (a.matcher_size // a.patch) ** 2 + 1
        self.patch = nn.Conv2d(3, hidden, a.patch, stride=a.patch, bias=False)
        self.class_token = nn.Parameter(torch.randn(1, 1, hidden) * hidden**-0.5)
        self.image_position = nn.Parameter(torch.randn(positions, hidden) * hidden**-0.5)
        self.norm_pre, self.norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.image_blocks = nn.Sequential(*(Block(hidden, a.encoder_heads, False) for _ in range(a.encoder_layers)))
        self.token = nn.Embedding(a.matcher_vocabulary, hidden)
        self.text_position = nn.Parameter(torch.randn(a.text, hidden) * 0.02)
        self.text_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.text_blocks = nn.Sequential(*(PostNormBlock(hidden, a.encoder_heads, False) for _ in range(a.encoder_layers)))
        self.image_proj, self.text_proj = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.659))

    def images(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.image_position
        x = self.image_blocks(self.norm_pre(x))
        return F.normalize(self.image_proj(self.norm(x[:, 0])), dim=-1)

    def texts(self, ids):
        x = self.text_blocks(self.text_norm(self.token(ids) + self.text_position))
        return F.normalize(self.text_proj(x[:, 0]), dim=-1)

    def forward(self, pixels, ids):
        logits = self.scale.exp() * self.images(pixels).float() @ self.texts(ids).float().t()
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = group_norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, 1, h * w, 3 * c).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.reshape(b, h, w, c).permute(0, 3, 1, 2))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def middle(channels):
    return [ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels)]


class Autoencoder(nn.Module):
    """VQGAN's encoder, quantizer and decoder, without discriminator and perceptual loss."""

    def __init__(self, a):
        super().__init__()
        widths = [m * a.channels for m in a.multipliers]
        layers, inputs = [nn.Conv2d(3, a.channels, 3, padding=1)], a.channels
        for i, outputs in enumerate(widths):
            for _ in range(a.residual_blocks):
                layers.append(ResnetBlock(inputs, outputs))
                inputs = outputs
            if i + 1 < len(widths):
                layers.append(Downsample(inputs))
        layers += [*middle(inputs), group_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, a.latent, 3, padding=1)]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(a.latent, a.code_dim, 1))
        self.codebook = nn.Embedding(a.picture_codes, a.code_dim)
        nn.init.uniform_(self.codebook.weight, -1 / a.picture_codes, 1 / a.picture_codes)
        layers = [nn.Conv2d(a.code_dim, a.latent, 1), nn.Conv2d(a.latent, inputs, 3, padding=1), *middle(inputs)]
        for i, outputs in reversed(list(enumerate(widths))):
            for _ in range(a.residual_blocks + 1):
                layers.append(ResnetBlock(inputs, outputs))
                inputs = outputs
            if i > 0:
                layers += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(inputs, inputs, 3, padding=1)]
        self.decoder = nn.Sequential(*layers, group_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, 3, 3, padding=1))

    def forward(self, pixels):
        z = self.encoder(pixels).permute(0, 2, 3, 1).float()
        flat, table = z.reshape(-1, z.shape[-1]), self.codebook.weight
        with torch.no_grad():
            codes = torch.addmm(table.square().sum(1), flat, table.t(), alpha=-2).argmin(1)
        z_q = self.codebook(codes).view(z.shape)
        commitment = 0.25 * F.mse_loss(z, z_q.detach()) + F.mse_loss(z_q, z.detach())
        z_q = (z + (z_q - z).detach()).permute(0, 3, 1, 2)
        output = self.decoder(z_q).float()
        return F.l1_loss(output, pixels) + F.mse_loss(output, pixels) + commitment


def autocast(precision):
    return torch.autocast(ARGS.device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def training(model, inputs, a):
    """One complete training step: forward, backward, clipping, AdamW."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.96), weight_decay=0.045, fused=True)
    forward = torch.compile(model) if a.compile else model

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(a.precision):
            loss = forward(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 4.0, foreach=True)
        optimizer.step()

    return step


def train(a):
    model = Transformer(a)
    inputs = torch.randint(a.vocabulary, (a.batch, a.text)), torch.randint(a.codebook, (a.batch, a.side * a.side))
    return training(model, inputs, a), a.batch * a.side * a.side, "tokens", model


def tokenizer(a):
    model = Autoencoder(a)
    pixels = torch.rand(a.batch, 3, a.size, a.size) * 2 - 1
    if a.channels_last:
        model, pixels = model.to(memory_format=torch.channels_last), pixels.to(memory_format=torch.channels_last)
    return training(model, (pixels,), a), a.batch, "images", model


def matcher_pixels(a):
    pixels = torch.rand(a.batch, 3, a.matcher_size, a.matcher_size) * 2 - 1
    return pixels.to(memory_format=torch.channels_last) if a.channels_last else pixels


def matcher(a):
    model = Matcher(a)
    ids = torch.randint(a.matcher_vocabulary, (a.batch, a.text))
    return training(model, (matcher_pixels(a), ids), a), a.batch, "pairs", model


def embed(a):
    model, pixels = Matcher(a).eval(), matcher_pixels(a)
    images = torch.compile(model.images) if a.compile else model.images

    def run():
        with torch.inference_mode(), autocast(a.precision):
            images(pixels)

    return run, a.batch, "images", model


def decode(a):
    model = Transformer(a).eval()
    count = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    if a.precision == "bf16":
        model = model.bfloat16()
    if a.precision == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    dtype = torch.bfloat16 if a.precision == "bf16" else torch.float32
    codes, positions = a.side * a.side, a.text + a.side * a.side
    caches = torch.zeros(a.layers, 2, a.batch, a.heads, positions, a.hidden // a.heads, dtype=dtype)
    text = torch.randint(a.vocabulary, (a.batch, a.text))
    step = torch.compile(model.step, dynamic=True) if a.compile else model.step

    @torch.inference_mode()
    def image():
        code = model.source(text, caches).argmax(-1)
        for position in range(a.text + 1, positions):
            code = step(code, caches, position).argmax(-1)

    model.count = count
    return image, a.batch * codes, "tokens", model


def dalle_model(a):
    """dalle-pytorch without its pretrained tokenizers, whose imports need packages that are not used here."""
    vae = types.ModuleType("dalle_pytorch.vae")
    vae.OpenAIDiscreteVAE = type("OpenAIDiscreteVAE", (), {})
    vae.VQGanVAE = type("VQGanVAE", (), {})
    sys.modules["dalle_pytorch.vae"] = vae
    from dalle_pytorch import DALLE, DiscreteVAE

    # As small as possible: only the transformer is measured.
    images = DiscreteVAE(image_size=2 * a.side, num_layers=1, num_tokens=a.codebook, codebook_dim=8, hidden_dim=8)
    return DALLE(
        dim=a.hidden,
        vae=images,
        num_text_tokens=a.vocabulary,
        text_seq_len=a.text,
        depth=a.layers,
        heads=a.heads,
        dim_head=a.hidden // a.heads,
        shift_tokens=a.shift,
        attn_types=("full",) if a.attention == "full" else ("axial_row", "axial_col", "axial_row", "axial_row"),
        optimize_for_inference=a.work == "dalle-decode",
    )


def dalle_train(a):
    model = dalle_model(a)
    text, codes = torch.randint(1, a.vocabulary, (a.batch, a.text)), torch.randint(a.codebook, (a.batch, a.side * a.side))

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.dalle = model

        def forward(self, text, codes):
            return self.dalle(text, codes, return_loss=True)

    return training(Loss(), (text, codes), a), a.batch, "samples", model


def dalle_decode(a):
    model = dalle_model(a).eval()
    if a.precision == "bf16":
        model = model.bfloat16()
    text = torch.randint(1, a.vocabulary, (a.batch, a.text))

    def image():
        with torch.inference_mode():
            model.generate_images(text, use_cache=True)

    return image, a.batch * a.side * a.side, "tokens", model


def finish():
    """Waits for a GPU, which computes while the host goes on."""
    if ARGS.device == "cuda":
        torch.cuda.synchronize()


def peak_bytes():
    if ARGS.device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main(a):
    torch.manual_seed(1)
    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    torch.set_default_device(a.device)
    works = {"train": train, "tokenizer": tokenizer, "matcher": matcher, "embed": embed, "decode": decode, "dalle-train": dalle_train, "dalle-decode": dalle_decode}
    run, amount, unit, model = works[a.work](a)
    seconds, cpu_seconds = [], []
    for i in range(a.warmup + a.repeat):
        begun, cpu = time.perf_counter(), time.process_time()
        run()
        finish()
        if i >= a.warmup:
            seconds.append(round(time.perf_counter() - begun, 6))
            cpu_seconds.append(round(time.process_time() - cpu, 6))
    settings = {key: getattr(a, key) for key in ("precision", "batch", "device", "threads", "malloc", "compile", "channels_last", "attention")}
    parameters = getattr(model, "count", None) or sum(p.numel() for p in model.parameters())
    result = {"work": a.work, "torch": torch.__version__, **settings, "parameters": parameters, "amount": amount, "unit": unit}
    print(json.dumps({**result, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_memory_bytes": peak_bytes()}))


main(ARGS)
