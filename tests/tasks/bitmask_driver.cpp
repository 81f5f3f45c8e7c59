// Runs every kernel of this processor over random shapes, in heap blocks of exactly the size that
// the interface asks for, against sums in double. Built with sanitizers by test_engines.py:
//
//   g++ -fsanitize=address,undefined ... bitmask_driver.cpp tasks/engines/native/*.cpp
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "matrix.h"

extern "C" {
int sparseramp_best_isa();
int64_t sparseramp_measure(const void*, int64_t, int64_t, int, int64_t*);
void sparseramp_encode(const void*, int64_t, int64_t, int, const int64_t*, uint8_t*);
void sparseramp_expand(int, int, const uint8_t*, const int64_t*, int64_t, int64_t, int, int64_t,
                       int64_t, void*);
int sparseramp_linear(int, int, int, const uint8_t*, const int64_t*, int64_t, int64_t, int,
                      const void*, int64_t, int64_t, const void*, void*);
}

static std::mt19937 draw(0);

static int64_t between(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(draw);
}

template <class E>
std::vector<E> random_values(int64_t count, double sparsity) {
  std::normal_distribution<float> normal;
  std::bernoulli_distribution zero(sparsity);
  std::vector<E> values(count);
  for (auto& value : values) value = zero(draw) ? E(0) : from_float<E>(normal(draw));
  return values;
}

template <class E>
bool one_case(int isa) {
  const int64_t rows = between(1, 300), columns = between(1, 300), tokens = between(1, 300);
  const double sparsity = between(0, 4) / 4.0;
  const auto dense = random_values<E>(rows * columns, sparsity);
  const auto x = random_values<E>(tokens * columns, 0), bias = random_values<E>(rows, 0);
  std::vector<int64_t> offsets((rows + GROUP - 1) / GROUP + 1);
  std::vector<uint8_t> stream(
      sparseramp_measure(dense.data(), rows, columns, sizeof(E), offsets.data()));
  sparseramp_encode(dense.data(), rows, columns, sizeof(E), offsets.data(), stream.data());

  std::vector<E> whole(rows * columns), out(tokens * rows);
  sparseramp_expand(isa, 2, stream.data(), offsets.data(), rows, columns, sizeof(E), 0,
                    int64_t(offsets.size()) - 1, whole.data());
  if (whole != dense) return false;
  if (sparseramp_linear(isa, int(between(0, 1)) * 300, int(between(1, 2)), stream.data(),
                        offsets.data(), rows, columns, sizeof(E), x.data(), columns, tokens,
                        bias.data(), out.data()))
    return false;
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t row = 0; row < rows; ++row) {
      double sum = to_float(bias[row]), size = std::fabs(sum);
      for (int64_t i = 0; i < columns; ++i) {
        const double term =
            double(to_float(dense[row * columns + i])) * to_float(x[token * columns + i]);
        sum += term;
        size += std::fabs(term);
      }
      const double allowed = size * (sizeof(E) == 2 ? 1.0 / 128 : 1e-5);
      if (std::fabs(sum - to_float(out[token * rows + row])) > allowed) return false;
    }
  return true;
}

int main() {
  const int best = sparseramp_best_isa();
  for (int isa = 0; isa <= best; ++isa)
    for (int i = 0; i < 20; ++i)
      if (!one_case<bf16>(isa) || !one_case<float>(isa)) {
        printf("wrong: instruction set %d, case %d\n", isa, i);
        return 1;
      }
  printf("instruction sets tried: %d\n", best + 1);
}
