// The kernels for AVX2 with FMA and POPCNT: values are spread by a table look-up of 8 mask bits.
#if defined(__x86_64__)
#include <immintrin.h>

#include "matrix.h"
#define WIDTH 8

namespace {

using Vector = __m256;

struct Tables {
  alignas(32) int8_t bytes[256][32];   // for pshufb: a bf16 value becomes the float of its lane
  alignas(64) int8_t lanes[256][8];     // for vpermps: which value goes to the lane, or -1
  alignas(16) int8_t halves[256][16];   // for pshufb: bf16 values to their places
  alignas(32) uint8_t columns[256][8];  // the set bits
  constexpr Tables() : bytes(), lanes(), halves(), columns() {
    for (int mask = 0; mask < 256; ++mask) {
      int value = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool here = (mask >> lane) & 1;
        bytes[mask][4 * lane] = bytes[mask][4 * lane + 1] = -1;
        bytes[mask][4 * lane + 2] = int8_t(here ? 2 * value : -1);
        bytes[mask][4 * lane + 3] = int8_t(here ? 2 * value + 1 : -1);
        lanes[mask][lane] = int8_t(here ? value : -1);
        halves[mask][2 * lane] = int8_t(here ? 2 * value : -1);
        halves[mask][2 * lane + 1] = int8_t(here ? 2 * value + 1 : -1);
        if (here) columns[mask][value++] = uint8_t(lane);
      }
    }
  }
};
constexpr Tables TABLES;

template <class E>
Vector widen(const uint8_t* values) {
  if (sizeof(E) == 4) return _mm256_loadu_ps(reinterpret_cast<const float*>(values));
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

inline float sum(Vector vector) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(vector), _mm256_extractf128_ps(vector, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

template <class E>
struct Spread;

template <>
struct Spread<float> {
  static constexpr int STEP = WIDTH;

  static void floats(const uint8_t* values, size_t mask, Vector* to) {
    const auto* entry = reinterpret_cast<const __m128i*>(TABLES.lanes[mask]);
    const __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(entry));
    const __m256 packed = _mm256_loadu_ps(reinterpret_cast<const float*>(values));
    __m256 zero = _mm256_setzero_ps();
    __asm__("" : "+x"(zero));  // known to be zero, gcc makes two instructions of the blend
    *to = _mm256_blendv_ps(_mm256_permutevar8x32_ps(packed, lanes), zero,
                           _mm256_castsi256_ps(lanes));
  }

  static void copy(const uint8_t* values, size_t mask, float* to) {
    Vector spread;
    floats(values, mask, &spread);
    _mm256_storeu_ps(to, spread);
  }
};

template <>
struct Spread<bf16> {
  static constexpr int STEP = WIDTH;

  static __m128i load(const uint8_t* values) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  }

  static void floats(const uint8_t* values, size_t mask, Vector* to) {
    const auto* entry = reinterpret_cast<const __m256i*>(TABLES.bytes[mask]);
    *to = _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load(values)),
                                                  _mm256_load_si256(entry)));
  }

  static void copy(const uint8_t* values, size_t mask, bf16* to) {
    const auto* entry = reinterpret_cast<const __m128i*>(TABLES.halves[mask]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_shuffle_epi8(load(values), _mm_load_si128(entry)));
  }
};

inline void list_columns(uint64_t mask, uint8_t* columns) {
  for (uint64_t first = 0; first < BLOCK * 0x0101010101010101; first += 8 * 0x0101010101010101) {
    uint64_t set;
    memcpy(&set, TABLES.columns[mask & 255], sizeof set);
    set += first;  // to each of its 8 bytes
    memcpy(columns, &set, sizeof set);
    columns += __builtin_popcount(mask & 255);
    mask >>= 8;
  }
}

}  // namespace

#include "kernels.h"
const Kernels avx2_kernels = KERNELS;
#endif
