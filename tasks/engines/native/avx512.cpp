// The kernels for AVX-512 F, BW, DQ, VL and VBMI2: values are spread by vexpandps and vpexpandw.
#if defined(__x86_64__)
#include <immintrin.h>

#include "matrix.h"
#define WIDTH 16

namespace {

using Vector = __m512;

template <class E>
Vector widen(const uint8_t* values) {
  if (sizeof(E) == 4) return _mm512_loadu_ps(values);
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline float sum(Vector vector) { return _mm512_reduce_add_ps(vector); }

// Zen 4 makes a zero-masked expand wait for the old content of its destination. A register that the
// compiler cannot know to be zero is cleared first, and the expand merges into it, from a
// register as compressing does.
template <class E>
struct Spread;

template <>
struct Spread<float> {
  static constexpr int STEP = 16;

  static __m512 spread(const uint8_t* values, size_t mask) {
    __m512 cleared = _mm512_setzero_ps(), packed = _mm512_loadu_ps(values);
    __asm__("" : "+v"(cleared), "+v"(packed));
    return _mm512_mask_expand_ps(cleared, __mmask16(mask), packed);
  }
  static void floats(const uint8_t* values, size_t mask, Vector* to) { *to = spread(values, mask); }
  static void copy(const uint8_t* values, size_t mask, float* to) {
    _mm512_storeu_ps(to, spread(values, mask));
  }
};

template <>
struct Spread<bf16> {
  static constexpr int STEP = 32;

  static __m512i spread(const uint8_t* values, size_t mask) {
    __m512i cleared = _mm512_setzero_si512(), packed = _mm512_loadu_si512(values);
    __asm__("" : "+v"(cleared), "+v"(packed));
    return _mm512_mask_expand_epi16(cleared, __mmask32(mask), packed);
  }
  static void floats(const uint8_t* values, size_t mask, Vector* to) {
    const __m512i both = spread(values, mask);
    to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    to[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
  }
  static void copy(const uint8_t* values, size_t mask, bf16* to) {
    _mm512_storeu_si512(to, spread(values, mask));
  }
};

struct Columns {
  alignas(64) uint8_t numbers[BLOCK];
  constexpr Columns() : numbers() {
    for (int i = 0; i < BLOCK; ++i) numbers[i] = uint8_t(i);
  }
};
constexpr Columns COLUMNS;

inline void list_columns(uint64_t mask, uint8_t* columns) {
  // Compressed in a register: compressing to memory is microcode on Zen 4.
  const __m512i all = _mm512_load_si512(COLUMNS.numbers);
  _mm512_storeu_si512(columns, _mm512_maskz_compress_epi8(mask, all));
}

}  // namespace

#include "kernels.h"
const Kernels avx512_kernels = KERNELS;
#endif
