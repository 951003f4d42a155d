// What the CPU kernels share: rows of numbers, and where an example's lie.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

template <class T>
struct Stream {
  const T* data;
  int64_t stride, width;
  explicit Stream(const torch::stable::Tensor& x)
      : data(x.const_data_ptr<T>()), stride(x.stride(0)), width(x.size(1)) {}
};

struct Span {
  int64_t begin, end;
};
