// fpo_native::grad_sketch on a CPU: a token's factors are folded into k buckets, transformed in place in the cache,
// multiplied and added to its example's sums. Scratch is 2k numbers a thread and 8k an example.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "stream.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A bucket map of p coordinates. Rows of the table in which every bucket has a coordinate are gathered, whole vectors
// at a time. Of a last row with gaps the coordinates are listed, each with twice its bucket, + 1 for a minus.
struct Map {
  const int32_t* table;
  int64_t full = 0;
  std::vector<int32_t> from, into;
  Map(const Tensor& x, int64_t k, int64_t p) : table(x.const_data_ptr<int32_t>()) {
    while (full < x.size(0) && std::none_of(table + full * k, table + (full + 1) * k, [](int32_t e) { return e < 0; }))
      ++full;
    const int64_t left = p - full * k;
    from.resize(left + 1), into.resize(left + 1);  // and one that gaps are written to
    int64_t next = 0;
    for (int64_t b = 0; left > 0 && b < k; ++b) {
      const int32_t entry = table[full * k + b];
      const int64_t at = entry < 0 ? left : full == 0 ? entry >> 1 : next;  // all of them: in their own order
      from[at] = entry >> 1, into[at] = static_cast<int32_t>(2 * b + (entry & 1));
      next += entry >= 0;
    }
    from.resize(left), into.resize(left);
  }
};

// Layers that read the same a: their folded d's are added before the one transform.
template <class T>
struct Layers {
  Stream<T> a;
  Map map_a;
  std::vector<Stream<T>> d;
  std::vector<Map> maps_d;
};

template <class T>
using Tokens = void (*)(const Layers<T>&, Span, int64_t, T*, T*);

#if defined(__x86_64__) && defined(__GNUC__)
#define FPO_TARGET __attribute__((target("avx512f")))
#define FPO_BYTES 64
#define FPO_BITS 4
#define FPO_GATHER(x, index) \
  _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, reinterpret_cast<__m512i>(index), x, 4)
namespace avx512 {
#include "grad_sketch_tile.h"
}
#undef FPO_TARGET
#undef FPO_BYTES
#undef FPO_BITS
#undef FPO_GATHER
#define FPO_TARGET __attribute__((target("avx2,fma")))
#define FPO_BYTES 32
#define FPO_BITS 3  // 8 vectors and their partners fit 16 registers
#define FPO_GATHER(x, index) _mm256_i32gather_ps(x, reinterpret_cast<__m256i>(index), 4)
namespace avx2 {
#include "grad_sketch_tile.h"
}
#undef FPO_TARGET
#undef FPO_BYTES
#undef FPO_BITS
#undef FPO_GATHER
#endif
#define FPO_TARGET
#define FPO_BYTES 16
#define FPO_BITS 3
namespace baseline {
#include "grad_sketch_tile.h"
}

// The choice is made once a process from what the processor says: a machine gives the same bits on every call.
template <class T>
Tokens<T> choose() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f")) return avx512::tokens<T>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::tokens<T>;
#endif
  return baseline::tokens<T>;
}

// An example's rows are dealt out to kBands bands, kBlock at a time, so that one long example keeps every core
// busy. Neither number depends on the threads, so their number leaves no trace in the result.
constexpr int64_t kBands = 8, kBlock = 16;

// Numbers folded and transformed that pay for waking a thread: about 50 µs of one core's work.
constexpr int64_t kWorthAThread = 1 << 17;

template <class T>
void run(const Layers<T>& layers, const int64_t* offsets, int64_t n, int64_t k, T* out) {
  static const Tokens<T> tokens = choose<T>();
  std::vector<Span> slots(n);  // of `partial`, in bands
  std::vector<std::pair<int64_t, int64_t>> items;  // example and band
  for (int64_t i = 0; i < n; ++i) {
    const int64_t length = offsets[i + 1] - offsets[i], begin = static_cast<int64_t>(items.size());
    for (int64_t band = 0; band < std::min(kBands, (length + kBlock - 1) / kBlock); ++band) items.push_back({i, band});
    slots[i] = {begin, static_cast<int64_t>(items.size())};
  }
  std::vector<T> partial(items.size() * k, T(0));
  int64_t width = layers.a.width + 2 * k;
  for (const Stream<T>& d : layers.d) width += d.width;
  const int64_t work = n == 0 ? 0 : (offsets[n] - offsets[0]) * width;
  const int64_t workers =
      std::clamp<int64_t>(work / kWorthAThread, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      std::vector<T> scratch(2 * k);
      for (int64_t item; (item = next.fetch_add(1)) < static_cast<int64_t>(items.size());) {
        const auto [i, band] = items[item];
        for (int64_t t = offsets[i] + band * kBlock; t < offsets[i + 1]; t += kBands * kBlock)
          tokens(layers, {t, std::min(t + kBlock, offsets[i + 1])}, k, scratch.data(), partial.data() + item * k);
      }
    }
  });
  const double scale = 1 / std::sqrt(static_cast<double>(k));
  std::vector<double> total(k);
  for (int64_t i = 0; i < n; ++i) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t slot = slots[i].begin; slot < slots[i].end; ++slot)
      for (int64_t b = 0; b < k; ++b) total[b] += partial[slot * k + b];
    for (int64_t b = 0; b < k; ++b) out[i * k + b] = static_cast<T>(total[b] * scale);
  }
}

Tensor grad_sketch(Tensor a, Tensor table_a, std::vector<Tensor> d, std::vector<Tensor> tables_d, Tensor offsets,
                   int64_t dim) {
  const int64_t n = offsets.size(0) - 1;
  Tensor out = torch::stable::new_empty(a, {n, dim});
  auto with = [&]<class T>(T*) {
    Layers<T> layers{Stream<T>(a), {table_a, dim, a.size(1)}, {}, {}};
    for (const Tensor& x : d) layers.d.emplace_back(x);
    for (size_t l = 0; l < d.size(); ++l) layers.maps_d.emplace_back(tables_d[l], dim, d[l].size(1));
    run<T>(layers, offsets.const_data_ptr<int64_t>(), n, dim, out.mutable_data_ptr<T>());
  };
  if (a.scalar_type() == ScalarType::Double) {
    with(static_cast<double*>(nullptr));
  } else {
    STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float, "fpo_native::grad_sketch: float32 or float64");
    with(static_cast<float*>(nullptr));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fpo_native, CPU, m) {
  m.impl("grad_sketch", TORCH_BOX(&grad_sketch));
}
