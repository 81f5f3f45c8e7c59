// The C interface of the bitmask engine: encode a matrix, multiply by it, expand it again.
//
//   g++ -O2 -fPIC -shared -fopenmp ...  (tasks/engines/build.py)
#include "matrix.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

enum Isa { PORTABLE, AVX2, AVX512 };

const Kernels* kernels_of(int isa) {
#if defined(__x86_64__)
  if (isa == AVX512) return &avx512_kernels;
  if (isa == AVX2) return &avx2_kernels;
#endif
  return &portable_kernels;
}

bool is_nonzero(float value) { return value != 0; }
bool is_nonzero(bf16 value) { return (value & 0x7fff) != 0; }

template <class E>
int64_t count_nonzeros(const E* row, int64_t columns) {
  int64_t nonzeros = 0;
  for (int64_t i = 0; i < columns; ++i) nonzeros += is_nonzero(row[i]);
  return nonzeros;
}

template <class E>
void encode_group(const E* dense, int rows, int64_t columns, uint8_t* to) {
  for (int64_t first = 0; first < columns; first += BLOCK) {
    uint8_t* masks = to;
    to += MASKS_BYTES;
    const int64_t width = columns - first < BLOCK ? columns - first : BLOCK;
    for (int row = 0; row < GROUP; ++row, masks += 8) {
      uint64_t mask = 0;
      for (int64_t i = 0; row < rows && i < width; ++i) {
        const E value = dense[row * columns + first + i];
        if (!is_nonzero(value)) continue;
        mask |= uint64_t(1) << i;
        memcpy(to, &value, sizeof value);
        to += sizeof value;
      }
      memcpy(masks, &mask, sizeof mask);
    }
  }
}

// Calls task(part, parts) on as many threads as are asked for, or as there are.
template <class Task>
void in_parallel(int threads, const Task& task) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    task(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  task(0, 1);
}

// x as floats, rows padded with zeros to whole blocks; `split`: see Kernels.
template <class E>
void widen_inputs(const E* x, int64_t x_stride, int64_t tokens, const Matrix& matrix, bool split,
                  float* to) {
  const int64_t padded = matrix.blocks() * BLOCK;
  for (int64_t token = 0; token < tokens; ++token, x += x_stride, to += padded)
    for (int64_t i = 0; i < padded; ++i) {
      const int64_t place = split ? i / 32 * 32 + i % 2 * 16 + i % 32 / 2 : i;
      to[place] = i < matrix.columns ? to_float(x[i]) : 0;
    }
}

// Columns first..last of a panel of x, transposed: columns x `step` floats, zeros behind `tokens`.
template <class E>
void transpose_inputs(const E* x, int64_t x_stride, int64_t tokens, int64_t step, int64_t first,
                      int64_t last, float* to) {
  for (int64_t left = first; left < last; left += 16)
    for (int64_t token = 0; token < step; ++token)
      for (int64_t i = left; i < (left + 16 < last ? left + 16 : last); ++i)
        to[i * step + token] = token < tokens ? to_float(x[token * x_stride + i]) : 0;
}

template <class E>
bool run_decode(const Kernels& kernels, const Matrix& matrix, const E* x, int64_t x_stride,
                int64_t tokens, const Output& out, int threads) {
  auto* inputs = allocate<float>(tokens * matrix.blocks() * BLOCK);
  if (!inputs) return false;
  const bool split = sizeof(E) == 2 && kernels.split;
  widen_inputs(x, x_stride, tokens, matrix, split, inputs);
  in_parallel(threads, [&](int64_t part, int64_t parts) {
    const int64_t groups = matrix.groups();
    kernels.decode[sizeof(E) / 4](matrix, inputs, tokens, out, groups * part / parts,
                                  groups * (part + 1) / parts);
  });
  free(inputs);
  return true;
}

template <class E>
bool run_prefill(const Kernels& kernels, const Matrix& matrix, const E* x, int64_t x_stride,
                 int64_t tokens, Output out, int threads) {
  constexpr int64_t AT_ONCE = 256;  // tokens per listing of the nonzeros
  bool done = true;
  float* inputs = nullptr;
  while (tokens && done) {
    const int64_t taken = tokens < AT_ONCE ? tokens : AT_ONCE;
    const int64_t vectors = (taken + kernels.width - 1) / kernels.width;
    const int panels = int((vectors + kernels.max_panel - 1) / kernels.max_panel);
    const int panel = int((vectors + panels - 1) / panels);
    const int64_t step = panel * kernels.width, apart = matrix.columns * step;
    if (!inputs) inputs = allocate<float>(panels * apart);
    if (!inputs) return false;
    in_parallel(threads, [&](int64_t part, int64_t parts) {
      for (int i = 0; i < panels; ++i)
        transpose_inputs(x + i * step * x_stride, x_stride, taken - i * step, step,
                         matrix.columns * part / parts, matrix.columns * (part + 1) / parts,
                         inputs + i * apart);
    });
    in_parallel(threads, [&](int64_t part, int64_t parts) {
      const int64_t groups = matrix.groups();
      if (!kernels.prefill[sizeof(E) / 4](matrix, inputs, apart, panel, panels, taken, out,
                                          groups * part / parts, groups * (part + 1) / parts))
        __atomic_store_n(&done, false, __ATOMIC_RELAXED);
    });
    x += taken * x_stride;
    out.data = static_cast<E*>(out.data) + taken * out.rows;
    tokens -= taken;
  }
  free(inputs);
  return done;
}

template <class E>
bool run(int isa, int decode_tokens, const Matrix& matrix, const void* x, int64_t x_stride,
         int64_t tokens, const Output& out, int threads) {
  const Kernels& kernels = *kernels_of(isa);
  const auto* inputs = static_cast<const E*>(x);
  return tokens <= decode_tokens
             ? run_decode(kernels, matrix, inputs, x_stride, tokens, out, threads)
             : run_prefill(kernels, matrix, inputs, x_stride, tokens, out, threads);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The best instruction set that the kernels know and of which this processor has all that the
// compiler was allowed (FLAGS_OF in build.py).
int sparseramp_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi2"))
    return AVX512;
  if (avx2) return AVX2;
#endif
  return PORTABLE;
}

// Fills offsets (groups + 1) for a contiguous rows x columns matrix of 2 (bf16) or 4 (fp32) bytes
// each, and returns the bytes that its stream needs.
int64_t sparseramp_measure(const void* dense, int64_t rows, int64_t columns, int bytes,
                           int64_t* offsets) {
  const Matrix matrix = {nullptr, offsets, rows, columns};
  offsets[0] = 0;
  for (int64_t group = 0; group < matrix.groups(); ++group) {
    int64_t nonzeros = 0;
    for (int64_t row = group * GROUP; row < rows && row < (group + 1) * GROUP; ++row)
      nonzeros += bytes == 2
                      ? count_nonzeros(static_cast<const bf16*>(dense) + row * columns, columns)
                      : count_nonzeros(static_cast<const float*>(dense) + row * columns, columns);
    offsets[group + 1] = offsets[group] + matrix.blocks() * MASKS_BYTES + nonzeros * bytes;
  }
  return offsets[matrix.groups()] + PADDING;
}

void sparseramp_encode(const void* dense, int64_t rows, int64_t columns, int bytes,
                       const int64_t* offsets, uint8_t* stream) {
  for (int64_t row = 0; row < rows; row += GROUP) {
    const int height = int(rows - row < GROUP ? rows - row : GROUP);
    uint8_t* to = stream + offsets[row / GROUP];
    if (bytes == 2)
      encode_group(static_cast<const bf16*>(dense) + row * columns, height, columns, to);
    else
      encode_group(static_cast<const float*>(dense) + row * columns, height, columns, to);
  }
  memset(stream + offsets[(rows + GROUP - 1) / GROUP], 0, PADDING);
}

// The rows of the groups first..last as a dense matrix.
void sparseramp_expand(int isa, int threads, const uint8_t* stream, const int64_t* offsets,
                       int64_t rows, int64_t columns, int bytes, int64_t first, int64_t last,
                       void* dense) {
  const Matrix matrix = {stream, offsets, rows, columns};
  in_parallel(threads, [&](int64_t part, int64_t parts) {
    const int64_t from = (last - first) * part / parts, to = (last - first) * (part + 1) / parts;
    kernels_of(isa)->expand[bytes / 4](matrix, first + from, first + to,
                                       static_cast<char*>(dense) + from * GROUP * columns * bytes);
  });
}

// out (tokens x rows) = x (tokens x columns, rows x_stride elements apart) W^T + bias; up to
// decode_tokens tokens by the decode kernel. Returns 0, or 1 where there is no memory. Re-entrant.
int sparseramp_linear(int isa, int decode_tokens, int threads, const uint8_t* stream,
                      const int64_t* offsets, int64_t rows, int64_t columns, int bytes,
                      const void* x, int64_t x_stride, int64_t tokens, const void* bias,
                      void* out) {
  const Matrix matrix = {stream, offsets, rows, columns};
  const Output output = {out, bias, rows};
  const bool done =
      bytes == 2 ? run<bf16>(isa, decode_tokens, matrix, x, x_stride, tokens, output, threads)
                 : run<float>(isa, decode_tokens, matrix, x, x_stride, tokens, output, threads);
  return done ? 0 : 1;
}

}
