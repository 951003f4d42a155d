// A token's two spectra and their product for one instruction set. Included several times by grad_sketch.cpp, each
// time inside its own namespace with FPO_TARGET (a function attribute), FPO_BYTES (a vector register) and FPO_BITS
// (log2 of the vectors a butterfly holds) set: every function must carry the attribute itself, because GCC lowers
// vector types by the attributes of the function they stand in, before inlining.

template <class T>
struct Lanes {
  static constexpr int count = FPO_BYTES / sizeof(T);
  typedef T Vector __attribute__((vector_size(FPO_BYTES), aligned(sizeof(T)), may_alias));
};

// x with lanes i and i ^ h exchanged.
template <int h, class V, int... I>
FPO_TARGET inline V exchanged(const V& x, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, (I ^ h)...);
#else
  typedef std::conditional_t<sizeof(V) / sizeof...(I) == 8, int64_t, int32_t> Index
      __attribute__((vector_size(FPO_BYTES)));
  return __builtin_shuffle(x, Index{(I ^ h)...});
#endif
}

// Butterflies between lanes h apart, then 2h, …: x_i + x_{i^h} below, x_{i^h} − x_i above.
template <int h, class T, class V, int... I>
FPO_TARGET inline void within(V& x, std::integer_sequence<int, I...> lanes) {
  if constexpr (h < sizeof...(I)) {
    const V sign = {T((I & h) ? -1 : 1)...};
    x = exchanged<h>(x, lanes) + sign * x;
    within<2 * h, T>(x, lanes);
  }
}

template <int h, int count, class V>
FPO_TARGET inline void butterflies(V (&x)[count]) {
  if constexpr (h < count) {
    for (int i = 0; i < count; ++i)
      if (!(i & h)) {
        const V low = x[i], high = x[i + h];
        x[i] = low + high;
        x[i + h] = low - high;
      }
    butterflies<2 * h>(x);
  }
}

// One pass over k numbers: butterflies over 2^bits vectors that lie `step` vectors apart; in the first pass within
// the vectors too. In the last pass of the second spectrum nothing is stored: its product with `other` joins `sums`.
template <int bits, bool first, bool last, class T>
FPO_TARGET void pass(T* x, int64_t k, int64_t step, const T* other, T* sums) {
  using V = typename Lanes<T>::Vector;
  constexpr int lanes = Lanes<T>::count, count = 1 << bits;
  for (int64_t block = 0; block < k / lanes; block += count * step)
    for (int64_t v = block; v < block + step; ++v) {
      V held[count];
      for (int i = 0; i < count; ++i) {
        held[i] = *reinterpret_cast<const V*>(x + (v + i * step) * lanes);
        if constexpr (first) within<1, T>(held[i], std::make_integer_sequence<int, lanes>{});
      }
      butterflies<1>(held);
      for (int i = 0; i < count; ++i) {
        const int64_t at = (v + i * step) * lanes;
        if constexpr (last)
          *reinterpret_cast<V*>(sums + at) += held[i] * *reinterpret_cast<const V*>(other + at);
        else
          *reinterpret_cast<V*>(x + at) = held[i];
      }
    }
}

template <bool first, bool last, class T>
FPO_TARGET void pass_of(int bits, T* x, int64_t k, int64_t step, const T* other, T* sums) {
  switch (bits) {
    case 0: return pass<0, first, last>(x, k, step, other, sums);
    case 1: return pass<1, first, last>(x, k, step, other, sums);
    case 2: return pass<2, first, last>(x, k, step, other, sums);
    case 3: return pass<3, first, last>(x, k, step, other, sums);
#if FPO_BITS == 4
    case 4: return pass<4, first, last>(x, k, step, other, sums);
#endif
  }
}

// x ← W x; or, with `sums`, sums += other ∘ W x.
template <class T>
FPO_TARGET void transform(T* x, int64_t k, const T* other, T* sums) {
  int left = 0;  // log2 of the vectors that hold x: a power of two of at least one
  while ((k / Lanes<T>::count) >> (left + 1)) ++left;
  int64_t step = 1;
  for (int passes = std::max(1, (left + FPO_BITS - 1) / FPO_BITS); passes > 0; --passes) {
    const int bits = (left + passes - 1) / passes;
    const bool first = step == 1, last = passes == 1 && sums != nullptr;
    if (first && last) pass_of<true, true>(bits, x, k, step, other, sums);
    else if (first) pass_of<true, false>(bits, x, k, step, other, sums);
    else if (last) pass_of<false, true>(bits, x, k, step, other, sums);
    else pass_of<false, false>(bits, x, k, step, other, sums);
    left -= bits;
    step <<= bits;
  }
}

// Lanes of x at entries 2j + s: x_j, or −x_j where s is 1.
template <class T>
FPO_TARGET inline typename Lanes<T>::Vector gathered(const T* x, const int32_t* entries) {
  using V = typename Lanes<T>::Vector;
#ifdef FPO_GATHER
  if constexpr (std::is_same_v<T, float>) {
    typedef int32_t Entries __attribute__((vector_size(FPO_BYTES), aligned(sizeof(int32_t)), may_alias));
    typedef uint32_t Bits __attribute__((vector_size(FPO_BYTES)));
    const Entries entry = *reinterpret_cast<const Entries*>(entries);
    const auto value = FPO_GATHER(x, entry >> 1);
    return reinterpret_cast<V>(reinterpret_cast<Bits>(value) ^ (reinterpret_cast<Bits>(entry) << 31));
  }
#endif
  V out;
  for (int i = 0; i < Lanes<T>::count; ++i) out[i] = entries[i] & 1 ? -x[entries[i] >> 1] : x[entries[i] >> 1];
  return out;
}

// into[b] ← ±x, or += where `more`, for `count` buckets that differ: signs in whole vectors, and no sum waits for another.
template <bool more, class T>
FPO_TARGET inline void scatter(const T* x, const int32_t* to, int64_t count, T* into) {
  constexpr int lanes = Lanes<T>::count;
  T value[lanes];
  int32_t bucket[lanes];
  for (int64_t j = 0; j < count; j += lanes) {
    const int some = static_cast<int>(std::min<int64_t>(lanes, count - j));
    for (int i = 0; i < some; ++i) value[i] = to[j + i] & 1 ? -x[j + i] : x[j + i];
    for (int i = 0; i < some; ++i) bucket[i] = to[j + i] >> 1;
    for (int i = 0; i < some; ++i) into[bucket[i]] = more ? into[bucket[i]] + value[i] : value[i];
  }
}

// into (k) ← C row, or += where `more`.
template <class T>
FPO_TARGET void fold(const T* row, const Map& map, int64_t k, bool more, T* into) {
  using V = typename Lanes<T>::Vector;
  constexpr int lanes = Lanes<T>::count;
  const int64_t left = map.into.size();
  if (map.full == 0) {
    if (more) return scatter<true>(row, map.into.data(), left, into);
    std::fill(into, into + k, T(0));
    return scatter<false>(row, map.into.data(), left, into);
  }
  for (int64_t b = 0; b < k; b += lanes) {
    V sum = {};
    if (more) sum = *reinterpret_cast<const V*>(into + b);
    for (int64_t r = 0; r < map.full; ++r) sum += gathered<T>(row, map.table + r * k + b);
    *reinterpret_cast<V*>(into + b) = sum;
  }
  for (int64_t j = 0; j < left; ++j) {
    const T value = row[map.from[j]];
    scatter<true>(&value, &map.into[j], 1, into);
  }
}

// sums (k) += Σ_t (W C_a a_t) ∘ (W Σ_l C_l d^l_t) over rows t; `scratch` holds 2k numbers.
template <class T>
FPO_TARGET void tokens(const Layers<T>& layers, Span rows, int64_t k, T* scratch, T* sums) {
  T *of_a = scratch, *of_d = scratch + k;
  for (int64_t t = rows.begin; t < rows.end; ++t) {
    fold(layers.a.data + t * layers.a.stride, layers.map_a, k, false, of_a);
    transform<T>(of_a, k, nullptr, nullptr);
    for (size_t l = 0; l < layers.d.size(); ++l)
      fold(layers.d[l].data + t * layers.d[l].stride, layers.maps_d[l], k, l > 0, of_d);
    transform<T>(of_d, k, of_a, sums);
  }
}
