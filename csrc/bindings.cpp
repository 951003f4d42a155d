// Schemas of the compiled operators. Each operation's .cpp and .cu register their kernels themselves, so a
// build without CUDA is the same build with fewer files.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fpo_native, m) {
  m.def(
      "grad_products(Tensor a, Tensor[] d, Tensor offsets, Tensor pairs,"
      " Tensor a2, Tensor[] d2, Tensor offsets2, bool mirrored) -> Tensor");
  m.def(
      "grad_sketch(Tensor a, Tensor table_a, Tensor[] d, Tensor[] tables_d, Tensor offsets, int dim) -> Tensor");
}
