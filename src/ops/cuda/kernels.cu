// All kernels as one module: build.rs compiles this file to PTX (feature `cuda`), and emulator.cpp as C++ for the tests.

#include "../attention/softmax.cu"
#include "../embedding/embedding.cu"
#include "../norm/layer_norm.cu"
#include "../optim/adamw.cu"
#include "../pointwise/cross_entropy.cu"
#include "../pointwise/gelu.cu"
