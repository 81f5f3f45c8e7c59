// The decode engine's kernels for NVIDIA GPUs: a sparse weight times up to TOKENS tokens, and back to
// a dense weight. ../decode_gpu.py explains the format, ../decode_kernels.py compiles this with
//
//   BF16     1 for bf16, 0 for fp16     ROWS, PARTS  of a group; a thread is a lane
//   TOKENS   1, 2, 4 or 8               Start        type of first columns
//   WIDE     whether the inputs of a single token are kept as floats
//
// A thread walks its lane in chunks of 8 entries: five words, of which a warp reads 128 bytes each.
// The inputs lie in shared memory, TOKENS values side by side for each column. A column's place is a
// running sum of the steps, made by dp4a, which adds a scaled byte to it in one instruction.
using Half = unsigned short;  // no headers, since there may be no CUDA but torch's

constexpr int LANES = ROWS * PARTS;

struct Pair {
  float low, high;
};

__device__ Pair halves(unsigned word) {
#if BF16
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
#else
  Pair pair;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(pair.low), "=f"(pair.high)
      : "r"(word));
  return pair;
#endif
}

__device__ float to_float(Half half) { return halves(half).low; }

__device__ Half from_float(float value) {
  Half half;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
#endif
  return half;
}

// What is read once goes past the L1.
__device__ unsigned stream_load(const unsigned* from) {
  unsigned word;
  asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(word) : "l"(from));
  return word;
}

// Eight entries of a lane: their steps, and their values in pairs; zeros past the end.
struct Chunk {
  unsigned steps, values[4];

  __device__ void load(const unsigned* words, int left) {
    steps = left > 0 ? stream_load(words) : 0;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
      values[pair] = left > 2 * pair ? stream_load(words + (1 + pair) * LANES) : 0;
  }
};

#if TOKENS == 1
#if WIDE
using Held = float;
__device__ float widened(float input) { return input; }
__device__ float narrowed(Half input) { return to_float(input); }
#else
using Held = Half;
__device__ float widened(Half input) { return to_float(input); }
__device__ Half narrowed(Half input) { return input; }
#endif
#else
struct alignas(2 * TOKENS) Held {
  unsigned words[TOKENS / 2];
};
#endif

__device__ void add(float value, const char* inputs, unsigned place, float* sums) {
  const Held found = *reinterpret_cast<const Held*>(inputs + place);
#if TOKENS == 1
  sums[0] += value * widened(found);
#else
#pragma unroll
  for (int pair = 0; pair < TOKENS / 2; ++pair) {
    const Pair both = halves(found.words[pair]);
    sums[2 * pair] += value * both.low;
    sums[2 * pair + 1] += value * both.high;
  }
#endif
}

extern "C" __global__ void __launch_bounds__(LANES, TOKENS == 1 ? 2 : 1)
    multiply(const unsigned* stream, const Start* starts, const long long* offsets,
             const int* lengths, const int* order, const Half* x, const Half* bias, Half* out,
             int num_rows, int num_columns, int num_tokens) {
  extern __shared__ __align__(16) char inputs[];
  const int lane = threadIdx.x, group = blockIdx.x, first_token = blockIdx.y * TOKENS;
  const int length = lengths[group];
  const unsigned* words = stream + offsets[group] + lane;
  Chunk next;
  next.load(words, length);
  unsigned place = unsigned(starts[group * LANES + lane]) * unsigned(sizeof(Held));

  x += (long long)first_token * num_columns;
#if TOKENS == 1
  for (int column = lane; column < num_columns; column += LANES)
    reinterpret_cast<Held*>(inputs)[column] = narrowed(x[column]);
#else
  for (int column = lane; column < num_columns; column += LANES)
#pragma unroll
    for (int token = 0; token < TOKENS; ++token)
      reinterpret_cast<Half*>(inputs)[column * TOKENS + token] =
          first_token + token < num_tokens ? x[(long long)token * num_columns + column] : 0;
#endif
  __syncthreads();

  float sums[TOKENS] = {};
  constexpr unsigned SCALE = sizeof(Held);
  for (int entry = 0; entry < length; entry += 8) {
    const Chunk chunk = next;
    words += 5 * LANES;
    next.load(words, length - entry - 8);
    const unsigned even = chunk.steps & 0x0f0f0f0fu, odd = (chunk.steps >> 4) & 0x0f0f0f0fu;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const Pair values = halves(chunk.values[pair]);
      place = __dp4a(even, SCALE << (8 * pair), place);
      add(values.low, inputs, place, sums);
      place = __dp4a(odd, SCALE << (8 * pair), place);
      add(values.high, inputs, place, sums);
    }
  }

  __syncthreads();  // the inputs are no longer needed: their memory holds the lanes' sums
  float* kept = reinterpret_cast<float*>(inputs);
#pragma unroll
  for (int token = 0; token < TOKENS; ++token) kept[token * LANES + lane] = sums[token];
  __syncthreads();
  for (int i = lane; i < ROWS * TOKENS; i += LANES) {
    const int token = i / ROWS, row = order[group * ROWS + i % ROWS];
    float sum = 0;
    for (int part = 0; part < PARTS; ++part) sum += kept[token * LANES + part * ROWS + i % ROWS];
    if (row >= 0 && first_token + token < num_tokens)
      out[(long long)(first_token + token) * num_rows + row] =
          from_float(bias ? sum + to_float(bias[row]) : sum);
  }
}

// The nonzeros of a group into a dense matrix of zeros.
extern "C" __global__ void __launch_bounds__(LANES)
    expand(const unsigned* stream, const Start* starts, const long long* offsets,
           const int* lengths, const int* order, unsigned short* weight, int num_columns) {
  const int lane = threadIdx.x, group = blockIdx.x;
  const int length = lengths[group];
  const unsigned* words = stream + offsets[group] + lane;
  weight += (long long)order[group * ROWS + lane % ROWS] * num_columns;
  int column = starts[group * LANES + lane];
  for (int entry = 0; entry < length; entry += 8, words += 5 * LANES) {
    Chunk chunk;
    chunk.load(words, length - entry);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned short value = chunk.values[i / 2] >> (16 * (i % 2));
      column += (chunk.steps >> (4 * i)) & 15;
      if (value) weight[column] = value;  // else a filler, or padding
    }
  }
}
