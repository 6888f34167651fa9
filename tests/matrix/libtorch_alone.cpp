// What a cell can ask of LibTorch: where its own headers do not compile, ours cannot either.
#include <torch/torch.h>

int main() { return torch::zeros({1}).item<int>(); }
