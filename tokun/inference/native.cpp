// A Qwen3's step on a CPU, and the choice of the next id, in one program. Built and called by native.py, which documents the arguments.
//
// Rows are never mixed and each sum has a fixed order, so a row's bits do not depend on the other rows or on the number of threads:
// oneDNN's small products (through torch's brgemm), which use the processor's matrix or vector units, sum over k in the same order for
// every number of rows. Sums, norms and everything between the products are float32 in every dtype.

#ifdef TOKUN_BRGEMM
#include <ATen/native/CPUBlas.h>
#endif
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using bf16 = c10::BFloat16;
constexpr int64_t PLACES = 64;  // positions per block of keys: [positions / 64][width][64]
constexpr int64_t CHUNK = 64;   // rows of one product

typedef float v16 __attribute__((vector_size(64)));  // on any processor: the compiler maps it to the available vectors

std::pair<int, int> team() {  // this thread's number, and the number of threads
#ifdef _OPENMP
  return {omp_get_thread_num(), omp_get_num_threads()};
#else
  return {0, 1};
#endif
}

// x (rows, k) -> x W^T (rows, n). Blocks of `block` of the n: [n / block][k][block], in bfloat16 [n / block][k / 2][block][2]; zeros after
// n.
struct Matrix {
  const void* weight;
  int64_t n, k, block;
};

struct Layer {
  Matrix qkv, out, gate_up, down;  // qkv: for each kv head its queries, its key, its value; gate_up: half a block of gate, half of up
  const float* qk_norm;  // (heads + kv heads, width)
};

struct Model {
  int64_t layers, size, heads, kv_heads, width, inner, is_half;
  float eps;
  const Layer* layer;
  const void* embedding;  // (ids, size), in the weights' dtype
};

struct Rows {  // the sequences of a stream
  // `length` ids each, from position `place`; `all` rows in the caches, of `capacity` positions
  int64_t count, length, place, capacity, all;
  const int64_t* ids;                           // (count, length)
  const int64_t* starts;                        // (count,) first visible position of each row
  const int64_t* index;                         // (count,) its row in the caches
  const float *cos, *sin;                       // (capacity, width / 2)
  void* cache;                                  // (layers, all, 2 * kv heads, capacity * width): keys, then values [capacity][width]
};

struct Words {  // the settings of a stream of texts: the tables of tokenizers/grammar.py (Tables), and the rows
  int64_t most, size, slots, ids, end;  // most ids per row; ids of the head; columns of u; of `following`; the state of a finished row
  float temperature;
  int64_t top_k;
  double top_p;
  const bool *allowed, *ruled, *in_text;  // (3 states, size) twice, (states,)
  const int64_t *following, *limit, *first;  // (states, ids), (states,) twice
  const float* u;  // (rows, slots)
  int64_t *states, *lengths, *chosen;  // (rows,) twice, (rows, most)
  double* found;  // (rows,): nats of texts
};

inline float number(float x) { return x; }
inline float number(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.x) << 16); }

template <class T> inline T rounded(float x);
template <> inline float rounded<float>(float x) { return x; }
template <> inline bf16 rounded<bf16>(float x) {  // to the nearest, ties to even
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return bf16(uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16), bf16::from_bits());
}

// e^x with an error of at most 2e-7 for x <= 0, by 2^n and a polynomial; 0 below -87. Written so that the compiler can vectorise loops
// over it.
inline float power_of_e(float x) {
  const float low = x < -87.0f ? -87.0f : x;
  const float shifted = low * 1.44269504f + 12582912.0f;  // rounds to a whole number in the low bits
  const float n = shifted - 12582912.0f;
  const float r = low - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  const int32_t bits = __builtin_bit_cast(int32_t, y) + (__builtin_bit_cast(int32_t, shifted) << 23);
  return x < -87.0f ? 0.0f : __builtin_bit_cast(float, bits);
}

inline float silu(float x) {
  const float e = power_of_e(x < 0 ? x : -x);  // x / (1 + e^-x), in the form that does not overflow
  return (x < 0 ? x * e : x) / (1.0f + e);
}

// c (rows, block) = a (rows, k) times block j of the matrix.
#ifdef TOKUN_BRGEMM
void multiply(const bf16* a, int64_t rows, const Matrix& m, int64_t j, float* c) {
  const auto* b = static_cast<const bf16*>(m.weight) + j * m.block * m.k;
  at::native::cpublas::brgemm(rows, m.block, m.k, m.k, m.block, m.block, false, a, b, c);
}

void multiply(const float* a, int64_t rows, const Matrix& m, int64_t j, float* c) {
  const auto* b = static_cast<const float*>(m.weight) + j * m.block * m.k;
  at::native::cpublas::brgemm(rows, m.block, m.k, m.k, m.block, m.block, false, a, b, c, false);
}

void release(bool is_half) { at::native::cpublas::brgemm_release(is_half); }
#else
template <int R> void few(const float* a, const float* b, const Matrix& m, int64_t from, float* c) {  // R rows, 16 columns
  float sums[R][16] = {};
  for (int64_t k = 0; k < m.k; ++k)
    for (int r = 0; r < R; ++r)
#pragma omp simd
      for (int i = 0; i < 16; ++i) sums[r][i] += a[r * m.k + k] * b[k * m.block + from + i];
  for (int r = 0; r < R; ++r) std::memcpy(c + r * m.block + from, sums[r], sizeof sums[r]);
}

void multiply(const float* a, int64_t rows, const Matrix& m, int64_t j, float* c) {
  const auto* b = static_cast<const float*>(m.weight) + j * m.block * m.k;
  for (int64_t from = 0; from < m.block; from += 16) {
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6) few<6>(a + r * m.k, b, m, from, c + r * m.block);  // as many sums as fit into AVX2's registers
    for (; r + 4 <= rows; r += 4) few<4>(a + r * m.k, b, m, from, c + r * m.block);
    for (; r < rows; ++r) few<1>(a + r * m.k, b, m, from, c + r * m.block);
  }
}

void release(bool) {}
#endif

// take(row, first column, columns, their values) for this thread's blocks of a (rows, k) W^T.
template <class T, class Take> void product(const T* a, int64_t rows, const Matrix& m, int me, int threads, float* c, Take&& take) {
  const int64_t blocks = (m.n + m.block - 1) / m.block;
  for (int64_t j = me * blocks / threads; j < (me + 1) * blocks / threads; ++j) {
    for (int64_t first = 0; first < rows; first += CHUNK) {
      const int64_t some = std::min(CHUNK, rows - first), from = j * m.block;
      multiply(a + first * m.k, some, m, j, c);
      for (int64_t r = 0; r < some; ++r) take(first + r, from, std::min(m.block, m.n - from), c + r * m.block);
    }
  }
}

template <class T> void norm(const float* x, T* out, int64_t size, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / size + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = rounded<T>(x[i] * scale);
}

// A head's query or key (width,): normed, and rotated to its position.
template <class T> void turn(const float* x, const float* weight, const float* cos, const float* sin, int64_t width, float eps, T* out) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / width + eps);
  const int64_t half = width / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i] * scale * weight[i], b = x[i + half] * scale * weight[i + half];
    out[i] = rounded<T>(a * cos[i] - b * sin[i]);
    out[i + half] = rounded<T>(b * cos[i] + a * sin[i]);
  }
}

// sum + q x for 16 positions or dimensions at once: one number each in float32; in bfloat16 two adjacent ones, summed.
template <class T> constexpr int64_t TOGETHER = sizeof(float) / sizeof(T);

inline v16 add(v16 sum, const float* x, const float* q) {
  v16 found;
  std::memcpy(&found, x, sizeof found);
  return sum + *q * found;
}

#ifdef __AVX512BF16__
inline v16 add(v16 sum, const bf16* x, const bf16* q) {
  int32_t pair;
  std::memcpy(&pair, q, sizeof pair);
  return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_set1_epi32(pair));
}
#endif

// Layout of a key (width,) and a value at position p: keys in blocks of positions, [positions / PLACES][width][PLACES], values
// [positions][width]; in bfloat16 pairs of dimensions or of positions are adjacent,
// [positions / PLACES][width / 2][PLACES][2] and [positions / 2][width][2].
template <class T> int64_t at_key(int64_t p, int64_t i, int64_t width) {
  constexpr int64_t S = TOGETHER<T>;
  return p / PLACES * PLACES * width + (i / S * PLACES + p % PLACES) * S + i % S;
}

template <class T> int64_t at_value(int64_t p, int64_t i, int64_t width) {
  constexpr int64_t S = TOGETHER<T>;
  return p / S * S * width + i * S + p % S;
}

// The products of G queries (G, width) and the first 16 N keys of a block -> scores (G, room).
template <int G, int N, class T> void look(const T* q, const T* block, int64_t width, int64_t room, float* scores) {
  v16 sums[G][N] = {};
  for (int64_t d = 0; d < width; d += TOGETHER<T>)
    for (int i = 0; i < N; ++i)
      for (int g = 0; g < G; ++g) sums[g][i] = add(sums[g][i], block + d * PLACES + 16 * TOGETHER<T> * i, q + g * width + d);
  for (int g = 0; g < G; ++g) std::memcpy(scores + g * room, sums[g], sizeof sums[g]);
}

// The means of 16 N dimensions of the values, weighted by the shares (G, room) -> out (G, width).
template <int G, int N, class T>
void mix(const T* shares, const T* values, int64_t count, int64_t width, int64_t room, const float* totals, T* out) {
  v16 sums[G][N] = {};
  for (int64_t p = 0; p < count; p += TOGETHER<T>)
    for (int i = 0; i < N; ++i)
      for (int g = 0; g < G; ++g) sums[g][i] = add(sums[g][i], values + p * width + 16 * TOGETHER<T> * i, shares + g * room + p);
  for (int g = 0; g < G; ++g) {
    float found[16 * N];
    std::memcpy(found, sums[g], sizeof found);
#pragma omp simd
    for (int i = 0; i < 16 * N; ++i) out[g * width + i] = rounded<T>(found[i] / totals[g]);
  }
}

// G queries (G, width) over the positions start … end of their row's keys and values -> out (G, width). scores, shares: buffers of
// (G, room) each.
template <int G, class T>
void attend(const T* q, const T* keys, const T* values, int64_t start, int64_t end, int64_t width, int64_t room, float* scores, T* shares,
            T* out) {
  const int64_t first = start / PLACES * PLACES, count = end - first;
  for (int64_t p = first; p < end; p += PLACES) {
    const T* block = keys + p * width;
    float* to = scores + p - first;
    if (end - p <= 16) look<G, 1>(q, block, width, room, to);
    else if (end - p <= 32) look<G, 2>(q, block, width, room, to);
    else look<G, 4>(q, block, width, room, to);
  }
  const int64_t low = start / TOGETHER<T> * TOGETHER<T> - first, begin = start - first;
  float totals[G];
  for (int g = 0; g < G; ++g) {
    float *x = scores + g * room, most = x[begin], total = 0;
    T* share = shares + g * room;
#pragma omp simd reduction(max : most)
    for (int64_t p = begin; p < count; ++p) most = x[p] > most ? x[p] : most;
#pragma omp simd reduction(+ : total)
    for (int64_t p = begin; p < count; ++p) {
      const float e = power_of_e(x[p] - most);
      total += e;
      share[p] = rounded<T>(e);
    }
    for (int64_t p = low; p < begin; ++p) share[p] = rounded<T>(0);
    for (int64_t p = count; p % TOGETHER<T>; ++p) share[p] = rounded<T>(0);
    totals[g] = total;
  }
  shares += low;
  values += (first + low) * width;
  int64_t from = 0;
  for (; from + 64 <= width; from += 64) mix<G, 4>(shares, values + from * TOGETHER<T>, count - low, width, room, totals, out + from);
  for (; from + 16 <= width; from += 16) mix<G, 1>(shares, values + from * TOGETHER<T>, count - low, width, room, totals, out + from);
  for (; from < width; ++from)
    for (int g = 0; g < G; ++g) {
      float sum = 0;
      for (int64_t p = 0; p < count - low; ++p) sum += number(shares[g * room + p]) * number(values[at_value<T>(p, from, width)]);
      out[g * width + from] = rounded<T>(sum / totals[g]);
    }
}

template <class T> void step(const Model& m, const Rows& rows, float* hidden, int threads) {
  const int64_t n = rows.count * rows.length, D = m.size, W = m.width, H = m.heads, K = m.kv_heads;
  const int64_t wide = (H + 2 * K) * W, group = wide / K, S = TOGETHER<T>;
  const int64_t room = (rows.capacity + PLACES) / PLACES * PLACES, half = W / 2;
  const bool alone = n <= CHUNK;  // each thread norms all rows itself, instead of waiting for the others
  static thread_local std::vector<float> floats;
  static thread_local std::vector<T> inputs;
  floats.resize(n * D + n * wide);
  inputs.resize(n * H * W + n * m.inner + n * D * (alone ? threads : 1));
  float *x = floats.data(), *qkv = x + n * D;
  T *seen = inputs.data(), *act = seen + n * H * W, *normed = act + n * m.inner;
  // pointers: within the parallel region `thread_local` names another thread's
#pragma omp parallel num_threads(threads)
  {
    const std::pair<int, int> of = team();
    const int me = of.first, count = of.second;
    static thread_local std::vector<float> own;
    int64_t widest = 0;
    for (int64_t l = 0; l < m.layers; ++l)
      for (const Matrix* part : {&m.layer[l].qkv, &m.layer[l].out, &m.layer[l].gate_up, &m.layer[l].down})
        widest = std::max(widest, part->block);
    own.resize(CHUNK * widest + 2 * room);
    static thread_local std::vector<T> turns;
    turns.resize(2 * room + H / K * W);
    float *c = own.data(), *scores = c + CHUNK * widest;
    T *shares = turns.data(), *turned = shares + 2 * room;
    T *h = alone ? normed + n * D * me : normed, *cache = static_cast<T*>(rows.cache);
    const int64_t low = alone ? 0 : me * n / count, high = alone ? n : (me + 1) * n / count;
    const auto norm_all = [&] {
      for (int64_t r = low; r < high; ++r) norm(x + r * D, h + r * D, D, m.eps);
      if (!alone) {
#pragma omp barrier
      }
    };
    const auto add = [&](int64_t r, int64_t from, int64_t some, const float* values) {
#pragma omp simd
      for (int64_t i = 0; i < some; ++i) x[r * D + from + i] += values[i];
    };
    for (int64_t r = me * n / count; r < (me + 1) * n / count; ++r) {
      const T* found = static_cast<const T*>(m.embedding) + rows.ids[r] * D;
#pragma omp simd
      for (int64_t i = 0; i < D; ++i) x[r * D + i] = number(found[i]);
    }
#pragma omp barrier
    for (int64_t l = 0; l < m.layers; ++l) {
      const Layer& layer = m.layer[l];
      norm_all();
      product(h, n, layer.qkv, me, count, c, [&](int64_t r, int64_t from, int64_t some, const float* values) {
        std::memcpy(qkv + r * wide + from, values, some * sizeof(float));
      });
      if (K % count != 0 || group % layer.qkv.block != 0) {  // otherwise each thread only reads what it computed itself
#pragma omp barrier
      }
      const int64_t tasks = rows.count * K;
      for (int64_t task = me * tasks / count; task < (me + 1) * tasks / count; ++task) {
        const int64_t row = task % rows.count, g = task / rows.count;
        T* keys = cache + ((l * rows.all + rows.index[row]) * 2 * K + g) * rows.capacity * W;
        T* values = keys + K * rows.capacity * W;
        for (int64_t t = 0; t < rows.length; ++t) {
          const int64_t p = rows.place + t;
          const float* from = qkv + (row * rows.length + t) * wide + g * group + (H / K) * W;
          turn(from, layer.qk_norm + (H + g) * W, rows.cos + p * half, rows.sin + p * half, W, m.eps, turned);
          for (int64_t i = 0; i < W; i += S) std::memcpy(keys + at_key<T>(p, i, W), turned + i, S * sizeof(T));
          const float* value = from + W;
          if (S > 1 && (p % S == 0 || p == rows.starts[row]))  // the other one of the pair must not be NaN
            for (int64_t i = 0; i < W; ++i) values[at_value<T>(p ^ 1, i, W)] = rounded<T>(0);
          for (int64_t i = 0; i < W; ++i) values[at_value<T>(p, i, W)] = rounded<T>(value[i]);
        }
        for (int64_t t = 0; t < rows.length; ++t) {
          const int64_t p = rows.place + t, r = row * rows.length + t, first = g * (H / K), last = first + H / K, start = rows.starts[row];
          for (int64_t head = first; head < last; ++head)
            turn(qkv + r * wide + g * group + (head - first) * W, layer.qk_norm + head * W, rows.cos + p * half, rows.sin + p * half, W,
                 m.eps, turned + (head - first) * W);
          int64_t head = first;  // queries that share their keys are computed together
          T* to = seen + r * H * W;
          for (; head + 2 <= last; head += 2)
            attend<2>(turned + (head - first) * W, keys, values, start, p + 1, W, room, scores, shares, to + head * W);
          for (; head < last; ++head)
            attend<1>(turned + (head - first) * W, keys, values, start, p + 1, W, room, scores, shares, to + head * W);
        }
      }
#pragma omp barrier
      product(seen, n, layer.out, me, count, c, add);
#pragma omp barrier
      norm_all();
      product(h, n, layer.gate_up, me, count, c, [&](int64_t r, int64_t from, int64_t some, const float* values) {
        const int64_t many = some / 2, valid = std::min(many, m.inner - from / 2);
        T* to = act + r * m.inner + from / 2;
#pragma omp simd
        for (int64_t i = 0; i < valid; ++i) to[i] = rounded<T>(silu(values[i]) * values[many + i]);
      });
#pragma omp barrier
      product(act, n, layer.down, me, count, c, add);
#pragma omp barrier
    }
    for (int64_t r = me * rows.count / count; r < (me + 1) * rows.count / count; ++r)
      norm(x + ((r + 1) * rows.length - 1) * D, hidden + r * D, D, m.eps);
    release(m.is_half);
  }
}

template <class T> void head(const Matrix& m, const float* hidden, int64_t n, float* logits, int threads) {
  static thread_local std::vector<T> inputs;
  inputs.resize(n * m.k);
  T* h = inputs.data();
  for (int64_t i = 0; i < n * m.k; ++i) h[i] = rounded<T>(hidden[i]);
#pragma omp parallel num_threads(threads)
  {
    const std::pair<int, int> of = team();
    const int me = of.first, count = of.second;
    static thread_local std::vector<float> own;
    own.resize(CHUNK * m.block);
    product(h, n, m, me, count, own.data(), [&](int64_t r, int64_t from, int64_t some, const float* values) {
      std::memcpy(logits + r * m.n + from, values, some * sizeof(float));
    });
    release(std::is_same_v<T, bf16>);
  }
}

constexpr int64_t BLOCK = 256;  // summed in float32; sums of blocks in float64

inline float itself(float x) { return x; }
inline float one(float) { return 1; }

template <class Weight> double sum_above(const float* x, int64_t count, float low, Weight&& weight) {
  double total = 0;
  for (int64_t from = 0; from < count; from += BLOCK) {
    const int64_t end = std::min(count, from + BLOCK);
    float some = 0;
#pragma omp simd reduction(+ : some)
    for (int64_t i = from; i < end; ++i) some += x[i] > low ? weight(x[i]) : 0.0f;
    total += some;
  }
  return total;
}

double sum(const float* x, int64_t count) { return sum_above(x, count, 0, itself); }

// The least float low such that the numbers of x (count,) above it, weighted by weight(number), sum to less than `wanted`: bisection over
// floats by their integer representation. x is in [0, 1]; y (count,) is a buffer.
template <class Weight> float least(const float* x, int64_t count, double wanted, float* y, Weight&& weight) {
  constexpr int32_t FEW = 1 << 22;  // from this distance on few numbers are left between the two, and only these are examined
  int32_t low = -1, top = __builtin_bit_cast(int32_t, 1.0f);
  double above = 0;
  bool is_few = false;
  while (top - low > 1) {
    if (!is_few && top - low <= FEW) {
      const float from = low < 0 ? -1.0f : __builtin_bit_cast(float, low), to = __builtin_bit_cast(float, top);
      int64_t left = 0;
      for (int64_t i = 0; i < count; ++i) {
        y[left] = x[i];
        left += x[i] > from && x[i] <= to;
      }
      above = sum_above(x, count, to, weight);
      x = y, count = left, is_few = true;
    }
    const int32_t middle = low + (top - low) / 2;
    (above + sum_above(x, count, __builtin_bit_cast(float, middle), weight) < wanted ? top : low) = middle;
  }
  return __builtin_bit_cast(float, top);
}

constexpr float NONE = -std::numeric_limits<float>::infinity();

// The legal logits, the others minus infinity -> x, and the largest.
float masked(const float* logits, const bool* legal, int64_t count, float* x) {
  float most = NONE;
  if (legal) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] = legal[i] ? logits[i] : NONE;
  } else {
    std::memcpy(x, logits, count * sizeof(float));
  }
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// For one row: see choose in token_choice.py. x (2 count,) is a buffer.
int64_t choose(const float* logits, const bool* legal, int64_t count, float u, float temperature, int64_t top_k, double top_p, float* x) {
  const float most = masked(logits, legal, count, x);
  if (temperature == 0 || most == NONE) return std::max_element(x, x + count) - x;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = power_of_e((x[i] - most) / temperature);
  const auto without = [&](float low) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] = x[i] < low ? 0.0f : x[i];
  };
  if (top_k > 0 && top_k < count) without(least(x, count, top_k, x + count, one));
  if (top_p < 1) without(least(x, count, top_p * sum(x, count), x + count, itself));
  const double at = u * sum(x, count);
  double passed = 0;
  int64_t i = 0;
  for (; i + BLOCK < count; i += BLOCK) {
    const double some = sum(x + i, BLOCK);
    if (passed + some > at) break;
    passed += some;
  }
  for (; i < count; ++i)
    if ((passed += x[i]) > at) return i;
  while (x[--i] == 0) {  // u may be so close to 1 that rounding exceeds the end
  }
  return i;
}

// The negative log-likelihood of an id among the legal ones. x (count,) is a buffer.
double nats(const float* logits, const bool* legal, int64_t count, int64_t chosen, float* x) {
  const float most = masked(logits, legal, count, x);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = power_of_e(x[i] - most);
  return std::log(sum(x, count)) + most - logits[chosen];
}

float* room(int64_t count) {  // a thread's own buffer, for `choose` and `nats`
  static thread_local std::vector<float> own;
  own.resize(2 * count);
  return own.data();
}

void advance(const Model& m, const Rows& rows, float* hidden, int threads) {
#ifdef TOKUN_BRGEMM
  if (m.is_half) return step<bf16>(m, rows, hidden, threads);
#endif
  step<float>(m, rows, hidden, threads);
}

void look_up(const Matrix& m, bool is_half, const float* hidden, int64_t n, float* logits, int threads) {
#ifdef TOKUN_BRGEMM
  if (is_half) return head<bf16>(m, hidden, n, logits, threads);
#endif
  head<float>(m, hidden, n, logits, threads);
}

#ifdef TOKUN_BRGEMM
template <class T> bool runs() {
  alignas(64) T some[32 * 32] = {};
  alignas(64) float sums[32 * 32];
  try {
    multiply(some, 32, Matrix{some, 32, 32, 32}, 0, sums);
    release(std::is_same_v<T, bf16>);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}
#endif

}  // namespace

extern "C" {

// Whether torch's small products run on this processor.
int tokun_has_products() {
#ifdef TOKUN_BRGEMM
  return runs<float>();
#else
  return 0;
#endif
}

// Whether those in bfloat16 run with the processor's own instructions; otherwise weights and caches are float32.
int tokun_has_half() {
#if defined(TOKUN_BRGEMM) && defined(__AVX512BF16__)
  return runs<bf16>();
#else
  return 0;
#endif
}

void tokun_step(const Model* model, const Rows* rows, float* hidden, int threads) { advance(*model, *rows, hidden, threads); }

void tokun_head(const Matrix* matrix, int is_half, const float* hidden, int64_t n, float* logits, int threads) {
  look_up(*matrix, is_half, hidden, n, logits, threads);
}

// Repeatedly: an id for each row from its hidden state (rows, size), and the step that follows; the head's first id is `offset`.
// u, chosen (rows, n); found (rows,): the sum of the nats.
void tokun_draw(const Model* model, const Rows* rows, const Matrix* matrix, float* hidden, int64_t n, const float* u, float temperature,
                int64_t top_k, double top_p, int64_t offset, int64_t* chosen, double* found, int threads) {
  const int64_t count = rows->count, V = matrix->n;
  std::vector<float> logits(count * V);
  std::vector<int64_t> ids(count);
  Rows at = *rows;
  at.ids = ids.data();
  for (int64_t i = 0; i < n; ++i, ++at.place) {
    look_up(*matrix, model->is_half, hidden, count, logits.data(), threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < count; ++r) {
      const float* own = logits.data() + r * V;
      const int64_t id = choose(own, nullptr, V, u[r * n + i], temperature, top_k, top_p, room(V));
      found[r] += nats(own, nullptr, V, id, room(V));
      ids[r] = chosen[r * n + i] = id + offset;
    }
    advance(*model, at, hidden, threads);
  }
}

// Rows of text, each until its end: an id for each unfinished row, and the step that follows. -> the number of ids of the longest.
int64_t tokun_write(const Model* model, const Rows* rows, const Matrix* matrix, const float* hidden, const Words* words, int threads) {
  const Words& w = *words;
  const int64_t D = model->size;
  std::vector<int64_t> alive, ids(rows->count), starts(rows->count), index(rows->count);
  std::vector<float> logits(rows->count * w.size), last;
  for (int64_t r = 0; r < rows->count; ++r)
    if (w.states[r] != w.end) {
      alive.push_back(r);
      last.insert(last.end(), hidden + r * D, hidden + (r + 1) * D);
    }
  Rows at = *rows;
  at.ids = ids.data(), at.starts = starts.data(), at.index = index.data();
  int64_t i = 0;
  for (; i < w.most && !alive.empty(); ++i, ++at.place) {
    const int64_t many = alive.size();
    look_up(*matrix, model->is_half, last.data(), many, logits.data(), threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t a = 0; a < many; ++a) {
      const int64_t r = alive[a], state = w.states[r], length = w.lengths[r], slot = std::min(w.first[state] + length, w.slots - 1);
      const int64_t row = (3 * state + (length > 0) + (length >= w.limit[state])) * w.size;
      const float* own = logits.data() + a * w.size;
      const int64_t id = choose(own, w.ruled + row, w.size, w.u[r * w.slots + slot], w.temperature, w.top_k, w.top_p, room(w.size));
      if (w.in_text[state]) w.found[r] += nats(own, w.allowed + row, w.size, id, room(w.size));
      w.chosen[r * w.most + i] = id;
      w.states[r] = w.following[state * w.ids + id];
      w.lengths[r] = w.states[r] == state ? length + 1 : 0;
    }
    std::erase_if(alive, [&](int64_t r) { return w.states[r] == w.end; });
    at.count = alive.size();
    for (int64_t a = 0; a < at.count; ++a)
      ids[a] = w.chosen[alive[a] * w.most + i], starts[a] = rows->starts[alive[a]], index[a] = rows->index[alive[a]];
    if (at.count) advance(*model, at, last.data(), threads);
  }
  return i;
}

// logits (n, count); row r may choose ids with legal[r * count …] (null: all).
void tokun_choose(const float* logits, const bool* legal, int64_t n, int64_t count, const float* u, float temperature, int64_t top_k,
                  double top_p, int64_t* chosen, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < n; ++r)
    chosen[r] = choose(logits + r * count, legal ? legal + r * count : nullptr, count, u[r], temperature, top_k, top_p, room(count));
}

void tokun_nats(const float* logits, const bool* legal, int64_t n, int64_t count, const int64_t* chosen, double* found, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < n; ++r) found[r] = nats(logits + r * count, legal ? legal + r * count : nullptr, count, chosen[r], room(count));
}
}
