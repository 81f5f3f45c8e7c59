// What is done with a bitmask matrix, written once over vectors of WIDTH floats. Before including
// it a file defines WIDTH, the type Vector and
//   widen<E>(values), which reads WIDTH values as floats;
//   sum(vector), of its lanes;
//   Spread<E>, which takes STEP columns at a time: `floats(values, mask, to)` spreads the values
//     over the lanes that a mask of STEP bits names, clears the others and writes STEP / WIDTH
//     vectors, of the even and the odd columns where there are two; `copy(values, mask, to)`
//     stores the same as it is;
//   list_columns(mask, columns), which writes the number of each set bit, and may write up to BLOCK
//     entries and 8 more.
//
// No templates of the standard library here: the linker keeps one copy of them for all files, and
// it may be one that uses instructions which this processor lacks.
#pragma once

namespace {

using Loose = float __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Loose*>(to) = value; }
inline int count(uint64_t mask) { return __builtin_popcountll(mask); }

template <int STEP>
inline size_t part_of_mask(const uint8_t* mask, int part) {
  if (STEP == 4) return (mask[part / 2] >> (4 * (part & 1))) & 15;
  uint32_t bits = 0;
  memcpy(&bits, mask + part * STEP / 8, STEP / 8);
  return bits;
}

// Decode: the weights are spread to vectors along the columns and used for up to TOKENS tokens.
// Four rows go side by side so that x is loaded once for them and the sums do not wait for
// each other.
template <class E, int TOKENS>
void decode_group(const Matrix& matrix, int64_t group, const float* x, int64_t token,
                  const Output& out) {
  constexpr int STEP = Spread<E>::STEP, VECTORS = STEP / WIDTH;
  const int64_t blocks = matrix.blocks();
  const uint8_t* from = matrix.stream + matrix.offsets[group];
  x += token * blocks * BLOCK;
  Vector sums[GROUP][TOKENS] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* masks = from;
    const uint8_t* values[GROUP];
    from += MASKS_BYTES;
    for (int row = 0; row < GROUP; ++row) {
      values[row] = from;
      from += sizeof(E) * count(load64(masks + 8 * row));
      for (unsigned line = 0; line < sizeof(E) / 2; ++line)  // 6 to 10 % faster from DRAM on Zen 3
        __builtin_prefetch(values[row] + 1536 + 64 * line);
    }
#pragma GCC unroll 8
    for (int part = 0; part < BLOCK / STEP; ++part) {
      Vector inputs[TOKENS][VECTORS];
#pragma GCC unroll 4
      for (int i = 0; i < TOKENS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
          inputs[i][v] = load(x + (i * blocks + block) * BLOCK + part * STEP + v * WIDTH);
#pragma GCC unroll 4
      for (int row = 0; row < GROUP; ++row) {
        const size_t mask = part_of_mask<STEP>(masks + 8 * row, part);
        Vector weights[VECTORS];
        Spread<E>::floats(values[row], mask, weights);
        values[row] += sizeof(E) * count(mask);
#pragma GCC unroll 4
        for (int i = 0; i < TOKENS; ++i)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) sums[row][i] += weights[v] * inputs[i][v];
      }
    }
  }
  for (int row = 0; row < GROUP && group * GROUP + row < matrix.rows; ++row)
    for (int i = 0; i < TOKENS; ++i)
      store_output<E>(out, token + i, group * GROUP + row, sum(sums[row][i]));
}

template <class E>
void decode(const Matrix& matrix, const float* x, int64_t tokens, const Output& out, int64_t first,
            int64_t last) {
  for (int64_t group = first; group < last; ++group)
    for (int64_t token = 0; token < tokens;) {  // the stream is cached after the first
      const int64_t left = tokens - token;
      if (left == 1) decode_group<E, 1>(matrix, group, x, token, out), token += 1;
      else if (left == 2) decode_group<E, 2>(matrix, group, x, token, out), token += 2;
      else if (left == 3) decode_group<E, 3>(matrix, group, x, token, out), token += 3;
      else decode_group<E, 4>(matrix, group, x, token, out), token += 4;
    }
}

// Whole again: rows of a group into a dense matrix, for a dense kernel or a reader.
template <class E>
void expand_group(const Matrix& matrix, int64_t group, E* dense) {
  constexpr int STEP = Spread<E>::STEP;
  const uint8_t* from = matrix.stream + matrix.offsets[group];
  for (int64_t first = 0; first < matrix.columns; first += BLOCK) {
    const uint8_t* masks = from;
    from += MASKS_BYTES;
    const int64_t width = matrix.columns - first < BLOCK ? matrix.columns - first : BLOCK;
    for (int row = 0; row < GROUP && group * GROUP + row < matrix.rows; ++row, masks += 8) {
      E whole[BLOCK];
      E* to = dense + row * matrix.columns + first;
#pragma GCC unroll 4
      for (int part = 0; part < BLOCK / STEP; ++part) {
        const size_t mask = part_of_mask<STEP>(masks, part);
        Spread<E>::copy(from, mask, (width == BLOCK ? to : whole) + part * STEP);
        from += sizeof(E) * count(mask);
      }
      if (width < BLOCK) memcpy(to, whole, width * sizeof(E));
    }
  }
}

template <class E>
void expand_groups(const Matrix& matrix, int64_t first, int64_t last, void* dense) {
  for (int64_t group = first; group < last; ++group)
    expand_group(matrix, group, static_cast<E*>(dense) + (group - first) * GROUP * matrix.columns);
}

// Prefill: zeros are skipped. For ROWS_AT_ONCE rows and a block of columns the nonzeros are listed
// once, then each is broadcast over PANEL vectors of tokens, whose inputs for the block stay in L1.
constexpr int ROWS_AT_ONCE = 128;

struct alignas(64) Row {
  float weights[BLOCK + WIDTH];
  uint8_t columns[BLOCK + 8];  // in the block
};

struct Lists {
  Row rows[ROWS_AT_ONCE + 1];       // the last one is empty
  int counts[ROWS_AT_ONCE + 1];
  uint8_t order[ROWS_AT_ONCE + 8];  // rows by count: loops of equal length are predicted
};

template <class E>
const uint8_t* list_group(const uint8_t* from, int row, Lists& lists) {
  const uint8_t* masks = from;
  from += MASKS_BYTES;
  for (int end = row + GROUP; row < end; ++row, masks += 8) {
    const int listed = lists.counts[row] = count(load64(masks));
    list_columns(load64(masks), lists.rows[row].columns);
    for (int i = 0; i < 32 || i < listed; i += WIDTH)  // most blocks have fewer: no misprediction
      store(lists.rows[row].weights + i, widen<E>(from + i * sizeof(E)));
    from += listed * sizeof(E);
  }
  return from;
}

// Sorts the rows by count, and makes `together` neighbours equally long with zero weights.
void order_rows(int rows, int together, Lists& lists) {
  uint8_t ends[BLOCK + 2] = {};
  for (int row = 0; row < rows; ++row) ++ends[lists.counts[row] + 1];
  for (int i = 1; i <= BLOCK; ++i) ends[i] += ends[i - 1];
  for (int row = 0; row < rows; ++row) lists.order[ends[lists.counts[row]]++] = uint8_t(row);
  for (int i = rows; i % together; ++i) lists.order[i] = ROWS_AT_ONCE;
  for (int i = 0; i < rows; i += together) {
    int longest = 0;
    for (int j = i; j < i + together; ++j)
      if (lists.counts[lists.order[j]] > longest) longest = lists.counts[lists.order[j]];
    for (int j = i; j < i + together; ++j)
      for (int k = lists.counts[lists.order[j]]; k < longest; ++k) {
        lists.rows[lists.order[j]].weights[k] = 0;
        lists.rows[lists.order[j]].columns[k] = 0;
      }
    lists.counts[lists.order[i]] = longest;
  }
}

// `x` is brought to the L1 in one go. While a row is multiplied, what comes next is fetched: lists and
// sums of the rows after it, and to the L2 a part of `next`, the inputs of the next call.
template <int PANEL, int TOGETHER>
void multiply(const Lists& lists, int rows, const float* x, const float* next, float* sums) {
  constexpr int STEP = PANEL * WIDTH, LINES = STEP / 16;  // cache lines of a column's inputs
  for (int line = 0; line < BLOCK * LINES; ++line) __builtin_prefetch(x + 16 * line);
  for (int i = 0; i < rows; i += TOGETHER) {
    const uint8_t* order = lists.order + i;
    const int length = lists.counts[order[0]];
    const Row* row[TOGETHER];
    float* kept[TOGETHER];
    Vector sum[TOGETHER][PANEL];
#pragma GCC unroll 8
    for (int r = 0; r < TOGETHER; ++r) {
      row[r] = lists.rows + order[r];
      kept[r] = sums + order[r] * STEP;
      const int after = order[r + TOGETHER];
      __builtin_prefetch(lists.rows[after].weights);
      __builtin_prefetch(lists.rows[after].weights + 16);
      __builtin_prefetch(lists.rows[after].columns);
      for (int line = 0; line < LINES; ++line) __builtin_prefetch(sums + after * STEP + 16 * line);
    }
    for (int line = i * LINES / 2; line < (i + TOGETHER) * LINES / 2; ++line)
      __builtin_prefetch(next + 16 * line, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < TOGETHER; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < PANEL; ++p) sum[r][p] = load(kept[r] + p * WIDTH);
    for (int k = 0; k < length; ++k) {
#pragma GCC unroll 8
      for (int r = 0; r < TOGETHER; ++r) {
        const Vector weight = row[r]->weights[k] - Vector{};
        const float* inputs = x + row[r]->columns[k] * STEP;
#pragma GCC unroll 8
        for (int p = 0; p < PANEL; ++p) sum[r][p] += weight * load(inputs + p * WIDTH);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < TOGETHER; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < PANEL; ++p) store(kept[r] + p * WIDTH, sum[r][p]);
  }
}

struct Variant {
  void (*multiply)(const Lists&, int rows, const float* x, const float* next, float* sums);
  int together;
};
constexpr Variant VARIANTS[] = {
    {multiply<1, 8>, 8}, {multiply<2, 4>, 4}, {multiply<3, 2>, 2}, {multiply<4, 2>, 2},
    {multiply<5, 1>, 1}, {multiply<6, 1>, 1}, {multiply<7, 1>, 1}, {multiply<8, 1>, 1}};

template <class E>
bool prefill(const Matrix& matrix, const float* x, int64_t apart, int panel, int panels,
             int64_t tokens, const Output& out, int64_t first, int64_t last) {
  const Variant variant = VARIANTS[panel - 1];
  const int64_t step = panel * WIDTH, apart_sums = (ROWS_AT_ONCE + 1) * step;
  auto* lists = allocate<Lists>(1);
  auto* sums = allocate<float>(panels * apart_sums);  // panels x rows x step
  const bool ready = lists && sums;
  for (; ready && first < last; first += ROWS_AT_ONCE / GROUP) {
    const int64_t end = last < first + ROWS_AT_ONCE / GROUP ? last : first + ROWS_AT_ONCE / GROUP;
    const int rows = int(end - first) * GROUP;
    const uint8_t* from[ROWS_AT_ONCE / GROUP];
    for (int64_t group = first; group < end; ++group)
      from[group - first] = matrix.stream + matrix.offsets[group];
    memset(sums, 0, panels * apart_sums * sizeof(float));
    lists->counts[ROWS_AT_ONCE] = 0;
    for (int64_t block = 0; block < matrix.blocks(); ++block) {
      for (int64_t group = 0; group < end - first; ++group) {
        from[group] = list_group<E>(from[group], int(group) * GROUP, *lists);
        __builtin_prefetch(from[group] + 256);
      }
      order_rows(rows, variant.together, *lists);
      for (int i = 0; i < panels; ++i) {
        const float* inputs = x + i * apart + block * BLOCK * step;
        const float* next = i + 1 < panels ? inputs + apart : inputs - i * apart + BLOCK * step;
        variant.multiply(*lists, rows, inputs, next, sums + i * apart_sums);
      }
    }
    for (int64_t token = 0; token < tokens; ++token)
      for (int row = 0; row < rows && first * GROUP + row < matrix.rows; ++row)
        store_output<E>(out, token, first * GROUP + row,
                        sums[token / step * apart_sums + row * step + token % step]);
  }
  free(lists);
  free(sums);
  return ready;
}

}  // namespace

#define KERNELS                                                            \
  {WIDTH, WIDTH == 16 ? 4 : 8, Spread<bf16>::STEP > WIDTH, {decode<bf16>, decode<float>}, {prefill<bf16>, prefill<float>}, \
   {expand_groups<bf16>, expand_groups<float>}}
