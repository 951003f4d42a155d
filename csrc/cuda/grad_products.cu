// fpo_native::grad_products on CUDA: one block a pair walks the tiles of both token-by-token matrices, holds
// one tile of each in registers, multiplies and sums. Plain FMA throughout, so fp32 stays fp32 and float64 is
// served too; the Triton room is the one that uses matrix units.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kSide = 16;               // threads along each side of the tile
constexpr int kEach = 4;                // tokens a thread holds along each side: 16 sums in registers
constexpr int kTokens = kSide * kEach;  // 64
constexpr int kFeatures = 16;           // a pass's features: 2 · 64 · 17 floats (8.5 KiB) of shared memory
constexpr int kThreads = kSide * kSide;

template <class T>
struct Stream {
  const T* data;
  int64_t stride, width;
  Stream() = default;
  explicit Stream(const Tensor& x) : data(x.const_data_ptr<T>()), stride(x.stride(0)), width(x.size(1)) {}
};

constexpr int kLayers = 8;  // that read the same a and travel in one launch's parameters (18 · 24 bytes)

template <class T>
struct Streams {
  Stream<T> a;
  Stream<T> d[kLayers];
  int count;
  Streams(const Tensor& a, const std::vector<Tensor>& ds) : a(a), count(static_cast<int>(ds.size())) {
    for (int k = 0; k < count; ++k) d[k] = Stream<T>(ds[k]);
  }
};

// One more column than features: threads of a warp that read a column then hit different banks.
template <class Acc>
using Tile = Acc[kTokens][kFeatures + 1];

// Rows past `stop` and features past the width are zero.
template <class T, class Acc>
__device__ void load(Tile<Acc>& tile, const Stream<T>& from, int64_t first, int64_t stop, int64_t column) {
  for (int e = threadIdx.x; e < kTokens * kFeatures; e += kThreads) {
    const int64_t row = first + e / kFeatures, k = column + e % kFeatures;
    const bool inside = row < stop && k < from.width;
    tile[e / kFeatures][e % kFeatures] = inside ? static_cast<Acc>(from.data[row * from.stride + k]) : Acc(0);
  }
}

// sums[m][n] += x_t · y_s with t = t0 + ty + 16·m and s = s0 + tx + 16·n.
template <class T, class Acc>
__device__ void token_products(Tile<Acc>& left, Tile<Acc>& right, const Stream<T>& x, int64_t t0, int64_t t_end,
                               const Stream<T>& y, int64_t s0, int64_t s_end, Acc (&sums)[kEach][kEach]) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int64_t column = 0; column < x.width; column += kFeatures) {
    load(left, x, t0, t_end, column);
    load(right, y, s0, s_end, column);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kFeatures; ++k) {
      Acc of_y[kEach];
#pragma unroll
      for (int n = 0; n < kEach; ++n) of_y[n] = right[tx + kSide * n][k];
#pragma unroll
      for (int m = 0; m < kEach; ++m) {
        const Acc of_x = left[ty + kSide * m][k];
#pragma unroll
        for (int n = 0; n < kEach; ++n) sums[m][n] += of_x * of_y[n];
      }
    }
    __syncthreads();  // before the next pass overwrites the tiles
  }
}

template <class T, class Acc>
__global__ void __launch_bounds__(kThreads, sizeof(Acc) == 4 ? 3 : 2)
    kernel(Streams<T> x, const int64_t* offsets, const int64_t* pairs, Streams<T> y, const int64_t* offsets2,
           bool same_streams, Acc* out) {
  __shared__ Tile<Acc> left, right;
  __shared__ double totals[kThreads];
  const int64_t i = pairs[2 * int64_t(blockIdx.x)], j = pairs[2 * int64_t(blockIdx.x) + 1];
  const bool mirrored = same_streams && i == j;
  double total = 0;
  for (int64_t t = offsets[i]; t < offsets[i + 1]; t += kTokens)
    for (int64_t s = mirrored ? t : offsets2[j]; s < offsets2[j + 1]; s += kTokens) {
      Acc aa[kEach][kEach] = {}, dd[kEach][kEach] = {}, sum = 0;
      token_products<T, Acc>(left, right, x.a, t, offsets[i + 1], y.a, s, offsets2[j + 1], aa);
      for (int k = 0; k < x.count; ++k)
        token_products<T, Acc>(left, right, x.d[k], t, offsets[i + 1], y.d[k], s, offsets2[j + 1], dd);
      for (int m = 0; m < kEach; ++m)
        for (int n = 0; n < kEach; ++n) sum += aa[m][n] * dd[m][n];
      total += mirrored && s > t ? 2 * double(sum) : double(sum);  // tiles below the diagonal are not visited
    }
  totals[threadIdx.x] = total;
  for (int half = kThreads / 2; half > 0; half /= 2) {  // a tree of fixed shape: the same bits every time
    __syncthreads();
    if (threadIdx.x < half) totals[threadIdx.x] += totals[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<Acc>(totals[0]);
}

Tensor grad_products(Tensor a, std::vector<Tensor> d, Tensor offsets, Tensor pairs, Tensor a2,
                     std::vector<Tensor> d2, Tensor offsets2, bool mirrored) {
  const bool wide = a.scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(a, {pairs.size(0)}, wide ? ScalarType::Double : ScalarType::Float);
  if (pairs.size(0) == 0) return out;
  STD_TORCH_CHECK(pairs.size(0) <= std::numeric_limits<int32_t>::max(), "grad_products: over 2^31 - 1 pairs");
  STD_TORCH_CHECK(d.size() <= kLayers && d.size() == d2.size(), "grad_products: over 8 layers in one launch");
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const cudaStream_t stream = current_stream(a);
  auto with = [&]<class T>(T*) {
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
    kernel<T, Acc><<<static_cast<unsigned>(pairs.size(0)), kThreads, 0, stream>>>(
        {a, d}, offsets.const_data_ptr<int64_t>(), pairs.const_data_ptr<int64_t>(),
        {a2, d2}, offsets2.const_data_ptr<int64_t>(), mirrored,
        out.mutable_data_ptr<Acc>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  switch (a.scalar_type()) {
    case ScalarType::Double: with(static_cast<double*>(nullptr)); break;
    case ScalarType::Float: with(static_cast<float*>(nullptr)); break;
    case ScalarType::BFloat16: with(static_cast<torch::headeronly::BFloat16*>(nullptr)); break;
    case ScalarType::Half: with(static_cast<torch::headeronly::Half*>(nullptr)); break;
    default: STD_TORCH_CHECK(false, "fpo_native::grad_products: float32, float64, bfloat16 or float16");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpo_native, CUDA, m) {
  m.impl("grad_products", TORCH_BOX(&grad_products));
}
