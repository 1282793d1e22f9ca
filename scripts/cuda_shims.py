#!/usr/bin/env python3
"""Archives that stand in for the CUDA libraries when vilg is linked, so that one binary starts everywhere.

    cuda_shims.py CUDARC_SOURCE CUDA_MAJOR FOLDER

Each function that cudarc declares becomes a trampoline. Its first call opens the real library and jumps into it from
then on; where there is none, it answers with an error code of that library. x86-64 Linux, by the System V convention.
"""

import re
import subprocess
import sys
from pathlib import Path

# Library: module of cudarc, file to open, and the error code if it is missing.
LIBRARIES = {
    "cuda": ("driver", "libcuda.so.1", 34),  # CUDA_ERROR_STUB_LIBRARY
    "cublas": ("cublas", "libcublas.so.{major}", 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "cublasLt": ("cublaslt", "libcublasLt.so.{major}", 1),
    "curand": ("curand", "libcurand.so.10", 203),  # CURAND_STATUS_INITIALIZATION_FAILED
    "nvrtc": ("nvrtc", "libnvrtc.so.{major}", 11),  # NVRTC_ERROR_INTERNAL_ERROR
    "nccl": ("nccl", "libnccl.so.2", 2),  # ncclSystemError
}

DECLARATION = re.compile(r"\bfn (\w+)\([^{]*?\)\s*(?:->\s*([\w:*\s]+?))?;\n")

SOURCE = """\
#include <dlfcn.h>
#include <stddef.h>

static const char *const names[] = {{{names}}};
/* 1: the function returns text. */
static const char texts[] = {{{texts}}};
__attribute__((used)) static void *found[sizeof texts];

static long no_number(void) {{ return {code}; }}
static const char *no_text(void) {{ return "{file} is missing"; }}

__attribute__((used)) static void *resolve(size_t i) {{
    void *library = dlopen("{file}", RTLD_NOW);
    void *function = library ? dlsym(library, names[i]) : NULL;
    if (!function) function = texts[i] ? (void *)no_text : (void *)no_number;
    return found[i] = function;
}}

/* r11 holds the function's number; all that arguments may lie in is kept. */
__asm__(".text\\n"
"first_call:\\n"
"  push %rbp; mov %rsp, %rbp; push %rdi; push %rsi; push %rdx; push %rcx; push %r8; push %r9; push %r10; push %rax\\n"
"  sub $128, %rsp; and $-16, %rsp\\n"
"  movups %xmm0, (%rsp); movups %xmm1, 16(%rsp); movups %xmm2, 32(%rsp); movups %xmm3, 48(%rsp)\\n"
"  movups %xmm4, 64(%rsp); movups %xmm5, 80(%rsp); movups %xmm6, 96(%rsp); movups %xmm7, 112(%rsp)\\n"
"  mov %r11, %rdi; call resolve; mov %rax, %r11\\n"
"  movups (%rsp), %xmm0; movups 16(%rsp), %xmm1; movups 32(%rsp), %xmm2; movups 48(%rsp), %xmm3\\n"
"  movups 64(%rsp), %xmm4; movups 80(%rsp), %xmm5; movups 96(%rsp), %xmm6; movups 112(%rsp), %xmm7\\n"
"  lea -64(%rbp), %rsp\\n"
"  pop %rax; pop %r10; pop %r9; pop %r8; pop %rcx; pop %rdx; pop %rsi; pop %rdi; pop %rbp\\n"
"  jmp *%r11\\n");

#define TRAMPOLINE(name, i) __asm__(".globl " #name "; .type " #name ", @function\\n" #name ":\\n" \\
"  mov found+8*" #i "(%rip), %r11; test %r11, %r11; jz 1f; jmp *%r11; 1: mov $" #i ", %r11d; jmp first_call\\n")
{trampolines}
"""


def functions(cudarc: Path, module: str) -> dict[str, bool]:
    """The functions that a module declares, for any CUDA version, and whether each returns text."""
    declared = DECLARATION.findall((cudarc / "src" / module / "sys" / "mod.rs").read_text())
    return {name: "c_char" in result for name, result in sorted(declared)}


def main() -> None:
    cudarc, major, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    for library, (module, file, code) in LIBRARIES.items():
        names = functions(cudarc, module)
        if not names:
            sys.exit(f"cudarc declares no function in {module}/sys/mod.rs: has its form changed?")
        source, archive = folder / f"{library}.c", folder / f"lib{library}.a"
        source.write_text(
            SOURCE.format(
                file=file.format(major=major),
                code=code,
                names=", ".join(f'"{name}"' for name in names),
                texts=", ".join(str(int(text)) for text in names.values()),
                trampolines="\n".join(f"TRAMPOLINE({name}, {i});" for i, name in enumerate(names)),
            )
        )
        subprocess.run(["cc", "-c", "-O1", "-fPIC", "-Wall", source, "-o", source.with_suffix(".o")], check=True)
        archive.unlink(missing_ok=True)
        subprocess.run(["ar", "rcs", archive, source.with_suffix(".o")], check=True)


if __name__ == "__main__":
    main()
