// fpo_native::grad_sketch on CUDA: a group of warps takes a token, gathers its row with signs into k buckets in
// registers, transforms them there, multiplies both spectra and adds them to the sums it keeps; the only numbers
// written are the sums of a chunk of tokens.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "launch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLanes = 32, kWarps = 8, kThreads = kLanes * kWarps;
constexpr int kEach = 16;                // buckets a thread holds at most: three sets of them in registers
constexpr int kMost = kEach * kThreads;  // buckets a block transforms at once: 4096
constexpr int kChunk = 64;               // tokens a block adds up: k sums are written for so many
constexpr int kShared = 48 * 1024;       // bytes a block may have without asking
constexpr int kLayers = 8;               // that read the same a and travel in one launch's parameters

// One stream and its table of (rows, k) entries: 2·coordinate + (1 if minus), or -1.
template <class T>
struct Stream {
  const T* data;
  int64_t stride, width;
  const int32_t* table;
  int64_t rows;
  Stream() = default;
  Stream(const Tensor& x, const Tensor& table)
      : data(x.const_data_ptr<T>()),
        stride(x.stride(0)),
        width(x.size(1)),
        table(table.const_data_ptr<int32_t>()),
        rows(table.size(0)) {}
};

template <class T>
struct Streams {
  Stream<T> a;
  Stream<T> d[kLayers];
  int count;
  Streams(const Tensor& a, const Tensor& table, const std::vector<Tensor>& ds, const std::vector<Tensor>& tables)
      : a(a, table), count(static_cast<int>(ds.size())) {
    for (int l = 0; l < count; ++l) d[l] = Stream<T>(ds[l], tables[l]);
  }
};

// A block's shared memory: what groups exchange, and a row for each of them, where it fits into what is left.
template <class T, class Acc, int kHeld>
struct Shared {
  static constexpr int kRows = (kShared - kHeld * kThreads * static_cast<int>(sizeof(Acc))) / sizeof(T);
  Acc exchange[kHeld * kThreads];
  T rows[kRows];
};

// Adds a token's buckets to x: register r of a thread holds bucket (r·kGroup + member)·32 + lane. W_k is
// W_blocks ⊗ W_buckets, so that block o of the output is the transform of the sum of all blocks β of buckets, each
// times W_blocks[o, β].
template <class T, class Acc, int kHeld, int kGroup>
__device__ void fold(const Stream<T>& from, int64_t token, bool there, int block, int blocks,
                     Shared<T, Acc, kHeld>& shared, Acc (&x)[kHeld]) {
  constexpr int kBuckets = kHeld * kGroup * kLanes, kGroups = kWarps / kGroup;
  const int lane = threadIdx.x % kLanes, member = threadIdx.x / kLanes % kGroup;
  const int group = threadIdx.x / (kLanes * kGroup);
  const T* row = from.data + token * from.stride;
  if (from.width <= shared.kRows / kGroups) {
    T* mine = shared.rows + group * from.width;
    __syncthreads();  // the last row has been gathered
    if (there)
      for (int64_t c = member * kLanes + lane; c < from.width; c += kGroup * kLanes) mine[c] = row[c];
    __syncthreads();
    row = mine;
  }
  if (!there) return;
  for (int64_t piece = 0; piece < from.rows * blocks; ++piece) {
    const int32_t* table = from.table + piece * kBuckets;
    const int flip = __popc(block & static_cast<int>(piece % blocks)) & 1;
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      const int32_t entry = table[(r * kGroup + member) * kLanes + lane];
      if (entry < 0) continue;
      const Acc value = static_cast<Acc>(row[entry >> 1]);
      x[r] += ((entry ^ flip) & 1) ? -value : value;
    }
  }
}

// Butterflies over the bits of the register number from kFrom up.
template <class Acc, int kHeld>
__device__ void butterflies(Acc (&x)[kHeld], int until) {
#pragma unroll
  for (int half = 1; half < kHeld; half *= 2)
    if (half < until) {
#pragma unroll
      for (int r = 0; r < kHeld; ++r)
        if (!(r & half)) {
          const Acc low = x[r], high = x[r + half];
          x[r] = low + high;
          x[r + half] = low - high;
        }
    }
}

// The Walsh–Hadamard transform of a group's buckets, in natural order: over the bits of r in registers, of the lane
// by shuffles, of the member after the warps of a group have dealt their registers out anew. Register r of a thread
// then holds bucket `place(r)`.
template <class Acc, int kHeld, int kGroup>
__device__ void transform(Acc (&x)[kHeld], Acc* exchange) {
  const int lane = threadIdx.x % kLanes, member = threadIdx.x / kLanes % kGroup;
  butterflies(x, kHeld);
#pragma unroll
  for (int bit = 1; bit < kLanes; bit *= 2)
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      const Acc other = __shfl_xor_sync(0xffffffffu, x[r], bit);
      x[r] = lane & bit ? other - x[r] : x[r] + other;
    }
  if constexpr (kGroup > 1) {
    Acc* mine = exchange + (threadIdx.x / (kLanes * kGroup)) * (kHeld * kGroup * kLanes);
    __syncthreads();  // what was dealt out last has been read
#pragma unroll
    for (int r = 0; r < kHeld; ++r) mine[(r * kGroup + member) * kLanes + lane] = x[r];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kHeld; ++r) x[r] = mine[(member * kHeld + r) * kLanes + lane];
    butterflies(x, kGroup);
  }
}

template <class T, class Acc, int kHeld, int kGroup>
__global__ void __launch_bounds__(kThreads, sizeof(Acc) == 4 ? 2 : 1)
    sketch_chunks(Streams<T> x, const int64_t* offsets, int64_t examples, Acc* sums) {
  constexpr int kBuckets = kHeld * kGroup * kLanes, kGroups = kWarps / kGroup;
  __shared__ Shared<T, Acc, kHeld> shared;
  const int lane = threadIdx.x % kLanes, member = threadIdx.x / kLanes % kGroup;
  const int group = threadIdx.x / (kLanes * kGroup);
  // Chunk c of example i is number offsets[i] / kChunk + i + c, which no two chunks share (some numbers are no
  // chunk's): found by bisection, nothing has to be counted first.
  const int64_t chunk = blockIdx.x;
  int64_t i = 0;
  for (int64_t after = examples; after - i > 1;) {
    const int64_t middle = (i + after) / 2;
    (offsets[middle] / kChunk + middle <= chunk ? i : after) = middle;
  }
  const int64_t first = offsets[i] + (chunk - offsets[i] / kChunk - i) * kChunk;
  const int64_t end = offsets[i + 1] < first + kChunk ? offsets[i + 1] : first + kChunk;
  if (first >= end) return;
  Acc total[kHeld] = {};
  for (int64_t row = first; row < end; row += kGroups) {
    const int64_t token = row + group;
    const bool there = token < end;
    Acc left[kHeld] = {}, right[kHeld] = {};
    fold<T, Acc, kHeld, kGroup>(x.a, token, there, blockIdx.y, gridDim.y, shared, left);
    transform<Acc, kHeld, kGroup>(left, shared.exchange);
    for (int l = 0; l < x.count; ++l)  // W is linear: what siblings share is transformed once
      fold<T, Acc, kHeld, kGroup>(x.d[l], token, there, blockIdx.y, gridDim.y, shared, right);
    transform<Acc, kHeld, kGroup>(right, shared.exchange);
#pragma unroll
    for (int r = 0; r < kHeld; ++r) total[r] += left[r] * right[r];
  }
  __syncthreads();  // the last exchange has been read
#pragma unroll
  for (int r = 0; r < kHeld; ++r)
    shared.exchange[group * kBuckets + (member * kHeld + r) * kLanes + lane] = total[r];
  __syncthreads();
  for (int b = threadIdx.x; b < kBuckets; b += kThreads) {
    Acc sum = 0;
    for (int g = 0; g < kGroups; ++g) sum += shared.exchange[g * kBuckets + b];
    sums[(chunk * gridDim.y + blockIdx.y) * kBuckets + b] = sum;
  }
}

// out[i] = scale · Σ of example i's chunks, first to last.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    add_chunks(const Acc* sums, const int64_t* offsets, int64_t dim, Acc scale, Acc* out) {
  const int64_t i = blockIdx.x, b = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  if (b >= dim) return;
  Acc sum = 0;
  int64_t chunk = offsets[i] / kChunk + i;
  for (int64_t row = offsets[i]; row < offsets[i + 1]; row += kChunk) sum += sums[chunk++ * dim + b];
  out[i * dim + b] = sum * scale;
}

template <class T, class Acc>
auto kernel(int64_t buckets) {
  switch (buckets) {
    case 64: return sketch_chunks<T, Acc, 2, 1>;
    case 128: return sketch_chunks<T, Acc, 4, 1>;
    case 256: return sketch_chunks<T, Acc, 8, 1>;
    case 512: return sketch_chunks<T, Acc, kEach, 1>;
    case 1024: return sketch_chunks<T, Acc, kEach, 2>;
    case 2048: return sketch_chunks<T, Acc, kEach, 4>;
    default: return sketch_chunks<T, Acc, kEach, kWarps>;
  }
}

Tensor grad_sketch(Tensor a, Tensor table_a, std::vector<Tensor> d, std::vector<Tensor> tables_d, Tensor offsets,
                   int64_t dim) {
  const bool wide = a.scalar_type() == ScalarType::Double;
  const ScalarType kind = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t examples = offsets.size(0) - 1, chunks = a.size(0) / kChunk + examples;
  Tensor out = torch::stable::new_empty(a, {examples, dim}, kind);
  if (examples == 0) return out;
  STD_TORCH_CHECK(chunks <= std::numeric_limits<int32_t>::max(), "grad_sketch: over 2^31 - 1 chunks of tokens");
  STD_TORCH_CHECK(d.size() <= kLayers && d.size() == tables_d.size(), "grad_sketch: over 8 layers in one launch");
  STD_TORCH_CHECK(dim >= 64 && (dim & (dim - 1)) == 0,
                  "grad_sketch: dim is no power of two from 64");
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const cudaStream_t stream = current_stream(a);
  Tensor sums = torch::stable::new_empty(a, {chunks, dim}, kind);
  const int64_t buckets = std::min<int64_t>(dim, kMost);
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(dim / buckets));
  const dim3 adding(static_cast<unsigned>(examples), static_cast<unsigned>((dim + kThreads - 1) / kThreads));
  auto with = [&]<class T>(T*) {
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const int64_t* cuts = offsets.const_data_ptr<int64_t>();
    kernel<T, Acc>(buckets)<<<grid, kThreads, 0, stream>>>({a, table_a, d, tables_d}, cuts, examples,
                                                           sums.mutable_data_ptr<Acc>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    add_chunks<Acc><<<adding, kThreads, 0, stream>>>(sums.const_data_ptr<Acc>(), cuts, dim,
                                                     static_cast<Acc>(1 / std::sqrt(double(dim))),
                                                     out.mutable_data_ptr<Acc>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  switch (a.scalar_type()) {
    case ScalarType::Double: with(static_cast<double*>(nullptr)); break;
    case ScalarType::Float: with(static_cast<float*>(nullptr)); break;
    case ScalarType::BFloat16: with(static_cast<torch::headeronly::BFloat16*>(nullptr)); break;
    case ScalarType::Half: with(static_cast<torch::headeronly::Half*>(nullptr)); break;
    default: STD_TORCH_CHECK(false, "fpo_native::grad_sketch: float32, float64, bfloat16 or float16");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpo_native, CUDA, m) {
  m.impl("grad_sketch", TORCH_BOX(&grad_sketch));
}
