// One pair's products for one instruction set. Included several times by grad_products.cpp, each time inside
// its own namespace with FPO_TARGET (a function attribute), FPO_BYTES (a vector register), FPO_M and FPO_N
// (rows of the register tile) set: every function must carry the attribute itself, because GCC lowers vector
// types by the attributes of the function they stand in, before inlining.

template <class T>
struct Lanes {
  static constexpr int count = FPO_BYTES / sizeof(T);
  typedef T Vector __attribute__((vector_size(FPO_BYTES), aligned(sizeof(T)), may_alias));
};

// [a0+a1, a2+a3, …, b0+b1, …]
template <class V, int... I>
FPO_TARGET inline V add_neighbours(const V& a, const V& b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
  typedef std::conditional_t<sizeof(V) / sizeof...(I) == 8, int64_t, int32_t> Index
      __attribute__((vector_size(FPO_BYTES)));
  return __builtin_shuffle(a, b, Index{(2 * I)...}) + __builtin_shuffle(a, b, Index{(2 * I + 1)...});
#endif
}

template <class T, int R>
FPO_TARGET inline void point(const T* (&rows)[R], const Stream<T>& from, int64_t first, int64_t stop) {
  for (int r = 0; r < R; ++r) rows[r] = from.data + std::min(first + r, stop - 1) * from.stride;
}

// out[m][n] = Σ over `count` streams of x_m · y_n, all in the same registers. Rows past the end of an example
// repeat its last row.
template <class T>
FPO_TARGET inline void dot_tile(const Stream<T>* left, const Stream<T>* right, int64_t count, int64_t t,
                                int64_t t_stop, int64_t s, int64_t s_stop, T (&out)[FPO_M * FPO_N]) {
  using V = typename Lanes<T>::Vector;
  constexpr int lanes = Lanes<T>::count;
  // Whole vectors of sums come out of the reduction below, so the count is rounded up to them.
  constexpr int sums = (FPO_M * FPO_N + lanes - 1) / lanes * lanes;
  V total[sums] = {};
  for (int i = 0; i < FPO_M * FPO_N; ++i) out[i] = 0;
  for (int64_t c = 0; c < count; ++c) {
    const T *x[FPO_M], *y[FPO_N];
    point(x, left[c], t, t_stop);
    point(y, right[c], s, s_stop);
    const int64_t width = left[c].width;
    V part[sums] = {};  // of this stream: `total` itself would be kept in memory, not in registers
    int64_t k = 0;
    for (; k + lanes <= width; k += lanes) {
      V of_y[FPO_N];
      for (int n = 0; n < FPO_N; ++n) of_y[n] = *reinterpret_cast<const V*>(y[n] + k);
      for (int m = 0; m < FPO_M; ++m) {
        const V of_x = *reinterpret_cast<const V*>(x[m] + k);
        for (int n = 0; n < FPO_N; ++n) part[m * FPO_N + n] += of_x * of_y[n];
      }
    }
    for (int i = 0; i < sums; ++i) total[i] += part[i];
    for (; k < width; ++k)
      for (int m = 0; m < FPO_M; ++m)
        for (int n = 0; n < FPO_N; ++n) out[m * FPO_N + n] += x[m][k] * y[n][k];
  }
  // log2(lanes) rounds, each halving the vectors and doubling what a lane holds, leave sum i in lane i.
  for (int count = sums; count > sums / lanes; count /= 2)
    for (int v = 0; v < count / 2; ++v)
      total[v] = add_neighbours<V>(total[2 * v], total[2 * v + 1], std::make_integer_sequence<int, lanes>{});
  for (int i = 0; i < FPO_M * FPO_N; ++i) out[i] += total[i / lanes][i % lanes];
}

// Σ over rows t in [begin, end) of the left example and all rows s of the right one. A tile's left rows stay in
// the first cache while the right ones pass by, of which kColumns at a time stay in the second.
template <class T>
FPO_TARGET double band(const Streams<T>& left, const Streams<T>& right, Span i, Span j, Span rows, bool mirrored) {
  double total = 0;
  for (int64_t first = mirrored ? rows.begin : j.begin; first < j.end; first += kColumns) {
    const int64_t stop = std::min(first + kColumns, j.end);
    for (int64_t t = rows.begin; t < rows.end; t += FPO_M)
      for (int64_t s = first; s < stop; s += FPO_N) {
        if (mirrored && t >= s + FPO_N) continue;  // below the diagonal
        T aa[FPO_M * FPO_N], dd[FPO_M * FPO_N];
        dot_tile<T>(&left.a, &right.a, 1, t, i.end, s, j.end, aa);
        dot_tile<T>(left.d.data(), right.d.data(), left.d.size(), t, i.end, s, j.end, dd);
        for (int m = 0; m < FPO_M && t + m < rows.end; ++m)
          for (int n = 0; n < FPO_N && s + n < stop; ++n) {
            // (t, s) and (s, t) are equal in a mirrored pair: the upper one counts twice, the lower one not
            const double weight = !mirrored || t + m == s + n ? 1 : t + m < s + n ? 2 : 0;
            total += weight * double(aa[m * FPO_N + n]) * double(dd[m * FPO_N + n]);
          }
      }
  }
  return total;
}
