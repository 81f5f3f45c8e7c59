// The bitmask layout, and what every instruction set offers (kernels.h has it for each of them).
//
// Rows are taken in groups of 4, columns in blocks of 64. A group is one sequential stream: for
// each block four 64-bit masks (bit j of mask r: row r has a value in column j), then the values
// of row 0, 1, 2, 3 in the order of their columns. `offsets` holds where each group begins, and
// the end. Kernels read up to PADDING bytes behind the end and use none of them.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

constexpr int GROUP = 4, BLOCK = 64, MASKS_BYTES = GROUP * BLOCK / 8, PADDING = 128;

using bf16 = uint16_t;  // the upper half of a float

struct Matrix {
  const uint8_t* stream;
  const int64_t* offsets;  // groups() + 1
  int64_t rows, columns;
  int64_t groups() const { return (rows + GROUP - 1) / GROUP; }
  int64_t blocks() const { return (columns + BLOCK - 1) / BLOCK; }
};

struct Output {
  void* data;        // tokens x rows, of the matrix's type
  const void* bias;  // rows, or null
  int64_t rows;
};

struct Kernels {
  int width;       // floats in a vector
  int max_panel;   // vectors of tokens that `prefill` takes at a time
  bool split;      // for bf16, `decode` wants the even columns of each 32 before the odd ones
  // out = x W^T for the groups first..last. x: tokens x (blocks * 64) floats, zeros at the end.
  void (*decode[2])(const Matrix&, const float* x, int64_t tokens, const Output&, int64_t first,
                    int64_t last);
  // The same for `panels` panels of tokens, each columns x (panel * width) floats, `apart` floats
  // behind the one before it; returns false where there is no memory.
  bool (*prefill[2])(const Matrix&, const float* x, int64_t apart, int panel, int panels,
                     int64_t tokens, const Output&, int64_t first, int64_t last);
  // The rows of the groups first..last as a dense matrix.
  void (*expand[2])(const Matrix&, int64_t first, int64_t last, void* dense);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

// Everything below is compiled once per instruction set and must not be shared between them.
namespace {

// To be freed by free(). A vector that straddles two cache lines costs two loads.
template <class T>
T* allocate(int64_t count) {
  return static_cast<T*>(aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
}

inline uint64_t load64(const uint8_t* from) {
  uint64_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class E>
E from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return bf16((bits >> 16) | 0x40);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class E>
void store_output(const Output& out, int64_t token, int64_t row, float sum) {
  if (out.bias) sum += to_float(static_cast<const E*>(out.bias)[row]);
  static_cast<E*>(out.data)[token * out.rows + row] = from_float<E>(sum);
}

}  // namespace
