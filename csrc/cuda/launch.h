// What launches on a stream of torch's need, in torch 2.11's stable ABI and in later ones: the checking macro of these
// calls has another name in each, and its own header.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

namespace {

// The stream that torch's work on the tensor's device goes to now.
inline cudaStream_t current_stream(const torch::stable::Tensor& on) {
  void* stream = nullptr;
  const AOTITorchError failed = aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream);
  STD_TORCH_CHECK(failed == AOTI_TORCH_SUCCESS, "torch names no current CUDA stream of device ", on.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

}  // namespace
