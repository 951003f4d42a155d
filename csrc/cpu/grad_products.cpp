// fpo_native::grad_products on a CPU: register tiles of both token-by-token matrices, multiplied and summed
// where they stand. Scratch is one double a band, whatever the number of tokens.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "stream.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One layer, or several that read the same a: a·a is computed once, d·d added over the layers.
template <class T>
struct Streams {
  Stream<T> a;
  std::vector<Stream<T>> d;
  Streams(const Tensor& a, const std::vector<Tensor>& ds) : a(a) {
    for (const Tensor& x : ds) d.emplace_back(x);
  }
};

template <class T>
using Band = double (*)(const Streams<T>&, const Streams<T>&, Span, Span, Span, bool);

constexpr int64_t kColumns = 48;  // a multiple of every FPO_N: 110 KB of 576 numbers a row

#define FPO_M 4
#define FPO_N 4
#if defined(__x86_64__) && defined(__GNUC__)
#define FPO_TARGET __attribute__((target("avx512f")))
#define FPO_BYTES 64
namespace avx512 {
#include "grad_products_tile.h"
}
#undef FPO_TARGET
#undef FPO_BYTES
#undef FPO_N
#define FPO_TARGET __attribute__((target("avx2,fma")))
#define FPO_BYTES 32
#define FPO_N 3  // 12 sums, 3 rows and one more fit 16 registers
namespace avx2 {
#include "grad_products_tile.h"
}
#undef FPO_TARGET
#undef FPO_BYTES
#undef FPO_N
#define FPO_N 2
#endif
#define FPO_TARGET
#define FPO_BYTES 16
namespace baseline {
#include "grad_products_tile.h"
}

// The choice is made once a process from what the processor says; it fixes the order of additions, so a
// machine gives the same bits on every call.
template <class T>
Band<T> choose() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f")) return avx512::band<T>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::band<T>;
#endif
  return baseline::band<T>;
}

// A pair's left rows are dealt out to kBands bands, kBlock rows at a time, so that a single long pair keeps
// every core busy and the halves of a mirrored pair weigh the same. Neither number depends on the threads.
constexpr int64_t kBands = 8, kBlock = 16;

// Multiply-adds that pay for waking a thread: about 50 µs of one core's work. Below that the call stays on the
// calling thread; a barrier with a core that another process holds costs milliseconds.
constexpr int64_t kWorthAThread = 1 << 20;

template <class T>
void run(const Streams<T>& left, const int64_t* offsets, const int64_t* pairs, const Streams<T>& right,
         const int64_t* offsets2, bool same_streams, int64_t n, T* out) {
  static const Band<T> band = choose<T>();
  std::vector<double> sums(n * kBands, 0.0);
  std::atomic<int64_t> next{0};
  int64_t work = 0;
  for (int64_t k = 0; k < n; ++k)
    work += (offsets[pairs[2 * k] + 1] - offsets[pairs[2 * k]]) *
            (offsets2[pairs[2 * k + 1] + 1] - offsets2[pairs[2 * k + 1]]);
  int64_t width = left.a.width;
  for (const Stream<T>& d : left.d) width += d.width;
  work *= width;
  const int64_t workers =
      std::clamp<int64_t>(work / kWorthAThread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  // Threads fetch bands as they finish; each band has its own slot, so the schedule leaves no trace.
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t item; (item = next.fetch_add(1)) < n * kBands;) {
        const int64_t* pair = pairs + 2 * (item / kBands);
        const Span i{offsets[pair[0]], offsets[pair[0] + 1]}, j{offsets2[pair[1]], offsets2[pair[1] + 1]};
        const bool mirrored = same_streams && pair[0] == pair[1];
        for (int64_t t = i.begin + item % kBands * kBlock; t < i.end; t += kBands * kBlock)
          sums[item] += band(left, right, i, j, {t, std::min(t + kBlock, i.end)}, mirrored);
      }
  });
  for (int64_t k = 0; k < n; ++k) {
    double total = 0;
    for (int64_t b = 0; b < kBands; ++b) total += sums[k * kBands + b];
    out[k] = static_cast<T>(total);
  }
}

Tensor grad_products(Tensor a, std::vector<Tensor> d, Tensor offsets, Tensor pairs, Tensor a2,
                     std::vector<Tensor> d2, Tensor offsets2, bool mirrored) {
  Tensor out = torch::stable::new_empty(a, {pairs.size(0)});
  auto with = [&]<class T>(T*) {
    run<T>({a, d}, offsets.const_data_ptr<int64_t>(), pairs.const_data_ptr<int64_t>(),
           {a2, d2}, offsets2.const_data_ptr<int64_t>(), mirrored, pairs.size(0),
           out.mutable_data_ptr<T>());
  };
  if (a.scalar_type() == ScalarType::Double) {
    with(static_cast<double*>(nullptr));
  } else {
    STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float, "fpo_native::grad_products: float32 or float64");
    with(static_cast<float*>(nullptr));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpo_native, CPU, m) {
  m.impl("grad_products", TORCH_BOX(&grad_products));
}
